"""The gated unit of an MLP, ``silu(gate) * up``."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels import dispatch
from pallas_kernels.swiglu import reference

_OP = "swiglu"
_DTYPES = (jnp.float32, jnp.bfloat16, jnp.float16)


def swiglu(gate_up: Float[Array, "*batch two_K"], *, implementation: str | None = None) -> Float[Array, "*batch K"]:
    """``silu(gate) * up``; the equations stand in the reference.

    Args:
        gate_up: ``[..., 2 * K]`` float32, bfloat16 or float16: the gate, then what it lets through.
        implementation: ``"reference"``, ``"triton"``, or None for the best that works.

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
    chosen = dispatch.select_implementation(_OP, implementation, triton_obstacle=_triton_obstacle)
    implementing = _triton() if chosen == dispatch.TRITON else reference
    return implementing.swiglu(gate_up)


def _triton_obstacle() -> None:
    """The kernel serves every shape; its import is what may fail."""
    _triton()


def _triton():
    from pallas_kernels.swiglu import gpu_triton  # imported only where it can run

    return gpu_triton
