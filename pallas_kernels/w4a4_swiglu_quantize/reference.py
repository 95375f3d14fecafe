"""The specification of ``w4a4_swiglu_quantize`` in ``jax.numpy``, and its implementation on the CPU.

``w4a4_matmul``, followed by ``swiglu`` and ``quantize_activations``; their equations stand in their own references::

    gate, up = dequantised x @ weight.T, rounded to a dtype
    y[k] = silu(gate[k]) * up[k]
    y[k] = scale * codes[k] - offset
"""

from __future__ import annotations

from typing import Any

import jax

from pallas_kernels.arrays.activation import QuantizedActivation
from pallas_kernels.arrays.weight import QuantizedWeight
from pallas_kernels.swiglu_quantize.reference import swiglu_quantize
from pallas_kernels.w4a4_matmul import reference

FUSED = False


def w4a4_swiglu_quantize(
    x: QuantizedActivation, weight: QuantizedWeight, *, dtype: jax.typing.DTypeLike, **settings: Any
) -> QuantizedActivation:
    """Multiplies, gates, then quantises; see the public function."""
    return swiglu_quantize(reference.w4a4_matmul(x, weight, dtype=dtype), **settings)
