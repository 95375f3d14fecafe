"""``decode_attention`` as two Pallas Triton kernels for NVIDIA GPUs (compute capability 8.0 and newer).

Split along the cache (flash decoding: Dao et al., 2023): a program of the first kernel attends from 16 or 32 rows, the
queries of one key/value head, to one chunk of slots, and leaves the largest logit, the sum of the exponentials and
the sum of the weighted values, all float32. The second kernel puts the chunks of a query together.

Row invariance: where a chunk begins depends on its number alone, whatever is summed within a tile of slots is summed by
a product, whose order does not depend on its number of rows, a slot that a row does not see adds zero, and chunks are
put together one after another. Every row therefore goes through the same operations however many tokens,
sequences and slots there are.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32, Int32

from pallas_kernels.backends.triton import registers
from pallas_kernels.backends.triton.registers import LN_2, LOG2_E, exp2, log2
from pallas_kernels.decode_attention.gpu_triton_tiles import (
    CHUNKS,
    ROWS,
    SHORT_CHUNK,
    Problem,
    across,
    dot,
    load_rows,
    load_slots,
    nothing,
)
from pallas_kernels.decode_attention.reference import BLOCK, MAX_DECODE_TOKENS

_MOST_GROUPS = 2  # of 16 rows, of a program: 6 tokens of 4 heads, 24 rows, load the cache once
_MAX_HEAD_DIM = 256
_TILE_BYTES = 8192  # of keys, and of values, that a program holds
_WEIGHED = 64  # blocks of a program that weighs them
_SUMS = 8  # columns: the fewest that a tensor core takes
_JOINING = {1: 1024, 2: 256}  # warps of a program that puts chunks together, of at least so many programs; else 4
FURTHER_SEQUENCES = True


def obstacle(num_tokens: int, head_dim: int, dtype: jnp.dtype | None = None) -> str | None:
    """Why these kernels cannot serve a call, as the end of a sentence; None if they can."""
    del dtype  # all three of the public function work
    if num_tokens > MAX_DECODE_TOKENS:
        return f"needs at most {MAX_DECODE_TOKENS} tokens per sequence; these are {num_tokens}"
    if head_dim > _MAX_HEAD_DIM:
        return f"needs a head dimension of at most {_MAX_HEAD_DIM}; this is {head_dim}"
    return None


def decode_attention(
    query: Float[Array, "B_all T H HD"],
    keys: Float[Array, "B S KH HD"],
    values: Float[Array, "B S KH HD"],
    lengths: Int32[Array, " B"],
    *,
    window: int | None,
    most_groups: int = _MOST_GROUPS,
    interpret: bool = False,
) -> Float[Array, "B_all T H HD"]:
    """See the public function. Up to ``most_groups`` of 16 rows, a power of two, share what a program loads."""
    registers.ignore_triton_deprecation()
    options = {"window": window, "most_groups": most_groups, "interpret": interpret}
    return _attend(query, keys, values, lengths, **options)


def decode_attention_with_masses(
    query: Float[Array, "B_all T H HD"],
    keys: Float[Array, "B S KH HD"],
    values: Float[Array, "B S KH HD"],
    lengths: Int32[Array, " B"],
    *,
    block_size: int,
    window: int | None,
    most_groups: int = _MOST_GROUPS,
    interpret: bool = False,
) -> tuple[Float[Array, "B_all T H HD"], Float32[Array, "B KH NB"]]:
    """See the public function, and :func:`decode_attention`."""
    registers.ignore_triton_deprecation()
    options = {"block_size": block_size, "window": window, "most_groups": most_groups, "interpret": interpret}
    return _attend_and_weigh(query, keys, values, lengths, **options)


# Jits of their own, so that a program with many layers lowers the kernels once per shape.
@functools.partial(jax.jit, static_argnames=("window", "most_groups", "interpret"))
def _attend(
    query: Array,
    keys: Array,
    values: Array,
    lengths: Array,
    *,
    window: int | None,
    most_groups: int,
    interpret: bool,
) -> Array:
    problem = _problem_of(query, keys, window, most_groups)
    chunks = _attend_to_chunks(query, keys, values, lengths, problem=problem, interpret=interpret)
    [out] = join_chunks(lengths, *chunks, problem=problem, query=query, interpret=interpret)
    return out


@functools.partial(jax.jit, static_argnames=("block_size", "window", "most_groups", "interpret"))
def _attend_and_weigh(
    query: Array,
    keys: Array,
    values: Array,
    lengths: Array,
    *,
    block_size: int,
    window: int | None,
    most_groups: int,
    interpret: bool,
) -> tuple[Array, Array]:
    problem = dataclasses.replace(_problem_of(query, keys, window, most_groups), weigh_blocks=True)
    *chunks, block_sums = _attend_to_chunks(query, keys, values, lengths, problem=problem, interpret=interpret)
    out, whole_sums = join_chunks(lengths, *chunks, problem=problem, query=query, interpret=interpret)
    sums = whole_sums, block_sums
    return out, weigh_blocks(lengths, *sums, block_size=block_size, problem=problem, interpret=interpret)


def _problem_of(query: Array, keys: Array, window: int | None, most_groups: int) -> Problem:
    _, num_tokens, num_heads, head_dim = query.shape
    _, slots, num_kv_heads, _ = keys.shape
    row_groups = min(most_groups, pl.cdiv(num_tokens * (num_heads // num_kv_heads), ROWS))
    return Problem(num_tokens, num_heads, num_kv_heads, head_dim, slots, window, row_groups=row_groups)


def _attend_to_chunks(
    query: Array, keys: Array, values: Array, lengths: Array, *, problem: Problem, interpret: bool
) -> tuple[Array, ...]:
    """Largest logits and sums ``[B, KH, chunks, rows]``, and weighted values ``[B, KH, chunks, rows, block_dim]``.

    A problem that weighs blocks adds ``[B, KH, blocks, rows]``: logarithms of the sums of exponentials of a block.
    Chunks, blocks and rows that see nothing, or do not exist, are not written.
    """
    batch, row_blocks = lengths.shape[0], problem.row_blocks
    out_specs, out_shape = results_of_chunks(problem, batch)
    return pl.pallas_call(
        functools.partial(_chunk_kernel, problem=problem, interpret=interpret),
        # Programs that read the same slots stand next to each other.
        grid=(problem.num_kv_heads * row_blocks, problem.num_chunks, batch),
        in_specs=[
            pl.BlockSpec((None,), lambda program, chunk, sequence: (sequence,)),
            *arrays_read(problem),
        ],
        out_specs=out_specs,
        out_shape=out_shape,
        compiler_params=plgpu.CompilerParams(num_warps=2, num_stages=3),
        interpret=interpret,
        name="decode_attention_chunks_and_blocks" if problem.weigh_blocks else "decode_attention_chunks",
    )(lengths, query, keys, values)


def arrays_read(problem: Problem) -> list[pl.BlockSpec]:
    """Queries, keys and values, as a program for a block of rows sees them; its grid is (head, part, batch)."""
    queries = (None, problem.num_tokens, problem.num_heads, problem.head_dim)
    cache = pl.BlockSpec(
        (None, problem.slots, None, problem.block_dim),
        lambda program, part, sequence: (sequence, 0, lax.div(program, problem.row_blocks), 0),
    )
    return [pl.BlockSpec(queries, lambda program, part, sequence: (sequence, 0, 0, 0)), cache, cache]


def parts_of(problem: Problem, batch: int, count: int) -> tuple[list[pl.BlockSpec], list[jax.ShapeDtypeStruct]]:
    """What such programs leave: largest logits, sums, and weighted values of their rows, each of ``count`` parts."""

    def block(program, part, sequence):
        return sequence, lax.div(program, problem.row_blocks), part, lax.rem(program, problem.row_blocks)

    rows = pl.BlockSpec((None, None, None, problem.rows), block)
    wide = pl.BlockSpec((None, None, None, problem.rows, problem.block_dim), lambda *ids: (*block(*ids), 0))
    shape = (batch, problem.num_kv_heads, count, problem.row_blocks * problem.rows)
    shapes = [shape, shape, (*shape, problem.block_dim)]
    return [rows, rows, wide], [jax.ShapeDtypeStruct(one, jnp.float32) for one in shapes]


def results_of_chunks(problem: Problem, batch: int) -> tuple[list[pl.BlockSpec], list[jax.ShapeDtypeStruct]]:
    """What programs for chunks leave: their parts, and of a problem that weighs blocks the sums of these."""
    out_specs, out_shape = parts_of(problem, batch, problem.num_chunks)
    if problem.weigh_blocks:
        weighing = pl.cdiv(problem.weighed_rows, problem.rows)
        sums = (batch, problem.num_kv_heads, problem.num_blocks, weighing * problem.rows)
        out_shape.append(jax.ShapeDtypeStruct(sums, jnp.float32))
        out_specs.append(
            pl.BlockSpec(
                (None, None, problem.num_blocks, problem.rows),
                lambda program, chunk, sequence: (
                    sequence,
                    lax.div(program, problem.row_blocks),
                    0,
                    jnp.minimum(lax.rem(program, problem.row_blocks), weighing - 1),
                ),
            )
        )
    return out_specs, out_shape


def parts_joined(problem: Problem, count: int) -> list[pl.BlockSpec]:
    """All parts of a query, as a program that puts them together sees them: its grid is (head, token, batch)."""
    group = problem.group

    def block(head, token, sequence):
        return sequence, lax.div(head, group), 0, token * group + lax.rem(head, group)

    one = pl.BlockSpec((None, None, count, None), block)
    wide = pl.BlockSpec((None, None, count, None, problem.block_dim), lambda *ids: (*block(*ids), 0))
    return [one, one, wide]


def result_of(problem: Problem, query: Array) -> tuple[pl.BlockSpec, jax.ShapeDtypeStruct]:
    """The attention of a query, as that program sees it; of sequences without a length there is no program."""
    spec = pl.BlockSpec((None, None, None, problem.block_dim), lambda head, token, sequence: (sequence, token, head, 0))
    return spec, jax.ShapeDtypeStruct(query.shape, query.dtype)


def _chunk_kernel(
    length_ref,  # [] int32
    query_ref,  # [T, H, HD]
    keys_ref,  # [S, block_dim]
    values_ref,  # [S, block_dim]
    maximum_ref,  # [rows] f32
    total_ref,  # [rows] f32
    mixed_ref,  # [rows, block_dim] f32
    *block_sums_ref,  # one [blocks, rows] f32, of a problem that weighs blocks
    problem: Problem,
    interpret: bool,
):
    chunk = registers.start_next(pl.program_id(1), interpret=interpret)
    program, length = pl.program_id(0), length_ref[...]
    kv_head, row_block = (part(program, problem.row_blocks) for part in (lax.div, lax.rem))
    rows = row_block * problem.rows + lax.broadcasted_iota(jnp.int32, (problem.rows,), 0)
    exist = rows < problem.num_rows

    # Whole tiles from the first slot that the first token sees to the last one that the last token sees.
    block_slots = max(BLOCK, min(SHORT_CHUNK, _TILE_BYTES // (problem.block_dim * keys_ref.dtype.itemsize)))
    chunk_start = problem.first_slot(chunk)
    end = jnp.minimum(problem.first_slot(chunk + 1), problem.end_of_seen(length + (problem.num_tokens - 1)))
    first_tile = lax.div(jnp.maximum(problem.first_seen(length) - chunk_start, 0), block_slots)
    end_tile = lax.div(end - chunk_start + (block_slots - 1), block_slots)

    @pl.when(first_tile < end_tile)
    def _():
        query = load_rows(query_ref, rows, exist, kv_head, problem)
        positions = length + lax.div(rows, problem.group)
        limits = jnp.minimum(positions + 1, end)
        unit = jnp.float32(problem.head_dim**-0.5)
        blocks = _blocks_of_a_tile(block_slots, values_ref.dtype)

        def attend_to_tile(tile, carry):
            maximum, totals, mixed = carry
            start = chunk_start + tile * block_slots
            keys, values = (load_slots(ref, start, end, block_slots, problem) for ref in (keys_ref, values_ref))
            products = dot(query, keys, contract=(1, 1))
            slots = start + lax.broadcasted_iota(jnp.int32, products.shape, 1)
            seen = slots < limits[:, None]
            if problem.window is not None:
                seen &= slots >= problem.first_seen(positions[:, None])
            products = jnp.where(seen, products, -jnp.inf)
            raised = jnp.maximum(maximum, jnp.max(products, axis=1))
            shift = jnp.where(raised == -jnp.inf, 0.0, raised)  # nothing seen yet: -inf - -inf is not a number
            kept, weights = (
                exp2((x - y) * (unit * jnp.float32(LOG2_E)), interpret=interpret)
                for x, y in ((maximum, shift), (products, shift[:, None]))
            )
            weights = weights.astype(values.dtype)
            sums = dot(weights, blocks, contract=(1, 0))
            if block_sums_ref:
                # A mask and no branch: a branch here costs more than what it saves for the rows that do not weigh.
                place, exist_here = _blocks_here(start, block_slots, row_block, problem)
                logarithms = log2(sums, interpret=interpret) * jnp.float32(LN_2) + (shift * unit)[:, None]
                plgpu.store(block_sums_ref[0].at[*place], logarithms, mask=exist_here)
            # Also where nobody else reads the sums: without the choice, they would be added within the product.
            sums = jnp.where(lax.broadcasted_iota(jnp.int32, sums.shape, 1) < block_slots // BLOCK, sums, 0.0)
            kept = kept[:, None]
            return raised, totals * kept + sums, mixed * kept + dot(weights, values, contract=(1, 0))

        maximum, totals, mixed = lax.fori_loop(first_tile, end_tile, attend_to_tile, _nothing(problem))
        columns = lax.broadcasted_iota(jnp.int32, totals.shape, 1)
        in_order = [jnp.max(jnp.where(columns == place, totals, 0.0), axis=1) for place in range(block_slots // BLOCK)]
        results = maximum * unit, sum(in_order[1:], start=in_order[0]), mixed
        masks = exist, exist, across(exist, (problem.rows, problem.block_dim))
        for ref, result, mask in zip((maximum_ref, total_ref, mixed_ref), results, masks, strict=True):
            plgpu.store(ref, result, mask=mask)


def _nothing(problem: Problem) -> tuple[Array, Array, Array]:
    """Of no slots: largest product, sums of the weights of the blocks of a tile, and weighted values."""
    totals, mixed = (jnp.zeros((problem.rows, count), jnp.float32) for count in (_SUMS, problem.block_dim))
    return jnp.full((problem.rows,), -jnp.inf, jnp.float32), totals, mixed


def _blocks_of_a_tile(slots: int, dtype: DTypeLike) -> Array:
    """What weights are multiplied with to be summed by blocks ``[slots, 8]``.

    The order in which a product sums does not depend on the number of rows, and no thread waits for others.
    """
    blocks, columns = (lax.broadcasted_iota(jnp.int32, (slots, _SUMS), axis) for axis in range(2))
    return (blocks // BLOCK == columns).astype(dtype)


def _blocks_here(
    start: Array, block_slots: int, row_block: Array, problem: Problem
) -> tuple[tuple[Array, Array], Array]:
    """Of the sums of a tile's blocks ``[rows, 8]``: the blocks and rows that they are of, and which are stored."""
    rows, columns = (lax.broadcasted_iota(jnp.int32, (problem.rows, _SUMS), axis) for axis in range(2))
    blocks = lax.div(start, BLOCK) + columns
    exist = (columns < block_slots // BLOCK) & (blocks < problem.num_blocks)
    return (blocks, rows), exist & (row_block * problem.rows + rows < problem.weighed_rows)


def weigh_blocks(
    lengths: Array, whole_sums: Array, block_sums: Array, *, block_size: int, problem: Problem, interpret: bool
) -> Array:
    """The masses of all blocks ``[B, KH, NB]`` float32, of the logarithms of sums; see the reference."""
    batch, block_rows = lengths.shape[0], pl.next_power_of_2(problem.weighed_rows)

    def whole(*sizes: int) -> pl.BlockSpec:
        return pl.BlockSpec((None, None, *sizes), lambda step, head, sequence: (sequence, head, *[0] * len(sizes)))

    masses = pl.pallas_call(
        functools.partial(_weigh_kernel, problem=problem),
        grid=(pl.cdiv(problem.num_blocks, _WEIGHED), problem.num_kv_heads, batch),
        in_specs=[
            pl.BlockSpec((None,), lambda step, head, sequence: (sequence,)),
            whole(block_rows),
            whole(problem.num_blocks, block_rows),
        ],
        out_specs=pl.BlockSpec((None, None, _WEIGHED), lambda step, head, sequence: (sequence, head, step)),
        out_shape=jax.ShapeDtypeStruct((batch, problem.num_kv_heads, problem.num_blocks), jnp.float32),
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=1),
        interpret=interpret,
        name="decode_attention_masses",
    )(lengths, whole_sums, block_sums)
    together = block_size // BLOCK
    masses = jnp.pad(masses, ((0, 0), (0, 0), (0, -masses.shape[2] % together)))
    return masses.reshape(*masses.shape[:2], -1, together).sum(axis=-1)


