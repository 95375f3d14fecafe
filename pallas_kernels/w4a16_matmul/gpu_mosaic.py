"""``w4a16_matmul`` as a Pallas Mosaic GPU kernel for NVIDIA Hopper.

Codes become 16-bit floats ``code - 8``, exactly, and then ``scale * (code - 8) + shift`` in one rounding, with
``shift = 8 * scale - offset`` of an asymmetric weight: the weight as a 16-bit matmul would read it. The scale is
rounded to the dtype of the rows first. Sums are float32. See :mod:`pallas_kernels.backends.mosaic.matmul`.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float

from pallas_kernels.arrays.partial_sums import PartialSums
from pallas_kernels.arrays.weight import Layout, QuantizedWeight, layout_obstacle
from pallas_kernels.backends import early_launch
from pallas_kernels.backends.mosaic import matmul as hopper
from pallas_kernels.backends.mosaic import pipeline as pipelines
from pallas_kernels.backends.mosaic import registers as lanes
from pallas_kernels.backends.mosaic.registers import assembly, ir, llvm, plgpu, vector

LAYOUT = Layout.WGMMA

# Of a word with four bytes, bytes 0 and 2 make one register and bytes 1 and 3 the other: no byte is moved. lop3
# ((a & b) | c) makes 128 + nibble (bfloat16) or 1024 + nibble (float16), the subtraction of 136 or 1032 is exact.
_DECODE = """{{.reg .b32 even, odd, magic, centre; mov.b32 magic, {magic}; mov.b32 centre, {centre};
shr.u32 even, $2, {even}; shr.u32 odd, $2, {odd};
lop3.b32 even, even, 0x000F000F, magic, 0xEA; lop3.b32 odd, odd, 0x000F000F, magic, 0xEA;
sub.{kind}x2 even, even, centre; sub.{kind}x2 odd, odd, centre;
{scale} $0, even, {factors}; {scale} $1, odd, {factors};}}"""
_KINDS = {
    jnp.dtype(jnp.bfloat16): {"kind": "bf16", "magic": "0x43004300", "centre": "0x43084308"},
    jnp.dtype(jnp.float16): {"kind": "f16", "magic": "0x64006400", "centre": "0x64086408"},
}
_SCALE = "{{.reg .f32 s; cvt.f32.f16 s, $1; cvt.rn.{kind}x2.f32 $0, s, s;}}"
_SHIFT = """{{.reg .f32 s, o; cvt.f32.f16 s, $1; cvt.f32.f16 o, $2; neg.f32 o, o;
fma.rn.f32 s, s, 0f41000000, o; cvt.rn.{kind}x2.f32 $0, s, s;}}"""


# Registers that travel between functions as arrays in the WGMMA layout, in the order in which a thread holds them.
_WORDS = plgpu.ShapeDtypeStruct((lanes.ROWS, 16), jnp.int32, layout=lanes.WGMMA)


def obstacle(dtype: jnp.dtype, weight: QuantizedWeight) -> str | None:
    """Why this kernel cannot serve a call, as the end of a sentence; None if it can."""
    if jnp.dtype(dtype) not in _KINDS:
        return f"needs bfloat16 or float16 rows; these are {dtype}"
    return hopper.obstacle(weight) or layout_obstacle(weight.layout, LAYOUT)


def w4a16_matmul(
    x: Float[Array, "*batch K"], weight: QuantizedWeight, *, config: hopper.MosaicConfig | None = None
) -> Float[Array, "*batch N"] | PartialSums:
    """See the public functions. ``config`` replaces the measured choice of tiles."""
    rows = x.reshape(-1, x.shape[-1])
    if config is None:
        config = default_config(rows.shape[0], weight.num_outputs, weight.num_inputs)
    early = early_launch.is_enabled()
    outputs = _matmul(rows, weight.packed, weight.scale, weight.offset, early=early, config=config)
    return outputs.reshape(*x.shape[:-1], weight.num_outputs)


def default_config(m: int, n: int, k: int) -> hopper.MosaicConfig:
    """Tiles by shape; the order of the sum depends on the weight alone."""
    slices = hopper.num_slices(n, k)
    config = hopper.layout_of_warpgroups(n, slices, hopper.block_m(m))
    if 32 < config.block_m <= 64 and hopper.tiles_of_slice(k, slices) >= 8:
        # Decoding keeps a warpgroup busy: long slices go faster on more programs than on two warpgroups of one.
        config = dataclasses.replace(config, warpgroups_k=1, split=slices)
    return config


# A jit of its own, so that a program with many layers lowers the kernel once per shape.
@functools.partial(jax.jit, static_argnames=("early", "config"))
def _matmul(
    x: Array, packed: Array, scale: Array, offset: Array | None, *, early: bool, config: hopper.MosaicConfig
) -> Array | PartialSums:
    problem = hopper.Problem(x.shape[0], packed.shape[0], x.shape[1], scale.shape[0], x.dtype, x.dtype)
    columns = (scale,) if offset is None else (scale, offset)
    config = hopper.with_most_stages(config, problem, len(columns))
    return pipelines.launch(
        x, packed, columns, None, consume=_consume, problem=problem, config=config, early=early, name="w4a16"
    )


def _consume(pipeline: pipelines.Pipeline) -> jax.Array:
    shape, dtype = (lanes.ROWS, pipeline.config.block_m), pipeline.problem.x_dtype

    def multiply(accumulator, tile):
        factors = []
        for part in range(pipeline.problem.pieces):
            if part == 0 or pipeline.problem.groups_per_tile > 1:
                factors = [_factors(tile, plane, part, pipeline.problem) for plane in range(2)]
            words = _load_words(tile, part)
            for plane in range(2):
                codes = _decode(words, factors[plane], plane, len(tile.columns) == 1, dtype)
                tile.multiply(part, plane, functools.partial(plgpu.wgmma, accumulator, codes))

    def product(accumulator):
        pipeline.for_each_tile(lambda tile, _: multiply(accumulator, tile), None)
        return accumulator[...]

    return pl.run_scoped(product, lanes.accumulator(shape, jnp.float32))


def _load_words(tile: pipelines.Tile, part: int) -> jax.Array:
    """A part of a tile's bytes, ``[64, 64]``, as words: a thread has four of either of its outputs."""

    def build(context, weight):
        pair = ir.VectorType.get((2,), ir.IntegerType.get_signless(32))
        first, second = lanes.load_words(weight, (part,))
        words = [*first, *second]
        return lanes.fragmented([vector.from_elements(pair, words[i : i + 2]) for i in range(0, 8, 2)], _WORDS.shape)

    return lanes.inline(build, tile.weight, types=[plgpu.RefType(pipelines.WEIGHT_TRANSFORMS)], returns=_WORDS)


