"""What a client asks for, checked: the bodies of ``/v1/completions`` and ``/v1/chat/completions``.

Every parameter has a meaning here, asks for nothing, or is refused by name: none is passed over.
"""

from __future__ import annotations

import dataclasses
import enum
import secrets
from collections.abc import Mapping, Sequence
from typing import Any

from qspec_jax.decoding import request_options
from qspec_jax.decoding.sampling_params import NUM_SEEDS, SamplingParams
from qspec_jax.decoding.values import refuse, shown, truth, whole
from qspec_jax.engine.intake import Intake
from qspec_jax.engine.prompts import Prompt, prompts_of
from qspec_jax.engine.requests import Request
from qspec_jax.errors import TooLongError, UsageError
from qspec_jax.files import json_lines
from qspec_jax.serving.limits import MAX_CHOICES, MAX_STOP_LENGTH, MAX_STOPS, Limits
from qspec_jax.serving.refusals import ApiError, refusal_of

_TEXT_TOKENS = 16  # that are made for a text where the client does not say, as in OpenAI's API


class Kind(enum.Enum):
    """Which of the two is asked for; the value is the parameter of the prompt."""

    TEXT = "prompt"
    CHAT = "messages"


_PATHS = {Kind.TEXT.value: "/v1/completions", Kind.CHAT.value: "/v1/chat/completions"}
_MEANT = ("model", "stream", "stream_options", "n")
_COUNTS = ("best_of", "num_return_sequences")  # of answers, as n is
# No token depends on these.
_WITHOUT_EFFECT = ("user", "metadata", "safety_identifier", "prompt_cache_key", "parallel_tool_calls")
# Values that ask for nothing, of parameters that the engine does not know.
_REFUSED: dict[str, tuple[Any, ...]] = {
    "store": (False,),
    "service_tier": ("auto", "default"),
    "modalities": (["text"],),
    "verbosity": ("medium",),
    **dict.fromkeys(("audio", "prediction", "reasoning_effort", "web_search_options", "moderation"), ()),
}
_KNOWN = {*_MEANT, *_WITHOUT_EFFECT, *_REFUSED, *request_options.NAMES} - {"chat"}
# Of these, what does something, and of names of one thing those of OpenAI's API and ours.
_OFFERED = {*_MEANT, *request_options.REQUEST_OPTIONS, "max_tokens", "max_completion_tokens", "top_logprobs"} - {"chat"}


@dataclasses.dataclass(frozen=True)
class Asked:
    """A request.

    Attributes:
        kind: of the answer.
        prompts: of each, there are ``num_choices`` answers, one after the other.
        sampling: of the first of these; the seeds of the others count up.
        max_new_tokens: None for as many as there is room for.
        limit_name: what the request calls that.
        stream: answer piece by piece.
        include_usage: and say at the end how many tokens there were.
    """

    kind: Kind
    prompts: Sequence[Prompt]
    num_choices: int
    sampling: SamplingParams
    max_new_tokens: int | None
    limit_name: str
    stream: bool
    include_usage: bool

    @property
    def num_answers(self) -> int:
        """All answers."""
        return len(self.prompts) * self.num_choices


def read_body(body: bytes, kind: Kind, *, model: str) -> Asked:
    """The request that a body asks for.

    Args:
        body: as it came.
        kind: of the request.
        model: the name of the one that is there.

    Raises:
        ApiError: it makes no sense, or asks for what is not done.
    """
    given: dict[str, Any] = {}
    try:
        given = {name: value for name, value in _object(body).items() if value is not None}
        _check_names(given, kind)
        return _asked(given, kind, model)
    except UsageError as error:
        raise refusal_of(error, given) from error


def _object(body: bytes) -> dict[str, Any]:
    try:
        value = json_lines.parse_object(body.decode())
    except UnicodeDecodeError as error:
        raise UsageError(f"the body is not UTF-8: byte {error.start} is wrong") from error
    except UsageError as error:
        raise UsageError(f"the body {error}") from error
    if (flaw := json_lines.flaw(value)) is not None:
        raise UsageError(f"the body {flaw}")
    return value


def _check_names(given: Mapping[str, Any], kind: Kind) -> None:
    for name, value in given.items():
        if name in _REFUSED and value not in _REFUSED[name]:
            raise ApiError(400, str(refuse(name, value, "nothing, as this is not done here")), param=name)
    unknown = [name for name in given if name not in _KNOWN and name != kind.value]
    # The engine has a better word for some of them.
    request_options.request_options({name: given[name] for name in unknown if name != "chat"})
    if unknown:
        message = f"{shown(unknown[0])} is no parameter of this; use some of {', '.join(sorted(_OFFERED))}"
        if unknown[0] in _PATHS:
            message = f"{unknown[0]!r} is a parameter of {_PATHS[unknown[0]]}; ask there, or give {kind.value!r} alone"
        raise ApiError(400, message, param=unknown[0], code="unknown_parameter")
    if kind.value not in given:
        raise ApiError(400, f"there are no {kind.value}; give some" if kind is Kind.CHAT else "there is no prompt; "
                       "give a text, token ids, or a list of either", param=kind.value)  # fmt: skip


