"""A copy of rows with zeros below, as a Pallas Triton kernel: unlike one of XLA's it may stand behind a signal."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Shaped

from pallas_kernels.backends.triton import registers
from pallas_kernels.backends.triton.producers import PIECE, PIECE_WARPS


def padded(rows: Shaped[Array, "M K"], num_rows: int, *, interpret: bool = False) -> Shaped[Array, "M_padded K"]:
    """The rows as the first of ``num_rows``; the others are zeros."""
    registers.ignore_triton_deprecation()
    num_inputs = rows.shape[1]
    spec = pl.BlockSpec((None, PIECE), lambda row, part: (row, part))
    return pl.pallas_call(
        functools.partial(_kernel, shape=rows.shape, interpret=interpret),
        grid=(num_rows, pl.cdiv(num_inputs, PIECE)),
        in_specs=[spec],
        out_specs=spec,
        out_shape=jax.ShapeDtypeStruct((num_rows, num_inputs), rows.dtype),
        compiler_params=plgpu.CompilerParams(num_warps=PIECE_WARPS, num_stages=1),
        interpret=interpret,
        name="padded_rows",
    )(rows)


def _kernel(
    rows_ref,  # [piece]
    out_ref,  # [piece]
    *,
    shape: tuple[int, ...],  # of the rows
    interpret: bool,
):
    row = registers.start_next(pl.program_id(0), interpret=interpret)
    exists = pl.program_id(1) * PIECE + jax.lax.broadcasted_iota(jnp.int32, out_ref.shape, 0) < shape[1]
    values = plgpu.load(rows_ref, mask=exists & (row < shape[0]), other=jnp.zeros((), rows_ref.dtype))
    plgpu.store(out_ref, values, mask=exists)
