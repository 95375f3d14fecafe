"""``w4a16_matmul`` as a Pallas Mosaic GPU kernel for NVIDIA Hopper.

Codes become 16-bit floats ``code - 8``, exactly, nested 8-bit ones too, and then ``scale * (code - 8) + shift`` in one
rounding: the weight as a 16-bit matmul would read it. The shift is ``8 * scale - offset`` of an asymmetric weight and
``-scale / 2`` of a symmetric nested one. The scale is rounded to the dtype of the rows first. Sums are float32. See
:mod:`pallas_kernels.backends.mosaic.matmul`. With few rows, decoding is most of what a program does: for bfloat16 it is
1.1 instructions a code (:class:`~pallas_kernels.backends.codes.SmallLanes`).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from pallas_kernels.arrays.partial_sums import PartialSums
from pallas_kernels.arrays.weight import Layout, QuantizedWeight, layout_obstacle
from pallas_kernels.backends import codes, early_launch
from pallas_kernels.backends.mosaic import matmul as hopper
from pallas_kernels.backends.mosaic import pair_pipeline, pairs
from pallas_kernels.backends.mosaic import pipeline as pipelines
from pallas_kernels.backends.mosaic import registers as lanes
from pallas_kernels.backends.mosaic.registers import assembly, ir, llvm, plgpu, vector

LAYOUT, ROWS_ALIKE, ROWS_ALIKE_IF_ASKED, PREFILL_ALIKE = Layout.WGMMA, None, None, False
rows_read = hopper.rows_read

# By outputs of a weight, the numbers of rows that pairs of programs multiply in bfloat16, where pairs.obstacle finds
# none: those that were right and faster on an H200. Rows in float16 have not run so.
PAIRED_ROWS: Mapping[int, range] = {28672: range(96, 257)}

_LONG = 8  # tiles of a slice

# Rows from which a warpgroup computes all slices of its sums in turn. Programs fill the GPU without sharing them, and
# parts that are written and added later cost more. On an H200 512 rows of 4096 x 4096 take 26.5 us, 37.9 with parts,
# and 2,048 rows 98.8 and 154.5. Fewer rows and other groups were not measured. Nested weights lose.
IN_TURN_ROWS = 512
_IN_TURN_GROUP = 128
_IN_TURN_BLOCK_M = 128  # a warpgroup has no registers for three sums of more rows each

# Of a word with four bytes, bytes 0 and 2 make one register and bytes 1 and 3 the other: no byte is moved.
_DECODE = """{{.reg .b32 even, odd, c0, c1;
{even} {odd}
{prepare_even} {prepare_odd}
add.{kind}x2 even, even, c0; add.{kind}x2 odd, odd, c1;
{scale} $0, even, {factors}; {scale} $1, odd, {factors};}}"""
_DECODE_SMALL = """{{.reg .b32 even, odd, c;
{even} {odd}
{prepare_even} {prepare_odd}
{centre}
{scale} $0, even, {factors}; {scale} $1, odd, {factors};}}"""
_CENTRE = "mov.b32 c, {centre}; add.bf16x2 even, even, c; add.bf16x2 odd, odd, c;"
# Of scale and offset, each a float16, a float32 that is rounded to both lanes of a register.
_TO_LANES = "{{.reg .f32 s, o; cvt.f32.f16 s, $1; {compute} {enlarge} cvt.rn.{kind}x2.f32 $0, s, s;}}"
_HALF = "mul.f32 s, s, 0fBF000000;"
_SHIFT = "cvt.f32.f16 o, $2; neg.f32 o, o; fma.rn.f32 s, s, 0f41000000, o;"


# Registers that travel between functions as arrays in the WGMMA layout, in the order in which a thread holds them.
_WORDS = plgpu.ShapeDtypeStruct((lanes.ROWS, 16), jnp.int32, layout=lanes.WGMMA)


def obstacle(dtype: jnp.dtype, weight: QuantizedWeight) -> str | None:
    """Why this kernel cannot serve a call, as the end of a sentence; None if it can."""
    if jnp.dtype(dtype) not in codes.NAMES:
        return f"needs bfloat16 or float16 rows; these are {dtype}"
    return hopper.obstacle(weight) or layout_obstacle(weight.layout, LAYOUT)


def w4a16_matmul(
    x: Float[Array, "*batch K"],
    weight: QuantizedWeight,
    *,
    dtype: DTypeLike | None = None,
    config: hopper.MosaicConfig | pairs.PairConfig | None = None,
    epilogue: hopper.Epilogue = hopper.Epilogue.NONE,
) -> Float[Array, "*batch N"] | PartialSums:
    """See the public functions. ``config`` replaces the measured choice of tiles.

    Args:
        epilogue: ``GATED`` for the result of ``w4a16_swiglu``, whose ``obstacle`` tells where.

    Raises:
        NotImplementedError: ``config`` is one of pairs, which cannot serve this call.
    """
    rows = x.reshape(-1, x.shape[-1])
    early = early_launch.is_enabled()
    if config is None:
        config = _chosen_config(rows.shape[0], weight, rows.dtype, early=early)
    elif isinstance(config, pairs.PairConfig) and (reason := pairs.obstacle(weight, config, early=early)):
        raise NotImplementedError(f"w4a16_matmul: pairs of programs {reason}")
    options = {"dtype": jnp.dtype(dtype or x.dtype), "early": early, "config": config, "epilogue": epilogue}
    outputs = _matmul(rows, dataclasses.replace(weight, group_sum=None), **options)
    return outputs.reshape(*x.shape[:-1], outputs.shape[-1])


def _chosen_config(
    m: int, weight: QuantizedWeight, dtype: DTypeLike, *, early: bool
) -> hopper.MosaicConfig | pairs.PairConfig:
    """Pairs where they are to be taken and can serve, else the programs of :func:`default_config`."""
    n, k = weight.num_outputs, weight.num_inputs
    if m in PAIRED_ROWS.get(n, ()) and dtype == jnp.bfloat16:
        config = pairs.default_config(m, n, k)
        if hopper.sums_fit(config.block_m) and pairs.obstacle(weight, config, early=early) is None:
            return config
    kind = {"group_size": weight.group_size, "symmetric": weight.symmetric}
    return default_config(m, n, k, nested=weight.low is not None, **kind)


def default_config(
    m: int, n: int, k: int, *, nested: bool = False, group_size: int = 128, symmetric: bool = True
) -> hopper.MosaicConfig:
    """Tiles by shape and kind of weight, the fastest on an H200; the order of the sum depends on the weight alone."""
    slices, block_m = hopper.num_slices(n, k), hopper.block_m(m)
    is_measured = not nested and group_size == _IN_TURN_GROUP
    if m >= IN_TURN_ROWS and is_measured and (in_turn := in_turn_config(m, n, k)) is not None:
        return in_turn
    config = hopper.layout_of_warpgroups(n, slices, block_m)
    if 32 < block_m <= 64 and (nested if slices == 1 else hopper.tiles_of_slice(k, slices) >= _LONG):
        # Decoding keeps a warpgroup busy: long slices, or many codes, go faster on more programs than on more
        # warpgroups of one. Two share the rows that a program copies.
        if n % (2 * hopper.ROWS) == 0:
            return hopper.MosaicConfig(2, 1, slices, block_m, 4, registers=(24, 240))
        return dataclasses.replace(config, warpgroups_k=1, split=slices)
    if not 64 < block_m <= 128:
        return config
    # Rows that are copied with each tile leave too little memory for three of them, and with two reading waits.
    problem = hopper.Problem(m, n, k, k // group_size, jnp.bfloat16, jnp.bfloat16, num_packed=1 + nested)
    if hopper.with_most_stages(config, problem, 1 if symmetric else 2).num_stages >= 3:
        return config
    if nested and block_m <= 96 and n >= hopper.LEAST_WIDE and n % (4 * hopper.ROWS) == 0:
        return hopper.MosaicConfig(4, 1, slices, block_m, 4, 4, registers=(24, 112))
    return dataclasses.replace(config, x_slots=6 if nested else 8)


def in_turn_config(m: int, n: int, k: int, *, nested: bool = False) -> hopper.MosaicConfig | None:
    """Tiles of warpgroups that share no sums; None where they would not anyway, or have too few registers for it."""
    slices, block_m = hopper.num_slices(n, k), hopper.block_m(m, most=_IN_TURN_BLOCK_M)
    sums = slices.bit_length()  # of the turn, and of each level of the tree
    if slices == 1 or n % (2 * hopper.ROWS) or not hopper.sums_fit(sums * block_m):
        return None
    ring = {"num_stages": 4, "x_slots": 6 if nested else 8, "programs": hopper.num_multiprocessors()}
    return hopper.MosaicConfig(2, 1, 1, block_m, **ring, registers=(24, 240), in_turn=slices, outputs_first=True)


# A jit of its own, so that a program with many layers lowers the kernel once per shape.
@functools.partial(jax.jit, static_argnames=("dtype", "early", "config", "epilogue"))
def _matmul(
    x: Array,
    weight: QuantizedWeight,
    *,
    dtype: DTypeLike,
    early: bool,
    config: hopper.MosaicConfig | pairs.PairConfig,
    epilogue: hopper.Epilogue,
) -> Array | PartialSums:
    packed = (weight.packed,) if weight.low is None else (weight.packed, weight.low)
    sizes = x.shape[0], weight.num_outputs, weight.num_inputs, weight.num_groups
    problem = hopper.Problem(*sizes, x.dtype, dtype, len(packed), epilogue)
    columns = (weight.scale,) if weight.offset is None else (weight.scale, weight.offset)
    of_weight = _Kind(jnp.dtype(x.dtype), len(packed), weight.truncated, weight.symmetric)
    consume = functools.partial(_consume, kind=of_weight)
    if isinstance(config, pairs.PairConfig):
        config = pairs.with_most_slots(config)
        settings = {"consume": consume, "problem": problem, "config": config, "name": "w4a16_pairs"}
        return pair_pipeline.launch(x, weight.packed, weight.scale, **settings)
    return pipelines.launch(
        x,
        packed,
        columns,
        None,
        consume=consume,
        problem=problem,
        config=hopper.with_most_stages(config, problem, len(columns)),
        early=early,
        name=f"w{weight.bits}a16" + "_swiglu" * (epilogue is not hopper.Epilogue.NONE),  # as profiles show it
    )


@dataclasses.dataclass(frozen=True)
class _Kind:
    """Which floats become of which codes: of how many packed arrays, and whether half a step more is meant."""

    dtype: jnp.dtype
    num_packed: int
    truncated: bool
    symmetric: bool

    @property
    def name(self) -> str:
        return codes.NAMES[self.dtype]

    @property
    def smaller(self) -> int:
        """The power of 2 by which weights are smaller, and what is summed of them."""
        return codes.SMALLER if self.name == "bf16" else 0

    @property
    def centred(self) -> bool:
        """Whether the middle between two codes stands for zero."""
        return self.symmetric and self.num_packed == 2

    def small(self, plane: int) -> codes.SmallLanes | None:
        """The lanes of a plane, where they are small."""
        if self.name != "bf16":
            return None
        return codes.small_lanes(plane, bits=4 * self.num_packed, truncated=self.truncated)


def _consume(pipeline: pipelines.Pipeline | pair_pipeline.Block, *, kind: _Kind) -> jax.Array:
    shape = (lanes.ROWS, pipeline.block_m)

    def multiply(accumulator, tile):
        factors = []
        for part in range(pipeline.problem.pieces):
            if part == 0 or pipeline.problem.groups_per_tile > 1:
                factors = [_factors(tile, plane, part, pipeline.problem, kind) for plane in range(2)]
            words = [_load_words(weight, part) for weight in tile.weight]
            for plane in range(2):
                decoded = _decode(words, factors[plane], kind, plane)
                tile.multiply(part, plane, functools.partial(plgpu.wgmma, accumulator, decoded))

    def product(accumulator):
        pipeline.for_each_tile(lambda tile, _: multiply(accumulator, tile), None)
        return accumulator[...] * jnp.float32(2.0**kind.smaller) if kind.smaller else accumulator[...]

    return pl.run_scoped(product, lanes.accumulator(shape, jnp.float32))


def _load_words(weight: pipelines.Ref, part: int) -> jax.Array:
    """A part of a tile's bytes, ``[64, 64]``, as words: a thread has four of either of its outputs."""

    def build(context, weight):
        pair = ir.VectorType.get((2,), ir.IntegerType.get_signless(32))
        first, second = lanes.load_words(weight, (part,))
        words = [*first, *second]
        return lanes.fragmented([vector.from_elements(pair, words[i : i + 2]) for i in range(0, 8, 2)], _WORDS.shape)

    return lanes.inline(build, weight, types=[plgpu.RefType(pipelines.WEIGHT_TRANSFORMS)], returns=_WORDS)


