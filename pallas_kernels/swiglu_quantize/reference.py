"""The specification of ``swiglu_quantize`` in ``jax.numpy``, and its implementation on the CPU.

``swiglu``, followed by ``quantize_activations``; their equations stand in their own references::

    y[k] = silu(gate[k]) * up[k]
    y[k] = scale * codes[k] - offset
"""

from __future__ import annotations

from typing import Any

from jaxtyping import Array, Float

from pallas_kernels.arrays.activation import QuantizedActivation
from pallas_kernels.arrays.partial_sums import PartialSums
from pallas_kernels.quantize_activations import reference
from pallas_kernels.swiglu.reference import swiglu


def swiglu_quantize(gate_up: Float[Array, "*batch two_K"] | PartialSums, **settings: Any) -> QuantizedActivation:
    """Gates, then quantises; see the public function."""
    return reference.quantize_activations(swiglu(gate_up), **settings)
