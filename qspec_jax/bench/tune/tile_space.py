"""The tiles that a tuner may try, the promising ones first.

The order is a guess that only decides what a small budget leaves out; which tiles are right and fast is measured.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import operator
from collections.abc import Iterator

from pallas_kernels.backends.triton import tiles
from pallas_kernels.backends.triton.tiles import TileConfig
from pallas_kernels.backends.triton.tuning import takes_wgmma
from qspec_jax.bench.kernels.operands import recipe
from qspec_jax.errors import UsageError

_SHARED_MEMORY_BYTES = 227 * 1024  # of a Hopper program; where there is less, some candidates do not compile
_MAX_SPLIT = 16
_SUMS_PER_THREAD = (4, 128)  # of a program's accumulator
_FIELDS = operator.attrgetter(*(field.name for field in dataclasses.fields(TileConfig)))


@dataclasses.dataclass(frozen=True)
class Problem:
    """One entry of a tuning table: an operation and a weight.

    Attributes:
        op: one of ``names.MATMULS``, but for ``w8a16``.
        k, n, group_size, symmetric: of the weight; ``group_size`` is ``k`` where one scale covers the row.
    """

    op: str
    k: int
    n: int
    group_size: int
    symmetric: bool

    def __str__(self) -> str:
        group = "row" if self.group_size == self.k else self.group_size
        return f"{self.op} {self.k}x{self.n} group {group}{'' if self.symmetric else ' asymmetric'}"

    @functools.cached_property
    def group_sizes(self) -> tuple[int, int]:
        """Inputs per weight scale and per activation scale."""
        activations = None if self.op == "w4a16" else recipe(self.op)[1].group_size
        return self.group_size, activations or self.k

    @functools.cached_property
    def run(self) -> int:
        """Inputs of a nibble plane that share all scales."""
        return tiles.scale_run(self.k, *self.group_sizes)

    @property
    def rounds_weights(self) -> bool:
        """Whether programs round the weight to 16 bits, and multiply by it from the left."""
        rounds = tiles.rounds_weights(self.k, self.group_size, symmetric=self.symmetric)
        return self.op == "w4a16" and rounds

    def height(self, tile: TileConfig) -> int:
        """Of the operand on the left."""
        return tile.block_n if self.rounds_weights else tile.block_m

    @property
    def tiles_prefill(self) -> bool:
        """A prefill runs in tiles of ours; XLA multiplies that of weight-only matmuls."""
        return self.op != "w4a16"

    def check(self) -> None:
        """Raises UsageError for a problem that the kernels do not serve."""
        obstacle = tiles.matmul_obstacle(self.n, self.k, *self.group_sizes)
        if obstacle is not None:
            raise UsageError(f"{self}: the Triton kernel {obstacle}; leave this shape or group size out")


def order_of(tiles: TileConfig) -> tuple[int, int]:
    """What decides the order of the sum over K: ``block_k`` and ``split``."""
    return tiles.block_k, tiles.split


@dataclasses.dataclass(frozen=True)
class TileSpace:
    """The candidates of a problem on a device with ``num_cores`` multiprocessors."""

    problem: Problem
    num_cores: int = 132

    def built_in(self, rows: int) -> TileConfig:
        """What runs without a table."""
        problem = self.problem
        if problem.rounds_weights and rows <= tiles.ROW_INVARIANT_ROWS:
            return tiles.rounding_config(rows, problem.n, problem.k, problem.run)
        scaled_in_loop = min(problem.group_sizes) < problem.k
        return tiles.tile_config(
            rows,
            problem.n,
            problem.k,
            problem.run,
            integer=problem.op != "w4a16" and scaled_in_loop,
            asymmetric=not problem.symmetric and problem.op != "w4a4",
        )

    def decode(self, rows: int) -> list[TileConfig]:
        """Candidates for a decode bucket of so many rows.

        Float products all take the same instruction, as a table demands (:mod:`pallas_kernels.backends.triton.tuning`):
        mma.sync where rows are on the left; where the weight is, wgmma if it has 64 outputs.
        """
        block_ms = tuple(size for size in (16, 32, 64, 128) if size <= rows)
        ranked = _ranked(self, rows, block_ms=block_ms, max_split=_MAX_SPLIT)
        if self.problem.op != "w4a16":
            return list(ranked)
        wanted = self.problem.rounds_weights and self.problem.n % 64 == 0
        return [one for one in ranked if takes_wgmma(self.problem.height(one), one.num_warps) == wanted]

    def prefill(self, rows: int) -> list[TileConfig]:
        """Candidates for many rows, whose grid is full without a split."""
        return list(_ranked(self, rows, block_ms=(64, 128, 256), max_split=2))

    def all_tiles(self, block_ms: tuple[int, ...], max_split: int) -> Iterator[TileConfig]:
        half, n, run = self.problem.k // 2, self.problem.n, self.problem.run
        block_ks = [size for size in (32, 64, 128, 256) if run % size == 0]
        block_ns = [size for size in (16, 32, 64, 128, 256) if n % size == 0]
        for block_m, block_n, block_k in itertools.product(block_ms, block_ns, block_ks):
            splits = [split for split in range(1, max_split + 1) if half // block_k % split == 0]
            for split, warps, stages in itertools.product(splits, (1, 2, 4, 8), (2, 3, 4, 5)):
                yield TileConfig(block_m, block_n, block_k, split, warps, stages)

    def fits(self, tiles: TileConfig) -> bool:
        """Whether registers and shared memory suffice, roughly, and no thread is idle."""
        sums_per_thread = tiles.block_m * tiles.block_n / (32 * tiles.num_warps)
        row_bytes = 2 if self.problem.op == "w4a16" else 1
        stage_bytes = tiles.block_k * (tiles.block_n + 2 * tiles.block_m * row_bytes)
        least, most = _SUMS_PER_THREAD
        return least <= sums_per_thread <= most and tiles.num_stages * stage_bytes <= _SHARED_MEMORY_BYTES

    def distance_from_guess(self, tiles: TileConfig, rows: int) -> float:
        """Octaves between the tiles and those that one would try first."""
        programs = self.problem.n // tiles.block_n * tiles.split * math.ceil(rows / tiles.block_m)
        block_m, warps = min(max(16, rows), 64), 4 if tiles.block_m * tiles.block_n >= 1024 else 2
        return (
            abs(math.log2(programs / (3 * self.num_cores)))
            + abs(math.log2(tiles.block_m / block_m))
            + abs(math.log2(tiles.block_k / min(self.problem.run, 128)))
            + abs(math.log2(tiles.num_warps / warps)) / 2
            + abs(tiles.num_stages - 3) / 2
        )


@functools.lru_cache(maxsize=64)
def _ranked(space: TileSpace, rows: int, *, block_ms: tuple[int, ...], max_split: int) -> tuple[TileConfig, ...]:
    """Kept, because a search asks for the same thousands of tiles once for each of its steps."""
    fitting = [tiles for tiles in space.all_tiles(block_ms, max_split) if space.fits(tiles)]
    return tuple(sorted(fitting, key=lambda tiles: space.distance_from_guess(tiles, rows)))


def neighbours(tiles: TileConfig, space: list[TileConfig]) -> list[TileConfig]:
    """The members of a space that differ from ``tiles`` in one field, or that trade rows for outputs."""
    mine = _FIELDS(tiles)

    def near(other: TileConfig) -> bool:
        differing = sum(map(operator.ne, mine, _FIELDS(other)))
        same_area = other.block_m * other.block_n == tiles.block_m * tiles.block_n
        return differing == 1 or (differing == 2 and same_area and other.block_m != tiles.block_m)

    return [other for other in space if near(other)]
