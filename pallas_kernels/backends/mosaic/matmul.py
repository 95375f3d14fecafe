"""What the Pallas Mosaic GPU kernels for Hopper share: the pipeline, the order of K, and the end of a matmul.

The kernels compute the transposed product: 64 outputs per warpgroup, with the decoded weights as the register
operand of ``wgmma`` and the rows of activations as the one in shared memory. A product runs while the next piece of
weight is decoded: nothing waits for the newest product but the end of the sum. A tile of the packed weight is 64
outputs by 128 bytes of each row, that is 128 inputs of either nibble plane. Thread ``t`` of the four that share an
output takes bytes ``32 t .. 32 t + 31`` of it, and finds there the inputs that the instructions want of it, because the
weight has ``Layout.WGMMA``. So rows of 16 bits are multiplied as they lie in memory, and both precisions read
the same bytes; integer rows come in the order that the layout gives activation codes.

One warpgroup copies (TMA), the others compute. The sum over K is cut into ``slices`` (tiles ``s, s + slices, ...``),
shared by the warpgroups of a program and then by programs, or computed by one warpgroup in turn, and added as a
balanced tree. ``slices`` and everything else that fixes the order of a sum depend on the weight alone, so a row has the
same bits however many are computed.
"""

from __future__ import annotations

import dataclasses
import enum
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.arrays.weight import QuantizedWeight
from pallas_kernels.backends import early_launch
from pallas_kernels.backends.mosaic.registers import ROWS, TILE

# Registers of a thread for sums, of three warpgroups with 168 each: beside more of them, ptxas has products
# wait for each other (C7512). W4A8 of 128 rows took 73 us so on an H200, where one warpgroup less takes 50.
_MOST_IN_EQUAL_SHARES = 104
MAX_BLOCK_M = 256  # the largest side of wgmma that is free
SHARED_MEMORY = 226 * 1024  # bytes a program may use on Hopper, less what barriers take
LEAST_WIDE = 256 * ROWS  # outputs from which four warpgroups stand side by side
MAX_GATED_ROWS = 64  # what a warpgroup hands over fits where its part of one weight tile was
HALF_OF_AN_SM = 114 * 1024  # bytes of shared memory; an SM has 228 KiB, and each program takes 1 KiB more


@dataclasses.dataclass(frozen=True)
class MosaicConfig:
    """How a matmul is cut into programs and warpgroups.

    Attributes:
        warpgroups_n: computing warpgroups side by side, 64 outputs each.
        warpgroups_k: warpgroups that share the sums of the same outputs.
        split: programs that share them further.
        block_m: rows per program, a multiple of 8 up to 256.
        num_stages: tiles in flight, at least 2.
        x_slots: 0 to copy rows with their weight tile; else rows come in pieces of 128 bytes, through a ring of
            this many slots.
        registers: per thread of the copying and of the computing warpgroups; None leaves them equal.
        in_turn: slices of K that a warpgroup computes one after the other, a power of two: ``in_turn * warpgroups_k *
            split`` in all. It keeps up to ``log2(in_turn)`` sums beside the one that it computes.
        outputs_first: programs that run at the same time differ in their outputs first, and then in their rows, so
            that they read few rows many times from the L2 cache. Else it is the other way round.
        programs: that go through all blocks of rows and outputs, and copy for one while another one is written; 0 for
            a program each. Those that start early have one each.

    Raises:
        ValueError: slices are computed in turn and also shared by the warpgroups of a program, or a sum is shared where
            programs go through all blocks.
    """

    warpgroups_n: int
    warpgroups_k: int
    split: int
    block_m: int
    num_stages: int
    x_slots: int = 0
    registers: tuple[int, int] | None = None
    in_turn: int = 1
    outputs_first: bool = False
    programs: int = 0

    def __post_init__(self) -> None:
        if self.in_turn > 1 and self.warpgroups_k > 1:  # whose numbers of tiles could differ within a slot
            raise ValueError(f"in_turn={self.in_turn} with warpgroups_k={self.warpgroups_k}; use 1 for one of them")
        if self.programs and self.warpgroups_k * self.split > 1:  # all tiles of a block would not be of one program
            shared = f"warpgroups_k={self.warpgroups_k} and split={self.split}"
            raise ValueError(f"programs={self.programs} with {shared}; use 1 for either, or programs=0")

    @property
    def num_warpgroups(self) -> int:
        return self.warpgroups_n * self.warpgroups_k

    @property
    def block_n(self) -> int:
        return ROWS * self.warpgroups_n

    @property
    def slices(self) -> int:
        return self.in_turn * self.warpgroups_k * self.split


