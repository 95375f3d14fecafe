"""The specification of ``decode_attention`` in ``jax.numpy``, and its implementation on the CPU.

For the query at position ``p = lengths + t`` (Vaswani et al., 2017, with the sliding window of Mistral)::

    w[s] = exp(q . keys[s] / sqrt(HD))      for max(0, p - window + 1) <= s <= p, else 0
    y    = sum_s(w[s] * values[s]) / sum_s(w[s])

Query head ``h`` reads key/value head ``h // (H / KH)`` (grouped queries, Ainslie et al., 2023).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32

MAX_DECODE_TOKENS = 17  # 16 drafts and the token before them; more are a prefill, which XLA does well


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
