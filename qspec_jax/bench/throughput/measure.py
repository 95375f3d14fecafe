"""Requests that arrive at a batch, and what came of them: tokens per second, waiting, latencies, occupancy.

The batch is the one that generates (``engine.scheduler.Scheduler``). Times are of the clock on the wall, as the
host sees tokens: at the end of a burst. The tokens of a burst count as evenly spread over the time since the last ones.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import random
import statistics
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from qspec_jax.decoding import packing
from qspec_jax.decoding.chunks import CHUNK_WIDTHS, Shape
from qspec_jax.decoding.plan import AutoPlan, Plan
from qspec_jax.engine.language_model import LanguageModel
from qspec_jax.engine.requests import Request
from qspec_jax.engine.results import PlanTotals
from qspec_jax.engine.scheduler import Scheduler
from qspec_jax.engine.sequence import RunningSequence

_WARM_UP_TOKENS = 8
_PERCENTILES = (50, 90, 99)
_LOOK_S = 0.1  # at whether the last request has come


@dataclasses.dataclass(frozen=True)
class ThroughputRun:
    """Figures of a run.

    Attributes:
        mode, draft, draft_length: of the plan; ``draft`` is None where nothing is drafted.
        rows: sequences that run together.
        rate: requests that arrive per second; None where all are there from the beginning.
        load: that rate over the requests per second of the run where all were there; None where the rate was given.
        choices: what each plan ran, by its name; see :class:`qspec_jax.engine.results.PlanTotals`.
        num_requests, num_prompt_tokens, num_tokens: what was served.
        num_reused_tokens: those of the prompts that another prompt's row had already.
        seconds: from the first arrival to the last token, without compiling.
        request_tokens_per_s: percentiles over requests, tokens after the first per second of decoding.
        first_token_s: percentiles over requests, from arrival to the first token.
        inter_token_s: percentiles over tokens, since the one before.
        acceptance_rate, tokens_per_cycle: of drafts; None where nothing is drafted.
        occupancy: share of the rows that held an unfinished sequence, over all cycles.
        prefill_share, gap_share: of the time that something was to be done; the device filled rows, or waited for
            the host.
        compile_s: seconds spent compiling before.
        num_compilations: during the run itself.
    """

    mode: str
    draft: str | None
    draft_length: int
    rows: int
    rate: float | None
    load: float | None
    choices: Mapping[str, PlanTotals]
    num_requests: int
    num_prompt_tokens: int
    num_reused_tokens: int
    num_tokens: int
    seconds: float
    request_tokens_per_s: dict[str, float]
    first_token_s: dict[str, float]
    inter_token_s: dict[str, float]
    acceptance_rate: float | None
    tokens_per_cycle: float | None
    occupancy: float | None
    prefill_share: float
    gap_share: float
    compile_s: float
    num_compilations: int

    @property
    def tokens_per_s(self) -> float:
        """New tokens of all requests."""
        return self.num_tokens / self.seconds

    @property
    def requests_per_s(self) -> float:
        """Requests that ended; where all were there from the beginning, about the most that can be served."""
        return self.num_requests / self.seconds

    def to_dict(self) -> dict[str, Any]:
        """All figures, JSON-serialisable."""
        return {
            **dataclasses.asdict(self),
            "tokens_per_s": self.tokens_per_s,
            "requests_per_s": self.requests_per_s,
        }


@dataclasses.dataclass(frozen=True)
class ReadyBatch:
    """A batch whose programs have all been compiled and run once, and the requests that it is to serve.

    Attributes:
        model: synthetic or real.
        plan: what a cycle does; of one that chooses, only what could win.
        requests: in the order of arrival.
        rows: sequences that run together.
        capacity: cache positions of each.
        compile_s: seconds that compiling took.
    """

    model: LanguageModel
    plan: Plan
    requests: Sequence[Request]
    rows: int
    capacity: int
    compile_s: float

    def serve(
        self, burst_s: float, rate: float | None = None, *, load: float | None = None, seed: int = 0
    ) -> ThroughputRun:
        """Serves the requests as they arrive.

        Args:
            burst_s: about how long the device runs before the host looks at what there is.
            rate: requests per second, at random (Poisson) intervals; None for all at once.
            load: what share that is of what can be served, for the record.
            seed: of the intervals.
        """
        model, plan, requests, rows = self.model, self.plan, self.requests, self.rows
        sizes = {"rows": rows, "capacity": self.capacity}
        compilations = model.num_compilations
        scheduler = Scheduler(model.programs, plan, **sizes, burst_s=burst_s, serves=rate is not None)
        if rate is not None:  # a server has its cache before anybody comes
            scheduler.allocate()
        began = time.perf_counter()
        sequences = _serve(scheduler, requests, arrivals(len(requests), rate, seed))
        seconds, totals = time.perf_counter() - began, scheduler.totals
        speeds = [_tokens_per_s(sequence) for sequence in sequences if len(sequence.token_ids) > 1]
        busy_s, accepted = max(totals.busy_s, 1e-9), sum(one.accepted for one in totals.choices.values())
        gaps = [gap for sequence in sequences for gap in inter_token_seconds(sequence.arrivals)]
        return ThroughputRun(
            mode=plan.mode,
            draft=plan.draft_source,
            draft_length=plan.draft_length,
            rows=rows,
            rate=rate,
            load=load,
            choices=totals.choices,
            num_requests=len(sequences),
            num_prompt_tokens=sum(len(request.token_ids) for request in requests),
            num_reused_tokens=totals.reused_prompt_tokens,
            num_tokens=totals.tokens,
            seconds=seconds,
            request_tokens_per_s=_percentiles(speeds),
            first_token_s=_percentiles([one.arrivals[0][0] - one.added_s for one in sequences]),
            inter_token_s=_percentiles(gaps),
            acceptance_rate=accepted / totals.drafted if totals.drafted else None,
            tokens_per_cycle=totals.tokens_per_cycle,
            occupancy=totals.occupancy,
            prefill_share=totals.prefill_s / busy_s,
            gap_share=totals.gap_s / busy_s,
            compile_s=self.compile_s,
            num_compilations=model.num_compilations - compilations,
        )


def ready_batch(
    model: LanguageModel, plan: Plan, requests: Sequence[Request], *, rows: int, capacity: int, burst_s: float
) -> ReadyBatch:
    """Compiles what a plan needs, and runs everything once.

    Of a plan that chooses, all that could win are compiled, and the requests are served once: what counts comes later,
    when it is known how long cycles take.

    Args:
        model, plan, requests, rows, capacity: as in :class:`ReadyBatch`.
        burst_s: as in :meth:`ReadyBatch.serve`.
    """
    options: dict[str, Any] = {"rows": rows, "capacity": capacity, "burst_s": burst_s}
    began_compiling = model.programs.compile_s
    widths = set().union(*(request.widths() for request in requests))
    if isinstance(plan, AutoPlan):
        context = round(statistics.mean(len(one.token_ids) + one.max_new_tokens for one in requests))
        could_win = functools.partial(model.programs.costs.num_bytes.can_win, rows=rows, context=context)
        plan = AutoPlan(plan.mode, tuple(filter(could_win, plan.choices)))
    model.programs.compile(plan, Shape.of(plan, rows=rows, capacity=capacity), widths)
    plans = plan.choices if isinstance(plan, AutoPlan) else (plan,)
    once = [(one, _warm_up(requests)) for one in plans]
    if longest := model.programs.longest_packed:
        sizes = {"rows": rows, "capacity": capacity, "longest_packed": longest}
        sizes |= {"vocab_size": model.decoder.config.vocab_size, "num_devices": model.programs.num_row_shards}
        passes = fill_passes(requests, **sizes)
        once += [(plans[0], some) for some in passes]
    for one, some in once:
        _serve(Scheduler(model.programs, one, state_of=plan, **options), some, arrivals(len(some), None))
    if isinstance(plan, AutoPlan):
        _serve(Scheduler(model.programs, plan, **options), requests, arrivals(len(requests), None))
    return ReadyBatch(model, plan, requests, rows, capacity, model.programs.compile_s - began_compiling)


def arrivals(count: int, rate: float | None, seed: int = 0) -> list[float]:
    """Seconds after the beginning at which requests arrive, one after the other."""
    if rate is None:
        return [0.0] * count
    generator, now, times = random.Random(seed), 0.0, []
    for _ in range(count):
        times.append(now)
        now += generator.expovariate(rate)
    return times


def inter_token_seconds(times: Sequence[tuple[float, int]]) -> list[float]:
    """The seconds between each token after the first ones and the one before it.

    Args:
        times: when tokens came, and how many.
    """
    gaps: list[float] = []
    for (before, _), (now, count) in itertools.pairwise(times):
        gaps += [(now - before) / count] * count
    return gaps


def _warm_up(requests: Sequence[Request]) -> list[Request]:
    """A short request for each width of a chunk, so that every program runs once."""
    by_width = {frozenset(request.widths()): request for request in requests}
    return [
        dataclasses.replace(request, max_new_tokens=min(_WARM_UP_TOKENS, request.max_new_tokens))
        for request in by_width.values()
    ]


def fill_passes(
    requests: Sequence[Request],
    *,
    rows: int,
    capacity: int,
    longest_packed: int,
    vocab_size: int,
    num_devices: int = 1,
) -> Iterator[list[Request]]:
    """Short requests that come together, so that each program that reads prompts of several runs once.

    Args:
        requests: which these are like; none of theirs is longer than the longest of these.
        rows, capacity: of the batch.
        longest_packed: tokens that a chunk of them may have.
        vocab_size: tokens are drawn of.
        num_devices: that have as many rows each. Requests that come together take those of one after the other.
    """
    generator, pieces = random.Random(0), 0  # fewer than those of a pass of this size
    longest = max(packing.num_pieces(len(one.token_ids)) for one in requests)
    if longest_packed < CHUNK_WIDTHS[-1]:  # longer chunks share no pass, neither with others nor among themselves
        longest = min(longest, packing.num_pieces(longest_packed))
    for size in packing.sizes(rows // num_devices, capacity):
        counts, needed = [], pieces + 1
        while sum(counts) < needed:
            counts.append(min(longest, needed - sum(counts)))
        pieces = size
        if len(counts) > rows // num_devices:
            return  # no pass has as many
        yield [
            dataclasses.replace(
                requests[0],
                token_ids=[generator.randrange(vocab_size) for _ in range(packing.PIECE * (count - 1) + 1)],
                max_new_tokens=1,
                prompt=None,
                watch=None,
                prefix_length=0,
                session=None,
            )
            for count in counts
            for _ in range(num_devices)
        ]


def _serve(scheduler: Scheduler, requests: Sequence[Request], times: Sequence[float]) -> list[RunningSequence]:
    """Adds every request when its time has come, whatever runs then, and runs the batch until all are finished."""
    sequences: list[RunningSequence] = []
    began, come = time.perf_counter(), threading.Event()

    def add_all() -> None:
        for arrival_s, request in zip(times, requests, strict=True):
            if (left_s := began + arrival_s - time.perf_counter()) > 0:
                time.sleep(left_s)
            sequence = scheduler.add(request)
            sequence.added_s = began + arrival_s
            sequences.append(sequence)
            come.set()

    adding = threading.Thread(target=add_all, daemon=True)
    if any(times):
        adding.start()
    else:
        add_all()
    while adding.is_alive() or scheduler.busy:
        come.clear()
        if scheduler.busy:
            scheduler.advance()
        else:
            come.wait(_LOOK_S)
    return sequences


def _tokens_per_s(sequence: RunningSequence) -> float:
    """Tokens after the first ones, per second since these."""
    (first_s, first), (last_s, _) = sequence.arrivals[0], sequence.arrivals[-1]
    return (len(sequence.token_ids) - first) / max(last_s - first_s, 1e-9)


def _percentiles(values: Sequence[float]) -> dict[str, float]:
    if not values:
        return {}
    return {f"p{one}": float(np.percentile(values, one)) for one in _PERCENTILES}
