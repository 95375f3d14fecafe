"""The specification of ``prefill_attention`` in ``jax.numpy``, and its implementation on the CPU.

A piece ``n`` attends as ``decode_attention`` does (see its reference), to row ``rows[n]`` of the cache from position
``starts[n]`` on. A piece of a negative row is zero.
"""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from pallas_kernels.decode_attention import reference

ALIKE = False


def prefill_attention(
    query: Float[Array, "N T H HD"],
    keys: Float[Array, "B S KH HD"],
    values: Float[Array, "B S KH HD"],
    rows: Int32[Array, " N"] | None,
    starts: Int32[Array, " N"],
    *,
    window: int | None,
) -> Float[Array, "N T H HD"]:
    """Attention over a copy of the row of each piece, or over the cache; see the public function."""
    if rows is None:
        return reference.decode_attention(query, keys, values, starts, window=window)
    held = jnp.maximum(rows, 0)
    attended = reference.decode_attention(query, keys[held], values[held], starts, window=window)
    return jnp.where((rows >= 0)[:, None, None, None], attended, jnp.zeros((), query.dtype))
