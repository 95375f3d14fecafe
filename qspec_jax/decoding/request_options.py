"""The options of one request as they stand in JSON, under the names of this library or those of others.

A name that means the same is taken for it. One that means something which is not done here is refused, unless its value
asks for nothing. ``null`` is an option that was not given. Imports no JAX.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from qspec_jax.decoding.sampling_params import SamplingParams, check_option
from qspec_jax.decoding.values import at_least_1, refuse, shown, truth
from qspec_jax.errors import UsageError

SAMPLING_OPTIONS = tuple(field.name for field in dataclasses.fields(SamplingParams))
REQUEST_OPTIONS = ("max_new_tokens", "chat", *SAMPLING_OPTIONS)

# Of OpenAI, vLLM, llama.cpp, Ollama, Hugging Face's TGI and Anthropic: names of the same thing.
_OTHER_NAMES = {
    "max_tokens": "max_new_tokens",
    "max_completion_tokens": "max_new_tokens",
    "max_output_tokens": "max_new_tokens",
    "max_gen_toks": "max_new_tokens",
    "n_predict": "max_new_tokens",
    "num_predict": "max_new_tokens",
    "min_tokens": "min_new_tokens",
    "repeat_penalty": "repetition_penalty",
    "stop_sequences": "stop",
    "stop_strings": "stop",
}
_SAMPLES = "a line of its own for each sample, or num_samples (--num-samples) of the run"
_MESSAGES = "the text that a chat template makes of it"
_NOT_DONE = "nothing, as this is not done here"
# Names of what is not done: values that ask for nothing, and what to do instead.
_REFUSED: dict[str, tuple[tuple[Any, ...], str]] = {
    **dict.fromkeys(("n", "best_of", "num_return_sequences"), ((1,), _SAMPLES)),
    **dict.fromkeys(("num_beams", "length_penalty", "typical_p", "tfs_z"), ((1,), _NOT_DONE)),
    **dict.fromkeys(("no_repeat_ngram_size", "mirostat", "epsilon_cutoff", "eta_cutoff", "top_a"), ((0,), _NOT_DONE)),
    **dict.fromkeys(("echo", "include_stop_str_in_output", "use_beam_search"), ((False,), _NOT_DONE)),
    "skip_special_tokens": ((True,), _NOT_DONE),
    **dict.fromkeys(("tools", "functions"), (([],), _MESSAGES)),
    **dict.fromkeys(("tool_choice", "function_call"), (("none", "auto"), _MESSAGES)),
    "response_format": (({"type": "text"},), _NOT_DONE),
    **dict.fromkeys(("guided_json", "guided_regex", "guided_choice", "guided_grammar", "grammar"), ((), _NOT_DONE)),
    **dict.fromkeys(("json_schema", "structured_outputs", "logits_processors", "prompt_logprobs"), ((), _NOT_DONE)),
    **dict.fromkeys(("bad_words", "bad_words_ids", "allowed_token_ids"), (([],), "logit_bias")),
    "suffix": (("",), "a prompt that ends where the text is to go on"),
    "max_length": ((), "max_new_tokens, which does not count the prompt"),
    "eos_token_id": ((), "stop_token_ids"),
}
NAMES = (*REQUEST_OPTIONS, *_OTHER_NAMES, *_REFUSED, "do_sample", "top_logprobs")
"""All that have a meaning, if only that they are refused."""
_KNOWN = {name.replace("_", ""): name for name in NAMES}


def our_name(name: str) -> str:
    """What an option is called here; a name that means nothing else is its own."""
    return _OTHER_NAMES.get(name, name)


def check_max_new_tokens(value: Any) -> int:
    """A limit of new tokens.

    Raises:
        UsageError: it is no whole number, or below 1.
    """
    return at_least_1("max_new_tokens", value)


def check_chat(value: Any) -> bool | None:
    """Whether there is a chat template around a text; None if the model decides.

    Raises:
        UsageError: it is no truth value.
    """
    return None if value is None else truth("chat", value, "true, false or null")


def request_options(given: Mapping[Any, Any]) -> dict[str, Any]:
    """The options of a request, checked: each of :data:`REQUEST_OPTIONS` that is given and not null.

    Args:
        given: of any names and values. Those that are no options, such as ``prompt``, have no meaning here.

    Raises:
        UsageError: a value makes no sense, an option has two values, or one asks for what is not done.
    """
    named = {name: value for name, value in given.items() if isinstance(name, str) and value is not None}
    for name in named:
        _check_name(name)
    for name, (nothing, instead) in _REFUSED.items():
        if name in named and not any(_is(named[name], one) for one in nothing):
            raise refuse(name, named[name], instead)
    options, called = _under_our_names(named)
    _check_do_sample(named, options)
    checked: dict[str, Any] = {}
    if "max_new_tokens" in options:
        limit = options.pop("max_new_tokens")
        checked["max_new_tokens"] = at_least_1(called.pop("max_new_tokens", "max_new_tokens"), limit)
    if "chat" in options:
        checked["chat"] = check_chat(options.pop("chat"))
    for name, given_name in called.items():  # whose error has that name
        if name in options:
            check_option(name, options[name], called=given_name)
    sampling = SamplingParams.of(options)
    return checked | {name: getattr(sampling, name) for name in options}


def _check_name(name: str) -> None:
    """Refuses another spelling of an option, such as ``topP``: it would have no meaning, and nobody would notice."""
    known = _KNOWN.get(name.replace("_", "").replace("-", "").lower(), name)
    if known != name:
        raise UsageError(f"{shown(name)} has no meaning; is it {known!r}?")


def _under_our_names(named: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """Options by our names, and the names by which those of them were given that have another."""
    options, called = {name: named[name] for name in REQUEST_OPTIONS if name in named}, {}
    for other, name in _OTHER_NAMES.items():
        if other in named:
            if name in options and not _is(options[name], named[other]):
                first = called.get(name, name)
                both = f"{other}={shown(named[other])} and {first}={shown(options[name])}"
                raise UsageError(f"{both} are two values of one option; give one")
            if name not in options:
                called[name] = other
            options[name] = named[other]
    # In OpenAI's chats `logprobs` is a truth value, and `top_logprobs` the number.
    top, wanted = named.get("top_logprobs"), options.get("logprobs")
    if isinstance(wanted, bool):
        del options["logprobs"]
        if wanted:
            options["logprobs"] = 0 if top is None else top
            called |= {} if top is None else {"logprobs": "top_logprobs"}
        elif top is not None and not _is(top, 0):
            raise refuse("top_logprobs", top, 'it with "logprobs": true')
    elif top is not None and not _is(top, wanted):
        raise refuse("top_logprobs", top, 'it with "logprobs": true, or "logprobs": N alone')
    return options, called


def _check_do_sample(named: Mapping[str, Any], options: Mapping[str, Any]) -> None:
    """In transformers ``do_sample`` says whether there is a temperature, here the temperature itself does."""
    if "do_sample" in named:
        sampled = truth("do_sample", named["do_sample"], "true or false, or the temperature alone")
        if sampled == _is(options.get("temperature", 0), 0):
            raise refuse("do_sample", sampled, "temperature, which is 0 for the most likely tokens, and more to draw")


def _is(value: Any, other: Any) -> bool:
    """Equal, and no number where the other is a truth value."""
    try:
        return isinstance(value, bool) == isinstance(other, bool) and bool(value == other)
    except Exception:  # arrays, or whatever an object raises
        return False
