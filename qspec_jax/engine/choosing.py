"""What a scheduler tells a choice between plans, and asks of it.

It knows sequences, which :class:`qspec_jax.engine.chooser.Chooser` does not: what each has drafted, when it ends
(:mod:`qspec_jax.engine.foresight`), and what lookup would have drafted of it (:mod:`qspec_jax.engine.replay`).
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Collection, Sequence
from typing import Any

import numpy as np

from qspec_jax.decoding.chunks import Shape
from qspec_jax.decoding.plan import AutoPlan, DecodingPlan
from qspec_jax.decoding.programs import Programs
from qspec_jax.engine.chooser import Burst, Chooser
from qspec_jax.engine.compile_beside import CompileBeside
from qspec_jax.engine.foresight import Foresight
from qspec_jax.engine.request_queue import RequestQueue
from qspec_jax.engine.sequence import RunningSequence

# Cycles of all rows after a burst: each takes the host about 8 us while the device runs the next burst.
_REPLAYED = 256
# Of all time, that choosing takes at most: a choice takes the host 1 to 2 ms, in which the device may have nothing to
# do, and bursts of small models are as short as 30 ms.
_SHARE = 0.02
# For which one holds at most: another thread, which compiles, may have kept this one waiting while it chose.
_LONGEST_S = 0.25


class _Loops:
    """The loops of a batch, whose shape grows with what requests need."""

    def __init__(self, programs: Programs, shape: Shape, on_event: Callable[[str], None]):
        self.shape = shape
        self._programs, self._beside = programs, CompileBeside(programs, on_event)

    def are_ready(self, plan: DecodingPlan) -> bool:
        return self._programs.has_loop(plan, self.shape)

    def prepare(self, plan: DecodingPlan) -> None:
        self._beside.prepare(plan, self.shape)

    def name_of(self, plan: DecodingPlan) -> tuple[DecodingPlan, Shape]:
        return plan, self.shape


class Choosing:
    """The choice between the plans of a batch.

    It knows nothing of the scheduler that asks it: a circle would keep the cache of a batch, when that is done, until
    Python looks for circles.
    """

    def __init__(
        self,
        programs: Programs,
        plan: AutoPlan,
        shape: Shape,
        *,
        burst_s: float,
        serves: bool,
        on_event: Callable[[str], None],
    ):
        """Lays weights out for all plans, since programs compiled before would be dropped.

        Args:
            programs: of the model.
            plan: what there is to choose from.
            shape: of the programs, until another one is noted.
            burst_s: seconds of a burst when there is nothing to find out.
            serves: of such a batch nobody knows the end.
            on_event: told of a plan that does not compile.
        """
        for one in plan.choices:
            programs.lay_out_weights(one)
        self._loops = _Loops(programs, shape, on_event)
        lookups = [one for one in plan.choices if one.lookup]
        rows = shape.rows
        self._chooser = Chooser(
            plan.choices,
            programs.costs,
            rows=rows,
            burst_s=burst_s,
            is_ready=self._loops.are_ready,
            prepare=self._loops.prepare,
            name_of=self._loops.name_of,
            replayed={one.draft_source for one in lookups},
        )
        self._foresight = Foresight(self._chooser, rows=rows, serves=serves)
        self._lookup = max(lookups, key=lambda one: one.draft_length, default=None)
        self._replayed = max(1, _REPLAYED // rows)
        self._burst_s = burst_s
        self._last: Burst | None = None  # that runs, or has run
        self._ahead: Burst | None = None  # that follows it
        self._part = self._left = 0  # cycles of it that run, or have run, and that have not, where it has a number
        self._ran: list[tuple[DecodingPlan, dict[str, Any]]] = []  # what its parts tell, while there are others to come
        self._holds_until_s = 0.0
        self._put_off: Callable[[], None] | None = None  # what the last burst tells

    def next(
        self, decoding: Sequence[RunningSequence], queue: RequestQueue, *, most_cycles: int | None = None
    ) -> Burst:
        """What to run next, while some sequences decode and others wait.

        The same as before, if that was chosen a moment ago and is no trial; or what was chosen meanwhile. Tokens come
        at the end of a burst: so one of many cycles is cut, for those who wait for them.

        Args:
            decoding: who has read its prompt.
            queue: who waits.
            most_cycles: of a burst that has a number of cycles; the others of it come next. None for all of them.
        """
        if self._last is None or not self._left or not self._loops.are_ready(self._last.plan):
            self._note_parts()
            self._last = self._next(decoding, queue)
            self._left = self._last.cycles or 0
        if not self._left:
            return self._last
        self._part = min(self._left, most_cycles or self._left)
        self._left -= self._part
        return dataclasses.replace(self._last, cycles=self._part)

    def _next(self, decoding: Sequence[RunningSequence], queue: RequestQueue) -> Burst:
        ahead, self._ahead = self._ahead, None
        if ahead is not None and queue and self._loops.are_ready(ahead.plan):
            return ahead
        if self._last is None or not self._holds(self._last):
            return self._choose(decoding, queue)
        return self._last

    def look_ahead(self, decoding: Sequence[RunningSequence], queue: RequestQueue) -> None:
        """Chooses what follows the burst under way, where its end says little: it is no trial, and others wait.

        The device runs that burst meanwhile. What is chosen after it has ended keeps the device waiting.

        Args:
            decoding: who has read its prompt.
            queue: who waits.
        """
        if len(decoding) > 1 and queue and self._last is not None and self._last.cycles is None:
            self._ahead = self._choose(decoding, queue)

    def _holds(self, burst: Burst) -> bool:
        is_young = time.perf_counter() < self._holds_until_s
        return burst.cycles is None and is_young and self._loops.are_ready(burst.plan)

    def _choose(self, decoding: Sequence[RunningSequence], queue: RequestQueue) -> Burst:
        began_s, context = time.perf_counter(), _context(decoding)
        self.settle()
        found = self._foresight.look(decoding, queue.first(self._foresight.most + 1), context)
        burst = self._chooser.choose(context=context, active=len(decoding), makespans=found)
        now_s = time.perf_counter()
        hold_s = min((now_s - began_s) / _SHARE, _LONGEST_S)
        self._holds_until_s = now_s + hold_s
        if burst.cycles is None and burst.seconds is not None:
            # To end before there is another choice would only cost another burst.
            burst = dataclasses.replace(burst, seconds=max(burst.seconds, min(hold_s, self._burst_s)))
        return burst

    def ran(
        self,
        plan: DecodingPlan,
        decoding: Collection[RunningSequence],
        *,
        cycles: int,
        seconds: float,
        histogram: Sequence[int],
    ) -> None:
        """Takes a burst into account (:meth:`Chooser.observe`), while the device works or before the next choice."""
        some = {"cycles": cycles, "seconds": seconds, "histogram": histogram, "context": _context(decoding)}
        self._ran.append((plan, some))
        if not self._left or cycles < self._part:
            self._left = 0
            self._note_parts()

    def _note_parts(self) -> None:
        """Has a burst count whose parts have run."""
        if not self._ran:
            return
        (plan, some), parts = self._ran[-1], [one for _, one in self._ran]
        some |= {name: sum(one[name] for one in parts) for name in ("cycles", "seconds")}
        some["histogram"] = np.sum([one["histogram"] for one in parts], axis=0).tolist()
        self._ran = []
        self.settle()
        self._put_off = functools.partial(self._chooser.observe, plan, **some)

    def end(self) -> None:
        """Nothing follows for now: takes into account what has run."""
        self._left = 0
        self._note_parts()
        self.settle()

    def settle(self) -> None:
        """Takes into account what was put off."""
        put_off, self._put_off = self._put_off, None
        if put_off is not None:
            put_off()

    def received(self, plan: DecodingPlan, sequences: Sequence[RunningSequence]) -> None:
        """Some sequences have new tokens of a plan: where it did not look them up, this says what lookup would find."""
        self.settle()
        if self._lookup is None:
            return
        counts = []
        for one in sequences:
            if plan.lookup:
                one.skip_replay()
            elif any(new := one.replay(self._lookup, most=self._replayed)):
                counts.append(new)
        if counts:
            # Texts count alike by the token, not by the cycle: where lookup serves one well, it would run fewer cycles.
            some = np.asarray(counts, float)
            of_a_token = (some / (some @ np.arange(1, some.shape[1] + 1))[:, None]).sum(axis=0)
            self._chooser.note_replayed(self._lookup, (of_a_token * some.sum() / of_a_token.sum()).tolist())

    def note_shape(self, shape: Shape) -> None:
        """The programs are those of another shape from now on."""
        self._loops.shape = shape

    def entered(self) -> None:
        """A sequence has got a row."""
        self._chooser.note_entered(1)

    def finished(self, sequence: RunningSequence) -> None:
        """A sequence has ended."""
        self._chooser.note_finished(sequence.drafts)


def _context(decoding: Collection[RunningSequence]) -> int:
    """Tokens that a row holds, on average over those that decode."""
    tokens = sum(len(one.request.token_ids) + len(one.token_ids) for one in decoding)
    return round(tokens / max(1, len(decoding)))
