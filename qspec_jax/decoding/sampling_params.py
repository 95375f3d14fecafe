"""What a user may ask of the tokens of one request, checked."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from qspec_jax.decoding.values import (
    FLOAT32_MAX,
    FLOAT32_TINY,
    INT32_MAX,
    SMALLEST,
    listed,
    real,
    refuse,
    shown,
    text,
    token_id,
    truth,
    whole,
)
from qspec_jax.errors import UsageError

MAX_STOP_TOKENS = 16
MAX_BIASES = 300
MAX_LOGPROBS = 20
NUM_SEEDS = 2**32
# With a factor for each of a million repetitions, sums of such biases and penalties stay finite in float32.
_MOST, _MOST_FACTOR = 1e28, 1e6
_Check = Callable[[str, Any], Any]


@typing.no_type_check  # it takes values of any type, and checks them itself
@dataclasses.dataclass(frozen=True)
class SamplingParams:
    """How the tokens of one request are drawn, and what ends them.

    A field takes what stands for its value: a text for one stop string, any list of token ids, token ids as text for
    biases as JSON has them, scalars of NumPy and JAX, None for the default.

    Attributes:
        temperature: divides the logits; 0 chooses greedily.
        top_k: only the ``top_k`` most likely tokens are drawn from; 0 for all.
        top_p: only the fewest tokens whose probabilities reach ``top_p`` together.
        min_p: only tokens at least ``min_p`` times as likely as the most likely one.
        repetition_penalty: divides positive logits, and multiplies negative ones, of tokens in prompt or output
            (Keskar et al., 2019); 1 for none.
        presence_penalty: subtracted from the logits of tokens that the output has.
        frequency_penalty: subtracted from them for every time that it has them.
        logit_bias: added to the logits of some tokens, before anything else; up to ``MAX_BIASES`` of them.
        seed: of the noise, 0 to 2**32 - 1.
        min_new_tokens: no stop token is chosen, and no stop string minded, before so many tokens.
        ignore_eos: the model's own stop tokens end no text, as benchmarks want it whose texts are to be of one length.
        stop_token_ids: tokens that end the text, besides those of the model; up to ``MAX_STOP_TOKENS`` together.
        stop: strings that end the text, and are not part of it.
        logprobs: report the log-probability of each token, and of as many of the most likely ones, at the verify
            precision and before all of the above; None for none of it.
        typical_acceptance: lossy. A draft is also accepted, though another token was chosen in its place, if its
            probability at the verify precision and with all of the above is more than the smaller of ``E`` and
            ``sqrt(E) * exp(-entropy)``; greedy requests take that of temperature 1. More than 0, up to 1: the smaller,
            the more is accepted. The text then depends on the drafts. None accepts nothing but what was chosen.

    Tokens tied with the last one that a limit lets through are let through as well.

    Raises:
        UsageError: a value is of another type, or out of its range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = dataclasses.field(default_factory=dict, hash=False)  # a mapping has no hash
    seed: int = 0
    min_new_tokens: int = 0
    ignore_eos: bool = False
    stop_token_ids: tuple[int, ...] = ()
    stop: tuple[str, ...] = ()
    logprobs: int | None = None
    typical_acceptance: float | None = None

    def __post_init__(self) -> None:
        for name, check in _CHECKS.items():
            value = getattr(self, name)
            if value is None and name in _DEFAULTS:
                value = _DEFAULTS[name]
            object.__setattr__(self, name, None if value is None else check(name, value))

    @classmethod
    def of(cls, values: Any) -> SamplingParams:
        """Parameters by name, as they stand in JSON; None (``null``) is the default of each.

        Raises:
            UsageError: as above, it is no mapping, or a name is unknown.
        """
        if isinstance(values, SamplingParams):
            return values
        if not isinstance(values, Mapping):
            raise refuse("sampling", values, "SamplingParams, or a mapping of some of them")
        for name in values:
            if name not in _CHECKS:
                raise UsageError(f"{shown(name)} is no sampling parameter; use some of {', '.join(_CHECKS)}")
        return cls(**values)

    def with_seed_after(self, count: int) -> SamplingParams:
        """The same with a seed that is ``count`` higher; after the last one comes the first."""
        return dataclasses.replace(self, seed=seed_after(self.seed, count))

    @property
    def greedy(self) -> bool:
        """The most likely token is always chosen."""
        return self.temperature == 0

    @property
    def truncates(self) -> bool:
        """Some tokens are never drawn."""
        return not self.greedy and (self.top_k > 0 or self.top_p < 1 or self.min_p > 0)

    @property
    def penalises(self) -> bool:
        """Logits depend on the tokens before."""
        return self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0

    @property
    def biases(self) -> bool:
        """Logits of some tokens are changed whatever the tokens before."""
        return bool(self.logit_bias) or self.min_new_tokens > 0


