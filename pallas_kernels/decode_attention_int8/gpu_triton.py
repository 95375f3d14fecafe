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
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32, Int32

from pallas_kernels.arrays.int8_cache import KEY_BLOCK, RING, Int8Cache
from pallas_kernels.backends.triton import registers
from pallas_kernels.block_attention import gpu_triton as blockwise
from pallas_kernels.decode_attention import gpu_triton as whole
from pallas_kernels.decode_attention.reference import BLOCK
from pallas_kernels.decode_attention_int8 import gpu_triton_blocks as listed
from pallas_kernels.decode_attention_int8.triton_arrays import (
    arrays_read,
    by_heads,
    codes_as_floats,
    values_as_floats,
)
from pallas_kernels.decode_attention_int8.triton_tiles import (
    GROUP,
    Carry,
    Rows,
    Values,
    half_of,
    nothing,
    results_of,
)

_TILE_BYTES = 16384  # of keys, and of values, as floats
FURTHER_SEQUENCES = True


@dataclasses.dataclass(frozen=True)
class Tuning:
    """How the work is cut; results with one are those of all calls with it, but not those with another."""

    tile: int = 64  # slots
    chunks: tuple[int, int] = (128, 256)
    num_warps: int = 4
    num_stages: int = 3
    most_groups: int = 4  # of 8 rows, of a program


