"""When a scheduler asks for a choice: while a burst runs, or for two hundredths of the time at most."""

from __future__ import annotations

import functools
import sys
import threading

import numpy as np
import pytest

from qspec_jax import SamplingParams
from qspec_jax.decoding.chunks import Shape
from qspec_jax.decoding.costs import CostTable, PassBytes
from qspec_jax.decoding.plan import AutoPlan, DecodingPlan, Lookup
from qspec_jax.decoding.programs import Programs
from qspec_jax.engine import choosing as of_choosing
from qspec_jax.engine import scheduler as of_scheduler
from qspec_jax.engine.chooser import Burst, Chooser
from qspec_jax.engine.choosing import Choosing
from qspec_jax.engine.request_queue import RequestQueue
from qspec_jax.engine.requests import Request
from qspec_jax.engine.sequence import RunningSequence
from qspec_jax.model.view import View
from tests.engine import simulated_batches
from tests.engine.simulated_device import AUTO, BUDGET, FULL, SMALL, Process, conversations

PLAIN, LOOKUP = DecodingPlan(View()), DecodingPlan(View(), Lookup(), 3)
CHOICE_S, USUAL_S = 0.002, 0.2


class Compiled(Programs):
    """All loops are there, until they are not."""

    are_there = True

    def __init__(self):
        self._lock, self._costs = threading.RLock(), CostTable(PassBytes(1000, 10))

    def lay_out_weights(self, plan):
        pass

    def has_loop(self, plan, shape):
        return self.are_there


class Clock:
    now_s = 1000.0

    def perf_counter(self):
        return self.now_s


@pytest.fixture
def batch(monkeypatch):
    """A batch in which choosing takes 2 ms; the clock, its programs, choices so far, and what asks for the next one."""
    clock, programs, chosen = Clock(), Compiled(), []
    monkeypatch.setattr(of_choosing, "time", clock)
    plan = AutoPlan("auto", (PLAIN, LOOKUP))
    shape = Shape.of(plan, rows=2, capacity=64)
    choosing = Choosing(programs, plan, shape, burst_s=USUAL_S, serves=True, on_event=print)

    def ask(cycles=None, *, ahead=False, num_running=2, num_waiting=0, **options):
        def choose(**_):
            clock.now_s += CHOICE_S
            chosen.append(Burst(PLAIN, 0.03, cycles, "so it is", 0.001))
            return chosen[-1]

        monkeypatch.setattr(choosing._chooser, "choose", choose)
        running = [RunningSequence(Request([1, 2, 3], 40, SamplingParams())) for _ in range(num_running)]
        queue = RequestQueue()
        for _ in range(num_waiting):
            queue.add(Request([1, 2, 3], 40, SamplingParams()))
        return (choosing.look_ahead if ahead else choosing.next)(running, queue, **options)

    ask.choosing = choosing
    return clock, programs, chosen, ask


def test_what_was_chosen_holds_for_as_long_as_choosing_is_to_take_a_small_share(batch):
    clock, _, chosen, ask = batch
    for _ in range(1000):
        ask()
        clock.now_s += 0.005
    share = CHOICE_S * len(chosen) / (clock.now_s - Clock.now_s)
    assert 0.015 < share <= 0.02


def test_it_is_the_same_choice(batch):
    clock, _, chosen, ask = batch
    first = ask()
    clock.now_s += 0.09
    assert ask() is first
    clock.now_s += 0.02
    assert ask() is not first
    assert len(chosen) == 2


@pytest.mark.parametrize(("choice_s", "seconds"), [(0.002, 0.1), (0.0002, 0.03), (1.0, USUAL_S)])
def test_a_burst_lasts_until_there_is_another_choice_and_never_longer_than_is_usual(
    batch, monkeypatch, choice_s, seconds
):
    """Of 30 ms it would be followed by two of the same plan, each of which takes some milliseconds besides."""
    _, _, chosen, ask = batch
    monkeypatch.setattr(sys.modules[__name__], "CHOICE_S", choice_s)
    assert ask().seconds == pytest.approx(seconds)
    assert chosen[0].seconds == 0.03


