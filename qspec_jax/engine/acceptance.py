"""What drafts yield, for any number of them, from what some number of them did.

A text that can be looked up is one for a while: once drafts were accepted, the next ones mostly are, also in the next
cycle. So the first draft of a cycle has two chances: one after a rejected draft, and one where all drafts of the cycle
before were accepted, which is nearly that of a draft behind others. The longer drafts are, the fewer cycles are of the
second kind. With one chance for both, longer drafts would seem better than they are, and once they run, shorter ones
worse.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

# By place in a cycle: how many drafts were tried as those before were accepted, and how many were accepted. In the
# first place only those count that follow a rejected one, as many as can be expected: nobody notes which they are.
Drafts = Sequence[tuple[float, float]]


def drafts_of(histogram: Sequence[int] | Sequence[float]) -> list[tuple[float, float]]:
    """Drafts by place, from cycles of one length counted by how many of their drafts were accepted.

    Args:
        histogram: cycles of which 0, 1, and so on were accepted; the last number is that of all drafts of a cycle.
    """
    *stopped, full = histogram
    if not stopped:
        return []
    left, found = sum(histogram), []
    for count in stopped:
        found.append((float(left), float(left - count)))
        left -= count
    (cycles, accepted), *behind = found
    tried, kept = (sum(some) for some in zip(*behind, strict=True)) if behind else (cycles, accepted)
    stays = kept / tried if tried else 0.0
    # Behind accepted drafts comes a token of the target, and then the first draft of the next cycle.
    found[0] = cycles - full * stays, max(0.0, accepted - full * stays**2)
    return found


def tokens_per_cycle(chances: np.ndarray) -> np.ndarray:
    """What cycles yield of no draft, one, and so on.

    Args:
        chances: ``[..., places]``, of a draft to be accepted: the first one after a rejected draft, each other behind
            accepted ones. The first draft behind some that were all accepted has the mean of theirs, but for the first.

    Returns:
        ``[..., places]``, by the number of drafts from 0 on.
    """
    full = np.concatenate([np.ones_like(chances[..., :1]), np.cumprod(chances[..., :-1], axis=-1)], axis=-1)
    after_rejected = np.cumsum(full, axis=-1)
    # Behind drafts that were all accepted comes a token of the target, like them or not, and then the next draft.
    # That of one place alone is known from few drafts: it would say that longer drafts yield less than shorter ones.
    count, behind = np.arange(chances.shape[-1]), np.cumsum(chances[..., 1:], axis=-1)
    stays = np.concatenate([chances[..., :1], behind / count[1:]], axis=-1)
    stays = np.minimum(stays, 1 - 1e-9)
    first = stays**2 + (1 - stays) * chances[..., :1]
    again = 1 + first * (1 - stays**count) / (1 - stays)
    full_again = np.where(count > 0, first * stays ** np.maximum(count - 1, 0), 0.0)
    share = np.where(count > 0, full / (1 - full_again + full), 0.0)  # of cycles behind one of all accepted
    return (1 - share) * after_rejected + share * again


@dataclasses.dataclass
class Acceptance:
    """How often drafts of one source are accepted, by their place: the newest cycles count most.

    Attributes:
        expected: by place, what texts before had; where there is none, less than the place before.
        tried, accepted: as :data:`Drafts`.
        cycles: seen in all.
        memory: cycles of sequences that count.
    """

    expected: Sequence[float] = ()
    tried: list[float] = dataclasses.field(default_factory=list)
    accepted: list[float] = dataclasses.field(default_factory=list)
    cycles: float = 0.0
    memory: float = 2000.0
    # What cycles yield by the number of drafts, by ``hope``, until more is seen: a choice asks for it some 20 times.
    _yields: dict[float, list[float]] = dataclasses.field(default_factory=dict, repr=False, compare=False)

    _WEIGHT, _WEIGHT_OF_ALL = 2.0, 32.0  # of what is expected, and of all places behind the first, in drafts
    _FEW = 8  # drafts, of which no share is known
    _MOST = 0.98  # texts that could be looked up for ever are none
    _UNKNOWN = 0.7  # what is expected of the first draft, if nothing is known
    _USUAL = 7  # drafts, up to which all numbers are computed at once

    def observe(self, histogram: Sequence[int] | Sequence[float]) -> None:
        """Takes cycles into account, counted by their accepted drafts; the last entry is that of all drafts."""
        new, drafts = sum(histogram), drafts_of(histogram)
        if not new or not drafts:
            return
        kept = max(0.0, 1 - new / self.memory)
        missing = [0.0] * (len(drafts) - len(self.tried))
        self.tried = [kept * count for count in self.tried] + missing
        self.accepted = [kept * count for count in self.accepted] + missing
        for place, (tried, accepted) in enumerate(drafts):
            self.tried[place] += tried
            self.accepted[place] += accepted
        self.cycles += float(new)
        self._yields.clear()

    def tokens_per_cycle(self, draft_length: int, *, hope: float = 0.0) -> float:
        """``E`` of cycles of so many drafts; with ``hope``, where drafts are accepted at least that often."""
        if len(self._yields.get(hope, ())) <= draft_length:
            chances = np.maximum(hope, self.profile(max(draft_length, self._USUAL) + 1))
            self._yields[hope] = tokens_per_cycle(chances).tolist()
        return self._yields[hope][draft_length]

    def profile(self, count: int) -> list[float]:
        """Chances of the first places, as :func:`tokens_per_cycle` takes them."""
        chances: list[float] = []
        behind = sum(self.accepted[1:]) / tried if (tried := sum(self.tried[1:])) > self._FEW else None
        for place in range(count):
            before = chances[-1] if chances else self._UNKNOWN
            chance, weight = self.expected[place] if place < len(self.expected) else before, self._WEIGHT
            if place and behind is not None:  # few drafts come to a place far behind, so all places tell
                chance, weight = behind, self._WEIGHT_OF_ALL
            if place < len(self.tried):
                chance = (self.accepted[place] + weight * chance) / (self.tried[place] + weight)
            chances.append(min(chance, self._MOST))
        return chances
