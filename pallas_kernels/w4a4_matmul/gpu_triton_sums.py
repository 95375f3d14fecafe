"""Sums of activation codes, which Mosaic matmuls of asymmetric weights read, as a Pallas Triton kernel.

XLA would add them in a launch as well, but behind a kernel of XLA's own no matmul may start early
(``backends/early_launch.py``).
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float32, Int8

from pallas_kernels.backends.triton import registers


def sums_of_codes(
    codes: Int8[Array, "M K"], *, num_groups: int, factor: float, num_rows: int, interpret: bool = False
) -> Float32[Array, "G M_padded"]:
    """``factor`` times the sum of each row's codes in each of ``num_groups`` groups: exact for a power of two.

    Args:
        codes: in any order within a group.
        num_groups: G.
        factor: that the sums are multiplied by.
        num_rows: of the result, ``M`` or more; those that ``codes`` has not are zero.
        interpret: run Pallas' interpreter.
    """
    registers.ignore_triton_deprecation()
    m, k = codes.shape
    shape = num_groups, k // num_groups
    block = tuple(map(pl.next_power_of_2, shape))
    return pl.pallas_call(
        functools.partial(_kernel, num_rows=m, shape=shape, factor=factor, interpret=interpret),
        grid=(num_rows,),
        in_specs=[pl.BlockSpec((None, *block), lambda row: (row, 0, 0))],
        out_specs=pl.BlockSpec((block[0], None), lambda row: (0, row)),
        out_shape=jax.ShapeDtypeStruct((num_groups, num_rows), jnp.float32),
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=1),
        interpret=interpret,
        name="sums_of_codes",
    )(codes.reshape(m, *shape))


def _kernel(
    codes_ref,  # [block_groups, block_group] int8
    sums_ref,  # [block_groups] f32
    *,
    num_rows: int,
    shape: tuple[int, int],  # groups, codes of a group
    factor: float,
    interpret: bool,
):
    row = registers.start_next(pl.program_id(0), interpret=interpret)
    groups, places = (jax.lax.broadcasted_iota(jnp.int32, codes_ref.shape, axis) for axis in range(2))
    exists = (row < num_rows) & (groups < shape[0]) & (places < shape[1])
    codes = plgpu.load(codes_ref, mask=exists, other=jnp.int8(0))
    sums = jnp.sum(codes.astype(jnp.int32), axis=1).astype(jnp.float32) * jnp.float32(factor)
    plgpu.store(sums_ref, sums, mask=jax.lax.broadcasted_iota(jnp.int32, sums_ref.shape, 0) < shape[0])
