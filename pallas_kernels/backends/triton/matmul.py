"""The launch of a Pallas Triton matmul, and how its kernel reads rows and multiplies.

A matmul kernel walks over tiles of ``[block_n, block_k]`` packed bytes. Each byte tile feeds two dots, one
per nibble plane, so the two tiles of activations lie ``K/2`` inputs apart. ``block_k`` divides the group
size, hence a tile never straddles two groups and its scale multiplies the dot's float32 result.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jax.typing import DTypeLike

from pallas_kernels.arrays.partial_sums import PartialSums
from pallas_kernels.backends.triton.registers import Ref
from pallas_kernels.backends.triton.tiles import TileConfig


def dot_transposed(rows: jax.Array, weight: jax.Array) -> jax.Array:
    """``rows: [m, k]`` times ``weight: [n, k]`` transposed, in float32 or int32."""
    accumulator = jnp.int32 if rows.dtype == jnp.int8 else jnp.float32
    return jax.lax.dot_general(rows, weight, (((1,), (1,)), ((), ())), preferred_element_type=accumulator)


def row_mask(num_rows: int, block_m: int, width: int) -> jax.Array | None:
    """``[block_m, width]`` bool, which rows of this program's block exist; None if all of them do."""
    if num_rows % block_m == 0:
        return None
    rows = pl.program_id(2) * block_m + jax.lax.broadcasted_iota(jnp.int32, (block_m, width), 0)
    return rows < num_rows


def load_rows(ref: Ref, start: jax.Array | int, width: int, mask: jax.Array | None) -> jax.Array:
    """``ref[:, start : start + width]`` with zeros in the rows that do not exist."""
    columns = ref.at[:, pl.ds(start, width)]
    if mask is None:
        return plgpu.load(columns)
    return plgpu.load(columns, mask=mask, other=jnp.zeros((), ref.dtype))


_Carry = TypeVar("_Carry")


def loop_with_loads_ahead(
    first: jax.Array,
    num_steps: int,
    step: Callable[[jax.Array, _Carry, Any], _Carry],
    carry: _Carry,
    load: Callable[[jax.Array], Any],
) -> _Carry:
    """Steps one after the other, each with what was loaded for it during the one before.

    Of a loop's loads Triton has only those of tiles on their way early. For others, such as the scales of a group, it
    would wait in each step, which takes longer than all else that a step does.

    Args:
        first: the number of the first step.
        num_steps: how many.
        step: takes the number of a step, what the one before returned, and what was loaded.
        carry: what the first step gets.
        load: takes the number of a step.
    """
    if num_steps == 1:
        return step(first, carry, load(first))

    def step_and_load(index: jax.Array, both: tuple[_Carry, Any]) -> tuple[_Carry, Any]:
        following = load(first + jnp.minimum(index + 1, num_steps - 1))
        return step(first + index, *both), following

    return jax.lax.fori_loop(0, num_steps, step_and_load, (carry, load(first)))[0]


def launch_matmul(
    kernel: Callable[..., None],
    row_arrays: tuple[jax.Array, ...],
    weight_arrays: tuple[jax.Array, ...],
    *,
    config: TileConfig,
    out_dtype: DTypeLike,
    interpret: bool,
    name: str,
    num_packed: int = 1,
) -> jax.Array | PartialSums:
    """Runs ``kernel`` over N blocks x split x M blocks. What programs that share a sum leave, its reader adds.

    Args:
        kernel: takes a ref per array and the output ref ``[block_m, block_n]``.
        row_arrays: ``[M, *]``, seen by the kernel as ``[block_m, *]``.
        weight_arrays: ``[N, K/2]`` packed codes, then ``[G, N]`` arrays, seen as ``[block_n, K/2]`` and
            ``[G, block_n]``.
        num_packed: how many of them are packed codes.
    """
    m, (n, half) = row_arrays[0].shape[0], weight_arrays[0].shape
    row_specs = [pl.BlockSpec((config.block_m, a.shape[1]), lambda n, p, m: (m, 0)) for a in row_arrays]
    packed_spec = pl.BlockSpec((config.block_n, half), lambda n, p, m: (n, 0))
    group_specs = [
        pl.BlockSpec((a.shape[0], config.block_n), lambda n, p, m: (0, n)) for a in weight_arrays[num_packed:]
    ]
    partial_sums = pl.pallas_call(
        kernel,
        grid=(n // config.block_n, config.split, pl.cdiv(m, config.block_m)),
        in_specs=[*row_specs, *[packed_spec] * num_packed, *group_specs],
        out_specs=pl.BlockSpec((None, config.block_m, config.block_n), lambda n, p, m: (p, m, n)),
        out_shape=jax.ShapeDtypeStruct((config.split, m, n), jnp.float32 if config.split > 1 else out_dtype),
        compiler_params=plgpu.CompilerParams(num_warps=config.num_warps, num_stages=config.num_stages),
        interpret=interpret,
        name=name,
    )(*row_arrays, *weight_arrays)
    return PartialSums(partial_sums, out_dtype) if config.split > 1 else partial_sums[0]
