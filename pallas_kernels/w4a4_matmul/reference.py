"""The specification of ``w4a4_matmul`` in ``jax.numpy``, and its implementation on the CPU.

The activations are dequantised to float32 and multiplied like float ones. This is the integer formula of
:mod:`pallas_kernels.arrays.activation` up to the rounding of float32: every code and every product of two codes
is exact there, so the two differ only in where the scales are applied.
"""

from __future__ import annotations

import jax
from jaxtyping import Array, Float

from pallas_kernels.arrays.activation import QuantizedActivation, dequantize_activation
from pallas_kernels.arrays.weight import Layout, QuantizedWeight
from pallas_kernels.w4a16_matmul import reference

LAYOUT = Layout.PLANES  # of checkpoints; it reads any


def w4a4_matmul(
    x: QuantizedActivation, weight: QuantizedWeight, *, dtype: jax.typing.DTypeLike
) -> Float[Array, "*batch N"]:
    """``dequantize_activation(x) @ dequantize(weight).T`` in float32; see the public function."""
    return reference.w4a16_matmul(dequantize_activation(x), weight).astype(dtype)
