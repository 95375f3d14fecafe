"""The specification of ``hadamard`` in ``jax.numpy``, and its implementation on the CPU.

``y[i] = sum_k H[i, k] * x[k] / sqrt(K)`` with the matrix H of :mod:`.matrices`, in float32, rounded once to the dtype
of ``x``. H is a Kronecker product of small matrices, so this costs ``K * (side + side + ...)`` multiplications.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from pallas_kernels.hadamard.matrices import kronecker_factors


@jax.jit
def hadamard(x: Float[Array, "*batch K"]) -> Float[Array, "*batch K"]:
    """See the public function."""
    num_inputs = x.shape[-1]
    product = multiply_kronecker(x.astype(jnp.float32), kronecker_factors(num_inputs))
    return (product * jnp.float32(1 / math.sqrt(num_inputs))).astype(x.dtype)


def multiply_kronecker(x: Float[Array, "*batch K"], factors: Sequence[np.ndarray | Array]) -> Float[Array, "*batch K"]:
    """``(factors[0] x factors[1] x ...) @ x`` along the last axis, in float32 throughout."""
    multiply = functools.partial(jnp.einsum, precision=lax.Precision.HIGHEST)
    after = x.shape[-1]
    product = x
    for factor in factors:
        side = factor.shape[0]
        after //= side
        matrix = jnp.asarray(factor, jnp.float32)
        product = multiply("ij,ajb->aib", matrix, product.reshape(-1, side, after))
    return product.reshape(x.shape)
