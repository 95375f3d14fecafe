"""What the matmuls for TPUs share that read codes: blocks, scales, and the walk over the inputs.

A program of the grid has all inputs of ``block_n`` outputs: their bytes arrive in one copy, while those of the outputs
before are multiplied. It goes through them in chunks of 128 lanes. Scales multiply sums, which are fewer than weights
in a decode. A *run* is the largest number of consecutive inputs of one plane that share all scales. Where a run is
narrower than a chunk, the rows are multiplied as a stack of copies, each with the lanes of one run and zeros elsewhere:
one product, of rows that a decode has to spare.

Row invariance: the chunks are the same for every number of rows, and the matrix unit adds the inputs of a chunk in one
order whatever the rows. No TPU has confirmed it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.typing import DTypeLike
from jaxtyping import Array

from pallas_kernels.arrays.weight import SYMMETRIC_ZERO_POINT, TRUNCATED_CODE, QuantizedWeight
from pallas_kernels.backends.tpu import words
from pallas_kernels.backends.tpu.dots import dot

LANES = 128
MAX_ROWS = 256  # of a decode; more are bound by arithmetic, which XLA does well
_MAX_BLOCK_M = 128
_UNROLLED = 16  # chunks at most: the compiler fills the gaps of one with others
_BLOCK_BYTES = 4 * 2**20  # of packed codes; two blocks are in VMEM, of which a kernel on v5e may take 16 MiB
_LONG_ROW_BYTES = 8192  # from which a kernel asks for more; a core has 64 MiB at least
_VMEM_OF_LONG_ROWS = 48 * 2**20


def scale_run(num_inputs: int, *group_sizes: int) -> int:
    """Consecutive inputs of one plane that share all scales."""
    return math.gcd(num_inputs // 2, *group_sizes)


def obstacle(num_inputs: int, *group_sizes: int) -> str | None:
    """Why runs of inputs do not fit chunks of lanes, as the end of a sentence; None if they do."""
    run = scale_run(num_inputs, *group_sizes)
    if all(size == num_inputs for size in group_sizes) or run % LANES == 0 or LANES % run == 0:
        return None
    return f"needs groups that are whole rows, or runs of 2^n or 128 n inputs; K={num_inputs} gives runs of {run}"


def packed_arrays(weight: QuantizedWeight) -> list[Array]:
    """Those of its codes: one, or of a nested weight two."""
    return [weight.packed] if weight.low is None else [weight.packed, weight.low]


def block_n(row_bytes: int) -> int:
    """Outputs of a program: 512, whose first and last products wait for nothing the shortest time, or 256.

    Args:
        row_bytes: of the codes of an output.
    """
    return 512 if 512 * row_bytes <= _BLOCK_BYTES else 256


def shift_in_steps(weight: QuantizedWeight) -> float | None:
    """``a`` of the weight ``scale * (code - 8) + shift``, ``shift = a * scale - offset``; None where there is none.

    The code is that of the packed nibbles alone: those of a truncated weight stand for half a step more. The zero
    point of a symmetric nested weight is half a step from 8.
    """
    steps = SYMMETRIC_ZERO_POINT + TRUNCATED_CODE * weight.truncated - weight.zero_point * weight.symmetric
    return None if weight.symmetric and not steps else float(steps)


def padded(x: Array, multiple: int) -> Array:
    """Rows of zeros below, up to whole tiles: ``multiple`` rows, or a block where one does not hold all."""
    multiple = multiple if x.shape[0] <= _MAX_BLOCK_M else _MAX_BLOCK_M
    return jnp.pad(x, ((0, -x.shape[0] % multiple), (0, 0)))


def launch(
    kernel: Callable[..., None],
    x: Array,
    per_row: Sequence[Array],
    weight: QuantizedWeight,
    per_group: Sequence[Array],
    *,
    out_dtype: DTypeLike,
    interpret: Any,
    name: str,
) -> Array:
    """A kernel over ``[M, N]``, ``M`` a multiple of the rows of a tile (:func:`padded`).

    Args:
        kernel: takes references to both planes of ``x``, ``per_row``, :func:`packed_arrays`, ``per_group``, the output,
            and one scratch array, or of a weight with a shift two, in the shape of a block of scales, float32.
        x: ``[M, K]`` rows.
        per_row: ``[M, _]`` each.
        per_group: ``[_, N]`` each; of float16 as :func:`words.half_bits`.
    """
    m, (n, half) = x.shape[0], weight.packed.shape
    packed = packed_arrays(weight)
    row_bytes = len(packed) * half
    width, block_m = block_n(row_bytes), min(m, _MAX_BLOCK_M)
    num_scales = 1 if shift_in_steps(weight) is None else 2
    planes, plane_specs = _planes(x, block_m)
    per_group = [words.half_bits(array) for array in per_group]
    return pl.pallas_call(
        kernel,
        grid=(pl.cdiv(n, width), m // block_m),
        in_specs=[
            *plane_specs,
            *[pl.BlockSpec((block_m, array.shape[1]), lambda n, m: (m, 0)) for array in per_row],
            *[pl.BlockSpec((width, half), lambda n, m: (n, 0))] * len(packed),
            *[pl.BlockSpec((array.shape[0], width), lambda n, m: (0, n)) for array in per_group],
        ],
        out_specs=pl.BlockSpec((block_m, width), lambda n, m: (m, n)),
        out_shape=jax.ShapeDtypeStruct((m, n), out_dtype),
        scratch_shapes=[pltpu.VMEM((weight.num_groups, width), jnp.float32)] * num_scales,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"),
            # XLA would else write the bits of all float16 scales to memory, before the loop of a program.
            allow_input_fusion=[False] * (2 + len(per_row) + len(packed))
            + [array.dtype == jnp.int16 for array in per_group],
            vmem_limit_bytes=_VMEM_OF_LONG_ROWS if row_bytes > _LONG_ROW_BYTES else None,
        ),
        interpret=interpret,
        name=name,
    )(*planes, *per_row, *packed, *per_group)


def _planes(x: Array, block_m: int) -> tuple[tuple[Array, Array], list[pl.BlockSpec]]:
    """Both planes of the rows, read in place where they are whole tiles."""
    half = x.shape[1] // 2
    if half % LANES == 0:
        return (x, x), [pl.BlockSpec((block_m, half), lambda n, m, plane=plane: (m, plane)) for plane in range(2)]
    low, high = jnp.split(x, 2, axis=1)
    return (low, high), [pl.BlockSpec((block_m, half), lambda n, m: (m, 0))] * 2


def read_scales(group_refs: Sequence[Any], scale_refs: Sequence[Any], steps: float | None) -> None:
    """In a kernel, once per block of outputs: the scale of a decoded code, and what the sum of a row is times of.

    ``steps`` is :func:`shift_in_steps`.
    """

    @pl.when(pl.program_id(1) == 0)
    def _():
        scale = words.as_float32(group_refs[0][...])
        scale_refs[0][...] = scale * jnp.float32(1 / words.CODE_FACTOR)
        if steps is not None:
            shift = jnp.float32(steps) * scale
            for offset_ref in group_refs[1:]:
                shift = shift - words.as_float32(offset_ref[...])
            scale_refs[1][...] = shift


def for_each_chunk(half: int, chunk: Callable[..., Any], carry: Any) -> Any:
    """In a kernel: ``carry = chunk(columns, start, carry)`` for 128 bytes of a row after 128, and what is left."""
    num_chunks, rest = divmod(half, LANES)

    def step(index, carry):
        start = pl.multiple_of(index * LANES, LANES)
        return chunk(pl.ds(start, LANES), start, carry)

    if num_chunks:
        carry = lax.fori_loop(0, num_chunks, step, carry, unroll=_unrolled(num_chunks))
    start = num_chunks * LANES
    return chunk(pl.ds(start, rest), start, carry) if rest else carry


def _unrolled(num_chunks: int) -> int:
    return max(count for count in range(1, _UNROLLED + 1) if num_chunks % count == 0)


def by_runs(x: Array, run: int) -> Array:
    """In a kernel: ``[M, W]`` as ``[W / run * M, W]``, each copy with the lanes of one run, zeros elsewhere."""
    num_runs = max(1, x.shape[1] // run)
    if num_runs == 1:
        return x
    integers = x.dtype == jnp.int8
    wide = x if integers else x.astype(jnp.float32)
    lane = lax.broadcasted_iota(jnp.int32, (x.shape[0] // (4 if integers else 1), x.shape[1]), 1)
    inside = [(lane >= r * run) & (lane < (r + 1) * run) for r in range(num_runs)]
    copies = [words.int8_where(mask, wide) if integers else jnp.where(mask, wide, 0.0) for mask in inside]
    return jnp.concatenate(copies, axis=0).astype(x.dtype)


def dot_transposed(x: Array, weight: Array, accumulator: DTypeLike = jnp.float32) -> Array:
    """In a kernel: ``x @ weight.T``."""
    return dot(x, weight, contract=(1, 1), accumulator=accumulator)


def row_sum(x: Array) -> Array:
    """In a kernel: ``[M, 1]`` float32."""
    return jnp.sum(x.astype(jnp.float32), axis=1, keepdims=True)


def column(values: Array, index: Array) -> Array:
    """In a kernel: column ``index`` of ``[M, G]``, as ``[M, 1]``."""
    lane = lax.broadcasted_iota(jnp.int32, values.shape, 1)
    return jnp.sum(jnp.where(lane == index, values, 0.0), axis=1, keepdims=True)
