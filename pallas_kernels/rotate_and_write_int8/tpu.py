"""``rotate_and_write_int8`` for TPUs: XLA rotates, and rounds values; two Pallas kernels write in place.

One writes the few new slots of values, their scales and the ring, as that of ``rotate_and_write`` does. Before it the
other one quantises the block of keys whose last position is among the new ones, for the few sequences that have one.
Its older keys are copied from the ring, and the codes straight to their place. No TPU has run them.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32, Int32

from pallas_kernels.arrays.int8_cache import KEY_BLOCK, RING, Int8Cache, codes_and_scales, quantize
from pallas_kernels.arrays.partial_sums import PartialSums
from pallas_kernels.rotate_and_write import tpu as writing
from pallas_kernels.rotate_and_write.tpu import LANES, Written, shape_of
from pallas_kernels.rotate_and_write_int8 import reference

_HALF = 64  # a block begins at a multiple of it in the ring, and may wrap there
_SCALE_ROWS = 8  # of a tile of 32 bits


def obstacle(dtype: DTypeLike | None = None) -> str | None:
    """Why this kernel cannot serve a call, as the end of a sentence; None if it can."""
    return writing.obstacle(dtype)


@functools.partial(jax.jit, static_argnames="interpret")
def rotate_and_write_int8(
    qkv: Float[Array, "B T heads HD"] | PartialSums,
    cosine: Float32[Array, "B T half_HD"],
    sine: Float32[Array, "B T half_HD"],
    cache: Int8Cache,
    lengths: Int32[Array, " B"],
    *,
    interpret: Any = False,
) -> tuple[Float[Array, "B T H HD"], Int8Cache]:
    """See the public function."""
    query, key, value = reference.rotated(qkv, cosine, sine, num_kv_heads=cache.num_kv_heads)
    return query, write(cache, key, value, lengths, interpret=interpret)


def write(
    cache: Int8Cache,
    key: Float[Array, "B T KH HD"],
    value: Float[Array, "B T KH HD"],
    lengths: Int32[Array, " B"],
    *,
    interpret: Any = False,
) -> Int8Cache:
    """The cache with the entries of new tokens, in place where the caller gives it up."""
    new = key.reshape(*key.shape[:2], -1)
    codes, scales = quantize(value, axis=-1)
    cache = _with_whole_blocks(cache, new, lengths, interpret=interpret)
    written = [
        Written(cache.recent_keys, new, is_ring=True),
        Written(cache.values, codes.reshape(new.shape)),
        Written(cache.value_scales, jnp.swapaxes(scales, 1, 2), in_lanes=True),
    ]
    newest = writing.write_tiles(written, lengths, num_tokens=new.shape[1], interpret=interpret)
    names = "recent_keys", "values", "value_scales"
    return dataclasses.replace(cache, **dict(zip(names, newest, strict=True)))


def _with_whole_blocks(cache: Int8Cache, new: Array, lengths: Array, *, interpret: Any) -> Int8Cache:
    """The cache with the blocks whose last position is among the new ones; the ring as it is."""
    batch, num_tokens, width = new.shape
    num_blocks, in_memory = cache.key_scales.shape[1], pl.BlockSpec(memory_space=pl.ANY)
    rows = min(_SCALE_ROWS, num_blocks)

    def scale_rows(b: Array, lengths: Any) -> tuple[Any, ...]:
        return b, jnp.minimum(lengths[b] // KEY_BLOCK, num_blocks - 1) // rows, 0

    scales_spec = pl.BlockSpec((None, rows, width), scale_rows)
    arrays = cache.keys, cache.key_scales, cache.recent_keys
    results: Any = pl.pallas_call(
        functools.partial(_kernel, num_slots=cache.keys.shape[1]),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(batch,),
            in_specs=[
                pl.BlockSpec((None, num_tokens, width), lambda b, lengths: (b, 0, 0)),
                in_memory,
                scales_spec,
                in_memory,
            ],
            out_specs=[in_memory, scales_spec, in_memory],
            scratch_shapes=[
                pltpu.VMEM((KEY_BLOCK, width), cache.recent_keys.dtype),
                pltpu.VMEM((KEY_BLOCK, width), jnp.int8),
                pltpu.SemaphoreType.DMA,
            ],
        ),
        out_shape=[shape_of(array) for array in arrays],
        input_output_aliases={2: 0, 3: 1, 4: 2},
        compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary",)),
        interpret=interpret,
        name="quantize_keys",
    )(lengths, new, *arrays)
    return dataclasses.replace(cache, keys=results[0], key_scales=results[1], recent_keys=results[2])


def _kernel(
    lengths_ref,  # [B] int32
    new_ref,  # [T, W]
    _keys_ref,  # the same memory as what is written
    scales_ref,  # [8, W] f32
    _ring_ref,
    keys_ref,  # [B, S, W] int8, in the device's memory
    new_scales_ref,  # [8, W] f32
    ring_ref,  # [B, RING, W], in the device's memory
    block_ref,  # [KEY_BLOCK, W]
    codes_ref,  # [KEY_BLOCK, W] int8
    arrived,
    *,
    num_slots: int,
):
    row, (num_tokens, width) = pl.program_id(0), new_ref.shape
    length = lengths_ref[row]
    block = length // KEY_BLOCK
    begin, end = block * KEY_BLOCK, (block + 1) * KEY_BLOCK
    new_scales_ref[...] = scales_ref[...]

    @pl.when((end <= length + num_tokens) & (end <= num_slots))
    def _():
        halves = [_copy_of_half(ring_ref.at[row], block_ref, begin, half, arrived) for half in (0, 1)]
        for copy in halves:
            copy.start()
        for copy in halves:
            copy.wait()
        for start in range(0, width, LANES):
            lanes = slice(start, min(start + LANES, width))
            keys, new = block_ref[:, lanes].astype(jnp.float32), new_ref[:, lanes].astype(jnp.float32)
            position = begin + lax.broadcasted_iota(jnp.int32, keys.shape, 0)
            for token in range(num_tokens):
                keys = jnp.where(position == length + token, new[token : token + 1], keys)
            codes_ref[:, lanes], scale = codes_and_scales(keys, jnp.max(jnp.abs(keys), axis=0, keepdims=True))
            rows = scales_ref[:, lanes]
            here = lax.broadcasted_iota(jnp.int32, rows.shape, 0) == block % _SCALE_ROWS
            new_scales_ref[:, lanes] = jnp.where(here, scale, rows)
        place = keys_ref.at[row, pl.ds(pl.multiple_of(begin, KEY_BLOCK), KEY_BLOCK)]
        copy = pltpu.make_async_copy(codes_ref, place, arrived)
        copy.start()
        copy.wait()


def _copy_of_half(ring_ref, block_ref, begin: Array, half: int, arrived) -> Any:
    """The copy of half of a block from the ring of a sequence."""
    start = pl.multiple_of((begin + half * _HALF) % RING, _HALF)
    return pltpu.make_async_copy(ring_ref.at[pl.ds(start, _HALF)], block_ref.at[pl.ds(half * _HALF, _HALF)], arrived)
