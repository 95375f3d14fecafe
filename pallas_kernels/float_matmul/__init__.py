"""The matmul with a weight in floating point whose result is float32: the LM head."""

from __future__ import annotations

import math

import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

from pallas_kernels import dispatch
from pallas_kernels.float_matmul import reference

_OP = "float_matmul"
_DTYPES = (jnp.float32, jnp.bfloat16, jnp.float16)


def float_matmul(
    x: Float[Array, "*batch K"], weight: Float[Array, "N K"], *, implementation: str | None = None
) -> Float32[Array, "*batch N"]:
    """``x @ weight.T``, accumulated in float32 and not rounded afterwards.

    The Triton kernel serves up to 256 rows of 16 bits and gives a row the same bits whatever rows are beside it.
    The reference is left to XLA, whose library chooses another order of the sum for another number of rows.

    Args:
        x: ``[..., K]`` float32, bfloat16 or float16.
        weight: ``[N, K]`` in the dtype of ``x``.
        implementation: ``"reference"``, ``"triton"``, or None for the best that works.

    Returns:
        ``[..., N]`` float32.

    Raises:
        ValueError: shapes or dtypes do not fit together, the dtype is not one of the three, or the name of the
            implementation is unknown.
        NotImplementedError: the named implementation cannot serve this call.
    """
    num_inputs = x.shape[-1]
    if weight.shape[1] != num_inputs or weight.dtype != x.dtype:
        raise ValueError(
            f"{_OP}: weight is {weight.dtype} {weight.shape}; use {x.dtype} [N, {num_inputs}], as x is "
            f"{x.dtype} {x.shape}"
        )
    if x.dtype not in _DTYPES:
        raise ValueError(f"{_OP}: x is {x.dtype}; use float32, bfloat16 or float16")
    num_rows = math.prod(x.shape[:-1])
    chosen = dispatch.select_implementation(
        _OP, implementation, triton_obstacle=lambda: _triton().obstacle(num_rows, x.dtype)
    )
    if chosen == dispatch.TRITON:
        return _triton().float_matmul(x, weight)
    return reference.float_matmul(x, weight)


def _triton():
    from pallas_kernels.float_matmul import gpu_triton  # imported only where it can run

    return gpu_triton
