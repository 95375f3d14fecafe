"""How many cycles a burst runs, and until how many rows are idle: by what bursts and reading took before."""

from __future__ import annotations

from qspec_jax.engine.reading import Reading
from qspec_jax.engine.refill import Refill

_FIRST_CYCLES = 4  # of a burst before the time of a cycle is known
_FIRST_BURST_S = 0.05  # of one between chunks of prompts, before the time of a chunk is known
_MAX_CYCLES = 4096


class Pace:
    """Of a batch.

    Attributes:
        burst_s: about how long a burst lasts.
        reading: for how long those that decode wait.
    """

    def __init__(self, rows: int, *, burst_s: float, serves: bool):
        """Of some rows, in bursts of about so many seconds; see :class:`qspec_jax.engine.scheduler.Scheduler`."""
        self.burst_s, self.reading = burst_s, Reading()
        self._rows, self._refill = rows, Refill(rows, serves=serves)
        self._cycle_s: float | None = None
        self._gap_s: float | None = None  # of all bursts up to the last one

    def note_burst(self, *, cycles: int, seconds: float, finished: int, gap_s: float) -> None:
        """Takes a burst into account: how many sequences ended in it, and seconds without work in all so far."""
        if cycles:
            self._cycle_s = seconds / cycles
        # Totals may be those of another batch before this one.
        own_s = 0.0 if self._gap_s is None else gap_s - self._gap_s
        self._refill.note_burst(seconds=seconds, finished=finished, gap_s=own_s)
        self._gap_s = gap_s

    def note_reading(self, *, chunks: int, rounds: int, passes: int, tokens: int, seconds: float) -> None:
        """Takes into account what reading took between two bursts."""
        self.reading.note(chunks, seconds)
        self._refill.note_reading(rounds=rounds, passes=passes, tokens=tokens, seconds=seconds)

    def until_finished(self, *, decoding: int, others_wait: bool) -> int:
        """Rows that are idle or finished when a burst ends, while some decode."""
        return self._refill.until_finished(active=decoding, others_wait=others_wait)

    def cycles(self, *, decoding: int, anyone_reads: bool, seconds: float | None, cycle_s: float | None = None) -> int:
        """Cycles of the next burst.

        Args:
            decoding: rows that run.
            anyone_reads: others wait for the end of it.
            seconds: that it is to take; None for what is usual.
            cycle_s: of a cycle; None for that of the last burst.
        """
        cycle_s = cycle_s or self._cycle_s
        if cycle_s is None:
            return _FIRST_CYCLES
        seconds = seconds or self.burst_s
        if anyone_reads:
            seconds = min(seconds, self.reading.burst_s(decoding=decoding, rows=self._rows) or _FIRST_BURST_S)
        return max(1, min(_MAX_CYCLES, round(seconds / cycle_s)))