def sampling_of_each(sampling: Any, num_prompts: int, num_samples: int = 1) -> list[tuple[Any, int]]:
    """What is given for each sample of each prompt, and how far its seed counts up: over all that share parameters.

    Raises:
        UsageError: those of all prompts make no sense, or there are some for another number of prompts.
    """
    if sampling is None or isinstance(sampling, (SamplingParams, Mapping)):
        shared = SamplingParams.of({} if sampling is None else sampling)
        return [(shared, row) for row in range(num_prompts * num_samples)]
    given = listed("sampling", sampling, "SamplingParams or a mapping of some of them, or a list of these")
    if len(given) != num_prompts:
        raise UsageError(f"there are {len(given)} sampling parameters for {num_prompts} prompts; give one for each")
    return [(one, sample) for one in given for sample in range(num_samples)]


def check_option(name: str, value: Any, *, called: str) -> None:
    """Checks a value of a field of :class:`SamplingParams` that was given by another name.

    Raises:
        UsageError: it makes no sense; the message has that name.
    """
    _CHECKS[name](called, value)


def all_stop_tokens(sampling: SamplingParams, own: Iterable[int], vocab_size: int) -> tuple[int, ...]:
    """The tokens that end a sequence: ``own`` of the model, unless they are ignored, and those that are asked for.

    Raises:
        UsageError: there are too many, or an option has a token that is not there.
    """
    for name, tokens in (("logit_bias", sampling.logit_bias), ("stop_token_ids", sampling.stop_token_ids)):
        if outside := [token for token in tokens if token >= vocab_size]:
            raise UsageError(f"{name} has token {outside[0]}; use 0..{vocab_size - 1}")
    own = () if sampling.ignore_eos else own
    stop_tokens = tuple(dict.fromkeys([*own, *sampling.stop_token_ids]))
    if len(stop_tokens) > MAX_STOP_TOKENS:
        raise UsageError(f"there are {len(stop_tokens)} stop tokens, those of the model included; use up to 16")
    return stop_tokens


def seed_after(seed: int, count: int) -> int:
    """A seed that is ``count`` higher; after the last one comes the first."""
    return (seed + count) % NUM_SEEDS


def _number(allowed: str, least: float, most: float, **options: Any) -> _Check:
    return lambda name, value: real(name, value, allowed, least=least, most=most, **options)


def _whole(allowed: str, *, most: int = INT32_MAX, **options: Any) -> _Check:
    return lambda name, value: whole(name, value, allowed, least=0, most=most, **options)


def _biases(name: str, value: Any) -> dict[int, float]:
    if not isinstance(value, Mapping):
        raise refuse(name, value, "a mapping with numbers by token id")
    if len(value) > MAX_BIASES:
        raise refuse(name, value, f"up to {MAX_BIASES} tokens")
    biases: dict[int, float] = {}
    for token, bias in value.items():
        token = token_id(name, token)
        if token in biases:
            raise UsageError(f"{name} has token {token} twice; give it one bias")
        allowed = f"finite numbers, -{_MOST:.0e} to {_MOST:.0e}, also for token {token}"
        biases[token] = real(name, bias, allowed, least=-_MOST, most=_MOST, kind=f"a number for token {token}")
    return biases


def _truth(name: str, value: Any) -> bool:
    return truth(name, value, "true or false")


