"""``w4a4_matmul`` as a Pallas kernel for TPUs, compiled for v5e, v6e and 7x; no TPU has run it.

The integer formula of :mod:`pallas_kernels.arrays.activation`. Weight codes become ``16 * (code - 8)`` as int8 and are
multiplied by the int8 activation codes, four-bit ones too: the bytes of a weight take longer to arrive than its int8
products. Sums are int32 within a run of inputs that share all scales. The matrix unit of 7x has no integers: there both
become bfloat16, which is exact, and sums are float32. See :mod:`pallas_kernels.backends.tpu.matmul`.
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

from pallas_kernels.arrays.activation import QuantizedActivation
from pallas_kernels.arrays.weight import Layout, QuantizedWeight, layout_obstacle
from pallas_kernels.backends.tpu import matmul, words
from pallas_kernels.backends.tpu.dots import dot
from pallas_kernels.backends.tpu.generation import has_integer_unit

LAYOUT = Layout.PLANES
_TILE_ROWS = {True: 32, False: 16}  # of int8, and of bfloat16


def obstacle(x: QuantizedActivation, weight: QuantizedWeight) -> str | None:
    """Why this kernel cannot serve a call, as the end of a sentence; None if it can."""
    return (
        matmul.obstacle(weight.num_inputs, weight.group_size, x.group_size)
        or layout_obstacle(weight.layout, LAYOUT)
        or layout_obstacle(x.layout, LAYOUT, what="activations")
    )


def w4a4_matmul(
    x: QuantizedActivation,
    weight: QuantizedWeight,
    *,
    dtype: DTypeLike,
    integers: bool | None = None,
    interpret: Any = False,
) -> Float[Array, "*batch N"]:
    """See the public function. ``integers`` says what the matrix unit multiplies; None is what the generation can."""
    rows = jax.tree.map(lambda a: a.reshape(-1, a.shape[-1]), x)
    integers = has_integer_unit() if integers is None else integers
    outputs = _matmul(rows, weight, dtype=jnp.dtype(dtype), integers=integers, interpret=interpret)
    return outputs.reshape(*x.codes.shape[:-1], weight.num_outputs)


@functools.partial(jax.jit, static_argnames=("dtype", "integers", "interpret"))
def _matmul(x: QuantizedActivation, weight: QuantizedWeight, *, dtype: DTypeLike, integers: bool, interpret: Any):
    num_rows, tile = x.codes.shape[0], _TILE_ROWS[integers]
    codes = matmul.padded(x.codes, tile)
    per_row = [x.scale]
    per_group = [array for array in (weight.scale, weight.offset) if array is not None]
    num_per_group = len(per_group)
    if x.offset is not None:
        sums = weight.group_sum
        assert sums is not None  # the public function has checked it
        per_row.append(jnp.repeat(x.offset, sums.shape[0] // x.num_groups, axis=1))
        per_group.append(sums)
    sizes = {"group_size": weight.group_size, "x_group": x.group_size}
    num_arrays, steps = (len(per_row), num_per_group), matmul.shift_in_steps(weight)
    product = matmul.launch(
        functools.partial(_kernel, num_arrays=num_arrays, steps=steps, **sizes),
        codes if integers else codes.astype(jnp.bfloat16),
        [matmul.padded(array, tile) for array in per_row],
        weight,
        per_group,
        out_dtype=dtype,
        interpret=interpret,
        name=f"w4a{x.bits}",  # as profiles show it
    )
    return product[:num_rows]


def _kernel(
    low_ref,  # [block_m, K/2] int8, or bf16 of whole numbers
    high_ref,
    *refs,  # scale (and offset) of the rows, packed, scale (and offset) (and group sums), output, scratch
    num_arrays: tuple[int, int],
    steps: float | None,
    group_size: int,
    x_group: int,
):
    num_per_row, num_per_group = num_arrays
    (x_scale_ref, *x_offset_refs), (packed_ref, *refs) = refs[:num_per_row], refs[num_per_row:]
    group_refs, refs = refs[:num_per_group], refs[num_per_group:]
    sums_refs, (out_ref, *scale_refs) = refs[: len(x_offset_refs)], refs[len(x_offset_refs) :]
    scale_ref, *shift_refs = scale_refs
    half, (block_m, block_n) = packed_ref.shape[1], out_ref.shape
    run = matmul.scale_run(2 * half, group_size, x_group)
    x_whole = x_group == 2 * half
    one_scale = group_size == x_group == 2 * half  # it covers all sums
    sum_dtype = jnp.int32 if low_ref.dtype == jnp.int8 else jnp.float32
    matmul.read_scales(group_refs, scale_refs, steps)

    def plane(carry, x, codes, first_input):
        product, code_sum = carry
        runs = x if one_scale else matmul.by_runs(x, run)
        partial = matmul.dot_transposed(runs, codes.astype(x.dtype), sum_dtype)
        if one_scale:
            return product + partial, code_sum + matmul.row_sum(x) if shift_refs else code_sum
        for r in range(runs.shape[0] // block_m):
            rows = slice(r * block_m, (r + 1) * block_m)
            start = first_input + r * run
            group = pl.ds(lax.div(start, group_size), 1)
            term = partial[rows].astype(jnp.float32) * scale_ref[group, :]
            for shift_ref in shift_refs:
                term = term + matmul.row_sum(runs[rows]) * shift_ref[group, :]
            x_scale = 1.0 if x_whole else matmul.column(x_scale_ref[...], lax.div(start, x_group))
            product = product + term * x_scale
        return product, code_sum

    def chunk(columns, start, carry):
        low, high = words.decode_planes(packed_ref[:, columns])
        carry = plane(carry, low_ref[:, columns], low, start)
        return plane(carry, high_ref[:, columns], high, start + half)

    zeros = jnp.zeros((block_m, block_n), sum_dtype if one_scale else jnp.float32)
    product, code_sum = matmul.for_each_chunk(half, chunk, (zeros, jnp.zeros((block_m, 1), jnp.float32)))
    if one_scale:
        product = product.astype(jnp.float32) * scale_ref[...]
        for shift_ref in shift_refs:
            product = product + code_sum * shift_ref[...]
    if x_whole:
        product = product * x_scale_ref[...]
    for x_offset_ref, sums_ref in zip(x_offset_refs, sums_refs, strict=True):
        product = product - dot(x_offset_ref[...], words.as_float32(sums_ref[...]))
    out_ref[...] = product.astype(out_ref.dtype)
