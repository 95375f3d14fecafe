"""The pipeline of the Mosaic GPU matmuls: one warpgroup copies tiles, the others compute; see ``gpu_mosaic``.

Tiles go through a ring of ``S = num_stages`` slots in shared memory, tile ``t`` through slot ``t % S``. Of a slot two
barriers are told: ``full`` (it may be read) and ``empty`` (it may be written). The way of tile ``t``::

    copying     wait empty ── start the copies ──▶ on to the next slot
                     ▲               │
                     │               │ each copy arrives at full when its bytes are there
                     │               ▼
    computing        │           wait full ── decode, multiply, ... ──▶ first product of tile t + 1;
                     │                                                  all before it are done
                     │                                                          │
                     └─────────── every computing warpgroup arrives at empty ───┘

A product runs on while the next piece is decoded, so that the end of a tile's last product is known only after the next
tile's first one was issued. A slot is released that late, and one tile less than ``S`` is in flight. With ``S = 3``::

    step of the copying warpgroup       0       1       2       3       4
    slot                                0       1       2       0       1
    waits for the first product of      -       -     tile 0  tile 1  tile 2
    which says that this was read       -       -     nothing tile 0  tile 1

The first product of tile 0 releases the slot before slot 0, which is the last one and holds nothing yet. To leave that
out would take a condition around an arrival; instead the copying warpgroup waits for it (step 2 above).

Rows may have a ring of their own (``x_slots``) where a tile of them is too large to have many in flight: it works
alike, with pieces of 128 bytes in place of tiles, and the barriers ``rows_full`` and ``rows_empty``.

Slices of K that a warpgroup computes in turn, and blocks that a program goes through, follow one another without a gap:
the tiles of all of them are counted as one row, so that those of the next one are copied while a sum ends.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.arrays.partial_sums import PartialSums
from pallas_kernels.backends.mosaic.epilogue import End, finish, scaled, sum_in_turn
from pallas_kernels.backends.mosaic.matmul import HALF_OF_AN_SM, Epilogue, MosaicConfig, Problem, pad_rows
from pallas_kernels.backends.mosaic.registers import (
    ROWS,
    TILE,
    WEIGHT_TRANSFORMS,
    Ref,
    plgpu,
    start_next,
)


def launch(
    rows: jax.Array,
    packed: Sequence[jax.Array],
    columns: Sequence[jax.Array],
    row_factor: jax.Array | None,
    *,
    row_groups: Sequence[jax.Array] = (),
    consume: Callable[[Pipeline], jax.Array],
    problem: Problem,
    config: MosaicConfig,
    early: bool,
    name: str,
    groups_in_tiles: bool = True,
) -> Any:
    """Runs a matmul kernel.

    Args:
        rows: ``[M, K]``.
        packed: ``[N, K/2]`` uint8 in ``Layout.WGMMA``: one array, or both of a nested weight.
        columns: arrays ``[G, N]`` of which each tile gets its groups.
        row_factor: ``[M]`` float32 that multiplies the product of each slice of K before any are added, or None.
        row_groups: float32 arrays ``[G, M]`` of which each tile gets its groups; ``M`` here a multiple of
            ``config.block_m``.
        early: begin to copy ``packed`` and ``columns`` before the kernel before this one has ended; see
            :mod:`pallas_kernels.backends.early_launch`.
        groups_in_tiles: False if :meth:`Pipeline.whole_row` is all that ``consume`` needs of them.
        consume: from the tiles of one slice of a warpgroup to its float32 product ``[64, block_m]``, in the WGMMA
            layout.

    Returns:
        ``[M, N]`` of ``problem.out_dtype``, or the partial sums of that where programs share the sum over K. With an
        epilogue that gates ``[M, N / 2]``, and with one of magnitudes also these: ``[M, N / 128]`` float32.
    """
    # Arrays by group, of which a tile needs those of both its planes.
    by_group = [a.reshape(problem.scale_planes, -1, a.shape[-1]) for a in (*columns, *row_groups)]
    factors = () if row_factor is None else (row_factor,)

    partial_dtype = jnp.float32 if config.split > 1 else problem.out_dtype
    written = [jax.ShapeDtypeStruct((config.split, problem.m, problem.num_written), partial_dtype)]
    if problem.epilogue is Epilogue.GATED_WITH_MAGNITUDES:
        written.append(jax.ShapeDtypeStruct((problem.m, problem.num_written // ROWS), jnp.float32))

    def body(x, *refs, **scratch):
        weight, refs = refs[: len(packed)], refs[len(packed) :]
        refs, last = refs[: len(by_group)], refs[len(by_group) :]
        arrays = x, weight, refs, len(columns), last[: len(factors)], last[len(factors) :]
        _Program(*arrays, problem, config, early, scratch).run(consume)

    in_tiles = [(a.dtype, index < len(columns)) for index, a in enumerate(by_group)] if groups_in_tiles else []
    body.__name__ = name
    if early or problem.epilogue is not Epilogue.NONE:
        config = dataclasses.replace(config, programs=0)
    # The last axis is the one along which programs follow one another.
    names, sizes = _axes(problem, config)
    if config.programs:
        names, sizes = ("split", "program"), (1, min(config.programs, math.prod(sizes)))
    outputs, *magnitudes = plgpu.kernel(
        body,
        out_type=written,
        scratch_types=_scratch(problem, config, in_tiles, alone=early),
        grid=sizes,
        grid_names=names,
        num_threads=config.num_warpgroups + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(
            lowering_semantics=plgpu.LoweringSemantics.Lane, unsafe_no_auto_barriers=True
        ),
    )(pad_rows(rows), *packed, *by_group, *factors)
    if magnitudes:
        return outputs[0], *magnitudes
    return outputs[0] if config.split == 1 else PartialSums(outputs, problem.out_dtype)


def _axes(problem: Problem, config: MosaicConfig) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """Names and sizes of the grid, where each block of rows and outputs has a program."""
    sizes = {"split": config.split, "n": problem.n // config.block_n, "m": pl.cdiv(problem.m, config.block_m)}
    names = ("split", "m", "n") if config.outputs_first else ("split", "n", "m")
    return names, tuple(sizes[name] for name in names)


def _scratch(
    problem: Problem, config: MosaicConfig, by_group: Sequence[tuple[Any, bool]], *, alone: bool
) -> dict[str, Any]:
    """Shared memory and barriers of one program.

    Args:
        by_group: dtypes, and whether they are of outputs.
        alone: reserve so much shared memory that an SM holds one program. Those that start early would else share an
            SM with another where the kernel before them still occupies some, and take twice the time.
    """
    stages, slices, x_slots = config.num_stages, config.warpgroups_k, config.x_slots
    x_transforms = (plgpu.TilingTransform((8, problem.piece)), plgpu.SwizzleTransform(128))
    x_shape = (x_slots, config.block_m, problem.piece) if x_slots else (stages, slices, 2, config.block_m, TILE)
    group_shape = (problem.scale_planes, problem.groups_per_tile)
    of_block = {
        True: (problem.halves, *group_shape, config.block_n // problem.halves),
        False: (*group_shape, config.block_m),
    }
    # Into a slot: of each half of the outputs the weight and its arrays by group, those of rows, rows per plane.
    num_columns = sum(of_outputs for _, of_outputs in by_group)
    copies = problem.halves * (problem.num_packed + num_columns) + len(by_group) - num_columns + (0 if x_slots else 2)
    weight_shape = (stages, slices, config.block_n, TILE)
    scratch = {
        "rows": plgpu.SMEM(x_shape, problem.x_dtype, transforms=x_transforms),
        "weight": [plgpu.SMEM(weight_shape, jnp.uint8, transforms=WEIGHT_TRANSFORMS)] * problem.num_packed,
        "by_group": [plgpu.SMEM((stages, slices, *of_block[of_outputs]), dtype) for dtype, of_outputs in by_group],
        # A slot has a tile for each slice of the sum: a warpgroup waits for its own only, ...
        "full": plgpu.Barrier(num_arrivals=copies, num_barriers=stages * slices),
        # ... but the slot is filled as a whole, once all warpgroups have read theirs.
        "empty": plgpu.Barrier(num_arrivals=config.num_warpgroups, num_barriers=stages),
    }
    if x_slots:
        scratch["rows_full"] = plgpu.Barrier(num_arrivals=1, num_barriers=x_slots)
        scratch["rows_empty"] = plgpu.Barrier(num_arrivals=config.num_warpgroups, num_barriers=x_slots)
    if slices > 1:
        # The first warpgroup of each column adds the products of the others: none for itself.
        scratch["partial"] = plgpu.SMEM((config.warpgroups_n, slices - 1, ROWS * config.block_m), jnp.float32)
        scratch["partial_full"] = plgpu.Barrier(num_arrivals=config.warpgroups_n * (slices - 1))
    if problem.epilogue is not Epilogue.NONE:
        scratch["handed_over"] = plgpu.Barrier(num_arrivals=1, num_barriers=config.warpgroups_n // 2)
    if alone:
        arrays = [one for one in jax.tree.leaves(scratch) if not isinstance(one, plgpu.Barrier)]
        used = sum(math.prod(one.shape) * jnp.dtype(one.dtype).itemsize for one in arrays)
        if used < HALF_OF_AN_SM:
            scratch["unused"] = plgpu.SMEM((HALF_OF_AN_SM - used,), jnp.uint8)
    return scratch


@dataclasses.dataclass(frozen=True)
class _Program:
    """One program: its memory, and what its warpgroups do."""

    rows: Ref  # [M, K], M padded
    weight: tuple[Ref, ...]  # [N, K/2] uint8
    by_group: tuple[Ref, ...]  # [planes, G / planes, N], then [planes, G / planes, M]
    num_columns: int  # how many of them are of outputs
    factors: tuple[Ref, ...]  # [M] f32, or nothing
    outputs: tuple[Ref, ...]  # [split, M, values written], and maybe magnitudes [M, blocks] f32
    problem: Problem
    config: MosaicConfig
    early: bool
    scratch: dict[str, Any]
    turn_of_block: jax.Array | None = None  # where programs go through blocks: how many this one has behind it

    def run(self, consume: Callable[[Pipeline], jax.Array]) -> None:
        config = self.config
        warpgroup = lax.axis_index("warpgroup")

        @pl.when(warpgroup == config.num_warpgroups)
        def _copy():
            # Who copies needs few registers, and leaves its share to those who hold accumulators.
            if config.registers is not None:
                plgpu.set_max_registers(config.registers[0], action="decrease")
            first = self.copy_first_tiles() if self.early else 0
            self.for_each_block(lambda program: program.copy_block(first))
            if self.early and self.problem.epilogue is not Epilogue.NONE:
                start_next()  # as the kernel that gates does elsewhere: what would follow that one follows this one

        @pl.when(warpgroup < config.num_warpgroups)
        def _compute():
            if config.registers is not None:
                plgpu.set_max_registers(config.registers[1], action="increase")
            if self.early:
                plgpu.griddepcontrol_wait()  # factors are read, and results written, by these warpgroups
            # Warpgroups are numbered by column of 64 outputs first, then by slice of the sum.
            column = lax.rem(warpgroup, config.warpgroups_n)
            in_program = lax.div(warpgroup, config.warpgroups_n)
            self.for_each_block(lambda program: program.compute_block(consume, column, in_program))

    def for_each_block(self, body: Callable[[_Program], None]) -> None:
        """``body(program)`` for each block of rows and outputs that this program has."""
        if not self.config.programs:
            return body(self)
        _, sizes = _axes(self.problem, self.config)
        programs = min(self.config.programs, math.prod(sizes))
        count = lax.div(math.prod(sizes) - lax.axis_index("program") + programs - 1, programs)
        return lax.fori_loop(0, count, lambda turn, _: body(dataclasses.replace(self, turn_of_block=turn)), None)

    def copy_block(self, first: int) -> None:
        """Copies the tiles of a block from a step on."""
        # No part of a program has more tiles than its first. Who reads the last copies waits for them, not this.
        for turn in range(self.config.in_turn):
            copy = functools.partial(self.copy_tiles, turn)
            lax.fori_loop(first if turn == 0 else 0, self.num_steps(0, turn), copy, None)

    def compute_block(self, consume: Callable[[Pipeline], jax.Array], column: jax.Array, in_program: jax.Array) -> None:
        """What a warpgroup has to do with a block."""
        place = self.first_row, self.first_column, column, in_program
        end = End(self.problem, self.config, self.scratch, self.factors, self.outputs, *place)
        product_of = lambda turn: scaled(consume(Pipeline(self, column, in_program, turn)), end)  # noqa: E731
        finish(sum_in_turn(product_of, self.config.in_turn), end)

    def num_steps(self, in_program: jax.Array | int, turn: int) -> jax.Array | int:
        """Tiles of a slice; the first slices have one more where they do not come out even."""
        tiles, slices = self.problem.num_tiles, self.config.slices
        if tiles % slices == 0:
            return tiles // slices
        return lax.div(tiles - self.slice_of(in_program, turn) + slices - 1, slices)

    def steps_before(self, turn: int) -> jax.Array | int:
        """Tiles of the slices that a program, whose warpgroups share none, computes before a turn."""
        of_block = sum(self.num_steps(0, earlier) for earlier in range(turn))
        return of_block if self.turn_of_block is None else self.turn_of_block * self.problem.num_tiles + of_block

    def slice_of(self, in_program: jax.Array | int, turn: int) -> jax.Array:
        """The number of a slice. One of ``in_turn`` and ``warpgroups_k`` is 1."""
        return lax.axis_index("split") * (self.config.in_turn * self.config.warpgroups_k) + in_program + turn

    def block_along(self, axis: str) -> jax.Array:
        """The number of this block among those of other rows (``m``), or of other outputs (``n``)."""
        if self.turn_of_block is None:
            return lax.axis_index(axis)
        (_, _, last), (_, _, size) = _axes(self.problem, self.config)
        block = self.turn_of_block * self.config.programs + lax.axis_index("program")
        return lax.rem(block, size) if axis == last else lax.div(block, size)

    @property
    def first_row(self) -> jax.Array:
        return self.block_along("m") * self.config.block_m

    @property
    def first_column(self) -> jax.Array:
        """Of this program in each half of the outputs."""
        return self.block_along("n") * (self.config.block_n // self.problem.halves)

    def place_of(self, column: jax.Array) -> tuple[jax.Array | int, jax.Array]:
        """Of a warpgroup: its half of the outputs, and where it stands among those that the program has of that."""
        if self.problem.epilogue is Epilogue.NONE:
            return 0, column
        in_half = self.config.warpgroups_n // 2
        return lax.div(column, in_half), lax.rem(column, in_half)

    def inputs(self, plane: int, start: jax.Array, size: int) -> Any:
        """The columns of ``rows`` that meet ``size`` bytes of a weight row from ``start`` on."""
        return pl.ds(plane * (self.problem.k // 2) + start, size)

    def copy_first_tiles(self) -> int:
        """Fills the slots that need not be waited for, with weights first; returns their number.

        The kernel before this one, which computes the rows, may still run.
        """
        config = self.config
        # All slots but the last, for which copy_tiles would wait; and no step in which a slice has no tile left.
        steps = min(config.num_stages - 1, self.problem.num_tiles // config.slices)
        tiles = [(jnp.int32(step), part) for step in range(steps) for part in range(config.warpgroups_k)]
        for step, part in tiles:
            self.copy_weight(step, part, self.tile_of(step, part))  # a step's slot is its number
        plgpu.griddepcontrol_wait()  # the kernel before this one has ended, and its results may be read
        for step, part in tiles:
            self.copy_rows(step, step, part, self.tile_of(step, part))
        return steps

    def tile_of(self, step: jax.Array | int, part: int, turn: int = 0) -> jax.Array:
        """The tile that a slice of this program takes in a step."""
        # Tiles are dealt out to slices. With two programs of two slices each: step 0 is tiles 0 and 1 in the first
        # program, 2 and 3 in the second; step 1 is tiles 4 and 5, 6 and 7. In turn: 0, 4, ... and then 1, 5, ...
        return step * self.config.slices + self.slice_of(part, turn)

    def copy_tiles(self, turn: int, step: jax.Array, _: None) -> None:
        """Fills the next slot: a tile for each slice that has one left, of those that this program has in a turn."""
        config, scratch, num_tiles = self.config, self.scratch, self.problem.num_tiles
        count = self.steps_before(turn) + step  # of the steps so far: turns follow one another without a gap
        slot = lax.rem(count, config.num_stages)
        # A slot is released with the first product of the next tile: the last one once before it is ever filled. So
        # from there on each step waits for exactly one release of its slot.
        pl.when(count >= config.num_stages - 1)(lambda: plgpu.barrier_wait(scratch["empty"].at[slot]))
        for part in range(config.warpgroups_k):
            tile = self.tile_of(step, part, turn)
            # In the last step a slice may have no tile left. Its warpgroups take a step less and await nothing.
            copy = functools.partial(self.copy_tile, count, slot, part, tile)
            copy() if num_tiles % config.slices == 0 else pl.when(tile < num_tiles)(copy)

    def copy_tile(self, count: jax.Array, slot: jax.Array, part: int, tile: jax.Array) -> None:
        """Copies weight, groups and rows of a tile."""
        self.copy_weight(slot, part, tile)
        self.copy_rows(count, slot, part, tile)

    def copy_weight(self, slot: jax.Array, part: int, tile: jax.Array) -> None:
        """The part of a tile that is of the weight: that of each half of the outputs beside the other."""
        size = self.config.block_n // self.problem.halves
        for half in range(self.problem.halves):
            outputs = pl.ds(half * self.problem.num_written + self.first_column, size)
            for ref, copied in zip(self.weight, self.scratch["weight"], strict=True):
                weight, place = ref.at[outputs, pl.ds(tile * TILE, TILE)], pl.ds(half * size, size)
                plgpu.copy_gmem_to_smem(weight, copied.at[slot, part, place], self.full(slot, part))
            self.copy_groups((slot, part, half), tile, slice(self.num_columns), outputs)

    def copy_rows(self, count: jax.Array, slot: jax.Array, part: int, tile: jax.Array) -> None:
        """The part of a tile that is of the activations."""
        rows = pl.ds(self.first_row, self.config.block_m)
        self.copy_groups((slot, part), tile, slice(self.num_columns, None), rows)
        if self.config.x_slots:
            return self.copy_rows_in_pieces(count, tile)
        for plane in range(2):
            block = self.rows.at[rows, self.inputs(plane, tile * TILE, TILE)]
            plgpu.copy_gmem_to_smem(block, self.scratch["rows"].at[slot, part, plane], self.full(slot, part))
        return None

    def copy_groups(self, place: tuple[Any, ...], tile: jax.Array, which: slice, columns: Any) -> None:
        """The groups of a tile of some of the arrays by group: ``columns`` of them, to a slot, its part, and so on."""
        problem = self.problem
        # A plane's part of a tile lies within a group or spans whole ones; a copy takes those of both planes.
        group = 0 if problem.num_groups == 1 else lax.div(tile, problem.tiles_per_group) * problem.groups_per_tile
        groups = pl.ds(group, problem.groups_per_tile)
        # None have a place where only ``whole_row`` is wanted of them.
        for ref, copied in zip(self.by_group[which], self.scratch["by_group"][which], strict=False):
            plgpu.copy_gmem_to_smem(ref.at[:, groups, columns], copied.at[place], self.full(*place[:2]))

    def full(self, slot: jax.Array, part: int) -> Ref:
        """The barrier of a tile that is there."""
        return self.scratch["full"].at[slot * self.config.warpgroups_k + part]

    def copy_rows_in_pieces(self, steps: jax.Array, tile: jax.Array) -> None:
        """The rows of a tile in the order in which they are multiplied: both planes of a part together."""
        scratch, x_slots, piece = self.scratch, self.config.x_slots, self.problem.piece
        pieces = self.problem.pieces
        for index in range(2 * pieces):
            part, plane = divmod(index, 2)
            count = steps * 2 * pieces + index  # of the pieces so far; Tile.multiply counts alike
            slot = lax.rem(count, x_slots)

            def wait(slot=slot):
                plgpu.barrier_wait(scratch["rows_empty"].at[slot])

            # As for tiles: a piece is released with the product of the next one, the last slot once while empty.
            pl.when(count >= x_slots - 1)(wait)
            inputs = self.inputs(plane, tile * TILE + part * piece, piece)
            block = self.rows.at[pl.ds(self.first_row, self.config.block_m), inputs]
            plgpu.copy_gmem_to_smem(block, scratch["rows"].at[slot], scratch["rows_full"].at[slot])


@dataclasses.dataclass(frozen=True)
class Tile:
    """64 outputs by 128 bytes of packed weight, its groups, and the rows that meet it.

    Attributes:
        weight: ``[64, 128]`` uint8, swizzled, per array.
        columns: ``[planes, groups, 64]`` per array.
        row_groups: ``[planes, groups, block_m]`` per array.
    """

    weight: tuple[Ref, ...]
    columns: tuple[Ref, ...]
    row_groups: tuple[Ref, ...]
    _rows: Ref
    _ring: tuple[Ref, Ref] | None  # barriers: rows are there, rows are done with
    _release_before: Callable[[], None]  # frees the tile before this one
    _step: jax.Array
    _problem: Problem

    def multiply(self, part: int, plane: int, issue: Callable[[Ref], None]) -> None:
        """Issues a product with a part of a plane's inputs, ``[piece, block_m]``, and waits for the one before it.

        The product is left in flight while the caller decodes the next piece. Those before it are done: what they
        read is free, their registers as well as rows and weights, whose slots are released here. The very first
        product so releases a slot that holds nothing, which the copying warpgroup knows: a condition here would make
        ptxas serialise the products.
        """
        index = 2 * part + plane
        if self._ring is None:
            self._multiply(self._rows.at[plane, :, pl.ds(part * self._problem.piece, self._problem.piece)], issue)
        else:
            full, empty = self._ring
            # The pieces of all tiles in one row, in the order in which copy_rows_in_pieces sends them.
            count = self._step * 2 * self._problem.pieces + index
            slot, before = (lax.rem(count + lag, full.shape[0]) for lag in (0, full.shape[0] - 1))
            plgpu.barrier_wait(full.at[slot])
            self._multiply(self._rows.at[slot], issue)
            plgpu.barrier_arrive(empty.at[before])
        # The wait in the first product of this tile was for the last one of the tile before: all of that has been read.
        if index == 0:
            self._release_before()

    def _multiply(self, rows: Ref, issue: Callable[[Ref], None]) -> None:
        issue(rows.T)
        plgpu.wgmma_wait(1)  # all but the newest product are done


@dataclasses.dataclass(frozen=True)
class Pipeline:
    """The tiles of one computing warpgroup in a turn."""

    _program: _Program
    _column: jax.Array
    _in_program: jax.Array
    _turn: int

    @property
    def problem(self) -> Problem:
        return self._program.problem

    @property
    def config(self) -> MosaicConfig:
        return self._program.config

    @property
    def block_m(self) -> int:
        """Rows of the product."""
        return self.config.block_m

    def for_each_tile(self, body: Callable[[Tile, Any], Any], carry: Any) -> Any:
        """``carry = body(tile, carry)`` over all tiles; ``body`` multiplies each plane of each part, in order."""
        scratch, config = self._program.scratch, self.config
        outputs = pl.ds(self._column * ROWS, ROWS)
        half, place = self._program.place_of(self._column)
        in_half = pl.ds(place * ROWS, ROWS)
        in_ring = bool(config.x_slots)
        num_columns, by_group = self._program.num_columns, scratch["by_group"]
        steps_before = self._program.steps_before(self._turn)

        def step(index, carry):
            count = steps_before + index
            # The slot before is (count - 1) modulo the stages, written so that it is never negative.
            slot, before = (lax.rem(count + lag, config.num_stages) for lag in (0, config.num_stages - 1))
            plgpu.barrier_wait(scratch["full"].at[slot * config.warpgroups_k + self._in_program])
            tile = Tile(
                weight=tuple(a.at[slot, self._in_program, outputs] for a in scratch["weight"]),
                columns=tuple(a.at[slot, self._in_program, half, :, :, in_half] for a in by_group[:num_columns]),
                row_groups=tuple(a.at[slot, self._in_program] for a in by_group[num_columns:]),
                _rows=scratch["rows"] if in_ring else scratch["rows"].at[slot, self._in_program],
                _ring=(scratch["rows_full"], scratch["rows_empty"]) if in_ring else None,
                _release_before=lambda: plgpu.barrier_arrive(scratch["empty"].at[before]),
                _step=count,
                _problem=self.problem,
            )
            return body(tile, carry)

        return lax.fori_loop(0, self._program.num_steps(self._in_program, self._turn), step, carry)

    def whole_row(self) -> tuple[tuple[Ref, ...], tuple[Ref, ...]]:
        """Columns ``[1, 1, 64]`` and row groups ``[1, 1, block_m]`` of a weight with one group."""
        program = self._program
        half, place = program.place_of(self._column)
        outputs = pl.ds(half * program.problem.num_written + program.first_column + place * ROWS, ROWS)
        rows = pl.ds(program.first_row, self.config.block_m)
        columns, row_groups = program.by_group[: program.num_columns], program.by_group[program.num_columns :]
        return tuple(a.at[:, :, outputs] for a in columns), tuple(a.at[:, :, rows] for a in row_groups)
