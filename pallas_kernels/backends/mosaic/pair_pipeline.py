"""The pipeline of pairs of programs that share blocks of outputs; see :mod:`pallas_kernels.backends.mosaic.pairs`.

The two are a cluster. Each has weights of its own, in a ring of tiles, and both multiply them with the same rows, in a
ring of pieces of 128 bytes; of both rings :mod:`pallas_kernels.backends.mosaic.pipeline` tells. What is new is that
either program copies half of a piece from memory into both (multicast), so that the L2 cache is read half as often::

    program A                                                  program B

    computing ── rows_empty ──▶ copying ◀── both_empty ──▶ copying ◀── rows_empty ── computing
        ▲                          │                          │                          ▲
        │                          ├─ first half of a piece ──┼──▶ slot of B             │
        │             slot of A ◀──┼── second half ───────────┤                          │
        │                          ▼                          ▼                          │
        └────────────────────── rows_full                 rows_full ─────────────────────┘

=============  ========================================  ==========================  ===================================
barrier        who arrives                               who waits                   what it says
=============  ========================================  ==========================  ===================================
``full``       copies of a tile: weight and scales of    computing warpgroups        the tile may be read
               each team
``empty``      computing warpgroups, all threads         copying warpgroup           the tile before is read
``rows_full``  both halves of a piece, by their bytes    computing warpgroups        the piece may be read
``rows_empty`` computing warpgroups, all threads         copying warpgroup           this program has read a piece
``both_empty`` copying warpgroups of both programs,      copying warpgroups of both  both programs have read a piece
               one thread of each
=============  ========================================  ==========================  ===================================

The hazard is ``both_empty``. All threads of a warpgroup arrive at a ``Barrier``, but a single one at a
``ClusterBarrier``. Of a computing warpgroup that would say that the products of one warp are done, while others still
read what the other program is about to overwrite. So computing warpgroups do not arrive there. They tell their own
copying warpgroup, by ``rows_empty``; each of its threads waits for that before any arrives.

What holds of that barrier:

- A program arrives there once for each piece but the first ``x_slots - 1``, and waits as often, at once. So it is never
  more than one piece ahead of the other one, and a parity tells pieces of a slot apart.
- Both copy the same pieces in the same order, and wait for nothing but the reading of earlier ones, which both have
  sent. So neither waits forever.
- A program does not end while the other one can still write to it: its computing warpgroups wait for all pieces, and
  its copying warpgroup for all arrivals. Before the start, Mosaic has both wait until the barriers of either are made.

Programs do not start early: the weights would have to be copied before, and nothing has run so.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.arrays.partial_sums import PartialSums
from pallas_kernels.backends.mosaic.matmul import Problem, pad_rows
from pallas_kernels.backends.mosaic.pairs import PairConfig
from pallas_kernels.backends.mosaic.pipeline import WEIGHT_TRANSFORMS, Tile
from pallas_kernels.backends.mosaic.registers import ROWS, TILE, Ref, plgpu, store


def launch(
    rows: jax.Array,
    packed: jax.Array,
    scale: jax.Array,
    *,
    consume: Callable[[Block], jax.Array],
    problem: Problem,
    config: PairConfig,
    name: str,
) -> jax.Array | PartialSums:
    """Runs a matmul kernel of a weight for which :func:`pairs.obstacle` finds none.

    Args:
        rows: ``[M, K]``, 16 bits.
        packed: ``[N, K/2]`` uint8 in ``Layout.WGMMA``.
        scale: ``[G, N]`` float16.
        consume: from the tiles of a block to its float32 product ``[64, block.block_m]``, in the WGMMA layout.

    Returns:
        ``[M, N]`` of ``problem.out_dtype``, or the partial sums of that where pairs share the sum over K.
    """

    def body(x, packed, scale, out, **scratch):
        _Program(x, packed, scale, out, problem, config, scratch).run(consume)

    body.__name__ = name
    partial_dtype = jnp.float32 if config.split > 1 else problem.out_dtype
    outputs = plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((config.split, problem.m, problem.n), partial_dtype),
        scratch_types=_scratch(problem, config),
        grid=(config.split, problem.n // config.block_n, pl.cdiv(problem.m, config.block_m)),
        grid_names=("split", "pair", "m"),
        cluster=(2,),
        cluster_names=("rank",),
        num_threads=config.warpgroups + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(
            lowering_semantics=plgpu.LoweringSemantics.Lane, unsafe_no_auto_barriers=True
        ),
    )(pad_rows(rows), packed, scale.reshape(problem.scale_planes, -1, problem.n))
    return outputs[0] if config.split == 1 else PartialSums(outputs, problem.out_dtype)


def _scratch(problem: Problem, config: PairConfig) -> dict[str, Any]:
    """Shared memory and barriers of one program."""
    stages, x_slots, warpgroups = config.num_stages, config.x_slots, config.warpgroups
    x_transforms = (plgpu.TilingTransform((8, problem.piece)), plgpu.SwizzleTransform(128))
    outputs = [ROWS * count for count in config.teams]
    planes = problem.scale_planes
    return {
        "rows": plgpu.SMEM((x_slots, config.block_m, problem.piece), problem.x_dtype, transforms=x_transforms),
        "weight": [plgpu.SMEM((stages, n, TILE), jnp.uint8, transforms=WEIGHT_TRANSFORMS) for n in outputs],
        "scales": [plgpu.SMEM((stages, planes, 1, n), jnp.float16) for n in outputs],
        "full": plgpu.Barrier(num_arrivals=2 * len(outputs), num_barriers=stages),
        "empty": plgpu.Barrier(num_arrivals=warpgroups, num_barriers=stages),
        "rows_full": plgpu.Barrier(num_arrivals=1, num_barriers=x_slots),
        "rows_empty": plgpu.Barrier(num_arrivals=warpgroups, num_barriers=x_slots),
        "both_empty": plgpu.ClusterBarrier(collective_axes=("rank",), num_arrivals=1, num_barriers=x_slots),
    }


@dataclasses.dataclass(frozen=True)
class _Program:
    """One program of a pair: its memory, and what its warpgroups do."""

    rows: Ref  # [M, K], M padded
    packed: Ref  # [N, K/2] uint8
    scale: Ref  # [planes, G / planes, N] f16
    out: Ref  # [split, M, N]
    problem: Problem
    config: PairConfig
    scratch: dict[str, Any]

    def run(self, consume: Callable[[Block], jax.Array]) -> None:
        config = self.config
        warpgroup = lax.axis_index("warpgroup")

        @pl.when(warpgroup == config.warpgroups)
        def _copy():
            plgpu.set_max_registers(config.registers[0], action="decrease")
            for phase in range(config.phases):
                lax.fori_loop(0, self.num_steps, functools.partial(self.copy_tile, phase), None)

        for team, count in enumerate(config.teams):
            first = config.first_warpgroup(team)

            @pl.when((warpgroup >= first) & (warpgroup < first + count))
            def _compute(team=team, place=warpgroup - first if count > 1 else 0):
                plgpu.set_max_registers(config.registers[1], action="increase")
                for phase in range(config.phases):
                    block = Block(self, team, phase, place)
                    block.write(consume(block))

    @property
    def num_steps(self) -> int:
        """Tiles of a phase."""
        return self.problem.num_tiles // self.config.split

    @property
    def rank(self) -> jax.Array:
        return lax.axis_index("rank")

    @property
    def first_row(self) -> jax.Array:
        return lax.axis_index("m") * self.config.block_m

    def first_output(self, team: int, phase: int) -> jax.Array:
        """Of the first warpgroup of a team."""
        block = self.config.first_block(team, phase, self.rank)
        return lax.axis_index("pair") * self.config.block_n + block * ROWS

    def copy_tile(self, phase: int, step: jax.Array, _: None) -> None:
        """Fills the next slot of weights, and the slots of rows that meet them."""
        config, scratch = self.config, self.scratch
        count = phase * self.num_steps + step  # of the tiles so far: phases follow one another without a gap
        slot = lax.rem(count, config.num_stages)
        # The last slot is released once before it is ever filled; see pipeline.
        pl.when(count >= config.num_stages - 1)(lambda: plgpu.barrier_wait(scratch["empty"].at[slot]))
        tile = step * config.split + lax.axis_index("split")
        full = scratch["full"].at[slot]
        group = lax.div(tile, self.problem.tiles_per_group)
        for team, num_warpgroups in enumerate(config.teams):
            outputs = pl.ds(self.first_output(team, phase), ROWS * num_warpgroups)
            weight = self.packed.at[outputs, pl.ds(tile * TILE, TILE)]
            plgpu.copy_gmem_to_smem(weight, scratch["weight"][team].at[slot], full)
            scale = self.scale.at[:, pl.ds(group, 1), outputs]
            plgpu.copy_gmem_to_smem(scale, scratch["scales"][team].at[slot], full)
        self.copy_rows(count, tile)

    def copy_rows(self, count: jax.Array, tile: jax.Array) -> None:
        """The rows of a tile, in the order in which they are multiplied: half of each piece, into both programs."""
        scratch, problem, x_slots = self.scratch, self.problem, self.config.x_slots
        for index in range(2 * problem.pieces):
            part, plane = divmod(index, 2)
            piece = count * 2 * problem.pieces + index  # of those so far; Tile.multiply counts alike
            slot = lax.rem(piece, x_slots)

            @pl.when(piece >= x_slots - 1)
            def _wait(slot=slot):
                plgpu.barrier_wait(scratch["rows_empty"].at[slot])  # all threads that compute here have read it, ...
                plgpu.barrier_arrive(scratch["both_empty"].at[slot])
                plgpu.barrier_wait(scratch["both_empty"].at[slot])  # ... and there

            inputs = pl.ds(plane * (problem.k // 2) + tile * TILE + part * problem.piece, problem.piece)
            block = self.rows.at[pl.ds(self.first_row, self.config.block_m), inputs]
            target, full = scratch["rows"].at[slot], scratch["rows_full"].at[slot]
            plgpu.copy_gmem_to_smem(block, target, full, collective_axes="rank")


@dataclasses.dataclass(frozen=True)
class Block:
    """64 outputs, by the rows of the pair or half of them, that a warpgroup computes in a phase."""

    _program: _Program
    _team: int
    _phase: int
    _place: jax.Array | int  # of the warpgroup in its team

    @property
    def problem(self) -> Problem:
        return self._program.problem

    @property
    def block_m(self) -> int:
        """Rows of the product."""
        return self._program.config.rows(self._team, self._phase, 0)[1]

    @property
    def first_row(self) -> Any:
        """Of those of the pair: 0, or what the rank says."""
        return self._program.config.rows(self._team, self._phase, self._program.rank)[0]

    def for_each_tile(self, body: Callable[[Tile, Any], Any], carry: Any) -> Any:
        """``carry = body(tile, carry)`` over all tiles; ``body`` multiplies each plane of each part, in order."""
        program, config, scratch = self._program, self._program.config, self._program.scratch
        outputs = pl.ds(self._place * ROWS, ROWS)
        rows = scratch["rows"]
        if self.block_m < config.block_m:
            rows = rows.at[:, pl.ds(pl.multiple_of(self.first_row, 8), self.block_m)]

        def step(index, carry):
            count = self._phase * program.num_steps + index
            slot, before = (lax.rem(count + lag, config.num_stages) for lag in (0, config.num_stages - 1))
            plgpu.barrier_wait(scratch["full"].at[slot])
            tile = Tile(
                weight=(scratch["weight"][self._team].at[slot, outputs],),
                columns=(scratch["scales"][self._team].at[slot, :, :, outputs],),
                row_groups=(),
                _rows=rows,
                _ring=(scratch["rows_full"], scratch["rows_empty"]),
                _release_before=lambda: plgpu.barrier_arrive(scratch["empty"].at[before]),
                _step=count,
                _problem=program.problem,
            )
            return body(tile, carry)

        return lax.fori_loop(0, program.num_steps, step, carry)

    def write(self, product: jax.Array) -> None:
        """Writes the product ``[64, block_m]``, of rows that exist."""
        program, problem = self._program, self._program.problem
        first_row = program.first_row + self.first_row
        first_output = program.first_output(self._team, self._phase) + self._place * ROWS
        out = program.out.at[lax.axis_index("split"), pl.ds(first_row, self.block_m), pl.ds(first_output, ROWS)]
        is_whole = problem.m % program.config.block_m == 0
        store(product, out, num_outputs=problem.n, num_rows=None if is_whole else problem.m - first_row)
