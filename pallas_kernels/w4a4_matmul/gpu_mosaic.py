"""``w4a4_matmul`` as a Pallas Mosaic GPU kernel for NVIDIA Hopper, for symmetric activations with one scale per token.

Codes become ``16 * (code - 8)`` as int8 and are multiplied by the int8 activation codes, four-bit ones too: Hopper
has no 4-bit path, and the product is exact either way. Sums are int32 as long as one weight scale covers them and
float32 beyond. An asymmetric weight adds ``(8 * scale - offset) * (sum of the activation codes of the group)``.
See :mod:`pallas_kernels.backends.mosaic.matmul`.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32

from pallas_kernels.arrays.activation import QuantizedActivation
from pallas_kernels.arrays.partial_sums import PartialSums
from pallas_kernels.arrays.weight import (
    SYMMETRIC_ZERO_POINT,
    Layout,
    QuantizedWeight,
    layout_obstacle,
    order_activation_codes,
)
from pallas_kernels.backends import early_launch
from pallas_kernels.backends.mosaic import matmul as hopper
from pallas_kernels.backends.mosaic import pipeline as pipelines
from pallas_kernels.backends.mosaic import registers as lanes
from pallas_kernels.backends.mosaic.registers import arith, assembly, ir, llvm, plgpu

LAYOUT = Layout.WGMMA
CODE_FACTOR = 16  # the kernel multiplies by 16 * (code - 8)
# (bytes << 4 & 0xF0) ^ 0x80 is 16 * (nibble - 8) as int8: no borrow can cross a byte. The high plane needs no shift.
# Half a step more, of truncated codes, is an 8 in the nibble that the mask has cleared.
_DECODE = (
    "{{.reg .b32 t; shl.b32 t, $1, 4; lop3.b32 $0, t, 0xF0F0F0F0, {centre}, 0x6A;}}",
    "lop3.b32 $0, $1, 0xF0F0F0F0, {centre}, 0x6A;",
)
_CENTRES = {False: "0x80808080", True: "0x88888888"}


def obstacle(x: QuantizedActivation, weight: QuantizedWeight) -> str | None:
    """Why this kernel cannot serve a call, as the end of a sentence; None if it can."""
    if not x.symmetric or x.num_groups > 1:
        return "needs symmetric activations with one scale per token"
    if weight.group_size % lanes.TILE:
        return f"needs groups of a multiple of {lanes.TILE}, or the whole row; this is {weight.group_size}"
    return hopper.obstacle(weight) or layout_obstacle(weight.layout, LAYOUT)


def w4a4_matmul(
    x: QuantizedActivation,
    weight: QuantizedWeight,
    *,
    dtype: DTypeLike,
    config: hopper.MosaicConfig | None = None,
) -> Float[Array, "*batch N"] | PartialSums:
    """See the public functions. ``config`` replaces the measured choice of tiles."""
    outputs = _product(x, weight, dtype, config or default_config(_num_rows(x), weight), hopper.Epilogue.NONE)
    return outputs.reshape(*x.codes.shape[:-1], weight.num_outputs)


def gated_product(
    x: QuantizedActivation, weight: QuantizedWeight, *, dtype: DTypeLike
) -> tuple[Float[Array, "*batch F"], Float32[Array, "M parts"]]:
    """``swiglu`` of the product, and the largest magnitude of each part of its rows.

    ``w4a4_swiglu_quantize`` goes on with them; its ``obstacle`` tells where this can serve.
    """
    config = default_config(_num_rows(x), weight)
    outputs, magnitudes = _product(x, weight, dtype, config, hopper.Epilogue.GATED_WITH_MAGNITUDES)
    return outputs.reshape(*x.codes.shape[:-1], outputs.shape[-1]), magnitudes


def _num_rows(x: QuantizedActivation) -> int:
    return math.prod(x.codes.shape[:-1])


def _product(
    x: QuantizedActivation,
    weight: QuantizedWeight,
    dtype: DTypeLike,
    config: hopper.MosaicConfig,
    epilogue: hopper.Epilogue,
) -> Any:
    # Who computes the codes writes them in this order, or XLA brings them into it.
    codes = x.codes if x.layout is weight.layout else order_activation_codes(x.codes, weight.layout)
    codes, scale = codes.reshape(-1, x.num_inputs), x.scale.reshape(-1)
    weight = dataclasses.replace(weight, group_sum=None)
    options = {"bits": x.bits, "early": early_launch.is_enabled(), "config": config, "epilogue": epilogue}
    return _matmul(codes, scale, weight, dtype=jnp.dtype(dtype), **options)


def default_config(m: int, weight: QuantizedWeight) -> hopper.MosaicConfig:
    """Tiles by shape; the order of the sum depends on the weight alone."""
    n, k, grouped = weight.num_outputs, weight.num_inputs, weight.num_groups > 1
    # Float32 and int32 sums of a group share the registers. Code sums are copied in pieces of 128 bytes, and
    # integer instructions come in steps of 16 rows beyond 32.
    multiple = 8 if weight.symmetric and m <= 32 else 16
    block_m = hopper.block_m(m, most=128 if grouped else 256, multiple=multiple)
    return hopper.layout_of_warpgroups(n, hopper.num_slices(n, k), block_m, sums=2 if grouped else 1)


def _sums_of_codes(codes: Array, num_groups: int, factor: float, num_rows: int, *, early: bool) -> Array:
    """``factor`` times the sums of each row's codes by group ``[G, num_rows]`` float32, zero where there is no row.

    XLA adds them up, unless the kernel before them has signalled.
    """
    if early:  # which asks for a JAX that has the Triton backend
        from pallas_kernels.w4a4_matmul.gpu_triton_sums import sums_of_codes

        return sums_of_codes(codes, num_groups=num_groups, factor=factor, num_rows=num_rows)
    by_group = codes.astype(jnp.int32).reshape(-1, num_groups, codes.shape[1] // num_groups)
    sums = by_group.sum(-1).T.astype(jnp.float32) * jnp.float32(factor)
    return jnp.pad(sums, ((0, 0), (0, num_rows - codes.shape[0])))


# A jit of its own, so that a program with many layers lowers the kernel once per shape.
@functools.partial(jax.jit, static_argnames=("dtype", "bits", "early", "config", "epilogue"))
def _matmul(
    codes: Array,
    x_scale: Array,
    weight: QuantizedWeight,
    *,
    dtype: DTypeLike,
    bits: int,
    early: bool,
    config: hopper.MosaicConfig,
    epilogue: hopper.Epilogue,
) -> Any:
    (num_rows, k), scale, offset = codes.shape, weight.scale, weight.offset
    sizes = num_rows, weight.num_outputs, k, scale.shape[0]
    problem = hopper.Problem(*sizes, jnp.int8, dtype, epilogue=epilogue)
    columns, row_groups = (scale,), ()
    if offset is not None:
        columns = (scale, offset)
        # Every slice of a whole row adds its share of the one sum; a share is exact, slices being a power of two.
        share = 1 / config.slices if scale.shape[0] == 1 else 1.0
        padded = num_rows + -num_rows % config.block_m
        row_groups = (_sums_of_codes(codes, scale.shape[0], share, padded, early=early),)
    config = hopper.with_most_stages(config, problem, len(columns) + len(row_groups))
    return pipelines.launch(
        codes,
        (weight.packed,),
        columns,
        x_scale,
        row_groups=row_groups,
        consume=functools.partial(
            _consume_grouped if scale.shape[0] > 1 else _consume_whole, centre=_CENTRES[weight.truncated]
        ),
        problem=problem,
        config=config,
        early=early,
        name=f"w4a{bits}" + "_swiglu" * (epilogue is not hopper.Epilogue.NONE),  # as profiles show it
        groups_in_tiles=scale.shape[0] > 1,
    )


def _consume_grouped(pipeline: pipelines.Pipeline, *, centre: str) -> jax.Array:
    """Float32 sums over the groups of int32 sums within them."""
    shape = (lanes.ROWS, pipeline.config.block_m)

    # Two products in flight need two accumulators, for which four warpgroups have registers up to 32 rows.
    together = 2 if shape[1] <= 32 or pipeline.config.num_warpgroups < 4 else 1

    def multiply(tile: pipelines.Tile, total: jax.Array) -> jax.Array:
        for first in range(0, 2, together):
            add = functools.partial(_add_planes, tile, centre, total, first)
            total = pl.run_scoped(add, *[_accumulator(shape)] * together)
        return total

    return pipeline.for_each_tile(multiply, lanes.zeros(shape))


def _add_planes(tile: pipelines.Tile, centre: str, total: jax.Array, first: int, *accumulators: Any) -> jax.Array:
    for plane, accumulator in enumerate(accumulators, first):
        tile.multiply(0, plane, functools.partial(plgpu.wgmma, accumulator, _decode(tile, plane, centre)))
    for index, accumulator in enumerate(accumulators):
        in_flight = len(accumulators) - 1 - index  # the second product runs while the first is scaled
        sums = plgpu.wgmma_accumulator_load(accumulator, wait_n=in_flight)
        total = lanes.pinned(_add_scaled(tile.columns, tile.row_groups, first + index, sums, total))
    return total


def _consume_whole(pipeline: pipelines.Pipeline, *, centre: str) -> jax.Array:
    """Int32 sums over all inputs, and one scale."""
    shape = (lanes.ROWS, pipeline.config.block_m)

    def multiply(accumulator, tile):
        for plane in range(2):
            tile.multiply(0, plane, functools.partial(plgpu.wgmma, accumulator, _decode(tile, plane, centre)))

    def product(accumulator):
        pipeline.for_each_tile(lambda tile, _: multiply(accumulator, tile), None)
        return accumulator[...]

    sums = pl.run_scoped(product, _accumulator(shape))
    return _add_scaled(*pipeline.whole_row(), 0, sums, lanes.zeros(shape))


def _accumulator(shape: tuple[int, int]) -> Any:
    return lanes.accumulator(shape, jnp.int32)


def _decode(tile: pipelines.Tile, plane: int, centre: str) -> jax.Array:
    """A plane of a tile as ``16 * (code - 8)``, int8 ``[64, 128]`` in registers."""
    shape = (lanes.ROWS, lanes.TILE)

    def build(context, weight):
        word_type = ir.IntegerType.get_signless(32)
        quad = ir.VectorType.get((4,), ir.IntegerType.get_signless(8))
        words = lanes.load_words(weight, (0, 1))
        registers: list[Any] = [None] * 16
        for half in range(2):
            for index, word in enumerate(words[half]):
                [decoded] = assembly(_DECODE[plane].format(centre=centre), "=r,r", [word], [word_type])
                registers[2 * index + half] = llvm.bitcast(quad, decoded)
        return lanes.fragmented(registers, shape)

    returns = plgpu.ShapeDtypeStruct(shape, jnp.int8, layout=plgpu.Layout.WGMMA_8BIT)
    return lanes.inline(build, *tile.weight, types=[plgpu.RefType(pipelines.WEIGHT_TRANSFORMS)], returns=returns)


def _add_scaled(
    columns: tuple[Any, ...], row_groups: tuple[Any, ...], plane: int, sums: jax.Array, total: jax.Array
) -> jax.Array:
    """``total + scale / 16 * sums``, and for an asymmetric weight ``+ shift * (sum of the activation codes)``."""

    def build(context, sums, total, *refs):
        columns_refs, row_refs = refs[: len(columns)], refs[len(columns) :]
        scales = [_scale_and_shift(columns_refs, plane, half) for half in range(2)]
        registers = []
        for index, (sum_pair, total_pair) in enumerate(zip(sums.registers.flat, total.registers.flat, strict=True)):
            scale, shift = scales[index % 2]
            pair = arith.sitofp(total_pair.type, sum_pair)
            pair = llvm.intr_fma(pair, lanes.splat(pair.type, scale), total_pair)
            if shift is not None:
                code_sums = lanes.load_row_pair(row_refs[0], plane, index // 2)
                pair = llvm.intr_fma(code_sums, lanes.splat(pair.type, shift), pair)
            registers.append(pair)
        return lanes.fragmented(registers, sums.shape)

    refs = (*columns, *row_groups)
    returns = plgpu.ShapeDtypeStruct(total.shape, jnp.float32, layout=lanes.WGMMA)
    types = [lanes.WGMMA, lanes.WGMMA, *[plgpu.RefType()] * len(refs)]
    return lanes.inline(build, sums, total, *refs, types=types, returns=returns)


def _scale_and_shift(columns: tuple[Any, ...], plane: int, half: int) -> tuple[Any, Any]:
    """Float32 scale of the int8 product, and shift of an asymmetric weight or None."""
    f32 = ir.F32Type.get()
    values = [arith.extf(f32, lanes.load_column(column, plane, 0, half)) for column in columns]
    scale = arith.mulf(values[0], lanes.f32(1 / CODE_FACTOR))
    if len(values) == 1:
        return scale, None
    return scale, arith.subf(arith.mulf(values[0], lanes.f32(float(SYMMETRIC_ZERO_POINT))), values[1])