def test_a_choice_that_was_kept_waiting_holds_no_longer_than_others(batch, monkeypatch):
    """By the thread that compiles what it asked for, say: the plan would stay for a minute."""
    clock, _, chosen, ask = batch
    monkeypatch.setattr(sys.modules[__name__], "CHOICE_S", 1.0)
    ask()
    clock.now_s += 0.3
    ask()
    assert len(chosen) == 2


def test_after_a_trial_there_is_another_choice(batch):
    _, _, chosen, ask = batch
    assert [ask(cycles=4) for _ in range(3)] == chosen
    assert len(chosen) == 3


def test_a_plan_without_a_program_does_not_stay(batch):
    _, programs, chosen, ask = batch
    ask()
    programs.are_there = False
    ask()
    assert len(chosen) == 2


def test_what_was_chosen_while_a_burst_ran_keeps_nobody_waiting(batch):
    clock, _, chosen, ask = batch
    ask(num_waiting=1)
    for count in range(2, 5):
        ask(ahead=True, num_waiting=1)
        clock.now_s += 0.5
        assert ask(num_waiting=1).why == "so it is"
        assert len(chosen) == count


@pytest.mark.parametrize(
    ("cycles", "waiting"),
    [
        (None, {"num_running": 2}),  # soon rows are idle, and when each ends matters
        (None, {"num_running": 1, "num_waiting": 1}),  # the next burst is another text's
        (4, {"num_running": 2, "num_waiting": 1}),  # a trial is to tell something
    ],
)
def test_nothing_is_chosen_before_the_end_of_a_burst_that_matters(batch, cycles, waiting):
    *_, chosen, ask = batch
    ask(cycles, **waiting)
    ask(ahead=True, **waiting)
    assert len(chosen) == 1


def test_what_was_chosen_for_more_who_wait_is_not_for_the_last_ones(batch):
    clock, _, chosen, ask = batch
    ask(num_waiting=1)
    ask(ahead=True, num_waiting=1)
    clock.now_s += 0.5
    ask()
    assert len(chosen) == 3


def test_a_plan_whose_program_went_meanwhile_does_not_run(batch):
    _, programs, chosen, ask = batch
    ask(num_waiting=1)
    ask(ahead=True, num_waiting=1)
    programs.are_there = False
    ask(num_waiting=1)
    assert len(chosen) == 3


def test_a_scheduler_chooses_while_the_device_runs(monkeypatch):
    """All but the first choices of a batch, trials, and the last ones."""
    look_ahead, made, ahead = Choosing.look_ahead, [], []

    def look(self, decoding, queue):
        before = len(made)
        look_ahead(self, decoding, queue)
        ahead.extend(made[before:])

    choose = Chooser.choose
    monkeypatch.setattr(Choosing, "look_ahead", look)
    monkeypatch.setattr(Chooser, "choose", lambda self, **options: made.append(0) or choose(self, **options))
    some = conversations(24, np.random.default_rng(0), chances={FULL: 0.9, BUDGET: 0.9})
    process = Process(CostTable(SMALL.num_bytes, bandwidth=4.3e12))
    with simulated_batches.on_the_clock(4):
        for _ in range(2):
            made.clear(), ahead.clear()
            simulated_batches.run(AUTO, 4, some, SMALL, process)
    assert len(ahead) > 10
    assert len(ahead) > 0.6 * len(made)


def test_every_burst_counts_once_before_another_choice_and_before_costs_are_kept(monkeypatch):
    """Where the next burst was chosen meanwhile, the device has that before the last one is taken into account."""
    told, ran, late = [], Choosing.ran, []

    def note(name, of, method):
        real = getattr(of, method)
        monkeypatch.setattr(
            of, method, lambda self, *some, **options: told.append(name) or real(self, *some, **options)
        )

    note("counts", Chooser, "observe")
    note("chooses", Chooser, "choose")
    note("dispatches", simulated_batches.Later, "submit")
    note("keeps", simulated_batches.Device, "save_costs")
    monkeypatch.setattr(
        Choosing, "ran", lambda self, *some, **options: told.append("ran") or ran(self, *some, **options)
    )
    some = conversations(24, np.random.default_rng(0), chances={FULL: 0.9, BUDGET: 0.9})
    with simulated_batches.on_the_clock(4):
        simulated_batches.run(AUTO, 4, some, SMALL, Process(CostTable(SMALL.num_bytes, bandwidth=4.3e12)))
    waits = False
    for one in told:
        if one in ("chooses", "keeps"):
            assert not waits
        late.append(waits and one == "dispatches")
        waits = one == "ran" or (waits and one != "counts")
    assert told.count("counts") == told.count("ran") > 20
    assert sum(late) > 10


