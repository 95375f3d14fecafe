"""``w4a16_matmul`` as a Pallas Triton kernel for NVIDIA GPUs (compute capability 8.0 and newer).

Codes become 16-bit floats centred by 8, which is exact, for nested 8-bit codes too; the scales multiply the float32
sums. An asymmetric weight is ``scale * (code - 8) + shift`` with ``shift = 8 * scale - offset``, so it adds the sum of
the activations times ``shift``, in float32. Float32 activations are cut into three bfloat16 pieces that together hold
all their bits, so tensor cores multiply them exactly.

Of small groups with offsets that is more work than of the weights themselves. Programs scale and round these to the 16
bits of their rows, once for all of them, and multiply by them from the left (:func:`tiles.rounds_weights`).

More rows of 16 bits than a decode has are a prefill, bound by arithmetic. Unless they are to be alike, the weight is
dequantised once, and XLA multiplies (cuBLAS); a row may then differ in its last bits by the number of rows beside it.
Prompts that are read beside others are tiles of one kind for any number of rows, and any weight is rounded for them: a
small one by each program, as it loads it, a large one once.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from pallas_kernels.arrays.partial_sums import PartialSums
from pallas_kernels.arrays.weight import (
    SYMMETRIC_ZERO_POINT,
    Layout,
    QuantizedWeight,
    dequantize,
    layout_obstacle,
)
from pallas_kernels.backends.triton import matmul, registers, tiles, tuning
from pallas_kernels.backends.triton.tuning import DECODE_ROWS
from pallas_kernels.float_matmul import gpu_triton as float_tiles

# Weights that are rounded by each program of 128 rows: reading these again costs less than one more launch.
_FEW_WEIGHTS = 4_000_000
LAYOUT, ROWS_ALIKE, ROWS_ALIKE_IF_ASKED, PREFILL_ALIKE = Layout.PLANES, DECODE_ROWS[-1], None, True


def obstacle(dtype: jnp.dtype, weight: QuantizedWeight) -> str | None:
    """Why this kernel cannot serve a weight, as the end of a sentence; None if it can."""
    del dtype  # all three of the public function work
    sizes = weight.num_outputs, weight.num_inputs, weight.group_size
    return tiles.matmul_obstacle(*sizes) or layout_obstacle(weight.layout, LAYOUT)


def w4a16_matmul(
    x: Float[Array, "*batch K"],
    weight: QuantizedWeight,
    *,
    dtype: DTypeLike | None = None,
    alike: bool = False,
    prefill: bool = False,
    config: tiles.TileConfig | None = None,
    interpret: bool = False,
) -> Float[Array, "*batch N"] | PartialSums:
    """See the public function. ``config`` replaces the measured choice of tiles.

    With ``alike`` more rows than a decode has are as many more tiles of what 256 rows take; with ``prefill`` any number
    of them are tiles for many rows.
    """
    registers.ignore_triton_deprecation()
    rows, dtype = x.reshape(-1, x.shape[-1]), jnp.dtype(dtype or x.dtype)
    is_exact = x.dtype == jnp.float32
    if prefill and config is None and not is_exact and weight.bits == 4 and not weight.truncated:
        outputs = _matmul_of_prompts(rows, weight, dtype=dtype, interpret=interpret)
        return outputs.reshape(*x.shape[:-1], weight.num_outputs)
    if prefill:
        config = config or tiles.prefill_config(weight.num_outputs, _run(weight), exact=is_exact)
    if config is None and rows.shape[0] > DECODE_ROWS[-1] and x.dtype != jnp.float32 and not alike:
        outputs = _dequantized_matmul(rows, weight, dtype=dtype)
    else:
        most = DECODE_ROWS[-1] if alike else rows.shape[0]
        config = config or _tile_config(min(rows.shape[0], most), x.dtype, weight)
        weight = dataclasses.replace(weight, group_sum=None)
        multiply = _rounded_matmul if _rounds(weight, x.dtype) else _matmul
        outputs = multiply(rows, weight, dtype=dtype, config=config, interpret=interpret)
    return outputs.reshape(*x.shape[:-1], weight.num_outputs)


@functools.partial(jax.jit, static_argnames="dtype")
def _dequantized_matmul(x: Array, weight: QuantizedWeight, *, dtype: DTypeLike) -> Array:
    """``x @ w.T`` with the weight rounded to the dtype of ``x``, the only time it is in memory in 16 bits."""
    product = lax.dot_general(
        x, _rounded(weight, x.dtype), (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32
    )
    return product.astype(dtype)


def _rounded(weight: QuantizedWeight, dtype: DTypeLike) -> Array:
    # The barrier keeps XLA from decoding the weight again for each block of rows.
    return lax.optimization_barrier(dequantize(weight).astype(dtype))


def _matmul_of_prompts(x: Array, weight: QuantizedWeight, *, dtype: jnp.dtype, interpret: bool) -> Array:
    """``x @ w.T`` with the weight rounded to the dtype of ``x``, in tiles that are the same for any number of rows."""
    n, k = weight.num_outputs, weight.num_inputs
    if n * k >= _FEW_WEIGHTS:
        return _float_product(x, weight, dtype=dtype, interpret=interpret)
    config = tiles.prefill_config(n, _run(weight), exact=False)
    product = _rounded_matmul(x, weight, dtype=dtype, config=config, interpret=interpret)
    assert isinstance(product, jax.Array)
    return product


@functools.partial(jax.jit, static_argnames=("dtype", "interpret"))
def _float_product(x: Array, weight: QuantizedWeight, *, dtype: jnp.dtype, interpret: bool) -> Array:
    floats, config = _rounded(weight, x.dtype), float_tiles.PROMPT_TILES
    product = float_tiles.float_matmul(x, floats, dtype=dtype, config=config, interpret=interpret)
    assert isinstance(product, jax.Array)
    return product


# A jit of its own, so that a program with many layers lowers the kernel once per shape.
@functools.partial(jax.jit, static_argnames=("dtype", "config", "interpret"))
def _rounded_matmul(
    x: Array, weight: QuantizedWeight, *, dtype: jnp.dtype, config: tiles.TileConfig, interpret: bool
) -> Array | PartialSums:
    """``x @ w.T`` by programs that round a weight of 4 bits to the dtype of ``x``, once for all of their rows."""
    offsets = () if weight.offset is None else (weight.offset,)
    options = {"num_rows": x.shape[0], "config": config, "signals": dtype != jnp.float32}
    return matmul.launch_matmul(
        functools.partial(_rounding_kernel, truncated=weight.truncated, interpret=interpret, **options),
        (x,),
        (weight.packed, weight.scale, *offsets),
        config=config,
        out_dtype=dtype,
        interpret=interpret,
        name="w4a16",  # as profiles show it
    )


def _rounding_kernel(
    x_ref,  # [block_m, K] bf16 or f16
    packed_ref,  # [block_n, K/2] uint8
    *group_refs,  # scale [G, block_n], offset of an asymmetric weight, output [block_m, block_n]
    truncated: bool,
    interpret: bool,
    num_rows: int,
    config: tiles.TileConfig,
    signals: bool,
):
    *group_refs, out_ref = group_refs
    half, block_k, dtype = packed_ref.shape[1], config.block_k, x_ref.dtype
    group_size = 2 * half // group_refs[0].shape[0]
    steps = half // block_k // config.split
    part = pl.program_id(1)
    first_step = (registers.start_next(part, interpret=interpret) if signals else part) * steps
    x_mask = matmul.row_mask(num_rows, config.block_m, block_k)

    def of_planes(index):
        """Scale, and offset if there is one, of a step's two tiles, as they are stored."""
        groups = [lax.div(start, group_size) for start in (index * block_k, half + index * block_k)]
        return [tuple(ref[group, :] for ref in group_refs) for group in groups]

    def rounded(codes, scale, offset=None):
        scale = scale.astype(jnp.float32)
        weight = codes.astype(jnp.float32) * scale[:, None]
        if offset is not None:
            weight += (SYMMETRIC_ZERO_POINT * scale - offset.astype(jnp.float32))[:, None]
        return weight.astype(dtype)

    def step(index, total, loaded):
        start = index * block_k
        packed = packed_ref[:, pl.ds(start, block_k)]
        planes = registers.decode_planes(packed, dtype, truncated=truncated, interpret=interpret)
        for first, codes, of_group in zip((start, half + start), planes, loaded, strict=True):
            x = matmul.load_rows(x_ref, first, block_k, x_mask)
            # The weight on the left: 64 outputs are as high as Hopper's tensor cores want it, whatever the rows are.
            total += matmul.dot_transposed(rounded(codes, *of_group), x)
        return total

    zeros = jnp.zeros((config.block_n, config.block_m), jnp.float32)
    total = matmul.loop_with_loads_ahead(first_step, steps, step, zeros, of_planes)
    out_mask = matmul.row_mask(num_rows, config.block_m, config.block_n)
    plgpu.store(out_ref, total.T.astype(out_ref.dtype), mask=out_mask)


