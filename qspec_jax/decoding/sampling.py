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

Requests may ask for *typical acceptance* instead, which is lossy (Medusa, Cai et al., 2024, section 2.3.1): a draft
that is likely enough at the verify precision is chosen as if it had been drawn. Other requests beside them feel none of
it.

The order of the options is that of Hugging Face: biases, penalties, temperature, top-k, top-p, min-p.
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float32, Int32, UInt32

from qspec_jax.decoding.sampling_params import MAX_BIASES, MAX_STOP_TOKENS, SamplingFeatures, SamplingParams
from qspec_jax.model.collectives import all_logits, most_likely

NO_TOKEN = -1


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
        bias_tokens, biases: ``[B, MAX_BIASES]`` int32 and float32, filled up with ``NO_TOKEN``; None where nothing
            biases.
        min_new_tokens: ``[B]`` int32; None likewise.
        stop_tokens: ``[B, MAX_STOP_TOKENS]`` int32, not chosen before ``min_new_tokens``; None likewise.
        typical_acceptance: ``[B]`` float32, infinite for sequences without; None where none has it.
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
    bias_tokens: Int32[Array, "B biases"] | None = None
    biases: Float32[Array, "B biases"] | None = None
    min_new_tokens: Int32[Array, " B"] | None = None
    stop_tokens: Int32[Array, "B stops"] | None = None
    typical_acceptance: Float32[Array, " B"] | None = None

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
            **(_bias_arrays(params) if features.biases else {}),
            typical_acceptance=_typical_array(params) if features.typical else None,
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
            unseen: Any = np.zeros((rows, vocab_size), bool)
            made = dataclasses.replace(made, in_prompt=unseen, counts=unseen.astype(np.int32))
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
    ) -> Sampler:
        """The sampler before the first new token.

        Args:
            tokens: of the prompts, padded on the right.
            num_tokens: valid ones of each.
            vocab_size: of the model.
        """
        if not self.penalises:
            return self
        batch, width = tokens.shape
        exists = jnp.arange(width, dtype=jnp.int32) < num_tokens[:, None]
        in_prompt = jnp.zeros((batch, vocab_size), bool)
        in_prompt = in_prompt.at[jnp.arange(batch, dtype=jnp.int32)[:, None], tokens].max(exists)
        return dataclasses.replace(self, in_prompt=in_prompt, counts=jnp.zeros((batch, vocab_size), jnp.int32))

    def after(self, tokens: Int32[Array, "B T"], kept: Bool[Array, "B T"]) -> Sampler:
        """The sampler after those of ``tokens`` that are kept."""
        if self.counts is None:
            return self
        rows = jnp.arange(tokens.shape[0], dtype=jnp.int32)[:, None]
        return dataclasses.replace(self, counts=self.counts.at[rows, tokens].add(kept.astype(jnp.int32)))


def choose(
    logits: Float32[Array, "B T V"],
    sampler: Sampler | None = None,
    *,
    first: Int32[Array, " B"] | None = None,
    drafts: Int32[Array, "B T_minus_1"] | None = None,
    axis: str | None = None,
) -> Int32[Array, "B T"]:
    """The next token after each of ``T`` tokens; the lowest of equally good ones, or a draft that is typical.

    Args:
        logits: of the next tokens.
        sampler: None chooses the most likely tokens.
        first: place among the new tokens of the first token chosen; needed with a sampler.
        drafts: the tokens between those that are chosen: the second is chosen as if the first draft had been.
        axis: of a mesh whose devices have the logits of some tokens each; not with a sampler, which sees all of them.
    """
    if sampler is None:
        return most_likely(logits, axis)
    assert first is not None
    assert axis is None
    places = first[:, None] + jnp.arange(logits.shape[1], dtype=jnp.int32)
    logits = adjusted(logits, sampler, places=places, drafts=drafts)
    noise = gumbel_noise(sampler.seed, places, logits.shape[-1])
    warm = (sampler.temperature > 0)[:, None, None]
    chosen = jnp.argmax(logits + jnp.where(warm, noise, 0), axis=-1).astype(jnp.int32)
    if sampler.typical_acceptance is None or drafts is None:
        return chosen
    typical = _is_typical(logits[:, :-1], drafts, sampler.typical_acceptance)
    return chosen.at[:, :-1].set(jnp.where(typical, drafts, chosen[:, :-1]))


