"""The specification of ``float_matmul`` in ``jax.numpy``, and its implementation on the CPU and for many rows."""

from __future__ import annotations

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Float32

# Of the Triton kernel: beyond, arithmetic and not the weight's bytes bounds the time, and the library's kernels win.
MAX_ROWS = 256


def float_matmul(x: Float[Array, "*batch K"], weight: Float[Array, "N K"]) -> Float32[Array, "*batch N"]:
    """``x @ weight.T``, accumulated in float32; see the public function."""
    precision = lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    contract_last = (((x.ndim - 1,), (1,)), ((), ()))
    return lax.dot_general(x, weight, contract_last, precision=precision, preferred_element_type=jnp.float32)