@pytest.fixture
def told(batch, monkeypatch):
    """What the bursts of the batch told its chooser: cycles, seconds, and cycles by accepted drafts."""
    found, choosing = [], batch[-1].choosing

    def observe(plan, *, cycles, seconds, histogram, context):
        found.append((cycles, round(seconds, 6), histogram))

    monkeypatch.setattr(choosing._chooser, "observe", observe)
    return found


def test_a_trial_is_cut_for_those_who_wait_for_tokens_and_counts_once(batch, told):
    *_, chosen, ask = batch
    for part in (20, 20, 8):
        assert ask(48, most_cycles=20).cycles == part
        ask.choosing.ran(PLAIN, [], cycles=part, seconds=part / 100, histogram=[part, 1])
        ask.choosing.settle()
    assert len(chosen) == 1
    assert told == [(48, 0.48, [48, 3])]
    assert ask(48, most_cycles=64).cycles == 48
    assert len(chosen) == 2


def test_a_part_that_ends_early_is_the_last_one(batch, told):
    """As where somebody comes who can have a row."""
    *_, chosen, ask = batch
    ask(48, most_cycles=20)
    ask.choosing.ran(PLAIN, [], cycles=20, seconds=0.2, histogram=[20])
    ask(48, most_cycles=20)
    ask.choosing.ran(PLAIN, [], cycles=7, seconds=0.1, histogram=[7])
    ask.choosing.settle()
    assert told == [(27, 0.3, [27])]
    ask()
    assert len(chosen) == 2


@pytest.mark.parametrize("how", ["end", "programs"])
def test_a_trial_that_does_not_go_on_counts_as_far_as_it_ran(batch, told, how):
    """The batch is done, or has other programs from now on."""
    _, programs, chosen, ask = batch
    ask(48, most_cycles=20)
    ask.choosing.ran(PLAIN, [], cycles=20, seconds=0.2, histogram=[20])
    ask.choosing.settle()
    assert told == []
    if how == "end":
        ask.choosing.end()
    else:
        programs.are_there = False
        ask()
    assert len(chosen) == (1 if how == "end" else 2)
    ask.choosing.settle()
    assert told == [(20, 0.2, [20])]


def test_a_burst_without_a_number_of_cycles_is_not_cut(batch, told):
    *_, ask = batch
    for _ in range(2):
        assert ask(most_cycles=3).cycles is None
        ask.choosing.ran(PLAIN, [], cycles=30, seconds=0.3, histogram=[30])
        ask.choosing.settle()
    assert told == [(30, 0.3, [30])] * 2


@pytest.mark.parametrize("serves", [False, True])
def test_a_batch_that_serves_takes_tokens_from_the_device_in_a_trial(serves, monkeypatch):
    """And one that does not has it in one burst, which costs least."""
    asked, run = [], of_scheduler.run_in_slices

    def run_in_slices(*arguments, **options):
        asked.append(options["max_cycles"])
        return run(*arguments, **options)

    monkeypatch.setattr(of_scheduler, "run_in_slices", run_in_slices)
    monkeypatch.setattr(Chooser, "choose", lambda self, **_: Burst(PLAIN, None, 48, "a trial"))
    scheduler = functools.partial(of_scheduler.Scheduler, serves=serves, burst_s=0.01)
    monkeypatch.setattr(simulated_batches, "Scheduler", scheduler)
    some = conversations(4, np.random.default_rng(0), chances={FULL: 0.9, BUDGET: 0.9})
    with simulated_batches.on_the_clock(1):
        simulated_batches.run(AUTO, 1, some, SMALL, Process(CostTable(SMALL.num_bytes, bandwidth=4.3e12)))
    assert (max(asked) < 48) == serves