def adjusted(
    logits: Float32[Array, "B T V"],
    sampler: Sampler,
    *,
    places: Int32[Array, "B T"],
    drafts: Int32[Array, "B T_minus_1"] | None = None,
) -> Float32[Array, "B T V"]:
    """What tokens are drawn from: logits that all options have changed, up to a number that all of a place share.

    A greedy sequence has those before its temperature and limits.

    Args:
        logits: of the next tokens.
        sampler: the options.
        places: of the tokens that are chosen, among the new ones.
        drafts: as in :func:`choose`.
    """
    if sampler.biases is not None:
        logits = _biased(logits, sampler, places)
    if sampler.penalises:
        logits = _penalised(logits, sampler, drafts)
    warm = (sampler.temperature > 0)[:, None, None]
    # Without the maximum taken off first, several logits would be infinite, and equal, at a temperature near 0.
    logits = (logits - jnp.where(warm, _finite_maximum(logits), 0)) / jnp.where(
        warm, sampler.temperature[:, None, None], 1
    )
    if sampler.truncates:
        logits = jnp.where(warm & ~_let_through(logits, sampler), -jnp.inf, logits)
    return logits


def _finite_maximum(logits: Float32[Array, "B T V"]) -> Float32[Array, "B T one"]:
    maximum = logits.max(axis=-1, keepdims=True)
    return jnp.where(jnp.isfinite(maximum), maximum, 0)


def gumbel_noise(seed: UInt32[Array, " B"], places: Int32[Array, "B T"], vocab_size: int) -> Float32[Array, "B T V"]:
    """Standard Gumbel noise of each token of the vocabulary, by seed and place alone."""

    def one(seed: Array, place: Array) -> Array:
        # By name: bits of another generator, such as jax_default_prng_impl may set, depend on the rows beside a row.
        key = jax.random.fold_in(jax.random.key(seed, impl="threefry2x32"), place)
        return jax.random.gumbel(key, (vocab_size,), jnp.float32)

    return jax.vmap(jax.vmap(one, in_axes=(None, 0)))(seed, places)


def padded_tokens(lists: Sequence[Sequence[int]], width: int) -> np.ndarray:
    """Lists of tokens as int32 ``[len(lists), width]``, filled up with ``NO_TOKEN``."""
    padded = np.full((len(lists), width), NO_TOKEN, np.int32)
    for row, tokens in enumerate(lists):
        padded[row, : len(tokens)] = tokens
    return padded


def _bias_arrays(params: Sequence[SamplingParams]) -> dict[str, Any]:
    """The fields of a sampler that biases."""
    biases = np.zeros((len(params), MAX_BIASES), np.float32)
    for row, one in enumerate(params):
        biases[row, : len(one.logit_bias)] = list(one.logit_bias.values())
    return {
        "bias_tokens": padded_tokens([list(one.logit_bias) for one in params], MAX_BIASES),
        "biases": biases,
        "min_new_tokens": np.asarray([one.min_new_tokens for one in params], np.int32),
        "stop_tokens": padded_tokens([one.stop_token_ids for one in params], MAX_STOP_TOKENS),
    }


def _typical_array(params: Sequence[SamplingParams]) -> Any:
    given = [one.typical_acceptance for one in params]
    return np.asarray([np.inf if epsilon is None else epsilon for epsilon in given], np.float32)