def _rounds(weight: QuantizedWeight, dtype: jnp.dtype) -> bool:
    """Whether programs round the weight to 16 bits before they multiply, for new tokens."""
    sizes = weight.num_inputs, weight.group_size
    return dtype != jnp.float32 and tiles.rounds_weights(*sizes, symmetric=weight.symmetric, bits=weight.bits)


def _run(weight: QuantizedWeight) -> int:
    return tiles.scale_run(weight.num_inputs, weight.group_size)


def _tile_config(num_rows: int, dtype: jnp.dtype, weight: QuantizedWeight) -> tiles.TileConfig:
    n, k, run, asymmetric = weight.num_outputs, weight.num_inputs, _run(weight), not weight.symmetric
    if dtype == jnp.float32:  # which take twice the shared memory
        config = tiles.tile_config(num_rows, n, k, min(run, 64), asymmetric=asymmetric)
        return dataclasses.replace(config, block_m=min(config.block_m, 64))
    if (tuned := tuning.tuned_config("w4a16", num_rows, weight)) is not None:
        return tuned
    if _rounds(weight, dtype):
        return tiles.rounding_config(num_rows, n, k, run)
    return tiles.tile_config(num_rows, n, k, run, asymmetric=asymmetric)


# A jit of its own, so that a program with many layers lowers the kernel once per shape.
@functools.partial(jax.jit, static_argnames=("dtype", "config", "interpret"))
def _matmul(
    x: Array, weight: QuantizedWeight, *, dtype: DTypeLike, config: tiles.TileConfig, interpret: bool
) -> Array | PartialSums:
    offsets = () if weight.offset is None else (weight.offset,)
    packed = (weight.packed,) if weight.low is None else (weight.packed, weight.low)
    options = {"num_rows": x.shape[0], "config": config, "signals": dtype != jnp.float32}
    is_centred = weight.symmetric and weight.low is not None
    codes = {"truncated": weight.truncated, "centred": is_centred, "interpret": interpret}
    return matmul.launch_matmul(
        functools.partial(_kernel, num_packed=len(packed), codes=codes, **options),
        (x,),
        (*packed, weight.scale, *offsets),
        config=config,
        out_dtype=dtype,
        interpret=interpret,
        name=f"w{weight.bits}a16",  # as profiles show it
        num_packed=len(packed),
    )


