"""Reading prompts into rows by the target view: chunks one after the other, or pieces of several in one pass."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float32, Int32

from qspec_jax.decoding.lookup import write
from qspec_jax.decoding.plan import DecodingPlan
from qspec_jax.decoding.sampling import as_chosen_from, choose, is_stop
from qspec_jax.decoding.state import DecodeState, PromptChunk, PromptPieces, TokenScores
from qspec_jax.model.decoder import Decoder


def prefill(model: Decoder, state: DecodeState, chunk: PromptChunk, *, plan: DecodingPlan) -> DecodeState:
    """Runs a chunk of a prompt in every row by the target view; the last one chooses the first new token.

    Args:
        model: the decoder.
        state: rows that have read the chunks before: of the same prompt, or of one that begins alike.
        chunk: one for each row.
        plan: says by which view.
    """
    logits, cache = model(
        chunk.tokens,
        state.cache.with_lengths(chunk.start),
        precision=plan.verify,
        logits_at=chunk.num_tokens - 1,
    )
    history = state.history
    if history is not None:
        index = jnp.arange(chunk.tokens.shape[1], dtype=jnp.int32)
        history = write(history, chunk.start, chunk.tokens, index < chunk.num_tokens[:, None])
    return _entered(model, dataclasses.replace(state, cache=cache, history=history), chunk, logits)


def _entered(
    model: Decoder, state: DecodeState, chunk: PromptChunk, logits: Float32[Array, "B 1 V_of_device"]
) -> DecodeState:
    """Rows that have read a chunk, whose entries and history are there, by the logits of its last token."""
    sampler, end = chunk.sampler, chunk.start + chunk.num_tokens
    logits, axis = as_chosen_from(logits, model.axis, sampler, scored=state.scores is not None)
    if sampler is not None and chunk.prompt is not None:
        sampler = sampler.for_prompts(chunk.prompt, end, logits.shape[-1])
    first_tokens = choose(logits, sampler, first=jnp.zeros_like(end), axis=axis)
    first, scores, history = first_tokens[:, 0], state.scores, state.history
    if scores is not None:
        found = TokenScores.of(logits, first_tokens)
        scores = jax.tree.map(lambda a, b: jnp.zeros_like(a).at[:, :1].set(b), scores, found)
    if history is not None:
        history = write(history, end, first_tokens, chunk.last[:, None])
    return DecodeState(
        # Nobody has weighed the blocks of this text yet: its first drafts read all of it, once it is there.
        cache=state.cache.with_lengths(end).with_everything_listed(chunk.last),
        last_token=first,
        tokens=jnp.zeros_like(state.tokens).at[:, 0].set(first),
        num_tokens=chunk.last.astype(jnp.int32),
        max_new_tokens=chunk.max_new_tokens,
        stop_tokens=chunk.stop_tokens,
        finished=~chunk.last | is_stop(first_tokens, chunk.stop_tokens)[:, 0] | (chunk.max_new_tokens <= 1),
        accepted_lengths=jnp.zeros_like(state.accepted_lengths),
        sampler=None if sampler is None else sampler.after(first_tokens, chunk.last[:, None]),
        scores=scores,
        history=history,
        record=None if state.record is None else state.record.cleared(),
    )


def prefill_rows(
    model: Decoder,
    state: DecodeState,
    chunks: PromptChunk,
    rows: Int32[Array, " P"],
    sources: Int32[Array, " P"],
    count: Int32[Array, ""],
    *,
    plan: DecodingPlan,
    rows_over: str | None = None,
) -> DecodeState:
    """Reads the first ``count`` of ``P`` chunks of prompts into ``rows``, while the other rows stay as they are.

    ``sources`` are the rows that hold what the prompts begin with, up to these chunks; see ``engine.prefixes``.
    One after the other, each as a batch of one: what a prompt yields cannot depend on what enters beside it.

    Where the devices of an axis ``rows_over`` have some rows each, each reads its own. They copy from nowhere else.
    """
    if rows_over is not None:
        first = lax.axis_index(rows_over) * len(state.finished)
        is_own = (
            (rows >= first) & (rows < first + len(state.finished)) & (jnp.arange(len(rows), dtype=jnp.int32) < count)
        )
        order = jnp.argsort(~is_own, stable=True)
        rows, sources, chunks = jax.tree.map(lambda array: array[order], (rows - first, sources - first, chunks))
        count = is_own.sum(dtype=jnp.int32)

    def enter(index: Array, state: DecodeState) -> DecodeState:
        entered = prefill(model, state.row(sources[index]), chunks.row(index), plan=plan)
        return state.with_row(rows[index], entered)

    return lax.fori_loop(0, count, enter, state)


def read_pieces(
    model: Decoder,
    state: DecodeState,
    pieces: PromptPieces,
    chunks: PromptChunk,
    rows: Int32[Array, " P"],
    sources: Int32[Array, " P"],
    num_copied: Int32[Array, ""],
    *,
    plan: DecodingPlan,
    rows_over: str | None = None,
) -> DecodeState:
    """Reads chunks of prompts into ``rows`` in one pass, while the other rows stay as they are.

    As :func:`prefill_rows`, where a token has the same bits whatever else a pass reads. Chunks come first whose prompts
    begin as other rows do, ``num_copied`` of them: those rows are copied before anything is read. Of a place without a
    chunk ``rows`` is past the last row.

    Where the devices of an axis ``rows_over`` have some rows each, each reads as many pieces, those of its own rows:
    the first of all pieces are those of the first device.
    """
    if rows_over is not None:
        places = rows, sources, num_copied
        pieces, chunks, rows, sources, num_copied = _of_device(rows_over, len(state.finished), pieces, chunks, *places)

    def copy(index: Array, state: DecodeState) -> DecodeState:
        return state.with_row(rows[index], state.row(sources[index]))

    state = lax.fori_loop(0, num_copied, copy, state)
    history = state.history
    if history is not None:
        index = jnp.arange(pieces.tokens.shape[1], dtype=jnp.int32)
        columns = jnp.where(index < pieces.num_tokens[:, None], pieces.starts[:, None] + index, history.shape[1])
        # A piece of nothing, whose row is negative, has no tokens: all its columns are past the last one.
        history = history.at[pieces.rows[:, None], columns].set(pieces.tokens, mode="drop")
    places = {"rows": pieces.rows, "starts": pieces.starts, "ends": pieces.ends}
    logits, cache = model.read_pieces(pieces.tokens, state.cache, **places, view=plan.verify)
    # All but the entries of the cache, of the rows that read.
    others = dataclasses.replace(state, cache=dataclasses.replace(cache, layers=()), history=history)
    entered = _entered(model, jax.tree.map(lambda array: array[rows], others), chunks, logits)
    others = jax.tree.map(lambda old, new: old.at[rows].set(new, mode="drop"), others, entered)
    return dataclasses.replace(others, cache=dataclasses.replace(others.cache, layers=cache.layers))


def _of_device(
    axis: str,
    num_rows: int,
    pieces: PromptPieces,
    chunks: PromptChunk,
    rows: Int32[Array, " P"],
    sources: Int32[Array, " P"],
    num_copied: Int32[Array, ""],
) -> tuple[PromptPieces, PromptChunk, Int32[Array, " own_rows"], Int32[Array, " own_rows"], Int32[Array, ""]]:
    """Of the arguments of :func:`read_pieces` those of one device, which counts rows and tokens from its own first one.

    ``num_rows`` is how many rows it has. No device has more chunks than that.
    """
    device, count = lax.axis_index(axis), lax.axis_size(axis)
    first, size = device * num_rows, len(pieces.rows) // count
    is_own = (rows >= first) & (rows < first + num_rows)
    order = jnp.argsort(~is_own, stable=True)[:num_rows]
    num_copied = (is_own & (jnp.arange(len(rows), dtype=jnp.int32) < num_copied)).sum(dtype=jnp.int32)
    by_chunk = jnp.where(is_own, rows - first, num_rows), sources - first, chunks
    rows, sources, chunks = jax.tree.map(lambda array: array[order], by_chunk)
    ends = jnp.where(is_own, pieces.ends - device * size * pieces.tokens.shape[1], 0)[order]
    of_pieces = pieces.tokens, pieces.rows, pieces.starts, pieces.num_tokens
    own = (lax.dynamic_slice_in_dim(array, device * size, size) for array in of_pieces)
    tokens, held, starts, num_tokens = own
    pieces = PromptPieces(tokens, jnp.where(held < 0, held, held - first), starts, num_tokens, ends)
    return pieces, chunks, rows, sources, num_copied
