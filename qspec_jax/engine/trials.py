"""Which plan to try, if any: what a trial may save in the rest of the work, against what it costs.

A trial is worth ``chance * saved - price``: what it saves if what is hoped of the plan is so, and what it takes beyond
the plan that runs, its program included where that was not loaded yet. The longer the work that is left, the more is
worth a trial; at its end nothing is. Whatever it is worth, trials together may lose a share of all time, and some of
what they have gained.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from typing import NamedTuple

from qspec_jax.decoding.costs import Trials
from qspec_jax.decoding.plan import DecodingPlan

UNKNOWN_REST_S = 5.0  # of work that is left, where nobody knows its end
_MAX_LOSS = 0.0175  # of all time, what is left included
_MOST_FOR_HOPE = 0.01  # of the time so far, where a source was tried before
_OF_GAINS = 0.1  # of what other plans have gained, that may be lost again
_OF_SAVED = 0.05  # of what is to be saved, where it is known what drafts yield
_LEAST_SAVED = 0.02  # of the rest
_FEW_DRAFTS = 48  # sequences times cycles, with which acceptance is known to some degree
_TRIAL_CYCLES, _TRIAL_S = range(2, 65), 0.01  # of a trial: at least so many, and at most; and about so long


class Knowledge(enum.Enum):
    """What is known of a plan that was not measured here.

    Attributes:
        chance: that it saves what is hoped.
        accepted: how often drafts are accepted at least, in what is hoped.
    """

    NOTHING = 0.4, 0.92
    HOPE = 0.03, 0.92  # that more is accepted than was
    DRAFTS = 0.6, 0.0  # what they yield, and not how long a cycle takes
    LENGTH = 0.3, 0.0  # the same, and how long other lengths take
    OTHER_LOAD = 0.3, 0.0  # all, and its time from another load

    def __init__(self, chance: float, accepted: float):
        self.chance, self.accepted = chance, accepted


class PossibleTrial(NamedTuple):
    """A trial.

    Attributes:
        plan: that runs.
        cycles: of its burst.
        knowledge: of the plan for whose sake it runs.
        saved_s: in the rest of the work, if what is hoped is so.
        price_s: what it loses, if not.
    """

    plan: DecodingPlan
    cycles: int
    knowledge: Knowledge
    saved_s: float
    price_s: float

    @property
    def worth_s(self) -> float:
        """What it can be expected to save."""
        return self.knowledge.chance * self.saved_s - self.price_s

    def is_promising(self, rest_s: float) -> bool:
        """Whether it can be expected to save anything of so much work."""
        return self.worth_s > 0 and self.saved_s > _LEAST_SAVED * rest_s


def choose_trial(possible: Sequence[PossibleTrial], spent: Trials, rest_s: float) -> PossibleTrial | None:
    """The trial that is worth the most of those that may be lost, if there is one.

    Args:
        possible: all of them.
        spent: so far.
        rest_s: of the work that is left.
    """
    may_lose = [one for one in possible if one.price_s <= _may_lose_s(one, spent, rest_s)]
    return max(may_lose, key=lambda one: one.worth_s, default=None)


def _may_lose_s(one: PossibleTrial, spent: Trials, rest_s: float) -> float:
    if one.knowledge is Knowledge.HOPE:
        return _MOST_FOR_HOPE * spent.elapsed_s - spent.lost_s
    left_s = _MAX_LOSS * (spent.elapsed_s + rest_s) + _OF_GAINS * spent.gained_s - spent.lost_s
    return max(left_s, _OF_SAVED * one.saved_s) if one.knowledge is Knowledge.DRAFTS else left_s


def cycles_to_tell(active: int, cycle_s: float) -> int:
    """Cycles that tell the acceptance of so many rows, and their time, which is about this long."""
    enough = max(_TRIAL_CYCLES[0], -(-_FEW_DRAFTS // max(1, active)), round(_TRIAL_S / cycle_s))
    return min(enough, _TRIAL_CYCLES[-1])
