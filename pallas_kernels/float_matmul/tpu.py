"""``float_matmul`` as a Pallas kernel for TPUs, compiled for v5e, v6e and 7x; no TPU has run it.

A program has all inputs of a block of outputs, whose weights arrive while those before are multiplied. The sum over K
has one order for all numbers of rows.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from pallas_kernels.backends.tpu import matmul
from pallas_kernels.float_matmul import reference

PREFILL_ALIKE = False
_TILE_ROWS = 16
_BLOCK_BYTES = 4 * 2**20  # of weights


def obstacle(num_rows: int, dtype: jnp.dtype) -> str | None:
    """Why this kernel cannot serve a call, as the end of a sentence; None if it can."""
    if dtype != jnp.bfloat16:
        return f"needs bfloat16; x is {jnp.dtype(dtype).name}"
    if not 0 < num_rows <= reference.MAX_ROWS:
        return f"needs 1 to {reference.MAX_ROWS} rows; x has {num_rows}"
    return None


def float_matmul(
    x: Float[Array, "*batch K"],
    weight: Float[Array, "N K"],
    *,
    dtype: DTypeLike = jnp.float32,
    interpret: Any = False,
) -> Float[Array, "*batch N"]:
    """See the public functions. XLA multiplies where rows are no whole chunks of lanes: it would copy the weight."""
    if x.shape[-1] % matmul.LANES:
        return reference.float_matmul(x, weight, dtype=dtype)
    outputs = _matmul(x.reshape(-1, x.shape[-1]), weight, interpret=interpret)
    return outputs.reshape(*x.shape[:-1], weight.shape[0]).astype(dtype)


@functools.partial(jax.jit, static_argnames="interpret")
def _matmul(x: Array, weight: Array, *, interpret: Any) -> Array:
    num_rows, (n, k) = x.shape[0], weight.shape
    rows = matmul.padded(x, _TILE_ROWS)
    block_m, block_n = min(rows.shape[0], 128), 512
    while block_n > 128 and 2 * block_n * k > _BLOCK_BYTES:
        block_n //= 2
    out = pl.pallas_call(
        _kernel,
        grid=(pl.cdiv(n, block_n), rows.shape[0] // block_m),
        in_specs=[
            pl.BlockSpec((block_m, k), lambda n, m: (m, 0)),
            pl.BlockSpec((block_n, k), lambda n, m: (n, 0)),
        ],
        out_specs=pl.BlockSpec((block_m, block_n), lambda n, m: (m, n)),
        out_shape=jax.ShapeDtypeStruct((rows.shape[0], n), jnp.float32),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        interpret=interpret,
        name="float_matmul",
    )(rows, weight)
    return out[:num_rows]


def _kernel(x_ref, weight_ref, out_ref):
    out_ref[...] = matmul.dot_transposed(x_ref[...], weight_ref[...])
