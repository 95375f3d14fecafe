"""The gated unit of an MLP, ``silu(gate) * up``, and the Hadamard transform of its result in one operation."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.arrays.arguments import checked
from pallas_kernels.dispatch import TPU, TRITON, Implementations
from pallas_kernels.hadamard.matrices import core_order

_OP = "swiglu_hadamard"
# A file has swiglu_hadamard and obstacle(num_inputs, block).
_IMPLEMENTATIONS = Implementations(__name__, {TRITON: "gpu_triton", TPU: "tpu"})
_DTYPES = (jnp.float32, jnp.bfloat16, jnp.float16)


@checked
def swiglu_hadamard(
    gate_up: Float[Array, "*batch two_K"], *, block: int | None = None, implementation: str | None = None
) -> Float[Array, "*batch K"]:
    """``hadamard(swiglu(gate_up))``; the equations stand in the reference.

    Args:
        gate_up: ``[..., 2 * K]`` float32, bfloat16 or float16: the gate, then what it lets through.
        block: consecutive values that are transformed together; None for all K.
        implementation: a name of ``IMPLEMENTATIONS``, or None for the best that works.

    Returns:
        ``[..., K]`` in the dtype of ``gate_up``.

    Raises:
        ValueError: the last axis of ``gate_up`` is odd, ``block`` does not divide K, there is no Hadamard matrix of
            its size, the dtype is not one of the three, or the name of the implementation is unknown.
        NotImplementedError: the named implementation cannot serve this call.
    """
    if gate_up.dtype not in _DTYPES:
        raise ValueError(f"{_OP}: gate_up is {gate_up.dtype}; use float32, bfloat16 or float16")
    num_inputs, block = checked_sizes(_OP, gate_up, block)
    chosen = _IMPLEMENTATIONS.select(implementation, lambda module: module.obstacle(num_inputs, block))
    return chosen.swiglu_hadamard(gate_up, block=block)


def checked_sizes(op: str, gate_up: Float[Array, "*batch two_K"], block: int | None) -> tuple[int, int]:
    """K, and the values that are transformed together.

    Raises:
        ValueError: they do not fit; the message begins with ``op``, or says which sizes have a Hadamard matrix.
    """
    if gate_up.shape[-1] % 2:
        raise ValueError(f"{op}: gate_up has a last axis of {gate_up.shape[-1]}; use 2 * K, the gate and then up")
    num_inputs = gate_up.shape[-1] // 2
    block = num_inputs if block is None else block
    if block < 1 or num_inputs % block:
        raise ValueError(f"{op}: block={block} does not divide K={num_inputs}; use a divisor, or None for all of them")
    core_order(block)
    return num_inputs, block
