"""The specification of ``block_attention`` and ``choose_blocks`` in ``jax.numpy``, and their implementation on the CPU.

Attention is that of ``decode_attention``, with ``w[s] = 0`` for slots outside of the blocks that a table lists. A block
is a run of ``block_size`` slots.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Int32

from pallas_kernels.decode_attention.reference import attention_mask

EVERYTHING = -1  # as the first entry of a table of blocks: all of them


def block_attention(
    query: Float[Array, "B T H HD"],
    keys: Float[Array, "B S KH HD"],
    values: Float[Array, "B S KH HD"],
    lengths: Int32[Array, " B"],
    blocks: Int32[Array, "B L KH N"],
    layer: Int32[Array, ""],
    *,
    block_size: int,
    window: int | None,
) -> Float[Array, "B T H HD"]:
    """Attention over the whole cache, slots outside of the blocks masked; see the public function."""
    _, num_tokens, num_heads, _ = query.shape
    slots, num_kv_heads = keys.shape[1:3]
    positions = lengths[:, None] + jnp.arange(num_tokens, dtype=jnp.int32)
    mask = attention_mask(positions, slots=slots, window=window)
    table = jnp.take(blocks, layer, axis=1)  # [B, KH, N]
    block_of_slot = jnp.arange(slots, dtype=jnp.int32) // block_size
    listed = (table[..., None] == block_of_slot).any(axis=2) | (table[..., :1] == EVERYTHING)
    mask = mask & jnp.repeat(listed, num_heads // num_kv_heads, axis=1)[:, :, None]
    with jax.numpy_dtype_promotion("standard"):
        return jax.nn.dot_product_attention(query, keys, values, mask=mask)


def choose_blocks(
    masses: Float32[Array, "B L KH NB"],
    lengths: Int32[Array, " B"],
    *,
    num_blocks: int,
    block_size: int,
    recent: int,
    ahead: int,
) -> Int32[Array, "B L KH N"]:
    """The heaviest blocks, in order; see the public function."""
    index = jnp.arange(masses.shape[-1], dtype=jnp.int32)
    forced = forced_blocks(index, lengths[:, None, None, None], block_size=block_size, recent=recent, ahead=ahead)
    wanted = jnp.where(forced, jnp.inf, masses)
    missing = num_blocks - masses.shape[-1]
    if missing >= 0:  # all of them fit
        table = jnp.broadcast_to(index, masses.shape)
        return jnp.pad(table, ((0, 0), (0, 0), (0, 0), (0, missing)), constant_values=masses.shape[-1])
    # top_k prefers the lower of equal ones, as it should.
    return jnp.sort(jax.lax.top_k(wanted, num_blocks)[1].astype(jnp.int32), axis=-1)


def forced_blocks(index: Array, lengths: Array, *, block_size: int, recent: int, ahead: int) -> Bool[Array, " *blocks"]:
    """Whether blocks are read whatever they weigh: the first one, and those from the recent tokens on.

    Args:
        index: numbers of blocks.
        lengths: tokens in the cache, in shapes that broadcast.
        block_size: slots of a block.
        recent, ahead: tokens before the end that are read in any case, and those that will follow it.
    """
    first, last = ((lengths + offset) // block_size for offset in (-recent, ahead - 1))
    return (index == 0) | ((index >= first) & (index <= last))
