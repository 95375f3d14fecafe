"""Products of the matrix unit in kernels for TPUs, each of which says its own precision.

A dot whose precision is open takes that of ``jax.default_matmul_precision``: a decoder in float32 asks for the highest
there, and Mosaic refuses it for operands of 8 or 16 bits, whose products are exact in any case.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array


def dot(one: Array, other: Array, *, contract: tuple[int, int] = (1, 0), accumulator: DTypeLike = jnp.float32) -> Array:
    """In a kernel: the product of two matrices over an axis of each.

    Args:
        one, other: float32, whose products are as exact as the reference's; or bfloat16 or int8, whose are exact.
        contract: the axes.
        accumulator: dtype of the sums and of the result.
    """
    is_wide = jnp.float32 in (one.dtype, other.dtype)
    precision = lax.Precision.HIGHEST if is_wide else lax.Precision.DEFAULT
    axes = (((contract[0],), (contract[1],)), ((), ()))
    return lax.dot_general(one, other, axes, precision=precision, preferred_element_type=accumulator)