def stop_tokens_of(name: str, value: Any) -> tuple[int, ...]:
    """Tokens that end a text, each once, from what goes for a list of them.

    Raises:
        UsageError: it is none, or there are too many.
    """
    members = listed(name, value, "a list of token ids")
    tokens = tuple(dict.fromkeys(token_id(name, token, or_text=False) for token in members))
    if len(tokens) > MAX_STOP_TOKENS:
        raise refuse(name, value, f"up to {MAX_STOP_TOKENS}")
    return tokens


def _stop(name: str, value: Any) -> tuple[str, ...]:
    kind = "a text, or a list of texts"
    members = [value] if isinstance(value, str) else listed(name, value, kind)
    strings = tuple(text(name, one, kind) for one in members)
    if not all(strings):
        raise refuse(name, value, "strings of at least one character")
    return strings


# By field: from what a user has, of any type, to what the field has.
_FINITE = f"a finite number, -{_MOST:.0e} to {_MOST:.0e}"
_FACTOR = f"more than 0, {1 / _MOST_FACTOR:.0e} to {_MOST_FACTOR:.0e}; 1 penalises nothing"
_TYPICAL = "more than 0 (accepts nearly every draft), up to 1, or None (lossless)"
_CHECKS: dict[str, _Check] = {
    "temperature": _number("0 (greedy) or more, 1.2e-38 to 3.4e38", FLOAT32_TINY, FLOAT32_MAX, or_zero=True),
    "top_k": _whole("0 (all tokens) or more, up to 2**31 - 1"),
    "top_p": _number("more than 0, up to 1 (all tokens)", SMALLEST, 1.0),
    "min_p": _number("0 (all tokens) to 1", 0.0, 1.0),
    "repetition_penalty": _number(_FACTOR, 1 / _MOST_FACTOR, _MOST_FACTOR),
    "presence_penalty": _number(_FINITE, -_MOST, _MOST),
    "frequency_penalty": _number(_FINITE, -_MOST, _MOST),
    "logit_bias": _biases,
    "seed": _whole("0 to 2**32 - 1", most=NUM_SEEDS - 1),
    "min_new_tokens": _whole("0 or more, up to 2**31 - 1"),
    "ignore_eos": _truth,
    "stop_token_ids": stop_tokens_of,
    "stop": _stop,
    "logprobs": _whole(
        f"0 (the chosen token alone) to {MAX_LOGPROBS}, or None", most=MAX_LOGPROBS, kind="a whole number, or null"
    ),
    "typical_acceptance": _number(_TYPICAL, SMALLEST, 1.0, kind="a number, or null"),
}
# What None stands for; of other fields it is a value.
_DEFAULTS: dict[str, Any] = {
    field.name: {} if field.default is dataclasses.MISSING else field.default
    for field in dataclasses.fields(SamplingParams)
    if field.default is not None
}


class SamplingFeatures(NamedTuple):
    """What some sequences of a batch need of the compiled program; static.

    Attributes:
        draws: tokens may be others than the most likely ones of the model's own logits.
        truncates, penalises, biases: as in :class:`SamplingParams`.
        scores: log-probabilities are reported.
        typical: drafts are accepted by how likely they are.
    """

    draws: bool = False
    truncates: bool = False
    penalises: bool = False
    biases: bool = False
    scores: bool = False
    typical: bool = False

    @classmethod
    def of(cls, params: Iterable[SamplingParams]) -> SamplingFeatures:
        """Those that any of the parameters needs."""
        features = cls()
        for one in params:
            scores, typical = one.logprobs is not None, one.typical_acceptance is not None
            draws = not one.greedy or one.penalises or one.biases or typical
            features = features.union(cls(draws, one.truncates, one.penalises, one.biases, scores, typical))
        return features

    def cover(self, other: SamplingFeatures) -> bool:
        """Whether programs with these serve what needs the others."""
        return self.union(other) == self

    def union(self, other: SamplingFeatures) -> SamplingFeatures:
        """What either needs."""
        return SamplingFeatures(*(a or b for a, b in zip(self, other, strict=True)))