def _factors(tile: pipelines.Tile, plane: int, part: int, problem: hopper.Problem, kind: _Kind) -> jax.Array:
    """Scale and shift, or 0, of each group of a part: of a thread's two outputs, each twice in a register."""
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
                registers.append(vector.from_elements(ir.VectorType.get((2,), word), _scale_and_shift(values)))
        return lanes.fragmented(registers, shape)

    def _scale_and_shift(values):
        small, word = kind.small(plane), ir.IntegerType.get_signless(32)

        def to_lanes(compute, power, *args):
            enlarge = f"mul.f32 s, s, {_power_of_2(power)};" if power else ""
            ptx = _TO_LANES.format(compute=compute, enlarge=enlarge, kind=kind.name)
            [made] = assembly(ptx, "=r" + ",h" * len(args), args, [word])
            return made

        scale = to_lanes("", small.larger if small else 0, values[0])
        if not kind.symmetric:
            return scale, to_lanes(_SHIFT, -kind.smaller, *values)
        if small and not kind.centred:
            [shift] = assembly(
                f"{{.reg .b32 c; mov.b32 c, {small.centre(8.0)}; mul.bf16x2 $0, $1, c;}}", "=r,r", [scale], [word]
            )
            return scale, shift
        return scale, to_lanes(_HALF, 0, values[0]) if kind.centred and not small else lanes.i32(0)

    types = [plgpu.RefType()] * len(tile.columns)
    returns = plgpu.ShapeDtypeStruct(shape, jnp.int32, layout=lanes.WGMMA)
    return lanes.inline(build, *tile.columns, types=types, returns=returns)


