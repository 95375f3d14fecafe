"""Sampling on the device, drawn so that speculation does not change a single token.

A token is drawn by the Gumbel-max trick: the largest of ``log p + g``, with standard Gumbel noise ``g`` that depends
on the request's seed and on the place of the token among the request's new tokens, and on nothing else. Draft and
verification share that noise. A draft is accepted if it is the token that the verification draws, and what comes out
is always the verification's own draw: the text is that of plain sampling at the verify precision with the same seed,
token for token, whatever drafted it and whatever ran beside it. Greedy decoding is the case without noise.

This is the coupling of Daliri, Musco and Suresh, "Coupling without communication and drafter-invariant speculative
decoding" (2024). Its acceptance is at least ``(1 - d) / (1 + d)`` at a total variation distance ``d`` between draft
and verify distribution; the rejection rule of Leviathan et al. (2023) reaches ``1 - d``, but keeps the distribution
alone: its text depends on the drafts.

The order of the options is that of Hugging Face: penalties, temperature, top-k, top-p, min-p.
"""

from __future__ import annotations

import dataclasses
import math
import typing
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float32, Int32, UInt32

from qspec_jax.errors import UsageError


@dataclasses.dataclass(frozen=True)
class SamplingParams:
    """How the tokens of one request are drawn.

    Attributes:
        temperature: divides the logits; 0 chooses greedily.
        top_k: only the ``top_k`` most likely tokens are drawn from; 0 for all.
        top_p: only the fewest tokens whose probabilities reach ``top_p`` together.
        min_p: only tokens at least ``min_p`` times as likely as the most likely one.
        repetition_penalty: divides positive logits, and multiplies negative ones, of tokens in prompt or output
            (Keskar et al., 2019); 1 for none.
        presence_penalty: subtracted from the logits of tokens that the output has.
        frequency_penalty: subtracted from them for every time that it has them.
        seed: of the noise, 0 to 2**32 - 1.
        stop_token_ids: tokens that end the text, besides those of the model.

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
    seed: int = 0
    stop_token_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        self._check("temperature", self.temperature >= 0, "0 (greedy) or more")
        self._check("top_k", self.top_k >= 0, "0 (all tokens) or more")
        self._check("top_p", 0 < self.top_p <= 1, "more than 0, up to 1 (all tokens)")
        self._check("min_p", 0 <= self.min_p <= 1, "0 (all tokens) to 1")
        self._check("repetition_penalty", self.repetition_penalty > 0, "more than 0; 1 penalises nothing")
        self._check("seed", 0 <= self.seed < 2**32, "0 to 2**32 - 1")
        for name in ("temperature", "repetition_penalty", "presence_penalty", "frequency_penalty"):
            self._check(name, math.isfinite(getattr(self, name)), "a finite number")

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
            checked[name] = _converted(name, value, fields[name])
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


def _converted(name: str, value: Any, kind: str) -> Any:
    """A value as the field of a kind (the text of its annotation) takes it."""
    numbers = {"int": (int, "a whole number"), "float": ((int, float), "a number")}
    if kind in numbers:
        types, allowed = numbers[kind]
        if isinstance(value, bool) or not isinstance(value, types):
            raise UsageError(f"{name}={value!r}: use {allowed}")
        return float(value) if kind == "float" else value
    if not isinstance(value, (list, tuple)) or not all(isinstance(token, int) for token in value):
        raise UsageError(f"{name}={value!r}: use a list of token ids")
    return tuple(value)


class SamplingFeatures(NamedTuple):
    """What some sequences of a batch need of the compiled program; static.

    Attributes:
        draws: tokens other than the most likely ones of the model's own logits.
        truncates, penalises: as in :class:`SamplingParams`.
    """

    draws: bool = False
    truncates: bool = False
    penalises: bool = False

    @classmethod
    def of(cls, params: Iterable[SamplingParams]) -> SamplingFeatures:
        """Those that any of the parameters needs."""
        needed = [(not one.greedy or one.penalises, one.truncates, one.penalises) for one in params]
        return cls(*(any(column) for column in zip(*needed, strict=True))) if needed else cls()

    def union(self, other: SamplingFeatures) -> SamplingFeatures:
        """What either needs."""
        return SamplingFeatures(*(a or b for a, b in zip(self, other, strict=True)))


@typing.no_type_check  # as a pytree it also holds shapes and other stand-ins for arrays
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sampler:
    """The sampling parameters of a batch as arrays, and what penalties need to know of the tokens before.

    Attributes:
        temperature, top_p, min_p, repetition_penalty, presence_penalty, frequency_penalty: ``[B]`` float32.
        top_k: ``[B]`` int32.
        seed: ``[B]`` uint32.
        in_prompt: ``[B, V]`` bool, the prompt has the token; None where nothing penalises.
        counts: ``[B, V]`` int32, how often the output has it; None likewise.
        truncates, penalises: some sequence does; static.
    """

    temperature: Float32[Array, " B"]
    top_k: Int32[Array, " B"]
    top_p: Float32[Array, " B"]
    min_p: Float32[Array, " B"]
    repetition_penalty: Float32[Array, " B"]
    presence_penalty: Float32[Array, " B"]
    frequency_penalty: Float32[Array, " B"]
    seed: UInt32[Array, " B"]
    truncates: bool = dataclasses.field(metadata={"static": True})
    penalises: bool = dataclasses.field(metadata={"static": True})
    in_prompt: Bool[Array, "B V"] | None = None
    counts: Int32[Array, "B V"] | None = None

    @classmethod
    def create(cls, params: Sequence[SamplingParams], features: SamplingFeatures | None = None) -> Sampler | None:
        """The sampler of a batch, in NumPy arrays.

        ``features`` are those of the program that runs it, by default what ``params`` need. None if that is nothing:
        all choose greedily among untouched logits.
        """
        features = features or SamplingFeatures.of(params)
        if not features.draws:
            return None

        def column(name: str, dtype: type) -> Any:
            return np.asarray([getattr(one, name) for one in params], dtype)

        floats = ("temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")
        return cls(
            **{name: column(name, np.float32) for name in floats},
            top_k=column("top_k", np.int32),
            seed=column("seed", np.uint32),
            truncates=features.truncates,
            penalises=features.penalises,
        )

    @classmethod
    def idle(
        cls, rows: int, vocab_size: int, features: SamplingFeatures, earlier: Sampler | None = None
    ) -> Sampler | None:
        """The sampler of idle rows, or of those that ran with fewer features so far, which changes none of them."""
        made = cls.create([SamplingParams()] * rows, features)
        if made is None:
            return None
        if features.penalises:
            shape = (rows, vocab_size)
            made = dataclasses.replace(made, in_prompt=np.zeros(shape, bool), counts=np.zeros(shape, np.int32))
        if earlier is None:
            return made
        arrays = [f.name for f in dataclasses.fields(cls) if not f.metadata.get("static")]
        known = {name: getattr(earlier, name) for name in arrays if getattr(earlier, name) is not None}
        return dataclasses.replace(made, **known)

    def for_prompts(
        self,
        tokens: Int32[Array, "B T"],
        num_tokens: Int32[Array, " B"],
        vocab_size: int,
        start: Int32[Array, " B"] | None = None,
        earlier: Sampler | None = None,
    ) -> Sampler:
        """The sampler before the first new token.

        Args:
            tokens: of the prompts, or of pieces of them, padded on the right.
            num_tokens: valid ones of each.
            vocab_size: of the model.
            start: tokens of the prompts before these pieces.
            earlier: the sampler after those.
        """
        if not self.penalises:
            return self
        batch, width = tokens.shape
        exists = jnp.arange(width) < num_tokens[:, None]
        in_prompt = jnp.zeros((batch, vocab_size), bool)
        if start is not None and earlier is not None and earlier.in_prompt is not None:
            in_prompt = (start > 0)[:, None] & earlier.in_prompt
        in_prompt = in_prompt.at[jnp.arange(batch)[:, None], tokens].max(exists)
        return dataclasses.replace(self, in_prompt=in_prompt, counts=jnp.zeros((batch, vocab_size), jnp.int32))

    def after(self, tokens: Int32[Array, "B T"], kept: Bool[Array, "B T"]) -> Sampler:
        """The sampler after those of ``tokens`` that are kept."""
        if self.counts is None:
            return self
        rows = jnp.arange(tokens.shape[0])[:, None]
        return dataclasses.replace(self, counts=self.counts.at[rows, tokens].add(kept.astype(jnp.int32)))


def choose(
    logits: Float32[Array, "B T V"],
    sampler: Sampler | None = None,
    *,
    first: Int32[Array, " B"] | None = None,
    drafts: Int32[Array, "B T_minus_1"] | None = None,
) -> Int32[Array, "B T"]:
    """The next token after each of ``T`` tokens; the lowest of equally good ones.

    Args:
        logits: of the next tokens.
        sampler: None chooses the most likely tokens.
        first: place among the new tokens of the first token chosen; needed with a sampler.
        drafts: the tokens between those that are chosen: the second is chosen as if the first draft had been.
    """
    if sampler is None:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    assert first is not None
    if sampler.penalises:
        logits = _penalised(logits, sampler, drafts)
    warm = (sampler.temperature > 0)[:, None, None]
    logits = logits / jnp.where(warm, sampler.temperature[:, None, None], 1)
    if sampler.truncates:
        logits = jnp.where(warm & ~_let_through(logits, sampler), -jnp.inf, logits)
    places = first[:, None] + jnp.arange(logits.shape[1], dtype=jnp.int32)
    noise = gumbel_noise(sampler.seed, places, logits.shape[-1])
    return jnp.argmax(logits + jnp.where(warm, noise, 0), axis=-1).astype(jnp.int32)


def gumbel_noise(seed: UInt32[Array, " B"], places: Int32[Array, "B T"], vocab_size: int) -> Float32[Array, "B T V"]:
    """Standard Gumbel noise of each token of the vocabulary, by seed and place alone."""

    def one(seed: Array, place: Array) -> Array:
        key = jax.random.fold_in(jax.random.key(seed), place)
        return jax.random.gumbel(key, (vocab_size,), jnp.float32)

    return jax.vmap(jax.vmap(one, in_axes=(None, 0)))(seed, places)


def _penalised(
    logits: Float32[Array, "B T V"], sampler: Sampler, drafts: Int32[Array, "B T_minus_1"] | None
) -> Float32[Array, "B T V"]:
    assert sampler.counts is not None
    assert sampler.in_prompt is not None
    counts = sampler.counts[:, None, :]
    if drafts is not None and drafts.shape[1]:
        drafted = jax.nn.one_hot(drafts, logits.shape[-1], dtype=jnp.int32)
        counts = counts + jnp.pad(jnp.cumsum(drafted, axis=1), ((0, 0), (1, 0), (0, 0)))
    repetition, presence, frequency = (
        getattr(sampler, name)[:, None, None]
        for name in ("repetition_penalty", "presence_penalty", "frequency_penalty")
    )
    in_output = counts > 0
    weakened = jnp.where(logits > 0, logits / repetition, logits * repetition)
    logits = jnp.where(in_output | sampler.in_prompt[:, None, :], weakened, logits)
    return logits - presence * in_output.astype(jnp.float32) - frequency * counts.astype(jnp.float32)


def _let_through(logits: Float32[Array, "B T V"], sampler: Sampler) -> Bool[Array, "B T V"]:
    """Which tokens top-k, top-p and min-p leave, one after the other; the most likely one always."""
    vocab_size = logits.shape[-1]
    ordered = jnp.sort(logits, axis=-1, descending=True)
    rank = jnp.arange(vocab_size, dtype=jnp.int32)
    top_k, top_p, min_p = (getattr(sampler, name)[:, None, None] for name in ("top_k", "top_p", "min_p"))
    kept = (top_k == 0) | (rank < top_k)
    probabilities = jax.nn.softmax(jnp.where(kept, ordered, -jnp.inf), axis=-1)
    # Rounded, the sum may reach 1 before the last token: a request without a limit must not feel its neighbours' ones.
    kept &= (jnp.cumsum(probabilities, axis=-1) - probabilities < top_p) | (top_p == 1)
    kept &= probabilities >= min_p * probabilities[..., :1]
    last = jnp.maximum(kept.astype(jnp.int32).sum(axis=-1, keepdims=True), 1) - 1
    return logits >= jnp.take_along_axis(ordered, last, axis=-1)
