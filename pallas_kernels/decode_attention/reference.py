"""The specification of ``decode_attention`` in ``jax.numpy``, and its implementation on the CPU.

For the query at position ``p = lengths + t`` (Vaswani et al., 2017, with the sliding window of Mistral)::

    w[s] = exp(q . keys[s] / sqrt(HD))      for max(0, p - window + 1) <= s <= p, else 0
    y    = sum_s(w[s] * values[s]) / sum_s(w[s])

Query head ``h`` reads key/value head ``h // (H / KH)`` (grouped queries, Ainslie et al., 2023).

*Blocks* are runs of ``block_size`` slots. The mass of a block is the share of the attention that it gets::

    mass[j] = mean over the first tokens and the query heads of a group of  sum_(s in block j)(w[s]) / sum_s(w[s])
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Int32

MAX_DECODE_TOKENS = 17  # 16 drafts and the token before them; more are a prefill
BLOCK = 16  # slots of the smallest block: what every tile of the GPU kernel is a multiple of
_WEIGHED_ROWS = 16  # what a tile of the GPU kernel has


def decode_attention(
    query: Float[Array, "B T H HD"],
    keys: Float[Array, "B S KH HD"],
    values: Float[Array, "B S KH HD"],
    lengths: Int32[Array, " B"],
    *,
    window: int | None,
) -> Float[Array, "B T H HD"]:
    """Attention over the whole cache, unseen slots masked; see the public function."""
    positions = lengths[:, None] + jnp.arange(query.shape[1], dtype=jnp.int32)
    mask = attention_mask(positions, slots=keys.shape[1], window=window)
    # The library function mixes dtypes inside, which strict promotion would refuse.
    with jax.numpy_dtype_promotion("standard"):
        return jax.nn.dot_product_attention(query, keys, values, mask=mask)


def attention_mask(positions: Int32[Array, "B T"], *, slots: int, window: int | None) -> Bool[Array, "B 1 T S"]:
    """True where a token may attend: to its own slot and earlier ones, within the sliding window."""
    distance = positions[:, None, :, None] - jnp.arange(slots, dtype=jnp.int32)
    visible = distance >= 0
    return visible if window is None else visible & (distance < window)


def decode_attention_with_masses(
    query: Float[Array, "B T H HD"],
    keys: Float[Array, "B S KH HD"],
    values: Float[Array, "B S KH HD"],
    lengths: Int32[Array, " B"],
    *,
    block_size: int,
    window: int | None,
) -> tuple[Float[Array, "B T H HD"], Float32[Array, "B KH NB"]]:
    """The same result, and the mass of each block; see the public function."""
    batch, num_tokens, num_heads, head_dim = query.shape
    _, slots, num_kv_heads, _ = keys.shape
    positions = lengths[:, None] + jnp.arange(num_tokens, dtype=jnp.int32)
    mask = attention_mask(positions, slots=slots, window=window)
    grouped = query.reshape(batch, num_tokens, num_kv_heads, num_heads // num_kv_heads, head_dim)
    logits = jnp.einsum("btkgd,bskd->bkgts", grouped, keys, preferred_element_type=jnp.float32)
    logits = logits[:, :, :, : weighed_tokens(num_tokens, num_heads // num_kv_heads)]
    logits = jnp.where(mask[:, :, None, : logits.shape[3]], logits * jnp.float32(head_dim**-0.5), -jnp.inf)
    weights = jax.nn.softmax(logits, axis=-1).mean(axis=(2, 3))
    weights = jnp.pad(weights, ((0, 0), (0, 0), (0, -slots % block_size)))
    masses = weights.reshape(batch, num_kv_heads, -1, block_size).sum(axis=-1)
    return decode_attention(query, keys, values, lengths, window=window), masses


def weighed_tokens(num_tokens: int, group: int) -> int:
    """The tokens that weigh blocks: the first ones, as many as have 16 queries for a key/value head, or one.

    The first ones are the least likely to be rejected, and the queries of 16 rows are there in one tile of a GPU.
    """
    return min(num_tokens, max(1, _WEIGHED_ROWS // group))
