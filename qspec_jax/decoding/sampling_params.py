"""What a user may ask of the tokens of one request, checked."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from qspec_jax.errors import UsageError

MAX_STOP_TOKENS = 16
MAX_BIASES = 300
MAX_LOGPROBS = 20


@dataclasses.dataclass(frozen=True)
class SamplingParams:
    """How the tokens of one request are drawn, and what ends them.

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
        UsageError: a value is out of its range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = dataclasses.field(default_factory=dict)
    seed: int = 0
    min_new_tokens: int = 0
    stop_token_ids: tuple[int, ...] = ()
    stop: tuple[str, ...] = ()
    logprobs: int | None = None
    typical_acceptance: float | None = None

    def __post_init__(self) -> None:
        self._check("temperature", self.temperature >= 0, "0 (greedy) or more")
        self._check("top_k", self.top_k >= 0, "0 (all tokens) or more")
        self._check("top_p", 0 < self.top_p <= 1, "more than 0, up to 1 (all tokens)")
        self._check("min_p", 0 <= self.min_p <= 1, "0 (all tokens) to 1")
        self._check("repetition_penalty", self.repetition_penalty > 0, "more than 0; 1 penalises nothing")
        self._check("seed", 0 <= self.seed < 2**32, "0 to 2**32 - 1")
        for name in ("temperature", "repetition_penalty", "presence_penalty", "frequency_penalty"):
            self._check(name, math.isfinite(getattr(self, name)), "a finite number")
        self._check("logit_bias", all(map(math.isfinite, self.logit_bias.values())), "finite numbers")
        self._check("logit_bias", len(self.logit_bias) <= MAX_BIASES, f"up to {MAX_BIASES} tokens")
        self._check("min_new_tokens", self.min_new_tokens >= 0, "0 or more")
        self._check("stop_token_ids", len(self.stop_token_ids) <= MAX_STOP_TOKENS, f"up to {MAX_STOP_TOKENS}")
        self._check("stop", all(self.stop), "strings of at least one character")
        fits = self.logprobs is None or 0 <= self.logprobs <= MAX_LOGPROBS
        self._check("logprobs", fits, f"0 (the chosen token alone) to {MAX_LOGPROBS}, or None")
        fits = self.typical_acceptance is None or 0 < self.typical_acceptance <= 1
        self._check("typical_acceptance", fits, "more than 0 (accepts nearly every draft), up to 1, or None (lossless)")

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> SamplingParams:
        """Parameters by name, of any types, as they stand in JSON.

        Raises:
            UsageError: as above, or a name is unknown, or a type is another one.
        """
        fields = {field.name: str(field.type) for field in dataclasses.fields(cls)}
        checked = {}
        for name, value in values.items():
            if name not in fields:
                raise UsageError(f"{name!r} is no sampling parameter; use some of {', '.join(fields)}")
            convert, allowed = _CONVERSIONS[fields[name]]
            try:
                checked[name] = convert(value)
            except (TypeError, ValueError, AttributeError) as error:
                raise UsageError(f"{name}={value!r}: use {allowed}") from error
        return cls(**checked)

    def _check(self, name: str, fits: bool, allowed: str) -> None:
        if not fits:
            raise UsageError(f"{name}={getattr(self, name)}: use {allowed}")

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


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError
    return float(value)


def _whole(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError
    return value


def _strings(value: Any) -> tuple[str, ...]:
    given = [value] if isinstance(value, str) else list(value)
    if not all(isinstance(one, str) for one in given):
        raise TypeError
    return tuple(given)


# By the annotation of a field: from what JSON has to what the field has, and what is allowed, in words.
_CONVERSIONS: dict[str, tuple[Any, str]] = {
    "float": (_number, "a number"),
    "int": (_whole, "a whole number"),
    "float | None": (lambda value: None if value is None else _number(value), "a number, or null"),
    "int | None": (lambda value: None if value is None else _whole(value), "a whole number, or null"),
    "tuple[int, ...]": (lambda value: tuple(map(_whole, value)), "a list of token ids"),
    "tuple[str, ...]": (_strings, "a text, or a list of texts"),
    "Mapping[int, float]": (
        lambda value: {int(token): _number(bias) for token, bias in value.items()},
        "an object with numbers by token id",
    ),
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

    def union(self, other: SamplingFeatures) -> SamplingFeatures:
        """What either needs."""
        return SamplingFeatures(*(a or b for a, b in zip(self, other, strict=True)))
