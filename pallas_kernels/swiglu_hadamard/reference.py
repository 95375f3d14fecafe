"""The specification of ``swiglu_hadamard`` in ``jax.numpy``, and its implementation on the CPU.

``swiglu``, followed by ``hadamard`` of each ``block`` consecutive values; their equations stand in their own
references::

    y = H @ (silu(gate) * up) / sqrt(block)
"""

from __future__ import annotations

from jaxtyping import Array, Float

from pallas_kernels.hadamard.reference import hadamard
from pallas_kernels.swiglu.reference import swiglu


def swiglu_hadamard(gate_up: Float[Array, "*batch two_K"], *, block: int) -> Float[Array, "*batch K"]:
    """Gates, then transforms; see the public function."""
    product = swiglu(gate_up)
    blocks = product.reshape(*product.shape[:-1], product.shape[-1] // block, block)
    return hadamard(blocks).reshape(product.shape)
