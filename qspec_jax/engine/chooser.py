"""Which plan the next burst runs: the one with the most tokens per second, by what was measured.

The rate of a plan is ``E / seconds``: tokens that a cycle yields a sequence, over the time of a cycle. ``E`` follows
from the chance of each draft to be accepted once those before it are (:class:`Acceptance`), which plans of one source
of drafts share whatever their length; seconds are those of :mod:`qspec_jax.decoding.costs`.

A plan that was never tried here may be faster, and a text may change. So a plan that could win is tried in a burst of
few cycles, where what it may save in the rest of the work, times the chance that it does, is more than the trial costs
(:mod:`qspec_jax.engine.trials`). What lookup would find is known without a trial (:mod:`qspec_jax.engine.replay`); how
long its cycles take is not. Plain decoding runs until another plan has been compiled, and wherever none is faster.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence

import numpy as np

from qspec_jax.decoding.costs import CostTable, Setting
from qspec_jax.decoding.plan import DecodingPlan
from qspec_jax.engine.acceptance import Acceptance, Drafts
from qspec_jax.engine.makespan import Makespan, tell
from qspec_jax.engine.trials import UNKNOWN_REST_S, Knowledge, PossibleTrial, choose_trial, cycles_to_tell

_BETTER = 1.02  # times faster than what runs, to take its place
_BETTER_THAN_PLAIN = 1.03  # where that drafts nothing: its time is known better than what drafts will yield
_BETTER_UNSEEN = 1.15  # where only texts before tell of lookup: those that have just begun have less to look up
_FIRST_PATIENCE, _LONGEST_PATIENCE = 64, 4096  # cycles before a source of drafts is tried again that was not worth it
_MEMORY_CYCLES, _MEMORY = 125, (500, 2000)  # that count of acceptance; at least and at most, of all sequences
_MAX_OVERHEAD_S = 0.02  # that a burst may take besides its cycles
_FASTER = 0.7  # that drafts could take of the time that was guessed
_FEW_REPLAYED = 16  # cycles of sequences, of which a source is known without a trial
_SHORT_CYCLES = 4  # of the second one
_COLD_CYCLES = 2  # of the first burst of a program, which says little of their time
_LEARNING_BURST_S = 0.03  # of plain decoding until its time is known, and bursts at least
_LEAST_OF_BURST = 1 / 2  # that its cycles take, for it to tell their time: one that ends after a cycle does not
_OF_OVERHEAD = 10  # times what a burst takes besides its cycles: also at least
_UNTIL_REPLAY = 64  # plain steps at most, where they may show that others would be faster
_UNTIL_REPLAY_OF_FAR = 256  # the same, where they have shown that nothing is nearly as fast
_NEAR = 0.9  # times as fast as what runs
_SHARE_OF_PAST, _SHARE_OF_REST = 1 / 4, 1 / 4  # of a burst: after that, more is known


@dataclasses.dataclass(frozen=True)
class Burst:
    """What to run next.

    Attributes:
        plan: whose cycles.
        seconds: about how long; None for as long as is usual.
        cycles: how many; None for those of ``seconds``.
        why: for people.
        cycle_s: about how long a cycle takes; None if nobody knows.
    """

    plan: DecodingPlan
    seconds: float | None
    cycles: int | None
    why: str
    cycle_s: float | None = None


class Chooser:
    """Chooses between plans from burst to burst.

    Attributes:
        acceptance: by source of drafts.
    """

    def __init__(
        self,
        plans: Sequence[DecodingPlan],
        costs: CostTable,
        *,
        rows: int,
        burst_s: float,
        is_ready: Callable[[DecodingPlan], bool],
        prepare: Callable[[DecodingPlan], None],
        name_of: Callable[[DecodingPlan], Hashable] = lambda plan: plan,
        replayed: Collection[str | None] = (),
    ):
        """Starts with plain decoding.

        Args:
            plans: the first of them is plain decoding.
            costs: what is known of them.
            rows: of the batch.
            burst_s: seconds of a burst when there is nothing to find out.
            is_ready: whether a plan has been compiled.
            prepare: asks for it to be; returns at once.
            name_of: the program of a plan; its first run in a process loads it.
            replayed: sources of drafts of which :meth:`note_replayed` tells what they would yield.
        """
        memory = float(np.clip(_MEMORY_CYCLES * rows, *_MEMORY))
        self.acceptance: dict[str | None, Acceptance] = {
            plan.draft_source: Acceptance(costs.acceptance.get(plan.source_and_target or "", ()), memory=memory)
            for plan in plans
        }
        self._plans, self._costs, self._rows, self._burst_s = plans, costs, rows, burst_s
        self._is_ready, self._prepare, self._name_of = is_ready, prepare, name_of
        self._current = plans[0]
        self._trial: PossibleTrial | None = None
        self._trials = costs.trials
        self._elapsed_s = 0.0  # of this batch
        self._overhead_s: float | None = None  # of a burst
        self._first_plain: tuple[int, float] | None = None  # cycles and seconds of the burst that loaded its program
        self._last_burst: dict[DecodingPlan, tuple[int, float, int]] = {}  # cycles, seconds, load
        self._cycle = 0  # of all plans
        # By source: when to hope again for more than was seen, and how long to wait after that.
        self._hope_at: dict[str | None, int] = dict.fromkeys(self.acceptance, _FIRST_PATIENCE)
        self._patience: dict[str | None, int] = dict.fromkeys(self.acceptance, _FIRST_PATIENCE)
        self._replayed = replayed
        self._entered = 0
        self._makespans: Mapping[str | None, Makespan] = {}

    def note_entered(self, count: int) -> None:
        """Sequences have entered: their texts may be of another kind."""
        self._entered += count
        if self._entered >= self._rows:
            self._entered = 0
            self._patience = dict.fromkeys(self._patience, _FIRST_PATIENCE)
            self._hope_at = {source: min(at, self._cycle + _FIRST_PATIENCE) for source, at in self._hope_at.items()}

    def alone(self, *, context: int, active: int) -> float:
        """The time of a plain step for one row over that for so many, as far as it is known."""
        plain, all_rows, one = self._plans[0], *(Setting(self._rows, rows, context) for rows in (active, 1))
        known, known_of_one = (self._costs.known(plain, setting) for setting in (all_rows, one))
        if known is not None and known_of_one is not None:
            return min(1.0, known_of_one / known)
        # Between that of what it reads, and that of all else that it may be limited by.
        return (1.0 + self._costs.ratio(plain, one, all_rows)) / 2

    @property
    def kinds(self) -> Mapping[str | None, Sequence[Drafts]]:
        """By source, drafts of the last sequences that have ended."""
        return {plan.draft_source: self._costs.kinds.get(plan.source_and_target or "", ()) for plan in self._plans}

    def note_finished(self, drafts: Mapping[str, Drafts]) -> None:
        """A sequence has ended, of whose drafts so many were tried and accepted, by source and place."""
        for source, name in {plan.draft_source: plan.source_and_target for plan in self._plans}.items():
            if name is not None and tell(some := drafts.get(source or "", ())):
                self._costs.note_kinds(name, [some])

    def note_replayed(self, plan: DecodingPlan, histogram: Sequence[int] | Sequence[float]) -> None:
        """What cycles of a plan would have yielded of tokens that came without it, as in :meth:`observe`."""
        self._note_accepted(plan, histogram)

    def profiles(self) -> dict[str | None, list[float]]:
        """By source, what :func:`qspec_jax.engine.acceptance.tokens_per_cycle` takes, for its longest plan."""
        longest: dict[str | None, int] = {}
        for plan in self._plans:
            longest[plan.draft_source] = max(longest.get(plan.draft_source, 0), plan.draft_length)
        return {source: self.acceptance[source].profile(length + 1) for source, length in longest.items()}

    def choose(self, *, context: int, active: int, makespans: Mapping[str | None, Makespan] | None = None) -> Burst:
        """What to run next.

        Args:
            context: tokens in each row that is not idle, about.
            active: rows that are not idle.
            makespans: by source of drafts, when the last sequence ends; None, or no source, where more may come.
        """
        self._makespans, self._trial = makespans or {}, None
        plain, setting = self._plans[0], Setting(self._rows, active, context)
        seconds = self._known(setting)
        if not self._costs.is_sound(plain, setting):  # everything else is compared with it
            # One that loads the program, and a short one, which tells with a longer one what a burst takes besides.
            cycles = _SHORT_CYCLES if plain not in self._last_burst else None
            cycles = cycles if self._has_run(plain) else _COLD_CYCLES
            return Burst(plain, _LEARNING_BURST_S, cycles, "the time of a plain step is not known yet")
        rates = {
            plan: self._rate(plan, self._tokens(plan) / one, seconds)
            for plan, one in seconds.items()
            if plan == plain or (self._is_ready(plan) and self._has_been_seen(plan))
        }
        running = rates.get(self._current, 0.0)
        better = [plan for plan, rate in rates.items() if rate > running * self._margin(plan)]
        self._current = max(better, key=rates.__getitem__, default=self._current)
        ends = next(iter(self._makespans.values()), None)
        rest_s = UNKNOWN_REST_S if ends is None else ends.plain * seconds[plain]
        trials = self._possible_trials(seconds, rates[self._current], setting, rest_s)
        wanted = max(trials, key=lambda one: one.worth_s, default=None)
        if wanted is not None and not self._is_ready(wanted.plan):
            self._prepare(wanted.plan)
        ready = [one for one in trials if self._is_ready(one.plan)]
        if (trial := choose_trial(ready, self._trials, rest_s)) is not None:
            self._trial = trial
            return Burst(trial.plan, None, trial.cycles, "a trial")
        if wanted is None and self._is_all_far(rates):
            burst_s = min(self._burst_s, _UNTIL_REPLAY_OF_FAR * seconds[plain])
        else:
            burst_s = self._until_more_is_known(seconds[plain], None if ends is None else rest_s)
        return Burst(self._current, burst_s, None, self._reason(rates, seconds), seconds.get(self._current))

    def _margin(self, plan: DecodingPlan) -> float:
        """How many times faster than what runs a plan has to be to take its place."""
        if plan.draft_source in self._replayed and not self.acceptance[plan.draft_source].cycles:
            return _BETTER_UNSEEN
        return _BETTER_THAN_PLAIN if self._current == self._plans[0] else _BETTER

    def _is_all_far(self, rates: Mapping[DecodingPlan, float]) -> bool:
        """Whether plain decoding runs, and what was measured is not nearly as fast, by what these texts show."""
        plain = self._plans[0]
        others = [rate for plan, rate in rates.items() if plan != plain]
        is_seen = all(self.acceptance[source].cycles >= _FEW_REPLAYED for source in self._replayed)
        return self._current == plain and is_seen and bool(others) and max(others) < _NEAR * rates[plain]

    def _until_more_is_known(self, plain_s: float, rest_s: float | None) -> float:
        """Seconds of the next burst: a part of what is past, and of the rest, if that is known.

        Args:
            plain_s: of a plain step.
            rest_s: until the batch ends; None if nobody knows.
        """
        least_s = max(_LEARNING_BURST_S, _OF_OVERHEAD * (self._overhead_s or 0.0))
        burst_s = max(least_s, _SHARE_OF_PAST * self._elapsed_s)
        if rest_s is not None:
            burst_s = min(burst_s, max(least_s, _SHARE_OF_REST * rest_s))
        burst_s = min(burst_s, self._burst_s)
        # After each burst of another source's plan, replay tells what drafts would have yielded.
        if self._replayed and self._current.draft_source not in self._replayed:
            burst_s = min(burst_s, _UNTIL_REPLAY * plain_s)
        return burst_s

    def observe(
        self, plan: DecodingPlan, *, cycles: int, seconds: float, histogram: Sequence[int], context: int
    ) -> None:
        """Takes a burst into account.

        Args:
            plan: that ran.
            cycles: of the device.
            seconds: of all of them.
            histogram: cycles of sequences by their accepted drafts, 0 to ``draft_length`` of them.
            context: tokens in each row that is not idle, about.
        """
        self._cycle += cycles
        self._note_accepted(plan, histogram)
        if not cycles:
            return
        setting = Setting(self._rows, max(1, round(sum(histogram) / cycles)), context)
        self._trials.elapsed_s += seconds
        self._elapsed_s += seconds
        if not self._has_run(plan):
            self._learn_load(plan, cycles, seconds, setting, tokens=_tokens_of(histogram) / setting.active)
            return
        is_short = plan.draft is None and plan not in self._last_burst and seconds < _LEARNING_BURST_S
        self._learn_overhead(plan, cycles, seconds, setting)
        if is_short and not self._costs.is_sound(plan, setting):
            return  # most of what it takes may be something else
        running_s = max(seconds - (self._overhead_s or 0.0), _LEAST_OF_BURST * seconds)
        # But of plain decoding something has to be known, whatever else a burst takes.
        is_needed = plan.draft is None and not self._costs.is_sound(plan, setting)
        if is_needed or running_s > _LEAST_OF_BURST * seconds:
            self._costs.note(plan, running_s / cycles, setting, weight=seconds)
        known, tokens = self._known(setting), _tokens_of(histogram) / setting.active
        if plan in known and plan.draft is None and self._first_plain is not None:
            (first, first_s), self._first_plain = self._first_plain, None
            self._trials.note_load(max(0.0, first_s - first * known[plan]))
        if self._trial is not None and self._trial.plan == plan:
            self._account(self._trial, tokens, running_s, known)
        elif plan.draft is not None and self._plans[0] in known:
            self._trials.gained_s = max(0.0, self._trials.gained_s + tokens * known[self._plans[0]] - running_s)

    def _note_accepted(self, plan: DecodingPlan, histogram: Sequence[int] | Sequence[float]) -> None:
        acceptance = self.acceptance[plan.draft_source]
        acceptance.observe(histogram[: plan.draft_length + 1])
        if plan.source_and_target is not None:
            self._costs.acceptance[plan.source_and_target] = acceptance.profile(len(acceptance.tried))

    def _has_run(self, plan: DecodingPlan) -> bool:
        return self._name_of(plan) in self._trials.loaded

    def _learn_load(self, plan: DecodingPlan, cycles: int, seconds: float, setting: Setting, *, tokens: float) -> None:
        """Learns what the first run of a program takes besides its cycles, whose time it does not tell."""
        self._trials.loaded.add(self._name_of(plan))
        known = self._known(setting)
        if self._plans[0] not in known:
            self._first_plain = cycles, seconds
            return
        running_s = min(seconds, cycles * self._guess(plan, known, setting))
        self._trials.note_load(seconds - running_s)
        if self._trial is not None and self._trial.plan == plan:
            self._trials.lost_s += seconds - running_s
            self._account(self._trial, tokens, running_s, known)

    def _learn_overhead(self, plan: DecodingPlan, cycles: int, seconds: float, setting: Setting) -> None:
        """Learns what a burst takes besides its cycles, from a short one and a long one of the same plan.

        Where cycles take a millisecond, it would else be most of what a trial measures.
        """
        last = self._last_burst.get(plan)
        self._last_burst[plan] = cycles, seconds, setting.load
        if last is None or abs(last[2] - setting.load) > setting.load / 4:
            return
        (few, short_s), (many, long_s) = sorted([last[:2], (cycles, seconds)])
        if many >= 3 * few:
            found = min(max((many * short_s - few * long_s) / (many - few), 0.0), _MAX_OVERHEAD_S)
            self._overhead_s = found if self._overhead_s is None else 0.5 * self._overhead_s + 0.5 * found

    def _account(
        self, trial: PossibleTrial, tokens: float, seconds: float, known: Mapping[DecodingPlan, float]
    ) -> None:
        """Counts what a trial lost that yielded a sequence so many tokens; says when to hope for its source again."""
        if self._current not in known:
            return
        others_s = tokens * known[self._current] / self._tokens(self._current)
        self._trials.lost_s += max(0.0, seconds - others_s)
        if trial.knowledge in (Knowledge.NOTHING, Knowledge.HOPE):
            source = trial.plan.draft_source
            self._hope_at[source] = self._cycle + self._patience[source]
            longer = min(_LONGEST_PATIENCE, 4 * self._patience[source])
            self._patience[source] = _FIRST_PATIENCE if others_s > seconds else longer

    def _possible_trials(
        self, seconds: dict[DecodingPlan, float], rate: float, setting: Setting, rest_s: float
    ) -> list[PossibleTrial]:
        """Of plans that could be the fastest of those that were not measured, or not for long."""
        found, running = [], self._tokens(self._current) / seconds[self._current]
        for plan in self._plans:
            hopes, is_exact = self._hopes(plan), self._costs.is_exact(plan, setting)
            if plan == self._current or (is_exact and not hopes and self._is_ready(plan)):
                continue
            if plan.draft_source in self._replayed and self.acceptance[plan.draft_source].cycles < _FEW_REPLAYED:
                continue  # more will be known without a trial
            knowledge = self._knowledge(plan, seconds, hopes=hopes)
            acceptance = self.acceptance[plan.draft_source]
            tokens = acceptance.tokens_per_cycle(plan.draft_length, hope=knowledge.accepted)
            hoped_s = self._guess(plan, seconds, setting)
            if plan not in seconds and self._has_run(plan):  # it costs little to know better
                plain_s = seconds[self._plans[0]]
                hoped_s = plain_s + _FASTER * (hoped_s - plain_s)
            hoped = self._rate(plan, tokens / hoped_s, seconds)
            tried = self._tried_for(plan, seconds, knowledge)
            one_s, is_loaded = self._guess(tried, seconds, setting), self._has_run(tried)
            least = 1 + math.ceil((self._overhead_s or 0.0) / one_s)  # cycles, to take longer than what is besides
            enough = max(cycles_to_tell(setting.active, one_s), least)
            # Of a source that nobody has seen nothing may be accepted.
            yields = 1.0 if knowledge is Knowledge.NOTHING else self._tokens(tried)
            # A second trial follows where the first one is promising.
            tried_for = enough if is_loaded else _COLD_CYCLES + enough / 2
            lost_s = tried_for * max(0.0, one_s - yields / running)
            price_s = lost_s + (0.0 if is_loaded else self._trials.load_s)
            cycles = enough if is_loaded else _COLD_CYCLES
            found.append(PossibleTrial(tried, cycles, knowledge, rest_s * (1 - rate / hoped), price_s))
        return [one for one in found if one.is_promising(rest_s)]

    def _knowledge(self, plan: DecodingPlan, seconds: Mapping[DecodingPlan, float], *, hopes: bool) -> Knowledge:
        if not self._has_been_seen(plan):
            return Knowledge.NOTHING
        if hopes:
            return Knowledge.HOPE
        if plan in seconds:
            return Knowledge.OTHER_LOAD
        alike = any(one.draft_source == plan.draft_source for one in seconds)
        return Knowledge.LENGTH if alike else Knowledge.DRAFTS

    def _tried_for(
        self, plan: DecodingPlan, seconds: Mapping[DecodingPlan, float], knowledge: Knowledge
    ) -> DecodingPlan:
        """What tells of a plan: itself, or the shortest of its source, to learn a time or to hope again."""
        alike = [one for one in self._plans if one.draft_source == plan.draft_source and self._is_ready(one)]
        if knowledge is Knowledge.HOPE:
            alike = [one for one in alike if one in seconds]
        elif knowledge is not Knowledge.DRAFTS:
            return plan
        return min(alike, key=lambda one: one.draft_length, default=plan)

    def _hopes(self, plan: DecodingPlan) -> bool:
        """Whether more than was seen may be accepted of its source: it is unknown, or was not tried for long."""
        if not self._has_been_seen(plan):
            return True
        # The source of the drafts that run is seen all the time, as is one that texts tell: nothing to hope for.
        is_seen = plan.draft_source in {self._current.draft_source, *self._replayed}
        return not is_seen and self._cycle >= self._hope_at[plan.draft_source]

    def _has_been_seen(self, plan: DecodingPlan) -> bool:
        acceptance = self.acceptance[plan.draft_source]
        return bool(acceptance.cycles or acceptance.expected)

    def _known(self, setting: Setting) -> dict[DecodingPlan, float]:
        found = {plan: self._costs.known(plan, setting) for plan in self._plans}
        return {plan: one for plan, one in found.items() if one is not None}

    def _guess(self, plan: DecodingPlan, seconds: dict[DecodingPlan, float], setting: Setting) -> float:
        if plan in seconds:
            return seconds[plan]
        return self._costs.guess(plan, seconds, setting)

    def _tokens(self, plan: DecodingPlan) -> float:
        return self.acceptance[plan.draft_source].tokens_per_cycle(plan.draft_length)

    def _rate(self, plan: DecodingPlan, tokens_per_s: float, seconds: dict[DecodingPlan, float]) -> float:
        """What a plan is worth that yields a sequence so many tokens per second."""
        ends = self._makespans.get(plan.draft_source)
        if ends is None:
            return tokens_per_s
        return ends.tokens_per_s(plan.draft_length, drafting=tokens_per_s, plain=1 / seconds[self._plans[0]])

    def _reason(self, rates: dict[DecodingPlan, float], seconds: dict[DecodingPlan, float]) -> str:
        """Why the plan that runs was chosen."""
        plan, plain = self._current, self._plans[0]
        if plan == plain:
            others = {other: rate for other, rate in rates.items() if other != plain}
            if not others:
                return "nothing else has been measured"
            best = max(others, key=others.__getitem__)
            return f"{best.label} would be {others[best] * seconds[plain]:.2f} times plain decoding"
        ratio = rates.get(plan, 0.0) * seconds[plain]
        tokens = self._tokens(plan)
        return f"{ratio:.2f} times plain decoding: {tokens:.2f} tokens in {1e3 * seconds[plan]:.2f} ms"


def _tokens_of(histogram: Sequence[int]) -> int:
    """Tokens of cycles, counted by how many drafts were accepted in each."""
    return sum((accepted + 1) * count for accepted, count in enumerate(histogram))
