"""The specification of ``rms_norm`` in ``jax.numpy``, and its implementation on the CPU.

The norm of Zhang and Sennrich (2019), whose mean and quotient are float32::

    s[k] = x[k] + update[k]                            rounded to the dtype of x; x[k] without an update
    n[k] = s[k] / sqrt(mean_k(s[k]^2) + epsilon)       rounded to the dtype of x
    y[k] = n[k] * gain[k]                              rounded to the dtype of x
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from pallas_kernels.arrays.partial_sums import PartialSums, value_of


def rms_norm(x: Float[Array, "*batch K"], gain: Float[Array, " K"], *, epsilon: float) -> Float[Array, "*batch K"]:
    """``y`` without an update."""
    wide = x.astype(jnp.float32)
    variance = jnp.mean(jnp.square(wide), axis=-1, keepdims=True)
    return (wide * lax.rsqrt(variance + epsilon)).astype(x.dtype) * gain


def add_rms_norm(
    x: Float[Array, "*batch K"],
    update: Float[Array, "*batch K"] | PartialSums,
    gain: Float[Array, " K"],
    *,
    epsilon: float,
) -> tuple[Float[Array, "*batch K"], Float[Array, "*batch K"]]:
    """``s`` and ``y``."""
    total = x + value_of(update)
    return total, rms_norm(total, gain, epsilon=epsilon)