class Epilogue(enum.Enum):
    """What becomes of a product before it is written.

    ``GATED``: its outputs are gate and up, and ``silu(gate) * up`` is written. A program computes as many blocks of 64
    outputs of gate as of up, those with the same numbers. With four warpgroups, program 0 takes::

        warpgroup      0                1                 2                     3
        outputs        0 .. 63          64 .. 127         N / 2 .. N / 2 + 63   N / 2 + 64 .. N / 2 + 127
        writes         0 .. 63          64 .. 127         nothing

    ``GATED_WITH_MAGNITUDES`` also writes the largest magnitude of each row in a block.
    """

    NONE = "none"
    GATED = "gated"
    GATED_WITH_MAGNITUDES = "gated with magnitudes"


@dataclasses.dataclass(frozen=True)
class Problem:
    """Shapes of one call.

    Attributes:
        m, n, k: rows, outputs, inputs.
        num_groups: scales per output.
        x_dtype, out_dtype: of rows and result.
        num_packed: arrays of packed codes: two of a nested weight.
        epilogue: what becomes of the outputs.
    """

    m: int
    n: int
    k: int
    num_groups: int
    x_dtype: Any
    out_dtype: Any
    num_packed: int = 1
    epilogue: Epilogue = Epilogue.NONE

    @property
    def halves(self) -> int:
        """Of the outputs: 2 where they are gate and up, else the one whole."""
        return 1 if self.epilogue is Epilogue.NONE else 2

    @property
    def num_written(self) -> int:
        """Values of a row of the result."""
        return self.n // self.halves

    @property
    def num_tiles(self) -> int:
        return self.k // 2 // TILE

    @property
    def scale_planes(self) -> int:
        """2, unless one scale covers the row."""
        return min(2, self.num_groups)

    @property
    def groups_per_tile(self) -> int:
        """Groups that a plane's part of a tile spans."""
        return 1 if self.num_groups == 1 else max(1, TILE * self.num_groups // self.k)

    @property
    def piece(self) -> int:
        """Inputs in 128 bytes of a row of activations: the width of a swizzled tile."""
        return 128 // jnp.dtype(self.x_dtype).itemsize

    @property
    def pieces(self) -> int:
        """Pieces of a plane's part of a tile."""
        return TILE // self.piece

    @property
    def tiles_per_group(self) -> int:
        return max(1, self.k // self.num_groups // TILE)


def obstacle(weight: QuantizedWeight) -> str | None:
    """Why the kernels cannot serve a weight in whatever layout, as the end of a sentence; None if they can."""
    num_outputs, num_inputs, group_size = weight.num_outputs, weight.num_inputs, weight.group_size
    if weight.scale.dtype != jnp.float16:
        return f"needs float16 scales; these are {weight.scale.dtype}"
    if num_inputs % (2 * TILE):
        return f"needs K to be a multiple of {2 * TILE}; this is {num_inputs}"
    if num_outputs % ROWS:
        return f"needs N to be a multiple of {ROWS}; this is {num_outputs}"
    fits = group_size % TILE == 0 and (num_inputs // 2) % group_size == 0
    if not (fits or (TILE % group_size == 0 and group_size >= 32) or group_size == num_inputs):
        return f"needs groups of 32, 64, a multiple of 128 that divides K/2, or the whole row; this is {group_size}"
    return None


def gated_obstacle(num_rows: int, weight: QuantizedWeight) -> str | None:
    """Why a matmul that :func:`obstacle` lets pass cannot gate its outputs, as the end of a sentence, or None."""
    num_outputs, slices = weight.num_outputs, num_slices(weight.num_outputs, weight.num_inputs)
    if num_outputs % (4 * ROWS):
        return f"needs N, gate and up together, to be a multiple of {4 * ROWS}; this is {num_outputs}"
    if not 0 < num_rows <= MAX_GATED_ROWS:
        return f"needs 1 to {MAX_GATED_ROWS} rows; these are {num_rows}"
    if layout_of_warpgroups(num_outputs, slices, block_m(num_rows)).warpgroups_n % 2 or slices > 1:
        return f"needs N of at least {LEAST_WIDE} outputs, whose sums nobody shares; this is {num_outputs}"
    return None


def rows_read(num_rows: int) -> int:
    """As many rows as a copy can clip: up to 8, or a multiple of 8.

    A shared-memory tile is 8 rows high, and the copy of several takes an array of whole tiles: Mosaic cannot describe
    one that is cut.
    """
    return num_rows if num_rows <= 8 else num_rows + -num_rows % 8


def pad_rows(rows: jax.Array) -> jax.Array:
    """``[M, K]`` with as many rows as :func:`rows_read` says; the others are zeros. A pass may have had them before."""
    num_rows, wanted = rows.shape[0], rows_read(rows.shape[0])
    if wanted == num_rows:
        return rows
    if early_launch.is_enabled():  # which asks for a JAX that has the Triton backend
        from pallas_kernels.backends.triton.rows import padded

        return padded(rows, wanted)
    return jnp.pad(rows, ((0, wanted - num_rows), (0, 0)))


def block_m(num_rows: int, *, most: int = MAX_BLOCK_M, multiple: int = 8) -> int:
    """Rows per program: a multiple of 8 (or 16), evenly shared by as few programs as possible."""
    programs = -(-num_rows // most)
    return -(-num_rows // programs // multiple) * multiple


def with_most_stages(config: MosaicConfig, problem: Problem, num_columns: int) -> MosaicConfig:
    """``config`` with as many tiles in flight as shared memory holds, up to ``config.num_stages``, but 2 at least."""
    itemsize = jnp.dtype(problem.x_dtype).itemsize
    per_tile = problem.num_packed * config.block_n * TILE + num_columns * 2 * problem.groups_per_tile * 4 * max(
        config.block_n, config.block_m
    )
    rows = 128 * config.block_m
    if not config.x_slots:
        per_tile += 2 * rows * TILE * itemsize // 128
    fixed = rows * config.x_slots + (config.warpgroups_k > 1) * 4 * ROWS * config.block_m * config.num_warpgroups
    stages = (SHARED_MEMORY - fixed) // (per_tile * config.warpgroups_k)
    return dataclasses.replace(config, num_stages=max(2, min(config.num_stages, stages)))


def num_multiprocessors() -> int:
    """Of the GPU that JAX uses; of an H100 or H200 where there is none."""
    device = jax.local_devices()[0]
    return device.core_count if device.platform in ("gpu", "cuda") else 132


def num_slices(n: int, k: int) -> int:
    """Slices of K, so that narrow weights fill the GPU: a property of the weight."""
    blocks = n // ROWS
    wanted = 1 if blocks >= 256 else 2 if blocks >= 80 else 4
    return min(wanted, 2 ** ((k // 2 // TILE).bit_length() - 1))


def tiles_of_slice(k: int, slices: int) -> int:
    """Tiles in each slice of K, rounded down."""
    return k // 2 // TILE // slices


def sums_fit(num_sums: int) -> bool:
    """Whether outputs of two warpgroups may have so many sums each, of rows or otherwise, where a third one copies.

    From jax 0.12 on, XLA has nvJitLink compile Mosaic kernels, as code that is to be linked. ptxas then ignores what
    warpgroups ask for (``setmaxnreg``, its notice C7504), and all three have as many registers.
    """
    return jax.__version_info__ < (0, 12) or num_sums // 2 <= _MOST_IN_EQUAL_SHARES


def layout_of_warpgroups(n: int, slices: int, block_m: int, *, sums: int = 1) -> MosaicConfig:
    """The tiles that were fastest on an H100, before :func:`with_most_stages`.

    Args:
        n, slices, block_m: outputs, slices of K, and rows of a program.
        sums: float32 or int32 sums that a warpgroup has of each of its outputs.
    """
    if block_m <= 64:
        if n % (4 * ROWS) == 0 and slices == 1 and n >= LEAST_WIDE:
            return MosaicConfig(4, 1, 1, block_m, 4, registers=(24, 112))
        return MosaicConfig(1, min(2, slices), max(1, slices // 2), block_m, 4)
    x_slots = 4 if block_m > 128 else 0
    if n % (2 * ROWS) or not sums_fit(sums * block_m):
        return MosaicConfig(1, 1, slices, block_m, 4, x_slots)
    return MosaicConfig(2, 1, slices, block_m, 4, x_slots, registers=(24, 240))
