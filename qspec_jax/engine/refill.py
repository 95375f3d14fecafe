"""How many idle rows of a batch are filled together.

A row that waits for others to end yields nothing; a pass that reads prompts takes some milliseconds however few they
are. Where ``finished`` of ``rows`` rows end in a cycle of ``cycle_s`` seconds, and reading takes ``fixed_s`` whoever
reads, then to fill ``k`` rows at a time costs each prompt ``fixed_s / k`` of all rows' time, and it costs
``cycle_s * k / (2 * finished * rows)`` that half of them wait for the last one. Both together are least for
``k = sqrt(2 * finished * rows * fixed_s / cycle_s)``. Of half or twice as many they are a quarter more.

All four are measured while a batch runs. What a pass takes without its tokens is found by least squares; prompts of
several chunks have as many rounds of passes, of which each may end with one that is not full.
"""

from __future__ import annotations

import math

_USUAL_SHARE = 1 / 8  # of the rows, until more is known
_SERVING_SHARE = 1 / 16  # where somebody waits for each of them
_MOST_SHARE = 1 / 4
_FEWEST_READINGS = 3
_KEPT = 0.95  # of what readings and bursts before tell, with each new one
_LEAST_DETERMINANT = 1e-3  # of the least squares, of 1 where passes and tokens have nothing in common


class Refill:
    """Tells when a burst is to end, for others to enter.

    Attributes:
        rows: of the batch.
    """

    def __init__(self, rows: int, *, serves: bool):
        """Of a batch, which may serve: then nobody waits for others to enter with."""
        self.rows = rows
        self._serves = serves
        self._readings = 0
        self._passes_passes = self._passes_tokens = self._tokens_tokens = 0.0  # decayed sums of products
        self._passes_s = self._tokens_s = 0.0
        self._weight = self._rounds = 0.0
        self._bursts = self._finished = self._cycles_s = self._gaps_s = 0.0

    def note_reading(self, *, rounds: int, passes: int, tokens: int, seconds: float) -> None:
        """Takes into account what reading took between two bursts.

        Args:
            rounds: times that all who read got their next chunk.
            passes: in which these were read.
            tokens: of them.
            seconds: that the device took.
        """
        self._readings += 1
        self._passes_passes = _KEPT * self._passes_passes + passes * passes
        self._passes_tokens = _KEPT * self._passes_tokens + passes * tokens
        self._tokens_tokens = _KEPT * self._tokens_tokens + tokens * tokens
        self._passes_s = _KEPT * self._passes_s + passes * seconds
        self._tokens_s = _KEPT * self._tokens_s + tokens * seconds
        self._weight = _KEPT * self._weight + 1
        self._rounds = _KEPT * self._rounds + rounds

    def note_burst(self, *, seconds: float, finished: int, gap_s: float) -> None:
        """Takes a burst into account, how many sequences ended in it, and for how long the device had no work."""
        self._bursts = _KEPT * self._bursts + 1
        self._gaps_s = _KEPT * self._gaps_s + gap_s
        self._cycles_s = _KEPT * self._cycles_s + seconds
        self._finished = _KEPT * self._finished + finished

    def together(self) -> int:
        """How many rows are filled together, if there are others for them."""
        if self._serves:
            return max(1, int(self.rows * _SERVING_SHARE))
        fixed_s = self._fixed_s()
        if fixed_s is None or not self._finished or not self._cycles_s:
            return max(1, int(self.rows * _USUAL_SHARE))
        # Those that end in a second are as many as end in a cycle, over its seconds.
        best = math.sqrt(2 * self._finished / self._cycles_s * self.rows * fixed_s)
        return max(1, min(round(best), int(self.rows * _MOST_SHARE)))

    def until_finished(self, *, active: int, others_wait: bool) -> int:
        """Rows that are idle or finished when a burst ends.

        Args:
            active: those that decode.
            others_wait: for a row, or for those that decode.
        """
        return self.rows - active + min(active, self.together()) if others_wait else self.rows

    def _fixed_s(self) -> float | None:
        """Seconds that reading takes however few prompts there are; None if nobody knows."""
        if self._readings < _FEWEST_READINGS:
            return None
        both = self._passes_passes * self._tokens_tokens
        determinant = both - self._passes_tokens**2
        if determinant < _LEAST_DETERMINANT * both:
            return None
        pass_s = (self._passes_s * self._tokens_tokens - self._tokens_s * self._passes_tokens) / determinant
        return max(0.0, pass_s) * self._rounds / self._weight + self._gaps_s / max(1.0, self._bursts)
