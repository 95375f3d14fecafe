"""The search for tiles: what is tried, what is rejected and what wins. It knows no device.

One weight and operation has one order of the sum over K, which ``block_k`` and ``split`` fix, for all decode row
counts; block shapes, warps and stages may differ by bucket as long as the bits of the results agree. They need not:
tensor-core instructions round differently, and which one a tile gets is the compiler's choice. So results are
compared, never predicted:

1. a candidate whose result is not the reference's (relative error above a bound, or NaN) is out;
2. candidates of one order whose first rows have the same bits form a *class*, and only a class with a member in
   every bucket can win;
3. the winner is the class with the lowest cost, the weighted mean over the buckets of its time over the best time of
   any class there. The weights favour few rows (:data:`BUCKET_WEIGHTS`): decoding is mostly 1 to 16 rows, the
   verification of a batch 32 to 128;
4. it must pass a last check of whole results for many row counts; else the next class is taken;
5. it must be as fast as the built-in tiles by the same measure, or these stay.

The orders are narrowed down with 16 rows. The built-in order always stays in, so the winner costs no more than it.
A prefill takes the fastest candidate that is right, also for a number of rows that fills no block.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Protocol, runtime_checkable

from pallas_kernels.backends.triton.tiles import TileConfig
from pallas_kernels.backends.triton.tuning import DECODE_ROWS
from qspec_jax.bench.tune.tile_space import TileSpace, neighbours, order_of

RELATIVE_ERROR_BOUND = 3e-3  # rounding a result to bfloat16 costs 1.7e-3
BUCKET_WEIGHTS: dict[int, float] = dict(zip(DECODE_ROWS, (0.55, 0.15, 0.15, 0.1, 0.05), strict=True))
PREFILL_ROWS = 2048
_ODD_ROWS = 517  # of a prefill that fills no block
_KEPT_ORDERS = 3
_FASTEST = 3  # whose neighbours are tried
_CLASSES_CHECKED = 4
# Shares of an entry's time; what a stage leaves over is the next one's.
_TIME_SHARES: dict[int, float] = dict(
    zip((*DECODE_ROWS, PREFILL_ROWS), (0.35, 0.12, 0.12, 0.12, 0.12, 0.12), strict=True)
)


@dataclasses.dataclass(frozen=True)
class Trial:
    """One candidate at one number of rows.

    Attributes:
        tiles: the candidate.
        microseconds: None if it did not compile or run.
        relative_error: of its result against the reference.
        bits: a digest of the first rows of its result.
    """

    tiles: TileConfig
    microseconds: float | None = None
    relative_error: float = float("nan")
    bits: str = ""

    @property
    def right(self) -> bool:
        """It ran, and its result is the reference's. Comparisons with NaN are false."""
        return self.microseconds is not None and self.relative_error <= RELATIVE_ERROR_BOUND


@runtime_checkable
class Laboratory(Protocol):
    """Where candidates of one problem are tried."""

    def trials(self, rows: int, tiles: Sequence[TileConfig], *, deadline: float) -> Iterator[Trial]:
        """Tries candidates in order until the deadline, a time of ``time.monotonic``."""
        ...

    def rows_agree(self, decode: Mapping[int, TileConfig]) -> bool:
        """Whether each row has the same bits for all row counts, with these tiles by bucket."""
        ...

    def relative_error(self, rows: int, tiles: TileConfig) -> float:
        """The error of the result for so many rows; NaN if there is none."""
        ...


@dataclasses.dataclass(frozen=True)
class CandidateClass:
    """Tiles of all decode buckets whose results agree in their bits, and their cost."""

    order: tuple[int, int]
    bits: str
    decode: Mapping[int, Trial]
    cost: float


@dataclasses.dataclass(frozen=True)
class Outcome:
    """The result of a search.

    Attributes:
        winner: None if no class was complete and row invariant, or none as fast as the built-in tiles.
        prefill: None if no candidate was right, or XLA multiplies.
        built_in_us: times of the built-in tiles, by rows, where they were measured.
        num_tried, num_failed, num_wrong: candidates, of those that did not compile, and whose result was wrong.
        num_other_bits: right ones that add in the winner's order and yet round differently.
        num_variant: classes that agreed in their first rows and failed the last check.
        keeps_built_in: there was a winner, and the built-in tiles are faster.
    """

    winner: CandidateClass | None
    prefill: Trial | None
    built_in_us: Mapping[int, float]
    num_tried: int
    num_failed: int
    num_wrong: int
    num_other_bits: int
    num_variant: int
    keeps_built_in: bool = False


