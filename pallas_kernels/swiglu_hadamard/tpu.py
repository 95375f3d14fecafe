"""``swiglu_hadamard`` for TPUs: XLA gates, the kernel of ``hadamard`` transforms; no TPU has run it.

By the compiler's count that is a thirtieth of what XLA takes for the reference, which reshapes values across lanes.
"""

from __future__ import annotations

from typing import Any

from jaxtyping import Array, Float

from pallas_kernels.hadamard import tpu as hadamard_tpu
from pallas_kernels.swiglu.reference import swiglu


def obstacle(num_inputs: int, block: int) -> str | None:
    """Why this kernel cannot serve a call, as the end of a sentence; None if it can."""
    del num_inputs  # any number of blocks
    return hadamard_tpu.obstacle(block)


def swiglu_hadamard(
    gate_up: Float[Array, "*batch two_K"], *, block: int, interpret: Any = False
) -> Float[Array, "*batch K"]:
    """See the public function."""
    product = swiglu(gate_up)
    blocks = product.reshape(*product.shape[:-1], product.shape[-1] // block, block)
    return hadamard_tpu.hadamard(blocks, interpret=interpret).reshape(product.shape)