def _weigh_kernel(
    length_ref,  # [] int32
    whole_ref,  # [block_rows] f32, logarithms of the sums over all slots
    blocks_ref,  # [blocks, block_rows] f32, logarithms of the sums over a block
    masses_ref,  # [_WEIGHED] f32
    *,
    problem: Problem,
):
    length, step = length_ref[...], pl.program_id(0)
    shape = (_WEIGHED, whole_ref.shape[0])
    blocks = step * _WEIGHED + lax.broadcasted_iota(jnp.int32, shape, 0)
    exists = lax.broadcasted_iota(jnp.int32, shape, 1) < problem.weighed_rows
    # Written are the blocks of which the first token sees the end, or the last one the beginning.
    end = problem.end_of_seen(length + (problem.num_tokens - 1))
    written = exists & (blocks * BLOCK < end) & ((blocks + 1) * BLOCK > problem.first_seen(length))
    sums = plgpu.load(blocks_ref.at[pl.ds(step * _WEIGHED, _WEIGHED), :], mask=written, other=-jnp.inf)
    rows = lax.broadcasted_iota(jnp.int32, whole_ref.shape, 0)
    whole = plgpu.load(whole_ref, mask=rows < problem.weighed_rows, other=0.0)
    masses = jnp.sum(jnp.exp(sums - whole[None, :]), axis=1) * jnp.float32(1 / problem.weighed_rows)
    here = step * _WEIGHED + lax.broadcasted_iota(jnp.int32, (_WEIGHED,), 0)
    plgpu.store(masses_ref, masses, mask=here < problem.num_blocks)


