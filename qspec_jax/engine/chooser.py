"""Which plan the next burst runs: the one with the most tokens per second, by what was measured.

The rate of a plan is ``E / seconds``: tokens that a cycle yields a sequence, over the time of a cycle. ``E`` follows
from the chance of each draft to be accepted once those before it are (:class:`Acceptance`), which plans of one source
of drafts share whatever their length; seconds are those of :mod:`qspec_jax.decoding.costs`.

A plan that was never tried here may be faster, and a text may change. So a plan that could win is tried now and then,
in a burst of few cycles: of a source of drafts that nobody knows, or hopes for again, its cheapest. What trials lose
against the best plan is counted for as long as the process lives, and they may lose :data:`_MAX_LOSS` of the time: one
that turns out to be slow is paid for by a long time without any. Plain decoding runs until another plan has been
compiled, and wherever none is faster.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence

from qspec_jax.decoding.costs import CostTable, Setting
from qspec_jax.decoding.plan import DecodingPlan
from qspec_jax.engine.acceptance import Acceptance, Drafts
from qspec_jax.engine.makespan import Makespan, tell

_MAX_LOSS = 0.01  # of the time, spent on trials
_BETTER = 1.02  # times faster than what runs, to take its place
_PROMISING = 1.02  # times faster than what runs, to be worth a trial
_UNCERTAIN = 0.97  # the same, where the time is known from another load
_FIRST_LOSS_S = 0.1  # that trials may lose at the beginning, where some source of drafts was never seen
_TRIAL_DRAFTS = 48  # sequences times cycles of a trial, about
_TRIAL_CYCLES, _TRIAL_S = range(2, 65), 0.05  # of a trial: at least so many, and at most; and about so long
_FIRST_PATIENCE, _LONGEST_PATIENCE = 64, 4096  # cycles before a source of drafts is tried again that was not worth it
_MAX_OVERHEAD_S = 0.02  # that a burst may take besides its cycles
_HOPE = 0.97  # acceptance of drafts that were never seen
_LEARNING_BURST_S, _LEARNING_S = 0.25, 5.0  # bursts while there are plans to try, at the beginning


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
    ):
        """Starts with plain decoding.

        Args:
            plans: the first of them is plain decoding.
            costs: what is known of them.
            rows: of the batch.
            burst_s: seconds of a burst when there is nothing to find out.
            is_ready: whether a plan has been compiled.
            prepare: asks for it to be; returns at once.
        """
        self.acceptance: dict[str | None, Acceptance] = {
            plan.draft_source: Acceptance(costs.acceptance.get(plan.source_and_target or "", ())) for plan in plans
        }
        self._plans, self._costs, self._rows, self._burst_s = plans, costs, rows, burst_s
        self._is_ready, self._prepare = is_ready, prepare
        self._current = plans[0]
        self._warm: set[DecodingPlan] = set()  # those that have run once, as the first run loads a program
        self._trial: DecodingPlan | None = None
        self._trials = costs.trials
        if any(plan.source_and_target not in costs.acceptance for plan in plans if plan.draft is not None):
            self._trials.allowed_s = _FIRST_LOSS_S
        self._overhead_s = 0.0  # of a burst
        self._last_burst: dict[DecodingPlan, tuple[int, float, int]] = {}  # cycles, seconds, load
        self._cycle = 0  # of all plans
        # By source: when to hope again for more than was seen, and how long to wait after that.
        self._hope_at: dict[str | None, int] = dict.fromkeys(self.acceptance, _FIRST_PATIENCE)
        self._patience: dict[str | None, int] = dict.fromkeys(self.acceptance, _FIRST_PATIENCE)
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
        self._makespans = makespans or {}
        plain, setting = self._plans[0], Setting(self._rows, active, context)
        seconds = self._known(setting)
        if not self._costs.is_sound(plain, setting):  # everything else is compared with it
            is_cold = plain not in self._warm
            cycles = self._trial_cycles(active, None) if is_cold else None
            return Burst(plain, _LEARNING_BURST_S, cycles, "the time of a plain step is not known yet")
        rates = {
            plan: self._rate(plan, self._tokens(plan) / one, seconds)
            for plan, one in seconds.items()
            if plan == plain or (self._is_ready(plan) and self._has_been_seen(plan))
        }
        best = max(rates, key=rates.__getitem__)
        if rates[best] > rates.get(self._current, 0.0) * _BETTER:
            self._current = best
        promising = self._promising(seconds, rates[self._current], setting)
        wanted = max(promising, key=promising.__getitem__, default=None)
        if wanted is not None and not self._is_ready(wanted):
            self._prepare(wanted)
        if (trial := self._next_trial(promising, rates[self._current], seconds, setting)) is not None:
            return trial
        self._trial = None
        is_learning = wanted is not None and self._trials.elapsed_s < _LEARNING_S
        burst_s = min(_LEARNING_BURST_S, self._burst_s) if is_learning else self._burst_s
        return Burst(self._current, burst_s, None, self._reason(rates, seconds), seconds.get(self._current))

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
        acceptance = self.acceptance[plan.draft_source]
        acceptance.observe(histogram[: plan.draft_length + 1])
        if plan.source_and_target is not None:
            self._costs.acceptance[plan.source_and_target] = acceptance.profile(len(acceptance.tried))
        if not cycles:
            return
        setting = Setting(self._rows, max(1, round(sum(histogram) / cycles)), context)
        first = plan not in self._warm
        self._warm.add(plan)
        self._trials.elapsed_s += seconds
        running_s = max(seconds - self._overhead_s, 0.5 * seconds)
        if not first:
            self._learn_overhead(plan, cycles, seconds, setting)
            self._costs.note(plan, running_s / cycles, setting, weight=seconds)
        elif self._plans[0] in (known := self._known(setting)):  # its first run loads a program, which is paid once
            running_s = min(running_s, cycles * self._guess(plan, known, setting))
        if plan == self._trial:
            self._account(plan, cycles, running_s, setting)

    def _trial_cycles(self, active: int, cycle_s: float | None) -> int:
        """Cycles that tell the acceptance of so many rows, and the time of a cycle, if it is about this long."""
        enough = [_TRIAL_CYCLES[0], -(-_TRIAL_DRAFTS // max(1, active))]
        if cycle_s is not None:
            enough.append(round(_TRIAL_S / cycle_s))
        return min(max(enough), _TRIAL_CYCLES[-1])

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
            found = (many * short_s - few * long_s) / (many - few)
            self._overhead_s = 0.5 * self._overhead_s + 0.5 * min(max(found, 0.0), _MAX_OVERHEAD_S)

    def _account(self, plan: DecodingPlan, cycles: int, seconds: float, setting: Setting) -> None:
        """Counts what a trial lost, and says when its source may be hoped for again."""
        known = self._known(setting)
        if self._current in known:
            rate = self._tokens(self._current) / known[self._current]
            self._trials.lost_s += max(0.0, seconds - self._tokens(plan) * cycles / rate)
            source, worth = plan.draft_source, self._tokens(plan) * cycles / seconds > rate
            self._hope_at[source] = self._cycle + self._patience[source]
            self._patience[source] = _FIRST_PATIENCE if worth else min(_LONGEST_PATIENCE, 4 * self._patience[source])

    def _promising(
        self, seconds: dict[DecodingPlan, float], rate: float, setting: Setting
    ) -> dict[DecodingPlan, float]:
        """The plans that could be the fastest of those that were not measured, or not for long, by their hoped rate."""
        hoped = {}
        for plan in self._plans:
            if plan == self._current:
                continue
            hopes, is_exact = self._hopes(plan), self._costs.is_exact(plan, setting)
            if is_exact and not hopes and self._is_ready(plan):
                continue
            acceptance = self.acceptance[plan.draft_source]
            tokens = acceptance.tokens_per_cycle(plan.draft_length, hope=_HOPE if hopes else 0.0)
            one = self._rate(plan, tokens / self._guess(plan, seconds, setting), seconds)
            if one > rate * (_UNCERTAIN if plan in seconds and not is_exact else _PROMISING):
                hoped[plan] = one
        return hoped

    def _next_trial(
        self, promising: Mapping[DecodingPlan, float], rate: float, seconds: dict[DecodingPlan, float], setting: Setting
    ) -> Burst | None:
        """A burst of the plan to try, if there is one and trials may lose what it could."""
        ready = [plan for plan in promising if self._is_ready(plan)]
        if not ready:
            return None
        plan = max(ready, key=promising.__getitem__)
        if self._hopes(plan):  # its first draft tells most of what there is to know
            alike = [one for one in ready if one.draft_source == plan.draft_source]
            plan = min(alike, key=lambda one: self._guess(one, seconds, setting))
        one_s = self._guess(plan, seconds, setting)
        cycles = self._trial_cycles(setting.active, one_s) if plan in self._warm else _TRIAL_CYCLES[0]
        could_lose_s = max(0.0, cycles * (one_s - self._tokens(plan) / rate))
        allowed_s = self._trials.allowed_s + _MAX_LOSS * self._trials.elapsed_s
        if self._has_been_seen(plan) and self._trials.lost_s + could_lose_s > allowed_s:
            return None
        self._trial = plan
        return Burst(plan, None, cycles, "a trial")

    def _hopes(self, plan: DecodingPlan) -> bool:
        """Whether more than was seen may be accepted of its source: it is unknown, or was not tried for long."""
        if not self._has_been_seen(plan):
            return True
        # The source of the drafts that run is seen all the time: nothing to hope for.
        is_seen = self._current.draft_source == plan.draft_source
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
