"""The gated unit of an MLP, ``silu(gate) * up``."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.arrays.arguments import checked
from pallas_kernels.arrays.partial_sums import PartialSums
from pallas_kernels.dispatch import TRITON, Implementations

_OP = "swiglu"
# A file has swiglu and obstacle().
_IMPLEMENTATIONS = Implementations(__name__, {TRITON: "gpu_triton"})
_DTYPES = (jnp.float32, jnp.bfloat16, jnp.float16)


@checked
def swiglu(
    gate_up: Float[Array, "*batch two_K"] | PartialSums, *, implementation: str | None = None
) -> Float[Array, "*batch K"]:
    """``silu(gate) * up``; the equations stand in the reference.

    Args:
        gate_up: ``[..., 2 * K]`` float32, bfloat16 or float16: the gate, then what it lets
            through; or its partial sums.
        implementation: a name of ``IMPLEMENTATIONS``, or None for the best that works.

    Returns:
        ``[..., K]`` in the dtype of ``gate_up``.

    Raises:
        ValueError: the last axis of ``gate_up`` is odd, the dtype is not one of the three, or the name of the
            implementation is unknown.
        NotImplementedError: the named implementation cannot serve this call.
    """
    if gate_up.dtype not in _DTYPES:
        raise ValueError(f"{_OP}: gate_up is {gate_up.dtype}; use float32, bfloat16 or float16")
    if gate_up.shape[-1] % 2:
        raise ValueError(f"{_OP}: gate_up has a last axis of {gate_up.shape[-1]}; use 2 * K, the gate and then up")
    chosen = _IMPLEMENTATIONS.select(implementation, lambda module: module.obstacle())
    return chosen.swiglu(gate_up)
