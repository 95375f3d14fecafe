"""The specification of ``w4a16_swiglu`` in ``jax.numpy``, and its implementation on the CPU.

``w4a16_matmul``, followed by ``swiglu``; their equations stand in their own references::

    gate, up = x @ weight.T, rounded to the dtype of x
    y[k] = silu(gate[k]) * up[k]
"""

from __future__ import annotations

from jaxtyping import Array, Float

from pallas_kernels.arrays.weight import QuantizedWeight
from pallas_kernels.swiglu.reference import swiglu
from pallas_kernels.w4a16_matmul import reference

FUSED = False


def w4a16_swiglu(x: Float[Array, "*batch K"], weight: QuantizedWeight) -> Float[Array, "*batch F"]:
    """Multiplies, then gates; see the public function."""
    return swiglu(reference.w4a16_matmul(x, weight))
