"""``rotate_and_write_int8`` as a Pallas Triton kernel for NVIDIA GPUs (compute capability 8.0 and newer).

A program is one warp and takes a few heads of queries of one token, one head of its values, or some channels of a head
of keys, of all tokens. The last of these also quantises the block of which it writes the last position: its older keys
are in the ring, the new ones in registers. They are few channels, so that this takes few steps, for which all others of
the layer would wait. The arrays of the cache are aliased to the results and seen whole, so that nothing else of them is
touched or copied.
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

from pallas_kernels.arrays.int8_cache import KEY_BLOCK, RING, Int8Cache, codes_and_scales
from pallas_kernels.arrays.partial_sums import PartialSums, tree_sum
from pallas_kernels.backends.triton import registers
from pallas_kernels.backends.triton.producers import reciprocal, round_half_to_even, rounded_to

_ROWS = 32  # keys of the ring that are read at a time
_QUERIES = 4  # heads of a program
_CHANNELS = 32  # of keys, of either half of a head, of a program
FURTHER_SEQUENCES = True


def obstacle(dtype: DTypeLike | None = None) -> None:
    """Why this kernel cannot serve a call: it serves all that the public function takes."""


def rotate_and_write_int8(
    qkv: Float[Array, "B_all T heads HD"] | PartialSums,
    cosine: Float32[Array, "B T half_HD"],
    sine: Float32[Array, "B T half_HD"],
    cache: Int8Cache,
    lengths: Int32[Array, " B"],
    *,
    interpret: bool = False,
) -> tuple[Float[Array, "B_all T H HD"], Int8Cache]:
    """See the public function."""
    registers.ignore_triton_deprecation()
    return _rotate_and_write(qkv, cosine, sine, cache, lengths, interpret=interpret)


# A jit of its own, so that a program with many layers lowers the kernel once per shape.
@functools.partial(jax.jit, static_argnames="interpret")
def _rotate_and_write(
    qkv: Array | PartialSums, cosine: Array, sine: Array, cache: Int8Cache, lengths: Array, *, interpret: bool
) -> tuple[Array, Int8Cache]:
    batch, num_tokens, num_heads, head_dim = qkv.shape
    parts = qkv.parts if isinstance(qkv, PartialSums) else qkv[None]
    num_kv_heads, capacity = cache.num_kv_heads, cache.keys.shape[1]
    block_half = pl.next_power_of_2(head_dim // 2)
    block_dim = head_dim // 2 + block_half  # what a load of the second half may reach

    def whole(*sizes: int) -> pl.BlockSpec:
        return pl.BlockSpec(sizes, lambda program, token, sequence: (0,) * len(sizes))

    def part_spec(index: int) -> pl.BlockSpec:
        # One array read several times: slices of it would be copies.
        shape = (None, None, num_tokens, num_heads, block_dim)
        return pl.BlockSpec(shape, lambda program, token, sequence: (index, sequence, 0, 0, 0))

    by_heads = [
        array.reshape(*array.shape[:2], num_kv_heads, head_dim)
        for array in (cache.keys, cache.key_scales, cache.recent_keys, cache.values)
    ]
    written = [*by_heads, cache.value_scales]
    specs = [*[whole(*array.shape[:3], block_dim) for array in by_heads], whole(*cache.value_scales.shape)]
    query_shape = (batch, num_tokens, num_heads - 2 * num_kv_heads)
    turn = pl.BlockSpec((None, num_tokens, block_half), lambda program, token, sequence: (sequence, 0, 0))
    pieces = pl.cdiv(block_half, _CHANNELS)
    query, *arrays = pl.pallas_call(
        functools.partial(_kernel, num_tokens=num_tokens, half=head_dim // 2, capacity=capacity, interpret=interpret),
        grid=(pl.cdiv(query_shape[2], _QUERIES) + num_kv_heads * (1 + pieces), num_tokens, lengths.shape[0]),
        in_specs=[
            pl.BlockSpec((None,), lambda program, token, sequence: (sequence,)),
            turn,
            turn,
            *specs,
            *[part_spec(index) for index in range(len(parts))],
        ],
        out_specs=[whole(*query_shape, block_dim), *specs],
        out_shape=[
            jax.ShapeDtypeStruct((*query_shape, head_dim), qkv.dtype),
            *[jax.ShapeDtypeStruct(array.shape, array.dtype) for array in written],
        ],
        input_output_aliases={3 + index: 1 + index for index in range(len(written))},
        compiler_params=plgpu.CompilerParams(num_warps=1, num_stages=1),
        interpret=interpret,
        name="rotate_and_write_int8",
    )(lengths, cosine, sine, *written, *[parts] * len(parts))
    shapes = (cache.keys, cache.key_scales, cache.recent_keys, cache.values, cache.value_scales)
    return query, Int8Cache(*[array.reshape(like.shape) for array, like in zip(arrays, shapes, strict=True)])


def _kernel(
    length_ref,  # [] int32
    cosine_ref,  # [T, block_half] f32
    sine_ref,  # [T, block_half] f32
    *refs,  # the cache: the same memory as the results; qkv or each part of it [T, heads, block_dim]; query; the cache
    num_tokens: int,
    half: int,
    capacity: int,
    interpret: bool,
):
    *part_refs, query_ref, keys_ref, scales_ref, recent_ref, values_ref, value_scales_ref = refs[5:]
    program, token, sequence = (pl.program_id(axis) for axis in range(3))
    token = registers.start_next(token, interpret=interpret)
    (num_queries, num_kv_heads), block_half = (query_ref.shape[2], keys_ref.shape[2]), cosine_ref.shape[1]
    first_value = pl.cdiv(num_queries, _QUERIES)
    first_key = first_value + num_kv_heads
    length, dtype = length_ref[...], query_ref.dtype
    position = length + token
    new = _New(part_refs, cosine_ref, sine_ref, dtype, half, interpret)

    @pl.when(program < first_value)
    def _():
        heads = program * _QUERIES + lax.broadcasted_iota(jnp.int32, (_QUERIES, 1), 0)
        tile = _Tile(token, heads, heads < num_queries, 0, block_half, half)
        for start, part in zip((0, half), new.rotated(tile), strict=True):
            tile.store(query_ref, (sequence, token, heads), start, part.astype(dtype))

    @pl.when((program >= first_value) & (program < first_key) & (position < capacity))
    def _():
        head = program - first_value
        tile = _Tile(token, num_queries + num_kv_heads + head, jnp.full((1, 1), True), 0, block_half, half)
        halves = new.values(tile)
        magnitude = functools.reduce(jnp.maximum, [jnp.max(jnp.abs(part), axis=1) for part in halves])[:, None]
        for start, part in zip((0, half), halves, strict=True):
            codes, scale = new.code(part, jnp.broadcast_to(magnitude, part.shape))
            tile.store(values_ref, (sequence, position, head), start, codes)
        # pyrefly: ignore[unbound-name]: there are two halves
        plgpu.store(value_scales_ref.at[sequence, head, position], jnp.max(scale))

    @pl.when((program >= first_key) & (token == 0))
    def _():
        head, piece = (part(program - first_key, pl.cdiv(block_half, _CHANNELS)) for part in (lax.div, lax.rem))
        tokens = lax.broadcasted_iota(jnp.int32, (pl.next_power_of_2(num_tokens), 1), 0)
        channels = min(_CHANNELS, block_half)
        tile = _Tile(tokens, num_queries + head, tokens < num_tokens, piece * channels, channels, half)
        keys = [rounded_to(part, dtype, interpret=interpret) for part in new.rotated(tile)]
        for start, part in zip((0, half), keys, strict=True):
            tile.store(recent_ref, (sequence, lax.rem(length + tokens, RING), head), start, part.astype(dtype))
        end = (lax.div(length, KEY_BLOCK) + 1) * KEY_BLOCK

        @pl.when((end <= length + num_tokens) & (end <= capacity))
        def _():
            arrays = keys_ref, scales_ref, recent_ref
            for start, part in zip((0, half), keys, strict=True):
                _quantise_block(*arrays, part, tile, (length, end), (sequence, head), code=new.code, start=start)


@dataclasses.dataclass(frozen=True)
class _Tile:
    """Tokens or heads, by channels of either half of a head."""

    tokens: Array  # [] or [rows, 1]
    heads: Array  # [] or [rows, 1]
    exist: Array  # [rows, 1]
    first: Array | int  # of the channels
    channels: int
    half: int

    @property
    def shape(self) -> tuple[int, int]:
        return self.exist.shape[0], self.channels

    def load(self, ref: registers.Ref, where: tuple[Array, ...], start: int) -> Array:
        """``[rows, channels]`` of a half that begins at ``start``, with zeros where there are none."""
        place, mask = self._place(ref, where, start)
        return plgpu.load(place, mask=mask, other=jnp.zeros((), ref.dtype))

    def store(self, ref: registers.Ref, where: tuple[Array, ...], start: int, values: Array) -> None:
        place, mask = self._place(ref, where, start)
        plgpu.store(place, values, mask=mask)

    def _place(self, ref: registers.Ref, where: tuple[Array, ...], start: int) -> tuple[registers.Ref, Array]:
        columns = self.first + lax.broadcasted_iota(jnp.int32, self.shape, 1)
        mask = jnp.broadcast_to(self.exist, self.shape) & (columns < self.half)
        return ref.at[(*[jnp.broadcast_to(index, self.shape) for index in where], start + columns)], mask


@dataclasses.dataclass(frozen=True)
class _New:
    """What is new, as float32 halves of a tile."""

    part_refs: list[registers.Ref]  # [T, heads, block_dim]
    cosine_ref: registers.Ref
    sine_ref: registers.Ref
    dtype: DTypeLike
    half: int
    interpret: bool

    def values(self, tile: _Tile) -> tuple[Array, Array]:
        """Both halves as they come."""

        def load_sum(start: int) -> Array:
            loaded = [tile.load(ref, (tile.tokens, tile.heads), start) for ref in self.part_refs]
            total = tree_sum([part.astype(jnp.float32) for part in loaded])
            return total if len(loaded) == 1 else rounded_to(total, self.dtype, interpret=self.interpret)

        return load_sum(0), load_sum(self.half)

    def rotated(self, tile: _Tile) -> tuple[Array, Array]:
        """Both halves, rotated."""
        first, second = self.values(tile)
        cosine, sine = (tile.load(ref, (tile.tokens,), 0) for ref in (self.cosine_ref, self.sine_ref))
        return first * cosine - second * sine, second * cosine + first * sine

    def code(self, x: Array, magnitude: Array) -> tuple[Array, Array]:
        """Codes and scales."""
        options = {"interpret": self.interpret}
        spelled = functools.partial(reciprocal, **options), functools.partial(round_half_to_even, **options)
        return codes_and_scales(x, magnitude, reciprocal=spelled[0], rounding=spelled[1])


def _quantise_block(
    keys_ref: registers.Ref,  # [B, S, KH, block_dim] int8
    scales_ref: registers.Ref,  # [B, NB, KH, block_dim] f32
    recent_ref: registers.Ref,  # [B, RING, KH, block_dim]
    new: Array,  # [tokens, channels] f32, the new keys as the dtype holds them
    tile: _Tile,  # that of the new keys
    bounds: tuple[Array, Array],  # positions before the new ones, and the end of the block
    where: tuple[Array, Array],  # the sequence and its head
    *,
    code: Callable[..., tuple[Array, Array]],
    start: int,
) -> None:
    """The codes and scales of some channels of half of a head in a block: its older keys come from the ring."""
    (sequence, head), (length, end) = where, bounds
    added = dataclasses.replace(tile, exist=tile.exist & (tile.tokens < end - length))
    new = jnp.where(jnp.broadcast_to(added.exist, new.shape), new, 0.0)
    first = end - KEY_BLOCK

    def older(step: Array) -> tuple[_Tile, Array]:
        positions = first + step * _ROWS + lax.broadcasted_iota(jnp.int32, (_ROWS, 1), 0)
        rows = dataclasses.replace(tile, tokens=positions, exist=positions < length)
        return rows, rows.load(recent_ref, (sequence, lax.rem(positions, RING), head), start).astype(jnp.float32)

    def largest(step: Array, magnitude: Array) -> Array:
        return jnp.maximum(magnitude, jnp.max(jnp.abs(older(step)[1]), axis=0))

    steps = lax.div(length - first + (_ROWS - 1), _ROWS)
    magnitude = lax.fori_loop(0, steps, largest, jnp.max(jnp.abs(new), axis=0))[None, :]

    def store_older(step: Array, carry: Array) -> Array:
        rows, keys = older(step)
        codes, _ = code(keys, jnp.broadcast_to(magnitude, keys.shape))
        rows.store(keys_ref, (sequence, rows.tokens, head), start, codes)
        return carry

    lax.fori_loop(0, steps, store_older, 0)
    codes, scales = code(new, jnp.broadcast_to(magnitude, new.shape))
    added.store(keys_ref, (sequence, length + tile.tokens, head), start, codes)
    once = dataclasses.replace(tile, exist=jnp.full((1, 1), True))
    once.store(scales_ref, (sequence, lax.div(end, KEY_BLOCK) - 1, head), start, jnp.max(scales, axis=0)[None, :])