def _biased(logits: Float32[Array, "B T V"], sampler: Sampler, places: Int32[Array, "B T"]) -> Float32[Array, "B T V"]:
    """Adds biases, and rules stop tokens out at places before ``min_new_tokens``."""
    batch, _, vocab_size = logits.shape
    rows = jnp.arange(batch, dtype=jnp.int32)[:, None]

    def columns(tokens: Any) -> Array:
        return jnp.where(tokens == NO_TOKEN, vocab_size, tokens)

    bias = jnp.zeros((batch, vocab_size), jnp.float32)
    bias = bias.at[rows, columns(sampler.bias_tokens)].add(sampler.biases, mode="drop")
    stops = jnp.zeros((batch, vocab_size), bool).at[rows, columns(sampler.stop_tokens)].set(True, mode="drop")
    assert sampler.min_new_tokens is not None
    early = places < sampler.min_new_tokens[:, None]
    return jnp.where(early[:, :, None] & stops[:, None, :], -jnp.inf, logits + bias[:, None, :])


def _penalised(
    logits: Float32[Array, "B T V"], sampler: Sampler, drafts: Int32[Array, "B T_minus_1"] | None
) -> Float32[Array, "B T V"]:
    assert sampler.counts is not None
    assert sampler.in_prompt is not None
    counts = sampler.counts[:, None, :]
    if drafts is not None and drafts.shape[1]:
        drafted = jax.nn.one_hot(drafts, logits.shape[-1], dtype=jnp.int32)
        counts = counts + jnp.pad(jnp.cumsum(drafted, axis=1, dtype=jnp.int32), ((0, 0), (1, 0), (0, 0)))
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
    top_k, top_p, min_p = (getattr(sampler, name)[:, None, None] for name in ("top_k", "top_p", "min_p"))
    last = jnp.broadcast_to(jnp.clip(top_k, 1, vocab_size) - 1, (*logits.shape[:-1], 1))
    # Those tied with the last of k are drawn, too: top-p counts their probabilities.
    kept = (top_k == 0) | (ordered >= jnp.take_along_axis(ordered, last, axis=-1))
    probabilities = jax.nn.softmax(jnp.where(kept, ordered, -jnp.inf), axis=-1)
    # Rounded, the sum may reach 1 before the last token: a request without a limit must not feel its neighbours' ones.
    kept &= (jnp.cumsum(probabilities, axis=-1) - probabilities < top_p) | (top_p == 1)
    kept &= probabilities >= min_p * probabilities[..., :1]
    last = jnp.maximum(kept.sum(axis=-1, keepdims=True, dtype=jnp.int32), 1) - 1
    return logits >= jnp.take_along_axis(ordered, last, axis=-1)


def _is_typical(
    logits: Float32[Array, "B gamma V"], tokens: Int32[Array, "B gamma"], epsilon: Float32[Array, " B"]
) -> Bool[Array, "B gamma"]:
    """Whether each token is likelier than ``min(epsilon, sqrt(epsilon) * exp(-entropy))``: none is at infinity.

    Medusa's two parameters are one here: theirs are 0.09 and its root.
    """
    probabilities = jax.nn.softmax(logits, axis=-1)
    entropy = jax.scipy.special.entr(probabilities).sum(axis=-1)
    threshold = jnp.minimum(epsilon[:, None], jnp.sqrt(epsilon)[:, None] * jnp.exp(-entropy))
    return jnp.take_along_axis(probabilities, tokens[:, :, None], axis=-1)[:, :, 0] > threshold


def as_chosen_from(
    logits: Float32[Array, "B T V"], axis: str | None, sampler: Sampler | None, *, scored: bool
) -> tuple[Float32[Array, "B T V_seen"], str | None]:
    """Logits of all tokens, or those that a device has where the most likely token is all that is wanted of them.

    Returns:
        the logits, and the axis over whose devices they are spread; None for all of them.
    """
    if sampler is None and not scored:
        return logits, axis
    return all_logits(logits, axis), None


def is_stop(tokens: Int32[Array, "B T"], stop_tokens: Int32[Array, "B stops"]) -> Bool[Array, "B T"]:
    """Whether each token ends its sequence."""
    return (tokens[:, :, None] == stop_tokens[:, None, :]).any(axis=-1)