def _kernel(
    x_ref,  # [block_m, K] bf16, f16 or f32
    packed_ref,  # [block_n, K/2] uint8
    *refs,  # low [block_n, K/2] of a nested weight, scale [G, block_n], offset of an asymmetric one, output
    num_packed: int,
    codes: dict[str, bool],
    num_rows: int,
    config: tiles.TileConfig,
    signals: bool,
):
    low_refs, (scale_ref, *offset_refs, out_ref) = refs[: num_packed - 1], refs[num_packed - 1 :]
    half, block_k = packed_ref.shape[1], config.block_k
    num_groups = scale_ref.shape[0]
    group_size = 2 * half // num_groups
    steps = half // block_k // config.split
    part = pl.program_id(1)
    first_step = (registers.start_next(part, interpret=codes["interpret"]) if signals else part) * steps
    x_mask = matmul.row_mask(num_rows, config.block_m, block_k)
    code_dtype = jnp.bfloat16 if x_ref.dtype == jnp.float32 else x_ref.dtype

    def of_group(group):
        """Scale, and offset if there is one, as they are stored."""
        return tuple(ref[group, :] for ref in (scale_ref, *offset_refs))

    def scale_and_shift(scale, offset=None):
        scale = scale.astype(jnp.float32)
        return scale, None if offset is None else SYMMETRIC_ZERO_POINT * scale - offset.astype(jnp.float32)

    def of_planes(index):
        """What a step needs of the groups of its two tiles."""
        starts = (index * block_k, half + index * block_k) if num_groups > 1 else ()
        return [of_group(lax.div(start, group_size)) for start in starts] or (None, None)

    def plane(start, codes, of_group, product, row_sum):
        """Adds one plane's tile to the scaled product, or (one group) to product and sum, still unscaled."""
        x = matmul.load_rows(x_ref, start, block_k, x_mask)
        partial = _dot(x, codes)
        tile_sum: Any = 0.0
        if offset_refs and config.sums_once:
            tile_sum = jnp.sum(x.astype(jnp.float32), axis=1, keepdims=True)
        elif offset_refs:
            # In every column, by tensor cores: jnp.sum would add in an order that depends on the height of the tile.
            tile_sum = _dot(x, jnp.ones_like(codes))
        if num_groups == 1:
            return product + partial, row_sum + tile_sum
        scale, shift = scale_and_shift(*of_group)
        product = product + partial * scale[None, :]
        return (product if shift is None else product + tile_sum * shift[None, :]), row_sum

    def step(index, carry, loaded):
        start = index * block_k
        packed, *lower = (ref[:, pl.ds(start, block_k)] for ref in (packed_ref, *low_refs))
        low, high = registers.decode_planes(packed, code_dtype, low=lower[0] if lower else None, **codes)
        return plane(half + start, high, loaded[1], *plane(start, low, loaded[0], *carry))

    zeros = jnp.zeros((config.block_m, config.block_n), jnp.float32)
    sums = jnp.zeros((config.block_m, 1), jnp.float32) if config.sums_once else zeros
    begin = zeros, (sums if offset_refs and num_groups == 1 else 0.0)
    product, row_sum = matmul.loop_with_loads_ahead(first_step, steps, step, begin, of_planes)
    if num_groups == 1:
        scale, shift = scale_and_shift(*of_group(0))
        product = product * scale[None, :]
        product = product if shift is None else product + row_sum * shift[None, :]
    out_mask = matmul.row_mask(num_rows, config.block_m, config.block_n)
    plgpu.store(out_ref, product.astype(out_ref.dtype), mask=out_mask)


def _dot(x: Array, codes: Array) -> Array:
    """``x: [block_m, block_k]`` times ``codes: [block_n, block_k]`` transposed, in float32."""
    if x.dtype != jnp.float32:
        return matmul.dot_transposed(x, codes)
    top, middle, bottom = _exact_bfloat16_pieces(x)
    small_first = matmul.dot_transposed(bottom, codes) + matmul.dot_transposed(middle, codes)
    return small_first + matmul.dot_transposed(top, codes)


def _exact_bfloat16_pieces(x: Array) -> tuple[Array, Array, Array]:
    """Three bfloat16 arrays whose sum is the float32 ``x``: its 24 bits in runs of eight."""

    def upper_bits(values):
        bits = lax.bitcast_convert_type(values, jnp.uint32) & jnp.uint32(0xFFFF0000)
        return lax.bitcast_convert_type(bits, jnp.float32)

    top = upper_bits(x)
    middle = upper_bits(x - top)
    bottom = x - top - middle
    return top.astype(jnp.bfloat16), middle.astype(jnp.bfloat16), bottom.astype(jnp.bfloat16)
