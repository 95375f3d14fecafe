"""What changes from cycle to cycle, and what enters it: the rows of a running batch, and prompts on their way in.

A *row* is a place of the batch: one sequence in one row of the cache Rows are
independent. A row whose sequence has finished is idle until ``prefill_rows`` (``speculative.py``) reads another prompt
into it. An idle row still holds the keys and values of its last prompt. They are used where another prompt begins
alike: the row is copied instead of reading that beginning again (``engine/prefixes.py``).
"""

from __future__ import annotations

import dataclasses
import typing
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float32, Int32

from pallas_kernels.arrays.shown import with_shapes
from qspec_jax.decoding.draft_record import DraftRecord
from qspec_jax.decoding.plan import MAX_DRAFT_LENGTH
from qspec_jax.decoding.sampling import NO_TOKEN, Sampler
from qspec_jax.decoding.sampling_params import MAX_LOGPROBS, MAX_STOP_TOKENS
from qspec_jax.model.cache import KVCache
from qspec_jax.model.collectives import rows_of_all


@typing.no_type_check  # as a pytree it also holds shapes and other stand-ins for arrays
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TokenScores:
    """Log-probabilities at the verify precision, of tokens and of the most likely ones at their places.

    Attributes:
        logprobs: ``[B, T]`` float32, of the tokens.
        top_tokens, top_logprobs: ``[B, T, MAX_LOGPROBS]`` int32 and float32, the most likely first.
    """

    logprobs: Float32[Array, "B T"]
    top_tokens: Int32[Array, "B T top"]
    top_logprobs: Float32[Array, "B T top"]

    def __repr__(self) -> str:
        return with_shapes(self)

    @classmethod
    def of(cls, logits: Float32[Array, "B T V"], tokens: Int32[Array, "B T"]) -> TokenScores:
        """Of tokens whose logits are given; a vocabulary of fewer than ``MAX_LOGPROBS`` is filled up."""
        logprobs = jax.nn.log_softmax(logits, axis=-1)
        chosen = jnp.take_along_axis(logprobs, tokens[:, :, None], axis=-1)[:, :, 0]
        num_top = min(MAX_LOGPROBS, logits.shape[-1])
        top_logprobs, top_tokens = lax.top_k(logprobs, num_top)
        missing = ((0, 0), (0, 0), (0, MAX_LOGPROBS - num_top))
        return cls(
            chosen,
            jnp.pad(top_tokens, missing, constant_values=NO_TOKEN),
            jnp.pad(top_logprobs, missing, constant_values=-jnp.inf),
        )

    @classmethod
    def zeros(cls, rows: int, capacity: int) -> TokenScores:
        """Of no token yet, in NumPy arrays."""
        one: Any = np.zeros((rows, capacity), np.float32)
        top: Any = np.zeros((rows, capacity, MAX_LOGPROBS), np.float32)
        return cls(one, top.astype(np.int32), top)


@typing.no_type_check  # as a pytree it also holds shapes and other stand-ins for arrays
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecodeState:
    """Everything that changes from cycle to cycle, and the options of each sequence. All counts are per sequence.

    Attributes:
        cache: valid up to, and without, ``last_token``.
        last_token: ``[B]`` int32, the newest token of each sequence.
        tokens: ``[B, capacity]`` int32, the generated tokens.
        num_tokens: ``[B]`` int32, how many of them are set.
        max_new_tokens: ``[B]`` int32, at most ``capacity``.
        stop_tokens: ``[B, MAX_STOP_TOKENS]`` int32, a sequence ends with the first of its own; filled up with
            ``NO_TOKEN``.
        finished: ``[B]`` bool, a stop token was generated or ``max_new_tokens`` reached, or the row is idle.
        accepted_lengths: ``[B, MAX_DRAFT_LENGTH + 1]`` int32, cycles run before the sequence finished, by how many
            drafts the verification agreed with. Drafts of the last cycle beyond a stop count as drafted and
            accepted although they are not emitted.
        sampler: how tokens are drawn; None for the most likely ones.
        scores: of ``tokens``; None where nobody asks.
        history: ``[B, S]`` int32, the tokens of prompt and output by position; None where drafts are not looked up.
        record: of the cycles; None where nobody asks.
    """

    cache: KVCache
    last_token: Int32[Array, " B"]
    tokens: Int32[Array, "B capacity"]
    num_tokens: Int32[Array, " B"]
    max_new_tokens: Int32[Array, " B"]
    stop_tokens: Int32[Array, "B stops"]
    finished: Bool[Array, " B"]
    accepted_lengths: Int32[Array, "B lengths"]
    sampler: Sampler | None = None
    scores: TokenScores | None = None
    history: Int32[Array, "B S"] | None = None
    record: DraftRecord | None = None

    def __repr__(self) -> str:
        return with_shapes(self)

    @classmethod
    def idle(cls, cache: KVCache, *, lookup: bool = False) -> DecodeState:
        """Rows without a sequence, around an empty cache; as many new tokens fit as the cache has positions.

        ``lookup`` is whether drafts will be looked up.
        """
        rows = cache.lengths.shape[0]

        def zeros(*shape: int) -> Any:
            return np.zeros((rows, *shape), np.int32)

        return cls(
            cache=cache,
            last_token=zeros(),
            tokens=zeros(cache.capacity),
            num_tokens=zeros(),
            max_new_tokens=zeros(),
            stop_tokens=zeros(MAX_STOP_TOKENS) + np.int32(NO_TOKEN),
            finished=zeros() == 0,
            accepted_lengths=zeros(MAX_DRAFT_LENGTH + 1),
            history=zeros(cache.capacity) if lookup else None,
        )

    def without_cache(self) -> DecodeState:
        """All but the cache, in whose place is ``None``: a pytree of arrays by row."""
        nothing: Any = None
        return dataclasses.replace(self, cache=nothing)

    def row(self, index: Int32[Array, ""]) -> DecodeState:
        """One row as a batch of its own."""
        sliced = jax.tree.map(lambda a: lax.dynamic_slice_in_dim(a, index, 1), self.without_cache())
        return dataclasses.replace(sliced, cache=self.cache.row(index))

    def with_row(self, index: Int32[Array, ""], row: DecodeState) -> DecodeState:
        """The same rows with another one at ``index``."""
        others, new = self.without_cache(), row.without_cache()
        updated = jax.tree.map(lambda a, b: lax.dynamic_update_slice_in_dim(a, b, index, 0), others, new)
        return dataclasses.replace(updated, cache=self.cache.with_row(index, row.cache))


