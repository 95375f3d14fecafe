"""``rotate_and_write_int8`` as a Pallas Triton kernel for NVIDIA GPUs (compute capability 8.0 and newer).

A program takes one head of queries or values of one token, or one head of keys of all tokens. The last of these also
quantises the block of which it writes the last position: its older keys are in the ring, the new ones in registers. The
arrays of the cache are aliased to the results and seen whole, so that nothing else of them is touched or copied.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

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

_ROWS = 16  # keys of the ring that are read at a time


def obstacle(dtype: DTypeLike | None = None) -> None:
    """Why this kernel cannot serve a call: it serves all that the public function takes."""


def rotate_and_write_int8(
    qkv: Float[Array, "B T heads HD"] | PartialSums,
    cosine: Float32[Array, "B T half_HD"],
    sine: Float32[Array, "B T half_HD"],
    cache: Int8Cache,
    lengths: Int32[Array, " B"],
    *,
    interpret: bool = False,
) -> tuple[Float[Array, "B T H HD"], Int8Cache]:
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
        return pl.BlockSpec(sizes, lambda head, token, sequence: (0,) * len(sizes))

    def part_spec(index: int) -> pl.BlockSpec:
        # One array read several times: slices of it would be copies.
        shape = (None, None, num_tokens, None, block_dim)
        return pl.BlockSpec(shape, lambda head, token, sequence: (index, sequence, 0, head, 0))

    by_heads = [
        array.reshape(*array.shape[:2], num_kv_heads, head_dim)
        for array in (cache.keys, cache.key_scales, cache.recent_keys, cache.values)
    ]
    written = [*by_heads, cache.value_scales]
    specs = [*[whole(*array.shape[:3], block_dim) for array in by_heads], whole(batch, num_kv_heads, capacity)]
    query_shape = (batch, num_tokens, num_heads - 2 * num_kv_heads)
    turn = pl.BlockSpec((None, num_tokens, block_half), lambda head, token, sequence: (sequence, 0, 0))
    query, *arrays = pl.pallas_call(
        functools.partial(_kernel, num_tokens=num_tokens, half=head_dim // 2, capacity=capacity, interpret=interpret),
        grid=(num_heads, num_tokens, batch),
        in_specs=[
            pl.BlockSpec((None,), lambda head, token, sequence: (sequence,)),
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
    *refs,  # the cache: the same memory as the results; qkv or each of its parts [T, block_dim]; query; the cache
    num_tokens: int,
    half: int,
    capacity: int,
    interpret: bool,
):
    *part_refs, query_ref, keys_ref, scales_ref, recent_ref, values_ref, value_scales_ref = refs[5:]
    head, token, sequence = (pl.program_id(axis) for axis in range(3))
    first_key, first_value = query_ref.shape[2], query_ref.shape[2] + keys_ref.shape[2]
    length, dtype = length_ref[...], query_ref.dtype
    position = length + token
    of_head = _Head(part_refs, cosine_ref, sine_ref, dtype, half, interpret)

    @pl.when(head < first_key)
    def _():
        for start, part in zip((0, half), of_head.rotated(token), strict=True):
            _store_half(query_ref, (sequence, token, head), part.astype(dtype), start, half)

    @pl.when((head >= first_value) & (position < capacity))
    def _():
        halves = of_head.value(token)
        magnitude = functools.reduce(jnp.maximum, [jnp.max(jnp.abs(part)) for part in halves])
        for start, part in zip((0, half), halves, strict=True):
            codes, scale = of_head.code(part, jnp.broadcast_to(magnitude, part.shape))
            _store_half(values_ref, (sequence, position, head - first_value), codes, start, half)
        plgpu.store(value_scales_ref.at[sequence, head - first_value, position], jnp.max(scale))

    @pl.when((head >= first_key) & (head < first_value) & (token == 0))
    def _():
        where = sequence, head - first_key
        tokens = lax.broadcasted_iota(jnp.int32, (pl.next_power_of_2(num_tokens), 1), 0)
        new = [rounded_to(part, dtype, interpret=interpret) for part in of_head.rotated(tokens)]
        for start, part in zip((0, half), new, strict=True):
            slots = lax.rem(length + tokens, RING)
            _store_rows(recent_ref, where, slots, tokens < num_tokens, part.astype(dtype), start, half)
        end = (lax.div(length, KEY_BLOCK) + 1) * KEY_BLOCK

        @pl.when((end <= length + num_tokens) & (end <= capacity))
        def _():
            arrays = keys_ref, scales_ref, recent_ref
            for start, part in zip((0, half), new, strict=True):
                bounds = length, end
                _quantise_block(*arrays, part, tokens, bounds, where, code=of_head.code, start=start, half=half)


@dataclasses.dataclass(frozen=True)
class _Head:
    """A head of one token, a scalar, or of several, ``[tokens, 1]``, as float32 halves."""

    part_refs: list[registers.Ref]  # [T, block_dim]
    cosine_ref: registers.Ref
    sine_ref: registers.Ref
    dtype: DTypeLike
    half: int
    interpret: bool

    def value(self, tokens: Array) -> tuple[Array, Array]:
        """Both halves as they come."""
        block_half = self.cosine_ref.shape[1]

        def load_sum(start: int) -> Array:
            loaded = [_load_half(ref, tokens, start, block_half, half=self.half) for ref in self.part_refs]
            total = tree_sum([part.astype(jnp.float32) for part in loaded])
            return total if len(loaded) == 1 else rounded_to(total, self.dtype, interpret=self.interpret)

        return load_sum(0), load_sum(self.half)

    def rotated(self, tokens: Array) -> tuple[Array, Array]:
        """Both halves, rotated."""
        first, second = self.value(tokens)
        refs, block_half = (self.cosine_ref, self.sine_ref), self.cosine_ref.shape[1]
        cosine, sine = (_load_half(ref, tokens, 0, block_half, half=self.half) for ref in refs)
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
    new: Array,  # [tokens, block_half] f32, the new keys as the dtype holds them
    tokens: Array,  # [tokens, 1]
    bounds: tuple[Array, Array],  # positions before the new ones, and the end of the block
    where: tuple[Array, Array],  # the sequence and its head
    *,
    code: Callable[..., tuple[Array, Array]],
    start: int,
    half: int,
) -> None:
    """The codes and scales of half of a head in a block: its older keys come from the ring."""
    length, end = bounds
    is_new = tokens < end - length
    new = jnp.where(jnp.broadcast_to(is_new, new.shape), new, 0.0)

    def older(step: Array) -> tuple[Array, Array, Array]:
        positions = end - KEY_BLOCK + step * _ROWS + lax.broadcasted_iota(jnp.int32, (_ROWS, 1), 0)
        exists = positions < length
        rows, columns, mask = _places(lax.rem(positions, RING), exists, start, half, new.shape[1])
        here = recent_ref.at[_everywhere(where[0], mask), rows, _everywhere(where[1], mask), columns]
        keys = plgpu.load(here, mask=mask, other=jnp.zeros((), recent_ref.dtype))
        return positions, exists, keys.astype(jnp.float32)

    def largest(step: Array, magnitude: Array) -> Array:
        return jnp.maximum(magnitude, jnp.max(jnp.abs(older(step)[2]), axis=0))

    steps = KEY_BLOCK // _ROWS
    magnitude = lax.fori_loop(0, steps, largest, jnp.max(jnp.abs(new), axis=0))[None, :]

    def store_older(step: Array, carry: Any) -> Any:
        positions, exists, keys = older(step)
        codes, _ = code(keys, jnp.broadcast_to(magnitude, keys.shape))
        _store_rows(keys_ref, where, positions, exists, codes, start, half)
        return carry

    lax.fori_loop(0, steps, store_older, 0)
    codes, scales = code(new, jnp.broadcast_to(magnitude, new.shape))
    _store_rows(keys_ref, where, length + tokens, is_new, codes, start, half)
    place = where[0], lax.div(end, KEY_BLOCK) - 1, where[1]
    _store_half(scales_ref, place, jnp.max(scales, axis=0), start, half)


def _exists(block_half: int, half: int) -> Array | None:
    return None if block_half == half else lax.broadcasted_iota(jnp.int32, (block_half,), 0) < half


def _load_half(ref: registers.Ref, tokens: Array, start: int, block_half: int, *, half: int) -> Array:
    """Half of a head of one token ``[block_half]``, or of several ``[tokens, block_half]``."""
    if tokens.ndim:
        rows, columns, places = _places(tokens, tokens < ref.shape[0], start, half, block_half)
        return plgpu.load(ref.at[rows, columns], mask=places, other=jnp.zeros((), ref.dtype))
    mask = _exists(block_half, half)
    here = ref.at[tokens, pl.ds(start, block_half)]
    return plgpu.load(here) if mask is None else plgpu.load(here, mask=mask, other=jnp.zeros((), ref.dtype))


def _store_half(ref: registers.Ref, where: tuple[Array, ...], values: Array, start: int, half: int) -> None:
    plgpu.store(ref.at[(*where, pl.ds(start, len(values)))], values, mask=_exists(len(values), half))


def _places(rows: Array, exists: Array, start: int, half: int, block_half: int) -> tuple[Array, Array, Array]:
    """Rows, columns and mask ``[rows, block_half]`` of half of a head of several tokens."""
    shape = (rows.shape[0], block_half)
    columns = lax.broadcasted_iota(jnp.int32, shape, 1)
    mask = jnp.broadcast_to(exists, shape) & (columns < half)
    return jnp.broadcast_to(rows, shape), start + columns, mask


def _store_rows(
    ref: registers.Ref,  # [B, rows, KH, block_dim]
    where: tuple[Array, Array],
    rows: Array,
    exists: Array,
    values: Array,
    start: int,
    half: int,
) -> None:
    rows, columns, mask = _places(rows, exists, start, half, values.shape[1])
    plgpu.store(ref.at[_everywhere(where[0], mask), rows, _everywhere(where[1], mask), columns], values, mask=mask)


def _everywhere(index: Array, like: Array) -> Array:
    return jnp.broadcast_to(index, like.shape)
