"""Which program of a pair computes what: the arithmetic of Mosaic GPU matmuls whose programs share blocks of outputs.

A block is 64 outputs, the fixed side of ``wgmma``. An H100 or H200 has 132 SMs, each of which holds one program of a
matmul with many rows. 28672 outputs are 448 blocks: 224 programs of two blocks are two waves, which keep 85% of the SMs
busy, and 112 programs of four are one wave on as many. 128 programs of three and a half would be one wave on 97% of
them. So two programs take seven blocks: three each, and of the seventh each takes half of the rows::

    block             0   1   2   3   4   5   6
                    ┌───┬───┬───┬───┬───┬───┬───┐
    first half      │   │   │   │   │   │   │ A │      A, B: the programs of the pair, ranks 0 and 1
    of the rows     │ A │ A │ A │ B │ B │ B ├───┤
    second half     │   │   │   │   │   │   │ B │
                    └───┴───┴───┴───┴───┴───┴───┘

Of an even number of blocks none is halved. A warpgroup computes one block at a time, so a program goes through its
blocks in phases, each over all inputs. What program A computes, with two and with four warpgroups::

    warpgroup       0    1                          0    1    2    3
    phase 0         0    1                          0    1    2    6, first half
    phase 1         2    6, first half

No sum is cut otherwise than by :class:`pallas_kernels.backends.mosaic.matmul.MosaicConfig`, so a row has the bits that
it has there. The kernel is in :mod:`pallas_kernels.backends.mosaic.pair_pipeline`.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from pallas_kernels.arrays.weight import QuantizedWeight
from pallas_kernels.backends.mosaic import matmul as hopper
from pallas_kernels.backends.mosaic.registers import ROWS, TILE

_GROUP_SIZE = 128  # a plane's part of a tile is one group


@dataclasses.dataclass(frozen=True)
class PairConfig:
    """How a matmul is cut into pairs of programs.

    Attributes:
        blocks: of 64 outputs, that a pair computes; of an odd number the last is halved by rows.
        warpgroups: computing ones of a program, one block each at a time.
        split: pairs that share the sums of the same outputs, as :class:`hopper.MosaicConfig` has it.
        block_m: rows of a pair, a multiple of 16 up to 256: half of them are copied by each of its programs.
        num_stages: weight tiles in flight, at least 2.
        x_slots: pieces of rows in flight, of 128 bytes each, at least 2.
        registers: per thread of the copying and of the computing warpgroups.

    Raises:
        ValueError: the blocks of a program do not come out even over its warpgroups, or a number is not as above.
    """

    blocks: int
    warpgroups: int
    split: int
    block_m: int
    num_stages: int
    x_slots: int
    registers: tuple[int, int]

    def __post_init__(self) -> None:
        if self.blocks < 2 or self.warpgroups < 1 or (self.own + self.has_half) % self.warpgroups:
            raise ValueError(
                f"a program of a pair that shares blocks={self.blocks} has {self.own + self.has_half} to compute; use "
                f"at least 2 blocks, and warpgroups that divide that number, not {self.warpgroups}"
            )
        if self.block_m % 16 or not 0 < self.block_m <= hopper.MAX_BLOCK_M:
            raise ValueError(f"block_m={self.block_m}; use a multiple of 16 up to {hopper.MAX_BLOCK_M}")
        if min(self.num_stages, self.x_slots) < 2:
            raise ValueError(f"num_stages={self.num_stages} and x_slots={self.x_slots}; use at least 2 of either")

    @property
    def own(self) -> int:
        """Blocks that a program computes whole."""
        return self.blocks // 2

    @property
    def has_half(self) -> bool:
        """Whether it also computes half of the rows of one."""
        return self.blocks % 2 == 1

    @property
    def phases(self) -> int:
        """Blocks of a program that one warpgroup computes, one after the other."""
        return (self.own + self.has_half) // self.warpgroups

    @property
    def block_n(self) -> int:
        """Outputs of a pair."""
        return ROWS * self.blocks

    @property
    def teams(self) -> tuple[int, ...]:
        """Neighbouring warpgroups that do alike, whose weights one copy brings: those with whole blocks, the last."""
        if self.has_half and self.warpgroups > 1:
            return (self.warpgroups - 1, 1)
        return (self.warpgroups,)

    def first_warpgroup(self, team: int) -> int:
        return sum(self.teams[:team])

    def halves(self, team: int, phase: int) -> bool:
        """Whether a team computes half of the rows of its block in a phase."""
        return self.has_half and (team, phase) == (len(self.teams) - 1, self.phases - 1)

    def first_block(self, team: int, phase: int, rank: Any) -> Any:
        """The block, of those of the pair, of a team's first warpgroup; those of the others follow.

        Args:
            rank: 0 or 1, the program of the pair: an integer, or one of a kernel, as the result is then.
        """
        if self.halves(team, phase):
            return 2 * self.own
        return rank * self.own + (phase * self.warpgroups + self.first_warpgroup(team))

    def rows(self, team: int, phase: int, rank: Any) -> tuple[Any, int]:
        """The first row, of those of the pair, that a team computes in a phase, and how many."""
        if self.halves(team, phase):
            return rank * (self.block_m // 2), self.block_m // 2
        return 0, self.block_m

    @property
    def shared_memory(self) -> int:
        """Bytes of weights, scales and rows in a program."""
        tile = self.warpgroups * ROWS * (TILE + 2 * 2)  # codes, and float16 scales of both planes
        return self.num_stages * tile + self.x_slots * 128 * self.block_m


def with_most_slots(config: PairConfig) -> PairConfig:
    """``config`` with as many pieces of rows in flight as shared memory holds, up to ``config.x_slots``, 2 at least."""
    one = 128 * config.block_m
    tiles = config.shared_memory - config.x_slots * one
    return dataclasses.replace(config, x_slots=max(2, min(config.x_slots, (hopper.SHARED_MEMORY - tiles) // one)))


def default_config(m: int, n: int, k: int) -> PairConfig:
    """The fastest arrangements of those that ran on an H200, before :func:`with_most_slots`."""
    blocks = 7 if n % (7 * ROWS) == 0 else 4
    block_m = hopper.block_m(m, multiple=16)
    # Four warpgroups leave each 112 registers: accumulators of more rows would have ptxas serialise the products.
    warpgroups, registers = (4, (32, 112)) if blocks == 7 and block_m <= 96 else (2, (40, 232))
    return PairConfig(blocks, warpgroups, hopper.num_slices(n, k), block_m, 3, 8, registers)


def obstacle(weight: QuantizedWeight, config: PairConfig, *, early: bool) -> str | None:
    """Why pairs cannot serve a weight that :func:`hopper.obstacle` lets pass, as the end of a sentence, or None.

    Args:
        early: whether kernels start before the one before them has ended.
    """
    if weight.low is not None:
        return "need codes of 4 bits; these are nested in 8"
    if weight.offset is not None:
        return "need symmetric weights; this one has zero points"
    if weight.group_size != _GROUP_SIZE:
        return f"need groups of {_GROUP_SIZE}; these are of {weight.group_size}"
    if weight.num_outputs % config.block_n:
        return f"need N to be a multiple of {config.block_n}; this is {weight.num_outputs}"
    if weight.num_inputs // 2 // TILE % config.split:
        return f"need K to be a multiple of {2 * TILE * config.split}; this is {weight.num_inputs}"
    return "do not start early" if early else None