def with_rows_of(state: DecodeState, smaller: DecodeState) -> DecodeState:
    """Idle rows that hold what those of another state do, of which there are as many, with less capacity."""
    history: Any = state.history
    if isinstance(history, jax.Array) and smaller.history is not None:  # on a mesh
        history = history.at[:, : smaller.cache.capacity].set(smaller.history)
    elif history is not None and smaller.history is not None:
        history = np.array(history)
        history[:, : smaller.cache.capacity] = np.asarray(smaller.history)
    cache = state.cache.with_entries_of(smaller.cache)
    return dataclasses.replace(state, cache=cache, history=history)


@typing.no_type_check  # as above
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Report:
    """What the host reads after a dispatch, in buffers of its own: those of the state are used up by the next one.

    Attributes:
        tokens, num_tokens, finished, accepted_lengths: of the state.
        cycles: run by the dispatch; 0 of a prefill.
        scores, record: of the tokens and of their cycles, where somebody asks.
    """

    tokens: Int32[Array, "B capacity"]
    num_tokens: Int32[Array, " B"]
    finished: Bool[Array, " B"]
    accepted_lengths: Int32[Array, "B lengths"]
    cycles: Int32[Array, ""] | np.int32
    scores: TokenScores | None = None
    record: DraftRecord | None = None

    def __repr__(self) -> str:
        return with_shapes(self)

    @classmethod
    def of(cls, state: DecodeState, cycles: Int32[Array, ""], *, rows_over: str | None = None) -> Report:
        """Of a state after some cycles; of the rows of all devices of an axis, where each has some."""
        arrays = state.tokens, state.num_tokens, state.finished, state.accepted_lengths, state.scores, state.record
        tokens, num_tokens, finished, accepted_lengths, scores, record = rows_of_all(arrays, rows_over)
        return cls(tokens, num_tokens, finished, accepted_lengths, cycles, scores, record)


@typing.no_type_check  # as above
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PromptChunk:
    """A chunk of a prompt for each of some rows, and the options of their sequences.

    Attributes:
        tokens: ``[B, T]`` int32, padded on the right; ``[B, 0]`` where :class:`PromptPieces` have them.
        num_tokens: ``[B]`` int32, valid tokens of the chunk, at least 1.
        start: ``[B]`` int32, tokens of the prompt before this chunk.
        last: ``[B]`` bool, the prompt ends with this chunk.
        max_new_tokens, stop_tokens: as in the state.
        sampler: as in the state, but for what it knows of tokens.
        prompt: ``[B, S]`` int32, the prompt from its beginning, padded on the right; None where nothing penalises.
    """

    tokens: Int32[Array, "B T"]
    num_tokens: Int32[Array, " B"]
    start: Int32[Array, " B"]
    last: Bool[Array, " B"]
    max_new_tokens: Int32[Array, " B"]
    stop_tokens: Int32[Array, "B stops"]
    sampler: Sampler | None = None
    prompt: Int32[Array, "B S"] | None = None

    def __repr__(self) -> str:
        return with_shapes(self)

    def row(self, index: Int32[Array, ""]) -> PromptChunk:
        """The chunk of one row."""
        return jax.tree.map(lambda a: lax.dynamic_slice_in_dim(a, index, 1), self)


@typing.no_type_check  # as above
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PromptPieces:
    """The tokens of chunks of several prompts, cut into pieces of the same size that one pass reads together.

    Attributes:
        tokens: ``[N, T]`` int32, padded on the right.
        rows: ``[N]`` int32, of the batch; negative for a piece of nothing.
        starts: ``[N]`` int32, tokens of the prompt before each piece.
        num_tokens: ``[N]`` int32, valid tokens of each.
        ends: ``[P]`` int32, where among all ``N * T`` tokens each chunk has its last one.
    """

    tokens: Int32[Array, "N T"]
    rows: Int32[Array, " N"]
    starts: Int32[Array, " N"]
    num_tokens: Int32[Array, " N"]
    ends: Int32[Array, " P"]

    def __repr__(self) -> str:
        return with_shapes(self)
