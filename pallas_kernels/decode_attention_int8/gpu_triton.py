"""``decode_attention_int8`` as Pallas Triton kernels for NVIDIA GPUs (compute capability 8.0 and newer).

Split along the cache as ``decode_attention`` is, whose second kernel puts the chunks together. A tile of int8 keys
becomes floats in registers. Its scales multiply the queries, once for a tile, and those of values the weights, so that
tensor cores multiply what memory holds.

Row invariance: a tile of 64 slots lies in one block of keys, of which a row sees all as int8 or all from the ring. A
program goes through its tiles of int8 first and then through those of the ring, which only come after them, and a row
that does not see a tile in this form adds zero. So every row goes through the tiles in the order of their positions.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, Float32, Int32

from pallas_kernels.arrays.int8_cache import KEY_BLOCK, RING, Int8Cache
from pallas_kernels.backends.triton import registers
from pallas_kernels.block_attention import gpu_triton as blockwise
from pallas_kernels.decode_attention import gpu_triton as whole
from pallas_kernels.decode_attention.gpu_triton import ROWS
from pallas_kernels.decode_attention.reference import BLOCK
from pallas_kernels.decode_attention_int8 import gpu_triton_blocks as listed
from pallas_kernels.decode_attention_int8.triton_arrays import arrays_read, by_heads, values_as_floats

_TILE_BYTES = 16384  # of keys, and of values, as floats
# 140 registers of a thread let three programs run at a time: each loads two tiles ahead.
_WARPS, _STAGES = 4, 3


@dataclasses.dataclass(frozen=True)
class _Problem(whole.Problem):
    """What both kernels know of the call."""

    itemsize: int = 2
    interpret: bool = False

    @property
    def tile(self) -> int:
        """Slots of a tile: divides every chunk, a block of keys, and the ring."""
        return min(64, _TILE_BYTES // (self.block_dim * self.itemsize))


def obstacle(num_tokens: int, head_dim: int, *, blocks: bool = False) -> str | None:
    """Why these kernels cannot serve a call, as the end of a sentence; None if they can."""
    return (blockwise if blocks else whole).obstacle(num_tokens, head_dim)


def decode_attention_int8(
    query: Float[Array, "B T H HD"],
    cache: Int8Cache,
    lengths: Int32[Array, " B"],
    *,
    window: int | None,
    interpret: bool = False,
) -> Float[Array, "B T H HD"]:
    """See the public function."""
    registers.ignore_triton_deprecation()
    return _attend(query, cache, lengths, window=window, interpret=interpret)


def decode_attention_int8_with_masses(
    query: Float[Array, "B T H HD"],
    cache: Int8Cache,
    lengths: Int32[Array, " B"],
    *,
    block_size: int,
    window: int | None,
    interpret: bool = False,
) -> tuple[Float[Array, "B T H HD"], Float32[Array, "B KH blocks"]]:
    """See the public function."""
    registers.ignore_triton_deprecation()
    return _attend_and_weigh(query, cache, lengths, block_size=block_size, window=window, interpret=interpret)


def block_attention_int8(
    query: Float[Array, "B T H HD"],
    cache: Int8Cache,
    lengths: Int32[Array, " B"],
    blocks: Int32[Array, "B L KH N"],
    layer: Int32[Array, ""],
    *,
    block_size: int,
    window: int | None,
    interpret: bool = False,
) -> Float[Array, "B T H HD"]:
    """See the public function."""
    registers.ignore_triton_deprecation()
    options = {"block_size": block_size, "window": window, "interpret": interpret}
    return listed.block_attention_int8(query, cache, lengths, blocks, layer, **options)


# Jits of their own, so that a program with many layers lowers the kernels once per shape.
@functools.partial(jax.jit, static_argnames=("window", "interpret"))
def _attend(query: Array, cache: Int8Cache, lengths: Array, *, window: int | None, interpret: bool) -> Array:
    problem = _problem_of(query, cache, window, interpret=interpret)
    chunks = _attend_to_chunks(query, cache, lengths, problem=problem)
    [out] = whole.join_chunks(lengths, *chunks, problem=problem, dtype=query.dtype, interpret=interpret)
    return out


@functools.partial(jax.jit, static_argnames=("block_size", "window", "interpret"))
def _attend_and_weigh(
    query: Array, cache: Int8Cache, lengths: Array, *, block_size: int, window: int | None, interpret: bool
) -> tuple[Array, Array]:
    problem = dataclasses.replace(_problem_of(query, cache, window, interpret=interpret), weigh_blocks=True)
    *chunks, block_sums = _attend_to_chunks(query, cache, lengths, problem=problem)
    out, sums = whole.join_chunks(lengths, *chunks, problem=problem, dtype=query.dtype, interpret=interpret)
    settings = {"block_size": block_size, "problem": problem, "interpret": interpret}
    return out, whole.weigh_blocks(lengths, sums, block_sums, **settings)


def _problem_of(query: Array, cache: Int8Cache, window: int | None, *, interpret: bool) -> _Problem:
    _, num_tokens, num_heads, head_dim = query.shape
    slots = cache.keys.shape[1]
    sizes = num_tokens, num_heads, cache.num_kv_heads, head_dim, slots, window
    return _Problem(*sizes, itemsize=query.dtype.itemsize, interpret=interpret)


def _attend_to_chunks(query: Array, cache: Int8Cache, lengths: Array, *, problem: _Problem) -> tuple[Array, ...]:
    """As of ``decode_attention``."""
    batch = query.shape[0]
    out_specs, out_shape = whole.results_of_chunks(problem, batch)
    return pl.pallas_call(
        functools.partial(_chunk_kernel, problem=problem),
        grid=(problem.num_kv_heads * problem.row_blocks, problem.num_chunks, batch),
        in_specs=[pl.BlockSpec((None,), lambda program, chunk, sequence: (sequence,)), *arrays_read(problem)],
        out_specs=out_specs,
        out_shape=out_shape,
        compiler_params=plgpu.CompilerParams(num_warps=_WARPS, num_stages=_STAGES),
        interpret=problem.interpret,
        name="decode_attention_int8_chunks" + "_and_blocks" * problem.weigh_blocks,
    )(lengths, query, *by_heads(cache))


def _chunk_kernel(
    length_ref,  # [] int32
    query_ref,  # [T, H, HD]
    keys_ref,  # [S, block_dim] int8
    scales_ref,  # [NB, block_dim] f32
    recent_ref,  # [RING, block_dim]
    values_ref,  # [S, block_dim] int8
    value_scales_ref,  # [S] f32
    maximum_ref,  # [16] f32
    total_ref,  # [16] f32
    mixed_ref,  # [16, block_dim] f32
    *block_sums_ref,  # one [blocks, 16] f32, of a problem that weighs blocks
    problem: _Problem,
):
    program, chunk, length = pl.program_id(0), pl.program_id(1), length_ref[...]
    kv_head, row_block = (part(program, problem.row_blocks) for part in (lax.div, lax.rem))
    rows = row_block * ROWS + lax.broadcasted_iota(jnp.int32, (ROWS,), 0)
    exists, positions = rows < problem.num_rows, length + lax.div(rows, problem.group)
    last = length + (problem.num_tokens - 1)

    # Of int8, whole tiles up to the block of the last token; of the ring, from the block of the first token on.
    begin, end = whole.first_slot(chunk), jnp.minimum(whole.first_slot(chunk + 1), problem.end_of_seen(last))
    first, tile = jnp.maximum(begin, problem.first_seen(length)), problem.tile
    tiles_of_int8 = lax.div(first, tile), lax.div(jnp.minimum(end, _begin_of_block(last)), tile)
    tiles_of_ring = lax.div(jnp.maximum(first, _begin_of_block(length)), tile), lax.div(end + (tile - 1), tile)

    @pl.when(first < end)
    def _():
        query = whole.load_rows(query_ref, rows, exists, kv_head, problem)
        tiles = _Tiles(
            keys_ref,
            scales_ref,
            recent_ref,
            values_ref,
            value_scales_ref,
            query,
            positions,
            end,
            block_sums_ref[0] if block_sums_ref else None,
            row_block * ROWS < problem.weighed_rows,
            problem,
        )
        results = lax.fori_loop(*tiles_of_int8, tiles.attend_to_int8, whole.nothing((ROWS,), problem))
        results = lax.fori_loop(*tiles_of_ring, tiles.attend_to_ring, results)
        for ref, result in zip((maximum_ref, total_ref, mixed_ref), results, strict=True):
            plgpu.store(ref, result, mask=exists if result.ndim == 1 else whole.across(exists, result.shape))


def _begin_of_block(position: Array) -> Array:
    return lax.div(position, KEY_BLOCK) * KEY_BLOCK


_Carry = tuple[Array, Array, Array]  # maximum [16], total [16], mixed [16, block_dim] of the tiles before


@dataclasses.dataclass(frozen=True)
class _Tiles:
    """What 16 rows make of tiles of a chunk."""

    keys_ref: registers.Ref
    scales_ref: registers.Ref
    recent_ref: registers.Ref
    values_ref: registers.Ref
    value_scales_ref: registers.Ref
    query: Array  # [16, block_dim]
    positions: Array  # [16]
    end: Array  # from where on no row sees any more
    sums_ref: registers.Ref | None
    weighs: Array
    problem: _Problem

    def attend_to_int8(self, tile: Array, carry: _Carry) -> _Carry:
        """Of keys of whole blocks."""
        start = tile * self.problem.tile
        scales = self._row(self.scales_ref, lax.div(start, KEY_BLOCK))
        query = (self.query.astype(jnp.float32) * scales[None, :]).astype(self.query.dtype)
        codes = whole.load_slots(self.keys_ref, start, self.end, self.problem.tile, self.problem)
        return self._attend(start, query, codes.astype(query.dtype), carry, is_int8=True)

    def attend_to_ring(self, tile: Array, carry: _Carry) -> _Carry:
        """Of the newest keys."""
        start = tile * self.problem.tile
        slot = lax.rem(start, RING)
        keys = whole.load_slots(self.recent_ref, slot, slot + (self.end - start), self.problem.tile, self.problem)
        return self._attend(start, self.query, keys, carry, is_int8=False)

    def _attend(self, start: Array, query: Array, keys: Array, carry: _Carry, *, is_int8: bool) -> _Carry:
        maximum, total, mixed = carry
        problem, tile = self.problem, self.problem.tile
        shape = (ROWS, tile)
        slots, positions = (
            start + lax.broadcasted_iota(jnp.int32, shape, 1),
            whole.across(self.positions, shape),
        )
        here = start < _begin_of_block(self.positions)  # whether a row sees this tile as int8
        here = here if is_int8 else ~here
        seen = (slots >= problem.first_seen(positions)) & (slots <= positions) & (slots < self.end)
        seen &= whole.across(here, shape)
        logits = whole.dot(query, keys, contract=(1, 1)) * jnp.float32(problem.head_dim**-0.5)
        maximum, kept, weights = whole.raise_maximum(maximum, jnp.where(seen, logits, -jnp.inf))
        total = total * kept + jnp.sum(weights, axis=1)
        codes = whole.load_slots(self.values_ref, start, self.end, tile, problem)
        values = values_as_floats(codes, query.dtype, always=self.end > 0)
        exist = start + lax.broadcasted_iota(jnp.int32, (tile,), 0) < self.end
        scales = plgpu.load(self.value_scales_ref.at[pl.ds(start, tile)], mask=exist, other=0.0)
        scaled = (weights * scales[None, :]).astype(values.dtype)
        mixed = mixed * kept[:, None] + whole.dot(scaled, values, contract=(1, 0))
        if self.sums_ref is not None:
            self._store_sums(self.sums_ref, start, maximum, weights, here)
        return maximum, total, mixed

    def _store_sums(self, ref: registers.Ref, start: Array, maximum: Array, weights: Array, here: Array) -> None:
        """As ``decode_attention`` does, of the rows that see the tile in this form."""
        count = self.problem.tile // BLOCK
        sums = jnp.sum(weights.reshape(ROWS, count, BLOCK), axis=2)
        shift = jnp.where(maximum == -jnp.inf, 0.0, maximum)
        first, shape = lax.div(start, BLOCK), (count, ROWS)
        exists = first + lax.broadcasted_iota(jnp.int32, shape, 0) < self.problem.num_blocks
        mask = self.weighs & exists & jnp.broadcast_to(here[None, :], shape)
        plgpu.store(ref.at[pl.ds(first, count), :], (jnp.log(sums) + shift[:, None]).T, mask=mask)

    def _row(self, ref: registers.Ref, row: Array) -> Array:
        """A row of scales ``[block_dim]``."""
        if self.problem.block_dim == self.problem.head_dim:
            return plgpu.load(ref.at[row, :])
        dims = lax.broadcasted_iota(jnp.int32, (self.problem.block_dim,), 0)
        return plgpu.load(ref.at[row, :], mask=dims < self.problem.head_dim, other=0.0)
