"""``swiglu_hadamard_quantize`` for TPUs: XLA gates and quantises, the kernel of ``hadamard`` transforms between."""

from __future__ import annotations

from typing import Any

from jaxtyping import Array, Float

from pallas_kernels.arrays.activation import QuantizedActivation
from pallas_kernels.quantize_activations.reference import quantize_activations
from pallas_kernels.swiglu_hadamard import tpu as swiglu_hadamard_tpu


def obstacle(num_inputs: int, block: int, group_size: int, outlier_groups: int) -> str | None:
    """Why this kernel cannot serve a call, as the end of a sentence; None if it can."""
    del group_size, outlier_groups  # XLA serves all
    return swiglu_hadamard_tpu.obstacle(num_inputs, block)


def swiglu_hadamard_quantize(
    gate_up: Float[Array, "*batch two_K"], *, block: int, interpret: Any = False, **settings: Any
) -> QuantizedActivation:
    """See the public function."""
    product = swiglu_hadamard_tpu.swiglu_hadamard(gate_up, block=block, interpret=interpret)
    return quantize_activations(product, **settings)
