"""When the last of some sequences ends: what counts where no more come than are known.

Drafts serve one text better than another. Those that they serve badly end last, rows that have nobody left are idle,
and what drafts gained by the cycle is lost again. So plans are compared by when all is done (the *makespan* of a list
schedule: whoever waits takes the row that is free first).

Time is counted in tokens that a text of the mean would have yielded by then. An example of two rows, and a source that
serves a twice as well as the mean and b half as well; c waits, and is like a::

    row 0   aaaa cccc          until: when c begins, 4
    row 1   bbbbbbbbbbbbbbbb   tail: from then on, 12, in which b yields the 6 tokens that it has left then

Plain decoding needs 6 steps for these, so where a token of drafts is not worth two steps, drafts end with ``until``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from qspec_jax.engine.acceptance import Drafts, tokens_per_cycle

_MEAN_DRAFTS = 8  # of a place that are accepted of a sequence as of others, until more is known of it
_FEWEST_KINDS = 4  # of texts that tell how much they differ
_AT_ONCE = 1 / 4  # of the rows that those who wait take together, which is quicker to foresee than one by one


class Makespan(NamedTuple):
    """How long sequences take, for each number of drafts of a cycle from 0 on. All are numbers of tokens.

    Attributes:
        plain: with plain decoding.
        until: with drafts, until the last one begins.
        tail: with drafts, from then on until the last one ends.
        left: the same if those that are left then decode without drafts.
    """

    plain: float
    until: np.ndarray
    tail: np.ndarray
    left: np.ndarray

    def tokens_per_s(self, draft_length: int, *, drafting: float, plain: float) -> float:
        """What a plan of so many drafts is worth: tokens per second that a plain step would have to yield for as much.

        Args:
            draft_length: of the plan.
            drafting: tokens per second of a sequence of the mean.
            plain: the same of plain decoding, to which the last ones may change where any others begin before.
        """
        until, tail, left = (some[draft_length] for some in (self.until, self.tail, self.left))
        seconds = until / drafting + (min(tail / drafting, left / plain) if until else tail / drafting)
        return float(self.plain / seconds)


class Served(NamedTuple):
    """How a source of drafts serves texts.

    Attributes:
        drafts: of each sequence that decodes.
        kinds: of others. Those of which little is known, or nothing, are taken for one or another; where they are
            fewer than the others, each for the mean of some.
        profile: the chances of their mean, as :func:`qspec_jax.engine.acceptance.tokens_per_cycle` takes them.
    """

    drafts: Sequence[Drafts]
    kinds: Sequence[Drafts]
    profile: Sequence[float]


def makespans(
    left: Sequence[int], waiting: Sequence[int], sources: Sequence[Served], *, rows: int, alone: float = 1.0
) -> list[Makespan]:
    """Foresees when sequences end, with each source of drafts.

    Args:
        left: tokens that each of those that decode has to yield; at least one sequence.
        waiting: tokens that each of those yields that take the rows, in order, as these become free.
        sources: of drafts.
        rows: of the batch.
        alone: the time of a step for one row over that for those that decode.
    """
    now, later = np.maximum(np.asarray(left, float), 1.0), np.asarray(waiting, float)
    # Cases: plain decoding, and each number of drafts of each source.
    slower = [np.ones((1, len(now) + len(later))), *(_slower(one, len(later)) for one in sources)]
    of_now, of_later = np.split(np.concatenate(slower), [len(now)], axis=1)
    rows = rows if waiting else len(left)
    until, ends, their = _schedule(now * of_now, of_now, later * of_later, of_later, rows=rows)
    rest = np.maximum(ends - until[:, None], 0.0)
    tail, same_tail = _with_fewer(rest, alone), _with_fewer(rest / np.where(their > 0, their, 1.0), alone)
    found, place = [], 1
    for one in sources:
        cases = slice(place, place + len(one.profile))
        found.append(Makespan(float(until[0] + tail[0]), until[cases], tail[cases], same_tail[cases]))
        place = cases.stop
    return found


def _slower(one: Served, num_waiting: int) -> np.ndarray:
    """By number of drafts, how much longer each sequence takes than if it were served as the mean is."""
    like = [*one.kinds, *filter(tell, one.drafts)]
    like = like if len(like) >= _FEWEST_KINDS else [()]
    profile = np.asarray(one.profile)
    counts = np.zeros((len(one.drafts) + len(like), len(profile), 2))
    for place, drafts in enumerate((*one.drafts, *like)):
        counts[place, : len(drafts)] = np.asarray(drafts[: len(profile)]).reshape(-1, 2)
    chances = (counts[:, :, 1] + _MEAN_DRAFTS * profile) / (counts[:, :, 0] + _MEAN_DRAFTS)
    slower = (tokens_per_cycle(profile) / tokens_per_cycle(chances)).T
    own, others = np.split(slower, [len(one.drafts)], axis=1)
    unknown = [place for place, drafts in enumerate(one.drafts) if not tell(drafts)]
    count = len(unknown) + num_waiting
    # For whom each of the others stands: all of them count, also where few are unknown.
    stands_for = np.arange(len(like))[:, None] % max(1, count) == np.arange(count) % len(like)
    taken = others @ (stands_for / stands_for.sum(axis=0))
    own[:, unknown] = taken[:, : len(unknown)]
    return np.concatenate([own, taken[:, len(unknown) :]], axis=1)


def _with_fewer(ends: np.ndarray, alone: float) -> np.ndarray:
    """The time until all rows have ended, where a step with fewer rows takes less, down to a share of it with one."""
    return alone * ends.max(axis=1) + (1 - alone) * ends.mean(axis=1)


def tell(drafts: Drafts) -> bool:
    """Whether enough were tried to tell how well a source serves a text."""
    return sum(tried for tried, _ in drafts) >= _MEAN_DRAFTS


def _schedule(
    now: np.ndarray, of_now: np.ndarray, later: np.ndarray, of_later: np.ndarray, *, rows: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Gives the rows that are free first to those that wait. The first axis is that of the cases.

    Args:
        now, later: how long each takes of those that have a row, and of those that wait.
        of_now, of_later: a number of each.
        rows: of the batch.

    Returns:
        when the last one begins, when each row has nobody left, and the number of who has it then.
    """
    cases = len(now)
    ends, their = np.zeros((cases, rows)), np.zeros((cases, rows))
    ends[:, : now.shape[1]], their[:, : now.shape[1]] = now, of_now
    until, at_once = np.zeros(cases), max(1, int(rows * _AT_ONCE))
    for place in range(0, later.shape[1], at_once):
        some = slice(place, place + at_once)
        first = np.argsort(ends, axis=1)[:, : later[:, some].shape[1]]
        begins = np.take_along_axis(ends, first, axis=1)
        until = np.maximum(until, begins[:, -1])
        np.put_along_axis(ends, first, begins + later[:, some], axis=1)
        np.put_along_axis(their, first, np.broadcast_to(of_later[:, some], begins.shape), axis=1)
    return until, ends, their
