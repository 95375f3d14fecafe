"""Attention of pieces of prompts over a cache of int8, as a Pallas Triton kernel (compute capability 8.0 and newer).

A program attends from up to 64 rows, the queries of one key/value head in neighbouring tokens of a piece. They lie in
one block of keys: so they see all blocks before it as int8, which are not masked, and of its own block the new keys.
Codes become float16 in registers; scales of keys multiply the queries, once for a tile, and those of values the
weights, as in ``decode_attention_int8``.

Row invariance: slots are read in tiles from multiples of their size on, in order; a tile that a row does not see leaves
what it has summed as it is, bit for bit; and a tile has as many rows whatever there is to do.
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
from jaxtyping import Array, Float, Int32

from pallas_kernels.arrays.int8_cache import KEY_BLOCK, Int8Cache
from pallas_kernels.backends.triton import registers
from pallas_kernels.backends.triton.registers import LOG2_E, exp2, log2
from pallas_kernels.decode_attention import gpu_triton as decode
from pallas_kernels.decode_attention.gpu_triton_tiles import load_rows, load_slots, store_rows
from pallas_kernels.decode_attention_int8.triton_arrays import by_heads, codes_as_floats
from pallas_kernels.decode_attention_int8.triton_tiles import KEY_UNIT, VALUE_UNIT, half_of, power_of_two

ALIKE = True
_ROWS = 64  # of a tile
_MAX_HEAD_DIM = 256  # of 16 bits
_SLOTS = 64  # of a tile: a divisor of a block of keys
_TILE_BYTES = 16384  # of keys, and of values, as floats, that a program holds

Carry = tuple[Array, Array, Array]  # maximum [rows], total [rows], mixed [rows, block_dim] of the tiles before


def obstacle(head_dim: int, dtype: DTypeLike) -> str | None:
    """Why this kernel cannot serve a call, as the end of a sentence; None if it can."""
    most = _MAX_HEAD_DIM * 2 // jnp.dtype(dtype).itemsize  # queries and their products with scales: 99 KB on Ada
    if head_dim > most:
        return f"needs a head dimension of at most {most} in {jnp.dtype(dtype).name}; this is {head_dim}"
    return None


def prefill_attention_int8(
    query: Float[Array, "N T H HD"],
    new_keys: Float[Array, "N T W"],
    cache: Int8Cache,
    rows: Int32[Array, " N"],
    starts: Int32[Array, " N"],
    *,
    window: int | None,
    interpret: bool = False,
) -> Float[Array, "N T H HD"]:
    """See the reference."""
    registers.ignore_triton_deprecation()
    return _attend(query, new_keys, cache, rows, starts, window=window, interpret=interpret)


# A jit of its own, so that a program with many layers lowers the kernel once per shape.
@functools.partial(jax.jit, static_argnames=("window", "interpret"))
def _attend(
    query: Array,
    new_keys: Array,
    cache: Int8Cache,
    rows: Array,
    starts: Array,
    *,
    window: int | None,
    interpret: bool,
) -> Array:
    (pieces, num_tokens, num_heads, head_dim), (batch, slots, _) = query.shape, cache.keys.shape
    problem = decode.Problem(num_tokens, num_heads, cache.num_kv_heads, head_dim, slots, window)
    num_tiles, block_dim = pl.cdiv(problem.num_rows, _ROWS), problem.block_dim
    piece = pl.BlockSpec((None, num_tokens, num_heads, block_dim), lambda program, piece: (piece, 0, 0, 0))
    number = pl.BlockSpec((None,), lambda program, piece: (piece,))

    def of_head(*sizes: int) -> pl.BlockSpec:
        return pl.BlockSpec(
            (*sizes, None, block_dim), lambda program, piece: (*[0] * len(sizes), lax.div(program, num_tiles), 0)
        )

    keys, key_scales, _, values, value_scales = by_heads(cache)
    return pl.pallas_call(
        functools.partial(_kernel, problem=problem, interpret=interpret),
        # Programs that read the same slots stand next to each other.
        grid=(cache.num_kv_heads * num_tiles, pieces),
        in_specs=[
            *(number, number, piece),
            *(of_head(pieces * num_tokens), of_head(batch, slots), of_head(batch, key_scales.shape[1])),
            of_head(batch, slots),
            pl.BlockSpec((batch, None, slots), lambda program, piece: (0, lax.div(program, num_tiles), 0)),
        ],
        out_specs=piece,
        out_shape=jax.ShapeDtypeStruct(query.shape, query.dtype),
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=2 if block_dim < 256 else 1),
        interpret=interpret,
        name="prefill_attention_int8",
    )(
        *(rows, starts, query, new_keys.reshape(pieces * num_tokens, cache.num_kv_heads, head_dim)),
        *(keys, key_scales, values, value_scales),
    )


def _kernel(
    row_ref,  # [] int32
    start_ref,  # [] int32
    query_ref,  # [T, H, block_dim]
    new_keys_ref,  # [N * T, block_dim]
    keys_ref,  # [B, S, block_dim] int8
    scales_ref,  # [B, NB, block_dim] f32
    values_ref,  # [B, S, block_dim] int8
    value_scales_ref,  # [B, S] f32
    out_ref,  # [T, H, block_dim]
    *,
    problem: decode.Problem,
    interpret: bool,
):
    row, start, group = row_ref[...], start_ref[...], problem.group
    num_tiles = pl.cdiv(problem.num_rows, _ROWS)
    kv_head, tile = (part(pl.program_id(0), num_tiles) for part in (lax.div, lax.rem))
    rows = tile * _ROWS + lax.broadcasted_iota(jnp.int32, (_ROWS,), 0)
    exist = rows < problem.num_rows
    query = load_rows(query_ref, rows, exist, kv_head, problem)

    half = half_of(query_ref.dtype)
    count = min(_SLOTS, _TILE_BYTES // (problem.block_dim * query_ref.dtype.itemsize))
    begin = lax.div(start, KEY_BLOCK) * KEY_BLOCK
    last_token = jnp.minimum(lax.div(tile * _ROWS + (_ROWS - 1), group), problem.num_tokens - 1)
    end = jnp.where(row < 0, 0, problem.end_of_seen(start + last_token))
    first_seen = problem.first_seen(start + lax.div(tile * _ROWS, group))
    wide = query.astype(jnp.float32)
    power, inverse = power_of_two(jnp.max(jnp.abs(wide), axis=1))
    unit = jnp.float32(problem.head_dim**-0.5 * LOG2_E)  # exponentials are powers of two here
    tiles = _Tiles(
        refs=(new_keys_ref, keys_ref, scales_ref, values_ref, value_scales_ref),
        query=query,
        normal=wide * inverse[:, None],
        unit=unit,
        units=power * (unit * jnp.float32(1 / KEY_UNIT)),
        positions=jnp.broadcast_to((start + lax.div(rows, group))[:, None], (_ROWS, count)),
        row=jnp.maximum(row, 0),
        # The block begins so many new keys before those of this piece.
        before=pl.program_id(1) * problem.num_tokens - start,
        end=end,
        half=half,
        problem=problem,
        interpret=interpret,
    )
    of_int8 = lax.div(first_seen, count), lax.div(jnp.minimum(begin, end), count)
    carry = lax.fori_loop(*of_int8, tiles.attend_to_int8, decode.nothing((_ROWS,), problem))
    of_new = lax.div(jnp.maximum(first_seen, begin), count), lax.div(end + (count - 1), count)
    _, total, mixed = lax.fori_loop(*of_new, tiles.attend_to_new, carry)
    out = mixed * (jnp.float32(1 / VALUE_UNIT) / jnp.where(total > 0, total, 1.0))[:, None]
    store_rows(out_ref, rows, exist, kv_head, problem, out)


@dataclasses.dataclass(frozen=True)
class _Tiles:
    """What the rows of a program make of tiles of slots."""

    refs: tuple[registers.Ref, ...]  # new keys; of the cache keys, their scales, values, theirs
    query: Array  # [rows, block_dim]
    normal: Array  # [rows, block_dim] f32, the same divided by powers of two
    unit: Array  # [] f32, what products with `query` are multiplied by
    units: Array  # [rows] f32, and those with `normal` and scales
    positions: Array  # [rows, slots]
    row: Array
    before: Array  # place among the new keys of position 0, if they went back that far
    end: Array  # from where on no row sees any more
    half: DTypeLike
    problem: decode.Problem
    interpret: bool

    @property
    def slots(self) -> int:
        return self.positions.shape[1]

    def attend_to_int8(self, tile: Array, carry: Carry) -> Carry:
        """Of keys of whole blocks, before that of the piece: all rows see all of them, but for a window."""
        _, keys_ref, scales_ref, values_ref, value_scales_ref = self.refs
        start = tile * self.slots
        scales = self._vector(scales_ref.at[self.row, lax.div(start, KEY_BLOCK), :])
        keys = codes_as_floats(self._codes(keys_ref, start, None), self.half, interpret=self.interpret)
        query = (self.normal * (scales * jnp.float32(KEY_UNIT))[None, :]).astype(self.half)
        logits = decode.dot(query, keys, contract=(1, 1)) * self.units[:, None]
        if self.problem.window is not None:
            slots = start + lax.broadcasted_iota(jnp.int32, logits.shape, 1)
            logits = jnp.where(slots >= self.problem.first_seen(self.positions), logits, -jnp.inf)
        value_scales = plgpu.load(value_scales_ref.at[self.row, pl.ds(start, self.slots)])
        return self._add(carry, logits, self._codes(values_ref, start, None), value_scales)

    def attend_to_new(self, tile: Array, carry: Carry) -> Carry:
        """Of keys of the block that the piece is in."""
        new_keys_ref, _, _, values_ref, value_scales_ref = self.refs
        problem, start = self.problem, tile * self.slots
        slots = start + lax.broadcasted_iota(jnp.int32, self.positions.shape, 1)
        exist = start + lax.broadcasted_iota(jnp.int32, (self.slots,), 0) < self.end
        keys = load_slots(new_keys_ref, self.before + start, self.before + self.end, self.slots, problem)
        logits = decode.dot(self.query, keys, contract=(1, 1)) * self.unit
        seen = (slots >= problem.first_seen(self.positions)) & (slots <= self.positions) & (slots < self.end)
        scales = plgpu.load(value_scales_ref.at[self.row, pl.ds(start, self.slots)], mask=exist, other=1.0)
        return self._add(carry, jnp.where(seen, logits, -jnp.inf), self._codes(values_ref, start, self.end), scales)

    def _add(self, carry: Carry, logits: Array, codes: Array, scales: Array) -> Carry:
        """What is carried on, of logits times log2(e) ``[rows, slots]`` and the values of a tile.

        Weights are relative to the largest one times the scale of its value, so that float16 holds the products.
        """
        before, total, mixed = carry
        exp2_of = functools.partial(exp2, interpret=self.interpret)
        with_scales = logits + log2(scales, interpret=self.interpret)[None, :]
        maximum = jnp.maximum(before, jnp.max(with_scales, axis=1))
        shift = jnp.where(maximum == -jnp.inf, 0.0, maximum)  # nothing seen yet: -inf - -inf is not a number
        kept, weights = exp2_of(before - shift), exp2_of(logits - shift[:, None])
        scaled = (weights * (scales * jnp.float32(VALUE_UNIT))[None, :]).astype(self.half)
        values = codes_as_floats(codes, self.half, interpret=self.interpret)
        total = total * kept + jnp.sum(weights, axis=1)
        return maximum, total, mixed * kept[:, None] + decode.dot(scaled, values, contract=(1, 0))

    def _codes(self, ref: registers.Ref, start: Array, end: Array | None) -> Array:
        return load_slots(ref, start, end, self.slots, self.problem, self.row)

    def _vector(self, place: registers.Ref) -> Array:
        """Scales ``[block_dim]``, with zeros past the head dimension."""
        if self.problem.block_dim == self.problem.head_dim:
            return plgpu.load(place)
        mask = lax.broadcasted_iota(jnp.int32, (self.problem.block_dim,), 0) < self.problem.head_dim
        return plgpu.load(place, mask=mask, other=0.0)
