"""The normalised Hadamard transform: an exact rotation that spreads an outlier over all values of a token."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.arrays.arguments import checked
from pallas_kernels.dispatch import TPU, TRITON, Implementations
from pallas_kernels.hadamard.matrices import core_order

_OP = "hadamard"
# A file has hadamard and obstacle(num_inputs).
_IMPLEMENTATIONS = Implementations(__name__, {TRITON: "gpu_triton", TPU: "tpu"})
_DTYPES = (jnp.float32, jnp.bfloat16, jnp.float16)


@checked
def hadamard(x: Float[Array, "*batch K"], *, implementation: str | None = None) -> Float[Array, "*batch K"]:
    """``H @ x / sqrt(K)`` along the last axis, with the matrix H of :mod:`pallas_kernels.hadamard.matrices`.

    The transform is orthogonal. A weight whose rows are transformed too gives the same products:
    ``hadamard(x) @ hadamard(weight).T == x @ weight.T`` but for rounding.

    Args:
        x: ``[..., K]`` float32, bfloat16 or float16.
        implementation: a name of ``IMPLEMENTATIONS``, or None for the best that works.

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
    chosen = _IMPLEMENTATIONS.select(implementation, lambda module: module.obstacle(x.shape[-1]))
    return chosen.hadamard(x)
