"""The specification of ``rotate_and_write_int8`` in ``jax.numpy``, and its implementation on the CPU.

Rotation is that of ``rotate_and_write``; what the entries are, ``arrays/int8_cache.py`` says. The blocks that are
quantised are those of which this pass writes the last position.
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Float32, Int32

from pallas_kernels.arrays.int8_cache import KEY_BLOCK, RING, Int8Cache, quantize
from pallas_kernels.arrays.partial_sums import PartialSums, value_of
from pallas_kernels.rotate_and_write.reference import rotate


def rotate_and_write_int8(
    qkv: Float[Array, "B T heads HD"] | PartialSums,
    cosine: Float32[Array, "B T half_HD"],
    sine: Float32[Array, "B T half_HD"],
    cache: Int8Cache,
    lengths: Int32[Array, " B"],
) -> tuple[Float[Array, "B T H HD"], Int8Cache]:
    """Rotates, then writes; see the public function."""
    query, key, value = rotated(qkv, cosine, sine, num_kv_heads=cache.num_kv_heads)
    return query, write(cache, newest_keys(cache, key, lengths), value, lengths)


def rotated(
    qkv: Float[Array, "B T heads HD"] | PartialSums,
    cosine: Float32[Array, "B T half_HD"],
    sine: Float32[Array, "B T half_HD"],
    *,
    num_kv_heads: int,
) -> tuple[Float[Array, "B T H HD"], Float[Array, "B T KH HD"], Float[Array, "B T KH HD"]]:
    """Rotated queries and keys, and values."""
    first_key = qkv.shape[2] - 2 * num_kv_heads
    query, key, value = jnp.split(value_of(qkv), (first_key, first_key + num_kv_heads), axis=2)
    # Without the barrier XLA may quantise keys and values from before they were rounded to their dtype.
    key, value = lax.optimization_barrier((rotate(key, cosine, sine), value))
    return rotate(query, cosine, sine), key, value


def newest_keys(
    cache: Int8Cache, keys: Float[Array, "B T KH HD"], lengths: Int32[Array, " B"]
) -> Float[Array, "B newest W"]:
    """The keys of a block's number of positions before ``lengths``, which the ring has, and the new ones."""
    return jnp.concatenate([of_ring(cache, lengths - KEY_BLOCK, KEY_BLOCK), keys.reshape(*keys.shape[:2], -1)], axis=1)


def of_ring(cache: Int8Cache, first: Int32[Array, " B"], count: int) -> Float[Array, "B count W"]:
    """The keys in the slots of some positions from ``first`` on."""
    slots = (first[:, None] + jnp.arange(count, dtype=jnp.int32)) % RING
    return jnp.take_along_axis(cache.recent_keys, slots[..., None], axis=1)


def write(
    cache: Int8Cache,
    newest: Float[Array, "B newest W"],
    values: Float[Array, "B T KH HD"],
    lengths: Int32[Array, " B"],
    *,
    num_tokens: Int32[Array, " B"] | None = None,
) -> Int8Cache:
    """The cache with the entries of new tokens; of positions past the last one, there are none.

    Args:
        cache: as it was.
        newest: what :func:`newest_keys` returns.
        values: of the new tokens.
        lengths: positions before them.
        num_tokens: how many of the new tokens are more than padding; None for all. The ring keeps what it has instead
            of padding, as a wide chunk has more of it than there are slots.
    """
    batch, num_new = values.shape[:2]
    rows, new = jnp.arange(batch, dtype=jnp.int32)[:, None], jnp.arange(num_new, dtype=jnp.int32)
    positions = lengths[:, None] + new
    codes, scales = quantize(values, axis=-1)
    put = {"mode": "drop", "unique_indices": True}
    cache = dataclasses.replace(
        cache,
        values=cache.values.at[rows, positions].set(codes.reshape(batch, num_new, -1), **put),
        value_scales=cache.value_scales.at[rows, :, positions].set(scales, **put),
        recent_keys=_in_ring(cache, newest, lengths, num_new if num_tokens is None else num_tokens),
    )
    return _with_whole_blocks(cache, newest, lengths, num_new)


def _in_ring(cache: Int8Cache, newest: Array, lengths: Array, num_tokens: Array | int) -> Array:
    """The ring with the last of the new keys."""
    last = (lengths + num_tokens - 1)[:, None]
    held = last - (last - jnp.arange(RING, dtype=jnp.int32)) % RING  # the newest position of each slot
    index = held - lengths[:, None]
    found = jnp.take_along_axis(newest, jnp.maximum(KEY_BLOCK + index, 0)[..., None], axis=1)
    return jnp.where(index[..., None] >= 0, found, cache.recent_keys)


def _with_whole_blocks(cache: Int8Cache, newest: Array, lengths: Array, num_new: int) -> Int8Cache:
    """The cache with the blocks whose last position is among the new ones."""
    (batch, capacity, width), rows = cache.keys.shape, jnp.arange(len(lengths), dtype=jnp.int32)[:, None]
    numbers = jnp.arange(-(-num_new // KEY_BLOCK), dtype=jnp.int32)
    ends = (lengths[:, None] // KEY_BLOCK + 1 + numbers) * KEY_BLOCK  # [B, blocks]
    within = jnp.arange(KEY_BLOCK, dtype=jnp.int32)
    index = (ends - lengths[:, None])[..., None] + within  # a block begins so far after the first of the newest keys
    blocks = jnp.take_along_axis(newest, jnp.minimum(index, newest.shape[1] - 1).reshape(batch, -1, 1), axis=1)
    codes, scales = quantize(blocks.reshape(batch, -1, KEY_BLOCK, width), axis=2)
    is_whole = (ends <= lengths[:, None] + num_new) & (ends <= capacity)
    # What is not whole goes to places that do not exist, where `mode="drop"` drops it.
    slots = jnp.where(is_whole, ends - KEY_BLOCK, capacity)[..., None] + within
    places = jnp.where(is_whole, ends // KEY_BLOCK - 1, cache.key_scales.shape[1])
    return dataclasses.replace(
        cache,
        keys=cache.keys.at[rows, slots.reshape(batch, -1)].set(codes.reshape(batch, -1, width), mode="drop"),
        key_scales=cache.key_scales.at[rows, places].set(scales, mode="drop"),
    )