@dataclasses.dataclass
class _Search:
    laboratory: Laboratory
    space: TileSpace
    candidates: int
    found: dict[int, dict[TileConfig, Trial]] = dataclasses.field(default_factory=dict)

    def right(self, rows: int) -> list[Trial]:
        """Right candidates, the fastest first."""
        return fastest_first(trial for trial in self.found.get(rows, {}).values() if trial.right)

    def explore(self, rows: int, first: Iterable[TileConfig], pool: list[TileConfig], *, deadline: float) -> None:
        """Tries ``first``, then the head of the pool, then what is near the fastest found."""
        first = list(dict.fromkeys(first))
        planned = list(dict.fromkeys([*first, *pool]))
        self._try(rows, planned[: max(len(first), 2 * self.candidates // 3)], deadline)
        best = [trial.tiles for trial in self.right(rows)[:_FASTEST]]
        near = dict.fromkeys(tiles for one in best for tiles in neighbours(one, pool))
        tried = self.found[rows]
        untried = [tiles for tiles in (*near, *planned) if tiles not in tried]
        self._try(rows, list(dict.fromkeys(untried))[: max(0, self.candidates - len(tried))], deadline)

    def _try(self, rows: int, tiles: list[TileConfig], deadline: float) -> None:
        found = self.found.setdefault(rows, {})
        for trial in self.laboratory.trials(rows, tiles, deadline=deadline):
            found[trial.tiles] = trial


def search(laboratory: Laboratory, space: TileSpace, *, candidates: int, deadline: float = float("inf")) -> Outcome:
    """Finds the tiles of one problem; the module docstring says how.

    Args:
        laboratory: tries them.
        space: proposes them.
        candidates: how many to try per bucket.
        deadline: when to have decided, as a time of ``time.monotonic``. Stages that run out of it are cut short.
    """
    run = _Search(laboratory, space, candidates)
    smallest, shares = DECODE_ROWS[0], _deadlines(time.monotonic(), deadline)
    run.explore(smallest, [space.built_in(smallest)], space.decode(smallest), deadline=shares[smallest])
    orders = kept_orders(run.right(smallest), order_of(space.built_in(smallest)))
    if not orders:
        return _outcome(run, None, None, 0)
    seeds = [next(trial.tiles for trial in run.right(smallest) if order_of(trial.tiles) == order) for order in orders]
    for rows in DECODE_ROWS[1:]:
        pool = in_turn([tiles for tiles in space.decode(rows) if order_of(tiles) == order] for order in orders)
        run.explore(rows, [*seeds, space.built_in(rows)], pool, deadline=shares[rows])
    if space.problem.tiles_prefill:
        prefill_first = [space.built_in(PREFILL_ROWS)]
        run.explore(PREFILL_ROWS, prefill_first, space.prefill(PREFILL_ROWS), deadline=shares[PREFILL_ROWS])
    classes = complete_classes({rows: run.right(rows) for rows in DECODE_ROWS})[:_CLASSES_CHECKED]
    agreeing = (laboratory.rows_agree({rows: trial.tiles for rows, trial in one.decode.items()}) for one in classes)
    num_variant = len(list(itertools.takewhile(lambda agrees: not agrees, agreeing)))
    winner = classes[num_variant] if num_variant < len(classes) else None
    outcome = _outcome(run, winner, _best_prefill(run), num_variant)
    if winner is not None and _built_in_cost(run) < winner.cost:
        return dataclasses.replace(outcome, winner=None, keeps_built_in=True)
    return outcome


def _built_in_cost(run: _Search) -> float:
    """Of the built-in tiles where they are a class of their own, which agrees in its bits; else infinite."""
    tiles = {rows: run.space.built_in(rows) for rows in DECODE_ROWS}
    trials = {rows: run.found[rows].get(tiles[rows], Trial(tiles[rows])) for rows in DECODE_ROWS}
    if len({trial.bits for trial in trials.values()}) > 1 or not all(trial.right for trial in trials.values()):
        return math.inf
    times = {rows: _us(trial) for rows, trial in trials.items()}
    return (
        cost(times, {rows: run.right(rows) for rows in DECODE_ROWS}) if run.laboratory.rows_agree(tiles) else math.inf
    )


def _best_prefill(run: _Search) -> Trial | None:
    def right_for_odd_rows(trial: Trial) -> bool:
        return run.laboratory.relative_error(_ODD_ROWS, trial.tiles) <= RELATIVE_ERROR_BOUND

    return next(filter(right_for_odd_rows, run.right(PREFILL_ROWS)), None)


def kept_orders(right: Sequence[Trial], built_in: tuple[int, int]) -> list[tuple[int, int]]:
    """The orders of the fastest trials, and the built-in one if it has a right trial."""
    orders = list(dict.fromkeys(order_of(trial.tiles) for trial in right))
    kept = orders[:_KEPT_ORDERS]
    return [*kept, built_in] if built_in in orders and built_in not in kept else kept


def complete_classes(right: Mapping[int, Sequence[Trial]]) -> list[CandidateClass]:
    """The classes with a member in every bucket, the cheapest first, each with its fastest members.

    Args:
        right: right trials by bucket.
    """
    fastest: dict[tuple[tuple[int, int], str], dict[int, Trial]] = {}
    for rows, trials in right.items():
        for trial in fastest_first(trials):
            fastest.setdefault((order_of(trial.tiles), trial.bits), {}).setdefault(rows, trial)
    classes = [
        CandidateClass(order, bits, members, cost({rows: _us(trial) for rows, trial in members.items()}, right))
        for (order, bits), members in fastest.items()
        if members.keys() == BUCKET_WEIGHTS.keys()
    ]
    return sorted(classes, key=lambda one: one.cost)


def cost(microseconds: Mapping[int, float], right: Mapping[int, Sequence[Trial]]) -> float:
    """The weighted sum over the decode buckets of times over the best ones found."""
    best_us = {rows: _us(fastest_first(trials)[0]) for rows, trials in right.items() if trials}
    return sum(weight * microseconds[rows] / best_us[rows] for rows, weight in BUCKET_WEIGHTS.items())


def fastest_first(trials: Iterable[Trial]) -> list[Trial]:
    """Trials that ran, sorted by time."""
    return sorted((trial for trial in trials if trial.microseconds is not None), key=_us)


def in_turn(lists: Iterable[list[TileConfig]]) -> list[TileConfig]:
    """One element of each list, then the next of each."""
    return [tiles for turn in itertools.zip_longest(*lists) for tiles in turn if tiles is not None]


def _us(trial: Trial) -> float:
    return float("inf") if trial.microseconds is None else trial.microseconds


def _deadlines(start: float, deadline: float) -> dict[int, float]:
    ends, share = {}, 0.0
    for rows, part in _TIME_SHARES.items():
        share += part
        ends[rows] = start + share * (deadline - start)
    return ends


def _outcome(run: _Search, winner: CandidateClass | None, prefill: Trial | None, num_variant: int) -> Outcome:
    trials = [(rows, trial) for rows, found in run.found.items() for trial in found.values()]
    other_bits = [
        trial
        for rows, trial in trials
        if winner and rows in winner.decode and trial.right and order_of(trial.tiles) == winner.order
        if trial.bits != winner.bits
    ]
    built_in = {rows: found.get(run.space.built_in(rows)) for rows, found in run.found.items()}
    return Outcome(
        winner=winner,
        prefill=prefill,
        built_in_us={rows: _us(trial) for rows, trial in built_in.items() if trial is not None and trial.right},
        num_tried=len(trials),
        num_failed=sum(trial.microseconds is None for _, trial in trials),
        num_wrong=sum(trial.microseconds is not None and not trial.right for _, trial in trials),
        num_other_bits=len(other_bits),
        num_variant=num_variant,
    )