def _factors(tile: pipelines.Tile, plane: int, part: int, problem: hopper.Problem) -> jax.Array:
    """Scale and shift (0 if symmetric) of each group of a part: of a thread's two outputs, each twice in a register."""
    kind = _KINDS[jnp.dtype(problem.x_dtype)]["kind"]
    num_groups = max(1, problem.groups_per_tile // problem.pieces)
    first_group = part * problem.groups_per_tile // problem.pieces
    shape = (lanes.ROWS, 8 * num_groups)

    def build(context, scale, *offset):
        word = ir.IntegerType.get_signless(32)
        registers = []
        for group in range(first_group, first_group + num_groups):
            for half in range(2):
                values = [lanes.load_column(column, plane, group, half) for column in (scale, *offset)]
                values = [llvm.bitcast(ir.IntegerType.get_signless(16), value) for value in values]
                [factor] = assembly(_SCALE.format(kind=kind), "=r,h", values[:1], [word])
                [shift] = assembly(_SHIFT.format(kind=kind), "=r,h,h", values, [word]) if offset else [lanes.i32(0)]
                registers.append(vector.from_elements(ir.VectorType.get((2,), word), [factor, shift]))
        return lanes.fragmented(registers, shape)

    types = [plgpu.RefType()] * len(tile.columns)
    returns = plgpu.ShapeDtypeStruct(shape, jnp.int32, layout=lanes.WGMMA)
    return lanes.inline(build, *tile.columns, types=types, returns=returns)


def _decode(words: jax.Array, factors: jax.Array, plane: int, symmetric: bool, dtype: Any) -> jax.Array:
    """A plane of a part of a tile as floats ``[64, 64]`` in registers."""
    kind = _KINDS[jnp.dtype(dtype)]
    element = {"bf16": ir.BF16Type, "f16": ir.F16Type}[kind["kind"]]

    def build(context, words, factors):
        pair = ir.VectorType.get((2,), element.get())
        registers: list[Any] = [None] * 16
        by_group = lanes.scalars(factors)  # of a group, scale and shift of either output
        words_per_group = 4 // (len(by_group) // 4)
        for half in range(2):
            for index, word in enumerate(lanes.scalars(words)[4 * half : 4 * half + 4]):
                first = 4 * (index // words_per_group) + 2 * half
                even, odd = _decode_word(kind, plane, word, by_group[first : first + (1 if symmetric else 2)])
                registers[4 * index + half] = llvm.bitcast(pair, even)
                registers[4 * index + 2 + half] = llvm.bitcast(pair, odd)
        return lanes.fragmented(registers, (lanes.ROWS, lanes.TILE // 2))

    returns = plgpu.ShapeDtypeStruct((lanes.ROWS, lanes.TILE // 2), dtype, layout=lanes.WGMMA)
    return lanes.inline(build, words, factors, types=[lanes.WGMMA, lanes.WGMMA], returns=returns)


def _decode_word(kind: dict[str, str], plane: int, word: Any, factors: list[Any]) -> list[Any]:
    """Inputs 0 and 2, and 1 and 3, of the four that a word holds of a plane."""
    symmetric = len(factors) == 1
    ptx = _DECODE.format(
        even=4 * plane,
        odd=4 * plane + 8,
        scale=f"mul.{kind['kind']}x2" if symmetric else f"fma.rn.{kind['kind']}x2",
        factors="$3" if symmetric else "$3, $4",
        **kind,
    )
    constraints = "=&r,=&r" + ",r" * (1 + len(factors))
    return assembly(ptx, constraints, [word, *factors], [ir.IntegerType.get_signless(32)] * 2)
