"""The normalised Hadamard transform: an exact rotation that spreads an outlier over all values of a token."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels import dispatch
from pallas_kernels.hadamard import reference
from pallas_kernels.hadamard.matrices import core_order

_OP = "hadamard"
_DTYPES = (jnp.float32, jnp.bfloat16, jnp.float16)


def hadamard(x: Float[Array, "*batch K"], *, implementation: str | None = None) -> Float[Array, "*batch K"]:
    """``H @ x / sqrt(K)`` along the last axis, with the matrix H of :mod:`pallas_kernels.hadamard.matrices`.

    The transform is orthogonal. A weight whose rows are transformed too gives the same products:
    ``hadamard(x) @ hadamard(weight).T == x @ weight.T`` but for rounding.

    Args:
        x: ``[..., K]`` float32, bfloat16 or float16.
        implementation: ``"reference"``, ``"triton"``, or None for the best that works.

    Returns:
        The transform in the dtype of ``x``, computed in float32.

    Raises:
        ValueError: there is no Hadamard matrix of size K, the dtype is not one of the three, or the name of the
            implementation is unknown.
        NotImplementedError: the named implementation cannot serve this call.
    """
    if x.dtype not in _DTYPES:
        raise ValueError(f"{_OP}: x is {x.dtype}; use float32, bfloat16 or float16")
    core_order(x.shape[-1])
    chosen = dispatch.select_implementation(
        _OP, implementation, triton_obstacle=lambda: _triton().obstacle(x.shape[-1])
    )
    return _triton().hadamard(x) if chosen == dispatch.TRITON else reference.hadamard(x)


def _triton():
    from pallas_kernels.hadamard import gpu_triton  # imported only where it can run

    return gpu_triton
