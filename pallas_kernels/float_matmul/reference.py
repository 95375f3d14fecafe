"""The specification of ``float_matmul`` in ``jax.numpy``, and its implementation on the CPU and for many rows."""

from __future__ import annotations

import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float

# Of the Triton kernel: beyond, arithmetic and not the weight's bytes bounds the time, and the library's kernels win.
MAX_ROWS = 256
PREFILL_ALIKE = False


def float_matmul(
    x: Float[Array, "*batch K"], weight: Float[Array, "N K"], *, dtype: DTypeLike = jnp.float32
) -> Float[Array, "*batch N"]:
    """``x @ weight.T``, accumulated in float32; see the public functions."""
    precision = lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    contract_last = (((x.ndim - 1,), (1,)), ((), ()))
    product = lax.dot_general(x, weight, contract_last, precision=precision, preferred_element_type=jnp.float32)
    return product.astype(dtype)