def _asked(given: dict[str, Any], kind: Kind, model: str) -> Asked:
    if given.get("model", model) != model:
        message = f"there is no model {shown(given['model'])}; this server has {model!r} alone"
        raise ApiError(404, message, param="model", code="model_not_found")
    stream = truth("stream", given.get("stream", False), "true or false")
    include_usage = _include_usage(given.get("stream_options"), stream)
    num_choices = whole("n", given.get("n", 1), f"1 to {MAX_CHOICES}", least=1, most=MAX_CHOICES)
    for name in _COUNTS:
        if given.get(name, 1) not in (1, num_choices):
            raise refuse(name, given[name], "n, of which all answers are returned")
    engines = {name: given[name] for name in given if name in request_options.NAMES and name not in ("n", *_COUNTS)}
    options = request_options.request_options(engines)
    max_new_tokens = options.pop("max_new_tokens", _TEXT_TOKENS if kind is Kind.TEXT else None)
    limit_name = next((name for name in engines if request_options.our_name(name) == "max_new_tokens"), "max_tokens")
    drawn = {"temperature": 1.0, "seed": secrets.randbelow(NUM_SEEDS)}
    sampling = SamplingParams.of({**drawn, **options})
    _check_stops(sampling.stop)
    prompts = _texts(given["prompt"]) if kind is Kind.TEXT else [_conversation(given["messages"])]
    if len(prompts) * num_choices > MAX_CHOICES:
        raise UsageError(f"prompt={len(prompts)} of them with n={num_choices}: use up to {MAX_CHOICES} answers")
    return Asked(kind, prompts, num_choices, sampling, max_new_tokens, limit_name, stream, include_usage)


def _include_usage(options: Any, stream: bool) -> bool:
    if options is None:
        return False
    if not stream:
        raise refuse("stream_options", options, 'it with "stream": true')
    if not isinstance(options, Mapping):
        raise refuse("stream_options", options, 'an object, such as {"include_usage": true}')
    for name, value in options.items():
        if name not in ("include_usage", "include_obfuscation"):
            raise UsageError(f"stream_options has {shown(name)}; use include_usage")
        if name == "include_obfuscation" and value:
            raise refuse(f"stream_options.{name}", value, "false, as this is not done here")
    value = options.get("include_usage")
    return value is not None and truth("stream_options.include_usage", value, "true or false")


def _check_stops(strings: Sequence[str]) -> None:
    if len(strings) > MAX_STOPS:
        raise UsageError(f"stop has {len(strings)} strings; use up to {MAX_STOPS}")
    if longest := [string for string in strings if len(string) > MAX_STOP_LENGTH]:
        raise UsageError(f"stop has a string of {len(longest[0])} characters; use up to {MAX_STOP_LENGTH}")


def _texts(given: Any) -> list[Prompt]:
    if not isinstance(given, str | list):
        raise refuse("prompt", given, "a text, token ids, or a list of either")
    prompts = prompts_of(given)
    if any(isinstance(one, Mapping) for prompt in prompts if isinstance(prompt, list) for one in prompt):
        raise refuse("prompt", given, "texts or token ids, or /v1/chat/completions for messages")
    return prompts


def _conversation(given: Any) -> Prompt:
    if not isinstance(given, list) or not given or not all(isinstance(one, Mapping) for one in given):
        raise refuse("messages", given, 'a list such as [{"role": "user", "content": "Hello!"}]')
    return [_without_nothing(message) for message in given]


def _without_nothing(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message without the empty lists that clients send back from an answer."""
    return {name: value for name, value in message.items() if value != [] or name == "content"}


def requests_of(asked: Asked, intake: Intake, *, limits: Limits, max_seq_len: int) -> list[Request]:
    """What the engine is to do, tokenised.

    Raises:
        ApiError: a prompt cannot be served.
    """
    requests = []
    for place, prompt in enumerate(asked.prompts, 1):
        what = "the prompt" if len(asked.prompts) == 1 else f"prompt {place}"
        try:
            request = _request(asked, prompt, intake, limits, max_seq_len, what)
        except UsageError as error:
            names = ("logit_bias", "stop_token_ids", asked.limit_name)
            if isinstance(error, TooLongError) and (error.num_tokens or max_seq_len) >= max_seq_len:
                names = ()
            raise refusal_of(error, names, otherwise=asked.kind.value) from error
        seeds = range(asked.num_choices)
        requests += [
            dataclasses.replace(request, sampling=request.sampling.with_seed_after(count)) if count else request
            for count in seeds
        ]
    return requests


def _request(asked: Asked, prompt: Prompt, intake: Intake, limits: Limits, max_seq_len: int, what: str) -> Request:
    wanted, most = asked.max_new_tokens, limits.max_new_tokens
    if most is not None and wanted is not None and wanted > most:
        raise UsageError(f"{asked.limit_name}={wanted} must be at most {most} on this server")
    options: dict[str, Any] = {"sampling": asked.sampling, "max_seq_len": max_seq_len, "chat": False}
    try:
        request = intake.request(prompt, max_new_tokens=wanted or 1, what=what, **options)
    except TooLongError as error:  # in words of who cannot change the size of a row
        num_tokens, more = error.num_tokens, "an answer" if wanted is None else f"{asked.limit_name}={wanted}"
        remedy = "shorten it" if wanted is None else f"shorten it, or lower {asked.limit_name}"
        message = f"{what} of {num_tokens} tokens and {more} do not fit the {max_seq_len} of this server; {remedy}"
        raise TooLongError(message, num_tokens=num_tokens) from error
    num_tokens = len(request.token_ids)
    if limits.max_prompt_tokens is not None and num_tokens > limits.max_prompt_tokens:
        raise TooLongError(f"{what} has {num_tokens} tokens; this server takes {limits.max_prompt_tokens}")
    if wanted is not None:
        return request
    room = max_seq_len - num_tokens
    return dataclasses.replace(request, max_new_tokens=room if most is None else min(room, most))
