"""What the device was busy for, and what it waited for the host."""

from __future__ import annotations

import time


class Clock:
    """Splits the time since the first dispatch into what the device was busy for and what it waited for the host."""

    def __init__(self) -> None:
        self._mark_s: float | None = None
        self._in_flight = False

    def dispatching(self) -> float:
        """Seconds that the device had nothing to do before this dispatch."""
        now = time.perf_counter()
        gap_s = 0.0 if self._in_flight or self._mark_s is None else now - self._mark_s
        if not self._in_flight:
            self._mark_s, self._in_flight = now, True
        return gap_s

    def landed(self, *, more: bool = False) -> float:
        """Seconds that a dispatch took; ``more`` are under way."""
        now = time.perf_counter()
        seconds = now - (self._mark_s or now)
        self._mark_s, self._in_flight = now, more
        return seconds
