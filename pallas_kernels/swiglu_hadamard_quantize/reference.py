"""The specification of ``swiglu_hadamard_quantize`` in ``jax.numpy``, and its implementation on the CPU.

``swiglu_hadamard``, followed by ``quantize_activations``; their equations stand in their own references::

    y = H @ (silu(gate) * up) / sqrt(block)
    y[k] = scale * codes[k] - offset
"""

from __future__ import annotations

from typing import Any

from jaxtyping import Array, Float

from pallas_kernels.arrays.activation import QuantizedActivation
from pallas_kernels.quantize_activations.reference import quantize_activations
from pallas_kernels.swiglu_hadamard.reference import swiglu_hadamard


def swiglu_hadamard_quantize(
    gate_up: Float[Array, "*batch two_K"], *, block: int, **settings: Any
) -> QuantizedActivation:
    """Gates, transforms, then quantises; see the public function."""
    return quantize_activations(swiglu_hadamard(gate_up, block=block), **settings)