def join_chunks(
    lengths: Array,
    maximum: Array,
    total: Array,
    mixed: Array,
    *,
    problem: Problem,
    query: Array,
    interpret: bool,
) -> tuple[Array, ...]:
    """The result, and of a problem that weighs blocks the logarithms of all sums ``[B, KH, rows]`` float32."""
    batch, group = lengths.shape[0], problem.group
    out_specs, out_shape = ([one] for one in result_of(problem, query))
    if problem.weigh_blocks:
        sums = (batch, problem.num_kv_heads, problem.row_blocks * problem.rows)
        out_shape.append(jax.ShapeDtypeStruct(sums, jnp.float32))
        out_specs.append(
            pl.BlockSpec(
                (None, None, None),
                lambda head, token, sequence: (sequence, lax.div(head, group), token * group + lax.rem(head, group)),
            )
        )
    num_programs = problem.num_heads * problem.num_tokens * batch
    num_warps = next((warps for warps, least in _JOINING.items() if num_programs >= least), 4)
    return pl.pallas_call(
        functools.partial(_join_kernel, problem=problem, interpret=interpret),
        grid=(problem.num_heads, problem.num_tokens, batch),
        in_specs=[
            pl.BlockSpec((None,), lambda head, token, sequence: (sequence,)),
            *parts_joined(problem, problem.num_chunks),
        ],
        out_specs=out_specs,
        out_shape=out_shape,
        compiler_params=plgpu.CompilerParams(num_warps=num_warps, num_stages=1),
        interpret=interpret,
        name="decode_attention_join",
    )(lengths, maximum, total, mixed)


