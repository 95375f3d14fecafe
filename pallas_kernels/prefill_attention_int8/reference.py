"""The specification of ``prefill_pieces_int8`` in ``jax.numpy``, and its implementation on the CPU.

A piece attends as ``decode_attention_int8`` does (see its reference), to row ``rows[n]`` of the cache from position
``starts[n]`` on. A piece of a negative row is zero. What is written is what ``rotate_and_write_int8`` writes.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from pallas_kernels.arrays.int8_cache import KEY_BLOCK, RING, Int8Cache, quantize
from pallas_kernels.decode_attention_int8.reference import attend

ALIKE = False


def prefill_attention_int8(
    query: Float[Array, "N T H HD"],
    new_keys: Float[Array, "N T W"],
    cache: Int8Cache,
    rows: Int32[Array, " N"],
    starts: Int32[Array, " N"],
    *,
    window: int | None,
) -> Float[Array, "N T H HD"]:
    """Attention over a copy of the row of each piece.

    Args:
        query: rotated.
        new_keys: of the pieces, rotated.
        cache: with all that the pieces write.
        rows, starts, window: see the public function.
    """
    of_row = jax.tree.map(lambda array: array[jnp.maximum(rows, 0)], cache)
    newest = _with_those_before(new_keys, KEY_BLOCK // query.shape[1])
    attended = attend(query, of_row, newest, starts, window=window)
    return jnp.where((rows >= 0)[:, None, None, None], attended, jnp.zeros((), query.dtype))


def _with_those_before(new_keys: Float[Array, "N T W"], count: int) -> Float[Array, "N newest W"]:
    """The keys of each piece behind those of so many pieces before it, whosever these are."""
    pieces, size, width = new_keys.shape
    places = jnp.arange(pieces, dtype=jnp.int32)[:, None] + jnp.arange(-count, 1, dtype=jnp.int32)
    return new_keys[jnp.maximum(places, 0)].reshape(pieces, (count + 1) * size, width)


def write_pieces(
    cache: Int8Cache,
    keys: Float[Array, "N T W"],
    values: Float[Array, "N T W"],
    rows: Int32[Array, " N"],
    starts: Int32[Array, " N"],
) -> Int8Cache:
    """The cache with the entries of pieces; of positions past the last one, there are none.

    The ring has room for the padding of a piece besides what a block and a pass of a few tokens need of it.
    """
    pieces, size, width = keys.shape
    (batch, capacity, _), num_kv_heads = cache.keys.shape, cache.num_kv_heads
    positions = starts[:, None] + jnp.arange(size, dtype=jnp.int32)
    # What is not to be written goes to places that do not exist, where `mode="drop"` drops it.
    held = jnp.where(rows < 0, batch, rows)
    codes, scales = quantize(values.reshape(pieces, size, num_kv_heads, -1), axis=-1)
    end = jnp.zeros((batch,), jnp.int32).at[held].max(starts + size, mode="drop")
    is_new = positions >= jnp.take(end, rows, mode="clip")[:, None] - RING
    in_ring = jnp.where(is_new, positions % RING, RING)
    cache = dataclasses.replace(
        cache,
        values=cache.values.at[held[:, None], positions].set(codes.reshape(pieces, size, width), mode="drop"),
        value_scales=cache.value_scales.at[held[:, None], :, positions].set(scales, mode="drop"),
        recent_keys=cache.recent_keys.at[held[:, None], in_ring].set(keys, mode="drop"),
    )
    # Blocks that end with a piece, whole or padded: of those, none is seen before it is made again.
    ends = starts + size
    is_block = ends % KEY_BLOCK == 0
    codes, scales = quantize(_with_those_before(keys, KEY_BLOCK // size - 1), axis=1)
    slots = jnp.where(is_block, ends - KEY_BLOCK, capacity)[:, None] + jnp.arange(KEY_BLOCK, dtype=jnp.int32)
    numbers = jnp.where(is_block, ends // KEY_BLOCK - 1, cache.key_scales.shape[1])
    return dataclasses.replace(
        cache,
        keys=cache.keys.at[held[:, None], slots].set(codes, mode="drop"),
        key_scales=cache.key_scales.at[held, numbers].set(scales, mode="drop"),
    )
