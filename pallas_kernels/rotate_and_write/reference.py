"""The specification of ``rotate_and_write`` in ``jax.numpy``, and its implementation on the CPU.

Rotary position embedding (Su et al., 2021) in the half-rotation form of Hugging Face checkpoints: each pair
``(x[i], x[i + HD/2])`` of a query or key turns by the angle of its token and pair::

    y[i]        = x[i] * cosine[i] - x[i + HD/2] * sine[i]
    y[i + HD/2] = x[i + HD/2] * cosine[i] + x[i] * sine[i]

in float32, rounded once. Then ``keys[b, lengths[b] + t]`` becomes the rotated key of token ``t``, and ``values`` alike.
"""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int32

from pallas_kernels.arrays.partial_sums import PartialSums, value_of


def rotate_and_write(
    qkv: Float[Array, "B T heads HD"] | PartialSums,
    cosine: Float32[Array, "B T half_HD"],
    sine: Float32[Array, "B T half_HD"],
    keys: Float[Array, "rows S KH HD"],
    values: Float[Array, "rows S KH HD"],
    lengths: Int32[Array, " B"],
    *,
    rows: Int32[Array, " B"] | None = None,
) -> tuple[Float[Array, "B T H HD"], Float[Array, "rows S KH HD"], Float[Array, "rows S KH HD"]]:
    """Rotates, then scatters into the cache; see the public function."""
    num_kv_heads = keys.shape[2]
    first_key = qkv.shape[2] - 2 * num_kv_heads
    query, key, value = jnp.split(value_of(qkv), (first_key, first_key + num_kv_heads), axis=2)
    query, key = rotate(query, cosine, sine), rotate(key, cosine, sine)
    return query, write(keys, key, lengths, rows), write(values, value, lengths, rows)


def rotate(
    x: Float[Array, "B T heads HD"], cosine: Float32[Array, "B T half_HD"], sine: Float32[Array, "B T half_HD"]
) -> Float[Array, "B T heads HD"]:
    """Rotates each pair of each head, in float32."""
    cosine, sine = cosine[:, :, None], sine[:, :, None]
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cosine - second * sine, second * cosine + first * sine], axis=-1)
    return rotated.astype(x.dtype)


def write(
    slots: Float[Array, "rows S KH HD"],
    new: Float[Array, "B T KH HD"],
    lengths: Int32[Array, " B"],
    rows: Int32[Array, " B"] | None = None,
) -> Float[Array, "rows S KH HD"]:
    """``slots`` with ``new`` at the positions from ``lengths`` on; a position past the last slot is dropped."""
    batch, num_tokens = new.shape[:2]
    positions = lengths[:, None] + jnp.arange(num_tokens, dtype=jnp.int32)
    if rows is None:
        return slots.at[jnp.arange(batch, dtype=jnp.int32)[:, None], positions].set(
            new, mode="drop", unique_indices=True
        )
    rows = jnp.where(rows < 0, slots.shape[0], rows)  # a negative index would count from the end
    return slots.at[rows[:, None], positions].set(new, mode="drop")
