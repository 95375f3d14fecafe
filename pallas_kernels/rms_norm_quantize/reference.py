"""The specification of ``rms_norm_quantize`` in ``jax.numpy``, and its implementation on the CPU.

The norm of Zhang and Sennrich (2019), whose mean and quotient are float32, followed by ``quantize_activations``::

    n[k] = x[k] / sqrt(mean_k(x[k]^2) + epsilon)       rounded to the dtype of x
    y[k] = n[k] * gain[k]                              rounded to the dtype of x
    y[k] = scale * codes[k] - offset                   as quantize_activations finds them
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from pallas_kernels.activations import QuantizedActivation
from pallas_kernels.quantize_activations import reference


def rms_norm(x: Float[Array, "*batch K"], gain: Float[Array, " K"], *, epsilon: float) -> Float[Array, "*batch K"]:
    """``x / sqrt(mean(x^2) + epsilon) * gain``, normalised in float32, in the dtype of ``x``."""
    wide = x.astype(jnp.float32)
    variance = jnp.mean(jnp.square(wide), axis=-1, keepdims=True)
    return (wide * lax.rsqrt(variance + epsilon)).astype(x.dtype) * gain


def rms_norm_quantize(
    x: Float[Array, "*batch K"], gain: Float[Array, " K"], *, epsilon: float, **settings: Any
) -> QuantizedActivation:
    """Normalises, then quantises; see the public function."""
    return reference.quantize_activations(rms_norm(x, gain, epsilon=epsilon), **settings)
