"""The specification of attention over a key/value cache of int8 in ``jax.numpy``, and its implementation on the CPU.

The equations are those of ``decode_attention`` and ``block_attention``, over keys and values as a query sees them by
``arrays/int8_cache.py``: all values as int8, and as int8 the keys of the blocks before its own. The others come from
the ring, or of a prefill, which has more new keys than the ring holds, from the list of its newest ones.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Int32

from pallas_kernels.arrays.int8_cache import KEY_BLOCK, Int8Cache, dequantized_keys, dequantized_values, int8_before
from pallas_kernels.block_attention.reference import EVERYTHING
from pallas_kernels.decode_attention.reference import weighed_tokens
from pallas_kernels.rotate_and_write_int8.reference import of_ring


class _Seen(NamedTuple):
    """Keys and values, some of which are there twice, and who sees which: slots of int8, then the newest ones."""

    keys: Float[Array, "B seen KH HD"]
    values: Float[Array, "B seen KH HD"]
    positions: Int32[Array, "B seen"]
    mask: Bool[Array, "B 1 T seen"]


def decode_attention_int8(
    query: Float[Array, "B T H HD"], cache: Int8Cache, lengths: Int32[Array, " B"], *, window: int | None
) -> Float[Array, "B T H HD"]:
    """Attention over the whole cache, unseen slots masked; see the public function."""
    return attend(query, cache, _newest(query, cache, lengths), lengths, window=window)


def attend(
    query: Float[Array, "B T H HD"],
    cache: Int8Cache,
    newest: Float[Array, "B newest W"],
    lengths: Int32[Array, " B"],
    *,
    window: int | None,
) -> Float[Array, "B T H HD"]:
    """The same, where the newest keys, from a block before ``lengths`` on, are given."""
    seen = _seen(query, cache, newest, lengths, window=window)
    return _attend(query, seen, seen.mask)


def decode_attention_int8_with_masses(
    query: Float[Array, "B T H HD"],
    cache: Int8Cache,
    lengths: Int32[Array, " B"],
    *,
    block_size: int,
    window: int | None,
) -> tuple[Float[Array, "B T H HD"], Float32[Array, "B KH blocks"]]:
    """The same result, and the mass of each block; see the public function."""
    batch, num_tokens, num_heads, head_dim = query.shape
    num_kv_heads, slots = cache.num_kv_heads, cache.keys.shape[1]
    seen = _seen(query, cache, _newest(query, cache, lengths), lengths, window=window)
    first = weighed_tokens(num_tokens, num_heads // num_kv_heads)
    grouped = query[:, :first].reshape(batch, first, num_kv_heads, -1, head_dim)
    logits = jnp.einsum("btkgd,bskd->bkgts", grouped, seen.keys, preferred_element_type=jnp.float32)
    logits = jnp.where(seen.mask[:, :, None, :first], logits * jnp.float32(head_dim**-0.5), -jnp.inf)
    weights = jax.nn.softmax(logits, axis=-1).mean(axis=(2, 3))
    blocks = jnp.where(seen.positions < 0, -1, seen.positions // block_size)
    numbers = jnp.arange(-(-slots // block_size), dtype=jnp.int32)
    one_hot = (blocks[..., None] == numbers).astype(jnp.float32)
    return _attend(query, seen, seen.mask), jnp.einsum("bks,bsn->bkn", weights, one_hot)


def block_attention_int8(
    query: Float[Array, "B T H HD"],
    cache: Int8Cache,
    lengths: Int32[Array, " B"],
    blocks: Int32[Array, "B L KH N"],
    layer: Int32[Array, ""],
    *,
    block_size: int,
    window: int | None,
) -> Float[Array, "B T H HD"]:
    """Attention over the blocks that a table lists, the others masked; see the public function."""
    seen = _seen(query, cache, _newest(query, cache, lengths), lengths, window=window)
    table = jnp.take(blocks, layer, axis=1)[:, :, :, None]  # [B, KH, N, 1]
    of_slot = (seen.positions // block_size)[:, None]
    listed = (table == of_slot[:, :, None]).any(axis=2) | (table[:, :, 0] == EVERYTHING)  # [B, KH, seen]
    group = query.shape[2] // cache.num_kv_heads
    return _attend(query, seen, seen.mask & jnp.repeat(listed, group, axis=1)[:, :, None])


def _newest(query: Array, cache: Int8Cache, lengths: Array) -> Array:
    """The keys that a pass of a few tokens finds in the ring."""
    return of_ring(cache, lengths - KEY_BLOCK, KEY_BLOCK + query.shape[1])


def _seen(query: Array, cache: Int8Cache, newest: Array, lengths: Array, *, window: int | None) -> _Seen:
    (batch, num_tokens), slots = query.shape[:2], cache.keys.shape[1]
    positions = lengths[:, None] + jnp.arange(num_tokens, dtype=jnp.int32)
    of_newest = lengths[:, None] + jnp.arange(-KEY_BLOCK, num_tokens, dtype=jnp.int32)
    of_slots = jnp.broadcast_to(jnp.arange(slots, dtype=jnp.int32), (batch, slots))
    values = dequantized_values(cache, query.dtype)
    their_values = jnp.take_along_axis(values, jnp.clip(of_newest, 0, slots - 1)[..., None], axis=1)
    keys = jnp.concatenate([dequantized_keys(cache, query.dtype), newest], axis=1)
    values = jnp.concatenate([values, their_values], axis=1)
    begins, at = int8_before(positions)[..., None], positions[..., None]
    mask = jnp.concatenate(
        [of_slots[:, None] < begins, (of_newest[:, None] >= begins) & (of_newest[:, None] <= at)], axis=2
    )
    where = jnp.concatenate([of_slots, of_newest], axis=1)
    if window is not None:
        mask &= at - where[:, None] < window
    shape = (batch, -1, cache.num_kv_heads, cache.head_dim)
    return _Seen(keys.reshape(shape), values.reshape(shape), where, mask[:, None])


def _attend(query: Array, seen: _Seen, mask: Array) -> Array:
    # The library function mixes dtypes inside, which strict promotion would refuse.
    with jax.numpy_dtype_promotion("standard"):
        return jax.nn.dot_product_attention(query, seen.keys, seen.values, mask=mask)