def _power_of_2(exponent: int) -> str:
    """A float32 as PTX spells it."""
    return f"0f{(127 + exponent) << 23:08X}"


def _decode(words: Sequence[jax.Array], factors: jax.Array, kind: _Kind, plane: int) -> jax.Array:
    """A plane of a part of a tile as floats ``[64, 64]`` in registers."""
    element = {"bf16": ir.BF16Type, "f16": ir.F16Type}[kind.name]

    def build(context, factors, *words):
        pair = ir.VectorType.get((2,), element.get())
        registers: list[Any] = [None] * 16
        by_group = lanes.scalars(factors)  # of a group, scale and shift of either output
        words_per_group = 4 // (len(by_group) // 4)
        all_words = list(zip(*(lanes.scalars(one) for one in words), strict=True))  # with those of lower nibbles
        for half in range(2):
            for index, word in enumerate(all_words[4 * half : 4 * half + 4]):
                first = 4 * (index // words_per_group) + 2 * half
                even, odd = _decode_word(kind, plane, word, by_group[first : first + 2])
                registers[4 * index + half] = llvm.bitcast(pair, even)
                registers[4 * index + 2 + half] = llvm.bitcast(pair, odd)
        return lanes.fragmented(registers, (lanes.ROWS, lanes.TILE // 2))

    returns = plgpu.ShapeDtypeStruct((lanes.ROWS, lanes.TILE // 2), kind.dtype, layout=lanes.WGMMA)
    return lanes.inline(build, factors, *words, types=[lanes.WGMMA] * (1 + len(words)), returns=returns)


def _decode_word(kind: _Kind, plane: int, words: Sequence[Any], factors: Sequence[Any]) -> list[Any]:
    """Inputs 0 and 2, and 1 and 3, of the four that a word holds of a plane."""
    small = kind.small(plane)
    down = 4 * plane - (small.first if small else kind.truncated)
    even = codes.shift_down("even", "$2", down) if down or not small else "mov.b32 even, $2;"
    odd = codes.shift_down("odd", "$2", down + 8)
    if kind.num_packed == 2:
        even, odd = codes.JOIN[plane].format("even", "$2", "$3"), codes.shift_down("odd", "even", 8)
    if small:
        is_centred_apart = kind.centred or not kind.symmetric
        factors = factors[:1] if kind.centred else factors
        centre = _CENTRE.format(centre=small.centre(8.5 if kind.centred else 8.0)) if is_centred_apart else ""
        prepare = {"prepare_even": small.prepare("even"), "prepare_odd": small.prepare("odd"), "centre": centre}
    else:
        made = codes.lanes_of(kind.dtype, bits=4 * kind.num_packed, truncated=kind.truncated)
        factors = factors[:1] if kind.symmetric and not kind.centred else factors
        prepare = {"prepare_even": made.prepare("even", "c0"), "prepare_odd": made.prepare("odd", "c1")}
    operation = "mul" if len(factors) == 1 else "fma.rn"
    ptx = (_DECODE_SMALL if small else _DECODE).format(
        even=even,
        odd=odd,
        **prepare,
        scale=f"{operation}.{kind.name}x2",
        factors=", ".join(f"${2 + len(words) + index}" for index in range(len(factors))),
        kind=kind.name,
    )
    constraints = "=&r,=&r" + ",r" * (len(words) + len(factors))
    return assembly(ptx, constraints, [*words, *factors], [ir.IntegerType.get_signless(32)] * 2)
