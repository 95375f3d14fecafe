"""``w4a16_matmul`` as a Pallas kernel for TPUs, compiled for v5e, v6e and 7x; no TPU has run it.

Codes become ``16 * (code - 8)`` in bfloat16, which is exact, for nested 8-bit codes too. The scales multiply the
float32 sums. Rows of other types are cut into bfloat16 pieces that hold all their bits, so that every product of the
matrix unit is exact. An asymmetric weight adds ``(8 * scale - offset) * (sum of the rows' inputs of the group)``, and a
symmetric nested one, whose zero is 8.5, ``-scale / 2`` times that sum. See :mod:`pallas_kernels.backends.tpu.matmul`.

More rows than a decode has are bound by arithmetic: there the weight is dequantised once, and XLA multiplies.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from pallas_kernels.arrays.weight import Layout, QuantizedWeight, dequantize, layout_obstacle
from pallas_kernels.backends.tpu import matmul, words

LAYOUT = Layout.PLANES
ROWS_ALIKE = ROWS_ALIKE_IF_ASKED = matmul.MAX_ROWS
PREFILL_ALIKE = False
_TILE_ROWS = 16  # of 16 bits


def obstacle(dtype: jnp.dtype, weight: QuantizedWeight) -> str | None:
    """Why this kernel cannot serve a weight, as the end of a sentence; None if it can."""
    del dtype  # all three of the public function work
    return matmul.obstacle(weight.num_inputs, weight.group_size) or layout_obstacle(weight.layout, LAYOUT)


def w4a16_matmul(
    x: Float[Array, "*batch K"], weight: QuantizedWeight, *, dtype: DTypeLike | None = None, interpret: Any = False
) -> Float[Array, "*batch N"]:
    """See the public function."""
    rows, dtype = x.reshape(-1, x.shape[-1]), jnp.dtype(dtype or x.dtype)
    if rows.shape[0] > matmul.MAX_ROWS and x.dtype != jnp.float32:
        outputs = _dequantized_matmul(rows, weight, dtype=dtype)
    else:
        outputs = _matmul(rows, weight, dtype=dtype, interpret=interpret)
    return outputs.reshape(*x.shape[:-1], weight.num_outputs)


@functools.partial(jax.jit, static_argnames="dtype")
def _dequantized_matmul(x: Array, weight: QuantizedWeight, *, dtype: DTypeLike) -> Array:
    floats = lax.optimization_barrier(dequantize(weight).astype(x.dtype))
    product = lax.dot_general(x, floats, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)
    return product.astype(dtype)


@functools.partial(jax.jit, static_argnames=("dtype", "interpret"))
def _matmul(x: Array, weight: QuantizedWeight, *, dtype: DTypeLike, interpret: Any) -> Array:
    num_rows = x.shape[0]
    pieces = [matmul.padded(piece, _TILE_ROWS) for piece in words.bfloat16_pieces(x)]
    height = pieces[0].shape[0]
    rows = matmul.padded(jnp.concatenate(pieces), _TILE_ROWS)
    per_group = [array for array in (weight.scale, weight.offset) if array is not None]
    num_arrays = len(matmul.packed_arrays(weight)), len(per_group)
    steps = matmul.shift_in_steps(weight)
    product = matmul.launch(
        functools.partial(_kernel, num_arrays=num_arrays, steps=steps, group_size=weight.group_size),
        rows,
        (),
        weight,
        per_group,
        out_dtype=dtype if len(pieces) == 1 else jnp.float32,
        interpret=interpret,
        name=f"w{weight.bits}a16",  # as profiles show it
    )
    parts = [product[i * height : i * height + num_rows] for i in range(len(pieces))]
    return functools.reduce(jnp.add, reversed(parts)).astype(dtype)


def _kernel(
    first_ref,  # [block_m, K/2] bf16
    second_ref,
    packed_ref,  # [block_n, K/2] uint8
    *refs,  # low as packed; scale and perhaps offset [G, block_n]; output [block_m, block_n]; scratch as the scale
    num_arrays: tuple[int, int],
    steps: float | None,
    group_size: int,
):
    num_packed, num_per_group = num_arrays
    low_refs, refs = refs[: num_packed - 1], refs[num_packed - 1 :]
    group_refs, out_ref, scale_refs = refs[:num_per_group], refs[num_per_group], refs[num_per_group + 1 :]
    scale_ref, *shift_refs = scale_refs
    half, (block_m, block_n) = packed_ref.shape[1], out_ref.shape
    run, whole_rows = matmul.scale_run(2 * half, group_size), group_size == 2 * half
    matmul.read_scales(group_refs, scale_refs, steps)

    def plane(carry, x, codes, first_input):
        """Adds one plane's chunk to the scaled product, or (one group) to product and row sums, still unscaled."""
        product, row_sum = carry
        if whole_rows:
            product = product + matmul.dot_transposed(x, codes)
            return product, row_sum + matmul.row_sum(x) if shift_refs else row_sum
        runs = matmul.by_runs(x, run)
        partial = matmul.dot_transposed(runs, codes)
        for r in range(runs.shape[0] // block_m):
            rows = slice(r * block_m, (r + 1) * block_m)
            group = pl.ds(lax.div(first_input + r * run, group_size), 1)
            product = product + partial[rows] * scale_ref[group, :]
            for shift_ref in shift_refs:
                product = product + matmul.row_sum(runs[rows]) * shift_ref[group, :]
        return product, row_sum

    def chunk(columns, start, carry):
        planes = words.decode_planes(*(ref[:, columns] for ref in (packed_ref, *low_refs)))
        first, second = (codes.astype(jnp.bfloat16) for codes in planes)
        carry = plane(carry, first_ref[:, columns], first, start)
        return plane(carry, second_ref[:, columns], second, start + half)

    zeros = jnp.zeros((block_m, block_n), jnp.float32), jnp.zeros((block_m, 1), jnp.float32)
    product, row_sum = matmul.for_each_chunk(half, chunk, zeros)
    if whole_rows:
        product = product * scale_ref[...]
        for shift_ref in shift_refs:
            product = product + row_sum * shift_ref[...]
    out_ref[...] = product.astype(out_ref.dtype)