def _join_kernel(
    length_ref,  # [] int32
    maximum_ref,  # [chunks] f32
    total_ref,  # [chunks] f32
    mixed_ref,  # [chunks, block_dim] f32
    out_ref,  # [block_dim]
    *sum_ref,  # one [] f32, of a problem that weighs blocks
    problem: Problem,
    interpret: bool,
):
    position = length_ref[...] + registers.start_next(pl.program_id(1), interpret=interpret)
    first, end = problem.first_seen(position), problem.end_of_seen(position)

    def load(chunk):
        seen = (problem.first_slot(chunk) < end) & (problem.first_slot(chunk + 1) > first)
        wide = jnp.broadcast_to(seen, (problem.block_dim,))
        # What was not written may hold anything, so it is not read.
        maximum = plgpu.load(maximum_ref.at[chunk], mask=seen, other=-jnp.inf)
        total = plgpu.load(total_ref.at[chunk], mask=seen, other=0.0)
        return maximum, total, plgpu.load(mixed_ref.at[chunk, :], mask=wide, other=0.0)

    def join(step, carry):
        maximum, total, mixed = carry
        chunks = [load(step * CHUNKS + place) for place in range(CHUNKS)]  # all of which are on their way at once
        raised = functools.reduce(jnp.maximum, (logit for logit, _, _ in chunks), maximum)
        shift = jnp.where(raised == -jnp.inf, 0.0, raised)  # nothing seen yet: -inf - -inf is not a number
        kept = jnp.exp(maximum - shift)
        total, mixed = total * kept, mixed * kept
        # No thread needs what another one has, so the order is the same for any number of them.
        for logit, of_chunk, mixture in chunks:
            weight = jnp.exp(logit - shift)
            total, mixed = total + weight * of_chunk, mixed + weight * mixture
        return raised, total, mixed

    # As many steps as the token needs: the same program for any number of slots.
    num_steps = 1 + lax.div(problem.chunk_of(end - 1), CHUNKS)
    maximum, total, mixed = lax.fori_loop(0, num_steps, join, nothing((), problem))
    out = mixed / jnp.where(total > 0, total, 1.0)
    exists = lax.broadcasted_iota(jnp.int32, out.shape, 0) < problem.head_dim
    plgpu.store(out_ref, out.astype(out_ref.dtype), mask=exists)
    if sum_ref:
        sum_ref[0][...] = jnp.where(total > 0, maximum + jnp.log(total), 0.0)
