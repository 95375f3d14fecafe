"""The choice between plans, on a device that is simulated: it never loses much, and finds what wins."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import pytest

from qspec_jax.decoding.costs import CostTable, PassBytes, Setting
from qspec_jax.decoding.plan import AUTO_LENGTHS, AutoPlan, DecodingPlan, Lookup, plan_of, static
from qspec_jax.decoding.sampling_params import SamplingParams
from qspec_jax.engine.chooser import Chooser
from qspec_jax.engine.foresight import Foresight
from qspec_jax.engine.makespan import Makespan, Served, makespans
from qspec_jax.engine.requests import Request
from qspec_jax.engine.sequence import RunningSequence
from qspec_jax.errors import UsageError
from qspec_jax.model.view import View

FULL, BUDGET = View(activation_bits=8), View(activation_bits=8, cache_budget=1024, cache_full_below=2048)
PLAIN = DecodingPlan(View())
LOOKUPS = tuple(DecodingPlan(View(), Lookup(), length) for length in (3, 7))
DRAFTING = tuple(DecodingPlan(View(), view, length) for view in (FULL, BUDGET) for length in AUTO_LENGTHS)
PLANS = (PLAIN, *LOOKUPS, *DRAFTING)
# Bytes of an 8B model and of a position of its cache, bytes per second of its kernels, seconds of a step besides.
BYTES, BANDWIDTH, STEP_S = PassBytes(5_600_000_000, 131_072), 2.4e12, 2e-4
WHILE_S = 20.0


class Device:
    """What a GPU takes for a cycle: the bytes, and arithmetic of the rows that are verified."""

    def __init__(self, *, rows: int, context: int, acceptance: dict[str, float], compile_s: float = 8.0):
        self.rows, self.context, self.acceptance, self.compile_s = rows, context, acceptance, compile_s
        self.now_s = 0.0
        self.ready_s = {PLAIN: 0.0}
        self.random = np.random.default_rng(0)
        self.seconds: dict[DecodingPlan, float] = {}

    def cycle_s(self, plan: DecodingPlan) -> float:
        verified = BYTES.of_cycle(PLAIN, rows=self.rows, context=self.context) / BANDWIDTH + STEP_S
        verified += self.rows * plan.draft_length * 2.2e-5
        if plan.draft_view is None:
            return verified
        drafted = BYTES.of_cycle(plan, rows=self.rows, context=self.context)
        drafted -= BYTES.of_cycle(PLAIN, rows=self.rows, context=self.context)
        return verified + drafted / BANDWIDTH + plan.draft_length * STEP_S

    def tokens(self, plan: DecodingPlan) -> float:
        return sum(self.acceptance.get(str(plan.draft_source), 0) ** place for place in range(plan.draft_length + 1))

    def rate(self, plan: DecodingPlan) -> float:
        return self.tokens(plan) / self.cycle_s(plan)

    def prepare(self, plan: DecodingPlan) -> None:
        self.ready_s.setdefault(plan, max(self.now_s, *self.ready_s.values()) + self.compile_s)

    def is_ready(self, plan: DecodingPlan) -> bool:
        return self.ready_s.get(plan, float("inf")) <= self.now_s

    def histogram(self, plan: DecodingPlan, cycles: int) -> list[int]:
        chance, length = self.acceptance.get(str(plan.draft_source), 0.0), plan.draft_length
        shares = [chance**place * (1 - chance) for place in range(length)] + [chance**length]
        return self.random.multinomial(cycles * self.rows, shares).tolist()

    def run(self, chooser: Chooser, seconds: float) -> float:
        """Tokens of a sequence in so many seconds."""
        tokens, end_s = 0.0, self.now_s + seconds
        while self.now_s < end_s:
            burst = chooser.choose(context=self.context, active=self.rows)
            assert self.is_ready(burst.plan)
            cycles = burst.cycles or max(1, round((burst.seconds or 0.5) / self.cycle_s(burst.plan)))
            first = burst.plan not in self.seconds
            took = cycles * self.cycle_s(burst.plan) * self.random.uniform(0.99, 1.01) + 0.05 * first
            counts = self.histogram(burst.plan, cycles)
            tokens += sum((length + 1) * count for length, count in enumerate(counts)) / self.rows
            self.now_s += took
            self.seconds[burst.plan] = self.seconds.get(burst.plan, 0) + took
            chooser.observe(burst.plan, cycles=cycles, seconds=took, histogram=counts, context=self.context)
        return tokens


def chooser_on(device: Device, costs: CostTable, **options) -> Chooser:
    options = {"rows": device.rows, "burst_s": 0.5, "is_ready": device.is_ready, "prepare": device.prepare, **options}
    return Chooser(PLANS, costs, name_of=lambda plan: (id(device), plan), **options)


@pytest.mark.parametrize("accepted", ["everywhere", "nowhere", "by lookup"])
@pytest.mark.parametrize(("rows", "context"), [(1, 512), (32, 8192)])
def test_it_finds_what_wins_and_never_loses_much(rows, context, accepted):
    chances = {
        "everywhere": {"w4a8": 0.97, "w4a8@1024": 0.95, "lookup": 0.2},
        "nowhere": {"w4a8": 0.5, "w4a8@1024": 0.3, "lookup": 0.05},
        "by lookup": {"w4a8": 0.9, "w4a8@1024": 0.8, "lookup": 0.85},
    }[accepted]
    costs = CostTable(BYTES)
    device = Device(rows=rows, context=context, acceptance=chances)
    best = max(map(device.rate, PLANS))
    tokens = device.run(chooser_on(device, costs), WHILE_S)
    assert tokens > 0.97 * WHILE_S * device.rate(PLAIN)
    # Once everything has been compiled.
    again = Device(rows=rows, context=context, acceptance=chances, compile_s=0.0)
    tokens = again.run(chooser_on(again, costs), WHILE_S / 2)
    assert tokens > 0.97 * WHILE_S / 2 * best


@pytest.mark.parametrize("accepted", [0.97, 0.02])
@pytest.mark.parametrize(("rows", "context"), [(4, 8192), (64, 512), (64, 8192)])
def test_short_runs_pay_for_trials_once(rows, context, accepted):
    """Each run begins with what those before have learnt, and trials lose their share of all of them together."""
    chances = {"w4a8": accepted, "w4a8@1024": accepted, "lookup": 0.02}
    device, costs = Device(rows=rows, context=context, acceptance=chances, compile_s=0.0), CostTable(BYTES)
    device.ready_s, device.seconds = dict.fromkeys(PLANS, 0.0), dict.fromkeys(PLANS, 0.0)  # compiled and loaded
    best, runs = max(map(device.rate, PLANS)), []
    for _ in range(8):
        chooser, before = chooser_on(device, costs), device.now_s
        tokens = device.run(chooser, 1.0)
        chooser.note_entered(rows)
        tokens += device.run(chooser, 1.0)
        runs.append(tokens / (device.now_s - before) / best)
    assert np.mean(runs[1:]) > 0.98


def test_where_nothing_can_win_nothing_else_is_compiled():
    """Drafts that read as many bytes as a plain step, of a batch in which looking up costs as much as it brings."""
    device = Device(rows=16, context=512, acceptance={"w4a8": 0.99, "w4a8@1024": 0.99, "lookup": 0.0})
    device.run(chooser_on(device, CostTable(BYTES)), WHILE_S)
    assert set(device.ready_s) <= {PLAIN, *LOOKUPS}
    assert device.seconds[PLAIN] > 0.98 * WHILE_S


def test_where_nobody_waits_the_last_to_end_counts():
    """Lookup serves one text badly, for which all others would wait; while others wait, it is the fastest."""
    device = Device(rows=16, context=8192, acceptance={"w4a8@1024": 0.95, "lookup": 0.9})
    chooser = chooser_on(device, CostTable(BYTES))
    for plan in (PLAIN, LOOKUPS[-1], DRAFTING[-1]) * 2:
        device.ready_s[plan] = 0.0
        counts = {"cycles": 50, "seconds": 50 * device.cycle_s(plan), "histogram": device.histogram(plan, 50)}
        chooser.observe(plan, **counts, context=8192)
    options = {"context": 8192, "active": 16}
    assert chooser.choose(**options).plan.draft_source == "lookup"
    ends = Makespan(100.0, np.zeros(8), np.asarray([100.0, *[400.0] * 7]), np.full(8, 100.0))
    assert chooser.choose(**options, makespans={"lookup": ends}).plan.draft_source == "w4a8@1024"


def test_plans_are_worth_what_they_end_sooner():
    """The example of the module: a is served twice as well as the mean, b half as well, c as a."""
    profile = [0.5, 0.5]  # one draft yields 1.5 tokens
    well, badly = [(1000.0, 1000.0)] * 2, [(1000.0, 0.0)]  # 2 and 1
    kinds = [well] * 100
    (found,) = makespans([8, 8], [8], [Served([well, badly], kinds, profile)], rows=2)
    assert found.plain == 16
    assert found.until[1] == pytest.approx(6, rel=0.02)  # 8 tokens of a, at 2 instead of 1.5 in a cycle
    assert found.tail[1] == pytest.approx(6, rel=0.02)  # b ends after 12, and c then
    assert found.left[1] == pytest.approx(8, rel=0.02)  # c has begun just then
    # As many tokens per second as plain decoding: sooner by a quarter. With half as many, the last ones have no drafts.
    assert found.tokens_per_s(1, drafting=1.0, plain=1.0) == pytest.approx(16 / 12, rel=0.02)
    assert found.tokens_per_s(1, drafting=0.5, plain=1.0) == pytest.approx(16 / (12 + 8), rel=0.02)
    assert found.tokens_per_s(0, drafting=1.0, plain=1.0) == pytest.approx(1.0)


def test_rows_that_are_left_take_less_time():
    (found,) = makespans([10, 30], [], [Served([(), ()], (), [0.7])], rows=4, alone=0.5)
    assert found.plain == pytest.approx(0.5 * 30 + 0.5 * 20)


def test_of_whom_nothing_is_known_is_taken_for_others():
    """Alone the mean says that all end together."""
    profile, well, badly = [0.5, 0.5], [(1000.0, 1000.0)] * 2, [(1000.0, 0.0)]
    same = makespans([8] * 4, [], [Served([()] * 4, (), profile)], rows=4)[0]
    apart = makespans([8] * 4, [], [Served([()] * 4, [well, badly] * 2, profile)], rows=4)[0]
    assert same.tail[1] == pytest.approx(8)
    assert apart.tail[1] == pytest.approx(12, rel=0.02)


def test_where_one_is_unknown_all_others_count():
    """Whichever of them is the oldest: half of all texts yield 2 tokens in a cycle, half 1, and 1.5 is the mean."""
    well, badly = [(1000.0, 1000.0)] * 2, [(1000.0, 0.0)]
    for kinds in ([well] * 2 + [badly] * 2, [badly] * 2 + [well] * 2):
        (found,) = makespans([8], [8], [Served([()], kinds, [0.5, 0.5])], rows=1)
        assert found.until[1] + found.tail[1] == pytest.approx(8 * 1.5 * (1 / 2 + 1), rel=0.02)


def test_who_waits_takes_the_row_that_is_free_first():
    (found,) = makespans([1, 9], [5, 5, 1], [Served([(), ()], (), [0.7])], rows=2)
    assert found.plain == 11  # 1, 5, 5 in one row, 9 and 1 in the other
    assert found.until[0] == 9


def test_a_batch_that_serves_knows_no_end():
    chooser = chooser_on(Device(rows=2, context=64, acceptance={}), CostTable(BYTES))
    one = RunningSequence(Request([1], 10, SamplingParams()))
    foresight = Foresight(chooser, rows=2, serves=True)
    assert foresight.look([one], [one], 64) == foresight.look([one], [], 64) == {}
    foresight = Foresight(chooser, rows=2, serves=False)
    assert foresight.look([one], [], 64)["lookup"].plain == 10
    assert foresight.look([one], [one] * foresight.most, 64)["lookup"].plain == 10 * (foresight.most + 1) / 2 + 5
    assert foresight.look([one], [one] * (foresight.most + 1), 64) == {}


def test_it_changes_its_mind_when_the_text_does():
    chances = {"w4a8": 0.9, "w4a8@1024": 0.95, "lookup": 0.1}
    device = Device(rows=16, context=8192, acceptance=chances)
    chooser = chooser_on(device, CostTable(BYTES))
    device.run(chooser, 2 * WHILE_S)
    assert chooser.choose(context=8192, active=16).plan.draft_source == "w4a8@1024"
    chances["w4a8@1024"] = 0.1
    device.run(chooser, 10)
    assert chooser._current == PLAIN
    chances["w4a8@1024"] = 0.95
    device.run(chooser, 2 * WHILE_S)
    assert chooser._current.draft_source == "w4a8@1024"


def test_a_reason_is_given():
    device = Device(rows=16, context=8192, acceptance={"w4a8": 0.9, "w4a8@1024": 0.95, "lookup": 0.1})
    chooser = chooser_on(device, CostTable(BYTES))
    assert "not known yet" in chooser.choose(context=8192, active=16).why
    device.run(chooser, WHILE_S)
    assert "times plain decoding: " in chooser.choose(context=8192, active=16).why


def test_what_there_is_to_choose_from():
    auto = plan_of("auto", draft="w4a8", draft_context=1024)
    assert isinstance(auto, AutoPlan)
    assert (auto.choices[0], auto.mode, auto.draft_source, auto.draft_length) == (PLAIN, "auto", "auto", 7)
    assert (auto.lookup, auto.num_blocks, len(auto.choices)) == (True, 64, 13)
    in_small_caches = auto.in_cache(1024)
    assert (in_small_caches.num_blocks, len(in_small_caches.choices)) == (0, 8)
    lengths = plan_of("qspec", draft="w4a8", draft_length="auto", draft_context="full")
    assert [plan.draft_length for plan in lengths.choices] == [0, *AUTO_LENGTHS]
    assert (lengths.mode, lengths.lookup) == ("qspec", False)
    with pytest.raises(UsageError, match="give mode='lookup' a number"):
        plan_of("lookup", draft_length="auto")
    with pytest.raises(UsageError, match="auto chooses from several plans"):
        static(auto)
    with pytest.raises(ValueError, match="plain decoding comes first"):
        AutoPlan("auto", DRAFTING)
    with pytest.raises(ValueError, match="so one budget"):
        AutoPlan("auto", (PLAIN, DRAFTING[-1], DecodingPlan(View(), View(activation_bits=8, cache_budget=512), 3)))


def test_a_plain_step_is_measured_for_long_enough_before_anything_else_is_tried():
    """A burst takes a while besides its cycles: a short one would overstate a step, and anything seem to win."""
    device = Device(rows=16, context=2048, acceptance={"w4a8": 0.9, "w4a8@1024": 0.9, "lookup": 0.5}, compile_s=0.0)
    device.ready_s = dict.fromkeys(PLANS, 0.0)
    chooser, costs_s, bursts = chooser_on(device, CostTable(BYTES)), 0.0, []
    while costs_s < 0.5:
        burst = chooser.choose(context=2048, active=16)
        bursts.append(burst.plan)
        cycles = burst.cycles or round((burst.seconds or 0.5) / 0.0013)
        seconds = 0.006 + cycles * 0.0013
        costs_s += seconds
        counts = device.histogram(burst.plan, cycles)
        chooser.observe(burst.plan, cycles=cycles, seconds=seconds, histogram=counts, context=2048)
        if len(bursts) == 3:
            break
    assert bursts == [PLAIN] * 3
    assert chooser._costs.known(PLAIN, Setting(16, 16, 2048)) == pytest.approx(0.0013, rel=0.05)


def tried_next(costs: CostTable, *, seen: dict[str | None, Sequence[int]], steps: float = 10_000.0, **options):
    """What runs once the time of a plain step is known and everything is compiled; of sources drafts were seen."""
    chooser = chooser_on(device := Device(rows=64, context=8192, acceptance={}), costs, **options)
    device.ready_s = dict.fromkeys(PLANS, 0.0)
    costs.note(PLAIN, 0.0025, Setting(64, 64, 8192), weight=10.0)
    for source, counts in seen.items():
        chooser.acceptance[source].observe(counts)
    left = np.full(8, steps)
    ends = dict.fromkeys(chooser.acceptance, Makespan(steps, np.zeros(8), left, left))
    return chooser, lambda: chooser.choose(context=8192, active=64, makespans=ends)


NOTHING_FOUND = {"lookup": [400, 0, 0, 0]}


@pytest.mark.parametrize(("steps", "is_tried"), [(10_000.0, True), (20.0, False)])
def test_a_source_that_nobody_knows_is_tried_where_enough_work_is_left_to_pay_for_it(steps, is_tried):
    """The first trial loads a program, and takes no longer than that needs."""
    _, choose = tried_next(CostTable(BYTES), seen=NOTHING_FOUND, steps=steps)
    burst = choose()
    assert (burst.why == "a trial") is is_tried
    if is_tried:
        assert burst.plan.draft_view is not None
        assert burst.cycles == 2


def test_a_program_that_takes_longer_to_load_than_it_may_save_is_not_loaded():
    costs = CostTable(BYTES)
    costs.trials.note_load(30.0)
    _, choose = tried_next(costs, seen=NOTHING_FOUND)
    assert choose().plan == PLAIN


def test_what_the_first_run_of_a_program_takes_is_learnt_and_no_time_of_its_cycles():
    chooser, choose = tried_next(CostTable(BYTES), seen=NOTHING_FOUND)
    tried = choose().plan
    chooser.observe(tried, cycles=2, seconds=0.5, histogram=[128] + [0] * tried.draft_length, context=8192)
    assert chooser._costs.known(tried, Setting(64, 64, 8192)) is None
    assert 0.4 < chooser._trials.load_s < 0.5
    assert chooser._trials.lost_s > chooser._trials.load_s


def test_a_burst_that_ran_while_a_trial_was_chosen_is_not_that_trial():
    chooser, choose = tried_next(CostTable(BYTES), seen=NOTHING_FOUND)
    assert choose().why == "a trial"
    lost_s = chooser._trials.lost_s
    chooser.observe(PLAIN, cycles=100, seconds=5.0, histogram=[6400], context=8192)
    assert chooser._trials.lost_s == lost_s


@pytest.mark.parametrize(("cycles", "tells"), [(1, False), (10, True)])
def test_a_burst_that_is_mostly_something_else_tells_no_time_of_its_cycles(cycles, tells):
    """A trial ends with its first cycle where a row ends in it: 4 ms besides 1 ms would be taken for the cycle."""
    chooser, _ = tried_next(CostTable(BYTES), seen={})
    chooser._overhead_s = 0.004
    chooser._trials.loaded.add(chooser._name_of(LOOKUPS[0]))
    seconds = 0.004 + 0.001 * cycles
    chooser.observe(LOOKUPS[0], cycles=cycles, seconds=seconds, histogram=[64 * cycles, 0, 0, 0], context=8192)
    known = chooser._costs.known(LOOKUPS[0], Setting(64, 64, 8192))
    assert known == (pytest.approx(0.001) if tells else None)


def test_a_trial_lasts_long_enough_to_tell_however_much_a_burst_takes_besides():
    chooser, choose = tried_next(CostTable(BYTES), seen=NOTHING_FOUND)
    chooser._trials.loaded.update(map(chooser._name_of, PLANS))
    chooser._overhead_s = 0.02
    burst = choose()
    assert burst.why == "a trial"
    setting = Setting(64, 64, 8192)
    cycle_s = chooser._guess(burst.plan, {PLAIN: chooser._costs.known(PLAIN, setting)}, setting)
    assert burst.cycles * cycle_s > chooser._overhead_s


@pytest.mark.parametrize(("counts", "is_tried"), [([400, 0, 0, 0, 0, 0, 0, 0], False), ([100] + [0] * 6 + [300], True)])
def test_what_texts_tell_of_lookup_needs_no_trial(counts, is_tried):
    """A trial tells only how long its cycles take, where drafts were found that would have been accepted."""
    nothing = {plan.draft_source: [4000] + [0] * plan.draft_length for plan in DRAFTING}
    chooser, choose = tried_next(CostTable(BYTES), seen=nothing, replayed={"lookup"})
    assert choose().plan == PLAIN  # more will be known without a trial
    chooser.note_replayed(LOOKUPS[-1], counts)
    burst = choose()
    assert (burst.plan == LOOKUPS[0], burst.why == "a trial") == (is_tried, is_tried)


@pytest.mark.parametrize("seen", [False, True])
def test_what_texts_before_yielded_has_to_promise_more_than_what_was_seen(seen):
    """A tenth faster by texts before: texts that have just begun have nothing to look up yet."""
    costs, setting = CostTable(BYTES), Setting(4, 4, 64)
    for plan, seconds in ((PLAIN, 0.01), (LOOKUPS[0], 0.01 * 1.7 / 1.1), (LOOKUPS[1], 0.1)):
        costs.note(plan, seconds, setting, weight=10.0)
    for plan in DRAFTING:
        costs.note(plan, 1.0, setting, weight=10.0)
    costs.acceptance.update({name: [0.0] for plan in DRAFTING if (name := plan.source_and_target)})
    costs.acceptance[str(LOOKUPS[0].source_and_target)] = [0.4, 0.5, 0.5]  # 1.7 tokens per cycle
    options = {"rows": 4, "burst_s": 0.5, "is_ready": lambda _: True, "prepare": lambda _: None}
    chooser = Chooser(PLANS, costs, replayed={"lookup"}, **options)
    costs.trials.loaded.update(map(chooser._name_of, PLANS))
    if seen:
        chooser.note_replayed(LOOKUPS[0], [600, 200, 100, 100])  # of which 0, 1, ... drafts would have been accepted
    burst = chooser.choose(context=64, active=4)
    assert (burst.plan == LOOKUPS[0]) is seen
    # Who promises more, and too little for one that nobody has seen, is in nobody's way.
    costs.note(LOOKUPS[1], 0.01 * chooser._tokens(LOOKUPS[1]) / 1.12, setting, weight=1e9)
    assert (chooser.choose(context=64, active=4).plan == PLAIN) is not seen
    assert 1.05 < costs.known(PLAIN, setting) * chooser._tokens(LOOKUPS[0]) / costs.known(LOOKUPS[0], setting) < 1.15
    assert burst.plan == (LOOKUPS[0] if seen else PLAIN)


@pytest.mark.parametrize(("counts", "cycles"), [([1000, 0, 0, 0], 256), ([700, 150, 100, 50], 64)])
def test_plain_decoding_is_looked_at_more_seldom_where_nothing_is_nearly_as_fast(counts, cycles):
    costs, setting = CostTable(BYTES), Setting(4, 4, 64)
    for plan in PLANS:
        costs.note(plan, {PLAIN: 0.0012, LOOKUPS[0]: 0.0018}.get(plan, 1.0), setting, weight=10.0)
    costs.acceptance.update({name: [0.0] for plan in DRAFTING if (name := plan.source_and_target)})
    options = {"rows": 4, "burst_s": 0.5, "is_ready": lambda _: True, "prepare": lambda _: None}
    chooser = Chooser(PLANS, costs, replayed={"lookup"}, **options)
    chooser._elapsed_s = 10.0
    costs.trials.loaded.update(map(chooser._name_of, PLANS))
    chooser.note_replayed(LOOKUPS[0], counts)
    burst = chooser.choose(context=64, active=4)
    assert burst.plan == PLAIN
    assert burst.seconds == pytest.approx(cycles * 0.0012, rel=0.01)


def test_what_one_target_accepts_says_nothing_of_another():
    costs, floats = CostTable(BYTES), View(weight_bits=None)
    exact = [dataclasses.replace(plan, verify=floats) for plan in PLANS]
    options = {"rows": 4, "burst_s": 0.5, "is_ready": lambda _: True, "prepare": lambda _: None}
    chooser = Chooser(PLANS, costs, **options)
    for plan in PLANS[1:]:
        chooser.observe(plan, cycles=50, seconds=1.0, histogram=[100] + [0] * plan.draft_length, context=64)
    source = PLANS[1].draft_source
    assert Chooser(PLANS, costs, **options).acceptance[source].profile(1)[0] < 0.5
    assert Chooser(exact, costs, **options).acceptance[source].profile(1)[0] > 0.5


@pytest.mark.parametrize(("lost_s", "is_tried"), [(0.0, True), (0.999, False)])
def test_a_trial_that_could_lose_more_than_is_left_waits(lost_s, is_tried):
    """Few of its drafts were accepted: only hope speaks for it."""
    costs = CostTable(BYTES)
    for plan in PLANS[1:]:
        costs.note(plan, 0.003, Setting(64, 64, 8192), weight=10.0)
    chooser, choose = tried_next(costs, seen={plan.draft_source: [40, 1, 0, 0] for plan in PLANS[1:]}, steps=100_000.0)
    costs.trials.elapsed_s, costs.trials.lost_s = 100.0, lost_s
    costs.trials.loaded.update(map(chooser._name_of, PLANS))
    chooser._hope_at = dict.fromkeys(chooser._hope_at, 0)
    assert (choose().why == "a trial") is is_tried


def test_a_hiccup_of_the_host_does_not_keep_plain_decoding_unknown():
    """What a burst took besides its cycles seems most of it, and all are as long until plain decoding is known."""
    chooser = Chooser(
        PLANS,
        CostTable(BYTES),
        rows=1,
        burst_s=0.5,
        is_ready=lambda plan: True,
        prepare=lambda plan: None,
        name_of=lambda plan: plan,
    )
    chosen = []
    for index in range(12):
        burst = chooser.choose(context=512, active=1)
        cycles = burst.cycles or round((burst.seconds or 0.5) / 0.001)
        seconds = cycles * 0.001 + 0.001 + 0.018 * (index == 1)
        accepted = [0] * burst.plan.draft_length + [cycles]
        chooser.observe(burst.plan, cycles=cycles, seconds=seconds, histogram=accepted, context=512)
        if burst.plan == PLAIN:
            chooser.note_replayed(LOOKUPS[-1], [0] * LOOKUPS[-1].draft_length + [max(1, cycles // 8)])
        chosen.append(burst.plan)
    assert chosen[-1] in LOOKUPS