@dataclasses.dataclass(frozen=True)
class _Problem(whole.Problem):
    """What both kernels know of the call."""

    dtype: DTypeLike = jnp.bfloat16
    interpret: bool = False
    tuning: Tuning = Tuning()

    @property
    def tile(self) -> int:
        """Slots of a tile: divides every chunk, a block of keys, and the ring."""
        return min(self.tuning.tile, _TILE_BYTES // (self.block_dim * jnp.dtype(self.dtype).itemsize))

    @property
    def groups(self) -> int:
        """Of 8 rows, that a program has."""
        return min(self.tuning.most_groups, pl.cdiv(self.num_rows, GROUP))

    @property
    def rows(self) -> int:
        return self.groups * GROUP

    @property
    def chunk_sizes(self) -> tuple[int, int, int]:
        return *self.tuning.chunks, self.tuning.chunks[-1]

    @property
    def half(self) -> DTypeLike:
        return half_of(self.dtype)


def obstacle(num_tokens: int, head_dim: int, *, blocks: bool = False) -> str | None:
    """Why these kernels cannot serve a call, as the end of a sentence; None if they can."""
    return (blockwise if blocks else whole).obstacle(num_tokens, head_dim)


def decode_attention_int8(
    query: Float[Array, "B_all T H HD"],
    cache: Int8Cache,
    lengths: Int32[Array, " B"],
    *,
    window: int | None,
    interpret: bool = False,
) -> Float[Array, "B_all T H HD"]:
    """See the public function."""
    registers.ignore_triton_deprecation()
    return _attend(query, cache, lengths, window=window, interpret=interpret)


def decode_attention_int8_with_masses(
    query: Float[Array, "B_all T H HD"],
    cache: Int8Cache,
    lengths: Int32[Array, " B"],
    *,
    block_size: int,
    window: int | None,
    interpret: bool = False,
) -> tuple[Float[Array, "B_all T H HD"], Float32[Array, "B KH blocks"]]:
    """See the public function."""
    registers.ignore_triton_deprecation()
    return _attend_and_weigh(query, cache, lengths, block_size=block_size, window=window, interpret=interpret)


def block_attention_int8(
    query: Float[Array, "B_all T H HD"],
    cache: Int8Cache,
    lengths: Int32[Array, " B"],
    blocks: Int32[Array, "B L KH N"],
    layer: Int32[Array, ""],
    *,
    block_size: int,
    window: int | None,
    interpret: bool = False,
) -> Float[Array, "B_all T H HD"]:
    """See the public function."""
    registers.ignore_triton_deprecation()
    options = {"block_size": block_size, "window": window, "interpret": interpret}
    return listed.block_attention_int8(query, cache, lengths, blocks, layer, **options)


# Jits of their own, so that a program with many layers lowers the kernels once per shape.
@functools.partial(jax.jit, static_argnames=("window", "interpret", "tuning"))
def _attend(
    query: Array,
    cache: Int8Cache,
    lengths: Array,
    *,
    window: int | None,
    interpret: bool,
    tuning: Tuning | None = None,
) -> Array:
    problem = _problem_of(query, cache, window, interpret=interpret, tuning=tuning)
    chunks = _attend_to_chunks(query, cache, lengths, problem=problem)
    [out] = whole.join_chunks(lengths, *chunks, problem=problem, query=query, interpret=interpret)
    return out


@functools.partial(jax.jit, static_argnames=("block_size", "window", "interpret", "tuning"))
def _attend_and_weigh(
    query: Array,
    cache: Int8Cache,
    lengths: Array,
    *,
    block_size: int,
    window: int | None,
    interpret: bool,
    tuning: Tuning | None = None,
) -> tuple[Array, Array]:
    problem = _problem_of(query, cache, window, interpret=interpret, tuning=tuning)
    problem = dataclasses.replace(problem, weigh_blocks=True)
    *chunks, block_sums = _attend_to_chunks(query, cache, lengths, problem=problem)
    out, sums = whole.join_chunks(lengths, *chunks, problem=problem, query=query, interpret=interpret)
    settings = {"block_size": block_size, "problem": problem, "interpret": interpret}
    return out, whole.weigh_blocks(lengths, sums, block_sums, **settings)


def _problem_of(
    query: Array, cache: Int8Cache, window: int | None, *, interpret: bool, tuning: Tuning | None
) -> _Problem:
    _, num_tokens, num_heads, head_dim = query.shape
    slots = cache.keys.shape[1]
    sizes = num_tokens, num_heads, cache.num_kv_heads, head_dim, slots, window
    tuning = tuning or _usual_tuning(head_dim, query.dtype)
    return _Problem(*sizes, dtype=query.dtype, interpret=interpret, tuning=tuning)


def _usual_tuning(head_dim: int, dtype: jnp.dtype) -> Tuning:
    """The fastest of eleven on an H200 for 32 sequences of 4,096 slots; of other heads, what was found right there."""
    return Tuning(tile=32, chunks=(256, 256), num_warps=2) if head_dim == 128 and dtype.itemsize == 2 else Tuning()


def _attend_to_chunks(query: Array, cache: Int8Cache, lengths: Array, *, problem: _Problem) -> tuple[Array, ...]:
    """As of ``decode_attention``."""
    batch, tuning = lengths.shape[0], problem.tuning
    out_specs, out_shape = whole.results_of_chunks(problem, batch)
    return pl.pallas_call(
        functools.partial(_chunk_kernel, problem=problem),
        grid=(problem.num_kv_heads * problem.row_blocks, problem.num_chunks, batch),
        in_specs=[pl.BlockSpec((None,), lambda program, chunk, sequence: (sequence,)), *arrays_read(problem)],
        out_specs=out_specs,
        out_shape=out_shape,
        compiler_params=plgpu.CompilerParams(num_warps=tuning.num_warps, num_stages=tuning.num_stages),
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
    maximum_ref,  # [rows] f32
    total_ref,  # [rows] f32
    mixed_ref,  # [rows, block_dim] f32
    *block_sums_ref,  # one [blocks, rows] f32, of a problem that weighs blocks
    problem: _Problem,
):
    chunk = registers.start_next(pl.program_id(1), interpret=problem.interpret)
    program, length = pl.program_id(0), length_ref[...]
    kv_head, row_block = (part(program, problem.row_blocks) for part in (lax.div, lax.rem))
    last = length + (problem.num_tokens - 1)

    # Of int8, whole tiles up to the block of the last token; of the ring, from the block of the first token on.
    begin, end = problem.first_slot(chunk), jnp.minimum(problem.first_slot(chunk + 1), problem.end_of_seen(last))
    first, tile = jnp.maximum(begin, problem.first_seen(length)), problem.tile
    end_of_int8 = jnp.minimum(end, _begin_of_block(last))
    tiles_of_int8 = lax.div(first, tile), lax.div(end_of_int8, tile)
    first_of_ring = lax.div(jnp.maximum(first, _begin_of_block(length)), tile)

    @pl.when(first < end)
    def _():
        places = [row_block * problem.rows + group * GROUP for group in range(problem.groups)]
        groups = [Rows.load(query_ref, place, length, kv_head, problem) for place in places]
        refs = keys_ref, scales_ref, recent_ref, values_ref, value_scales_ref
        tiles = _Tiles(*refs, groups, end, block_sums_ref[0] if block_sums_ref else None, row_block, problem)
        carry = lax.fori_loop(*tiles_of_int8, tiles.attend_to_int8, [nothing(tile, problem)] * problem.groups)
        # No loop that would be unrolled into stages: its keys are twice as wide, and it has few tiles.
        _, carry = lax.while_loop(
            lambda carry: carry[0] * tile < end,
            lambda carry: (carry[0] + 1, tiles.attend_to_ring(carry[0], carry[1])),
            (first_of_ring, carry),
        )
        for number, (rows, one) in enumerate(zip(groups, carry, strict=True)):
            for ref, result in zip((maximum_ref, total_ref, mixed_ref), results_of(one), strict=True):
                mask = rows.exist if result.ndim == 1 else jnp.broadcast_to(rows.exist[:, None], result.shape)
                plgpu.store(ref.at[pl.ds(number * GROUP, GROUP)], result, mask=mask)


def _begin_of_block(position: Array) -> Array:
    return lax.div(position, KEY_BLOCK) * KEY_BLOCK


@dataclasses.dataclass(frozen=True)
class _Tiles:
    """What the rows of a program make of tiles of a chunk."""

    keys_ref: registers.Ref
    scales_ref: registers.Ref
    recent_ref: registers.Ref
    values_ref: registers.Ref
    value_scales_ref: registers.Ref
    groups: list[Rows]
    end: Array  # from where on no row sees any more
    sums_ref: registers.Ref | None
    row_block: Array
    problem: _Problem

    def attend_to_int8(self, tile: Array, carry: list[Carry]) -> list[Carry]:
        """Of keys of whole blocks, all of which exist."""
        problem = self.problem
        start = tile * problem.tile
        scales = self._row(self.scales_ref, lax.div(start, KEY_BLOCK))
        keys = codes_as_floats(self._codes(self.keys_ref, start), problem.half, interpret=problem.interpret)

        def logits_of(rows: Rows) -> tuple[Array, Array]:
            logits = rows.logits_of_codes(keys, scales)
            # Also where one token sees all: without the choice, a product and a sum would be rounded only once.
            here = start < _begin_of_block(rows.positions)
            seen = jnp.broadcast_to(here[None, :], logits.shape)
            if problem.window is not None:
                slots = start + lax.broadcasted_iota(jnp.int32, logits.shape, 0)
                seen &= slots >= problem.first_seen(rows.positions[None, :])
            return jnp.where(seen, logits, -jnp.inf), here

        value_scales = plgpu.load(self.value_scales_ref.at[pl.ds(start, problem.tile)])
        return self._attend(start, logits_of, self._codes(self.values_ref, start), value_scales, carry)

    def attend_to_ring(self, tile: Array, carry: list[Carry]) -> list[Carry]:
        """Of the newest keys."""
        problem = self.problem
        start, count = tile * problem.tile, problem.tile
        slot = lax.rem(start, RING)
        keys = whole.load_slots(self.recent_ref, slot, slot + (self.end - start), count, problem)

        def logits_of(rows: Rows) -> tuple[Array, Array]:
            logits = rows.logits(keys)
            here = start >= _begin_of_block(rows.positions)
            slots, positions = start + lax.broadcasted_iota(jnp.int32, logits.shape, 0), rows.positions[None, :]
            seen = (slots >= problem.first_seen(positions)) & (slots <= positions) & (slots < self.end)
            return jnp.where(seen & here[None, :], logits, -jnp.inf), here

        codes = whole.load_slots(self.values_ref, start, self.end, count, problem)
        exist = start + lax.broadcasted_iota(jnp.int32, (count,), 0) < self.end
        scales = plgpu.load(self.value_scales_ref.at[pl.ds(start, count)], mask=exist, other=1.0)
        return self._attend(start, logits_of, codes, scales, carry)

    def _attend(
        self,
        start: Array,
        logits_of: Callable[[Rows], tuple[Array, Array]],
        codes: Array,
        scales: Array,
        carry: list[Carry],
    ) -> list[Carry]:
        """What is carried on, with the logits of each group and whether its rows see the tile in this form."""
        problem = self.problem
        # Before the values, so that keys are not kept beside these.
        logits = [logits_of(rows) for rows in self.groups]
        floats = values_as_floats(codes, problem.half, always=self.end > 0, interpret=problem.interpret)
        values, results = Values.of(floats, scales, interpret=problem.interpret), []
        for number, ((seen, here), before) in enumerate(zip(logits, carry, strict=True)):
            result, weights, shift = values.add_to(before, seen)
            results.append(result)
            if self.sums_ref is not None and number * GROUP < problem.weighed_rows:
                self._store_sums(self.sums_ref, start, number, weights, shift, here)
        return results

    def _store_sums(
        self, ref: registers.Ref, start: Array, number: int, weights: Array, shift: Array, here: Array
    ) -> None:
        """As ``decode_attention`` does, of the rows that see the tile in this form."""
        problem = self.problem
        count = problem.tile // BLOCK
        sums = jnp.sum(weights.reshape(count, BLOCK, GROUP), axis=1)
        first, shape = lax.div(start, BLOCK), (count, GROUP)
        weighs = self.row_block * problem.rows + number * GROUP < problem.weighed_rows
        mask = weighs & (first + lax.broadcasted_iota(jnp.int32, shape, 0) < problem.num_blocks)
        mask &= jnp.broadcast_to(here[None, :], shape)
        place = ref.at[pl.ds(first, count), pl.ds(number * GROUP, GROUP)]
        plgpu.store(place, jnp.log(sums) + (shift * jnp.float32(registers.LN_2))[None, :], mask=mask)

    def _codes(self, ref: registers.Ref, start: Array) -> Array:
        """Those of a tile ``[tile, block_dim]``, all of whose slots exist."""
        problem = self.problem
        here, shape = ref.at[pl.ds(start, problem.tile), :], (problem.tile, problem.block_dim)
        if problem.block_dim == problem.head_dim:
            return plgpu.load(here)
        mask = lax.broadcasted_iota(jnp.int32, shape, 1) < problem.head_dim
        return plgpu.load(here, mask=mask, other=jnp.zeros((), ref.dtype))

    def _row(self, ref: registers.Ref, row: Array) -> Array:
        """A row of scales ``[block_dim]``."""
        if self.problem.block_dim == self.problem.head_dim:
            return plgpu.load(ref.at[row, :])
        dims = lax.broadcasted_iota(jnp.int32, (self.problem.block_dim,), 0)
        return plgpu.load(ref.at[row, :], mask=dims < self.problem.head_dim, other=0.0)
