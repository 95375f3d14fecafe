"""A batch that serves: who needs programs that are not there waits for them, and nobody else does."""

from __future__ import annotations

import threading

from qspec_jax import SamplingParams
from qspec_jax.decoding.plan import DecodingPlan
from qspec_jax.decoding.sampling_params import SamplingFeatures
from qspec_jax.engine import scheduler as of_scheduler
from qspec_jax.engine.compile_beside import NextPrograms
from qspec_jax.engine.request_queue import RequestQueue
from qspec_jax.engine.requests import Request
from qspec_jax.engine.scheduler import Scheduler
from qspec_jax.errors import OutOfMemoryError
from qspec_jax.model.precision import Precision
from tests import tiny
from tests.engine.test_scheduler import FakePrograms

SCORED = SamplingParams(logprobs=1)
BIASED = SamplingParams(logit_bias={5: 1.0})


class Compiling(FakePrograms):
    """Programs with features take until they are let go."""

    def __init__(self, rows):
        super().__init__(rows)
        self.may_end, self.asked, self.failures, self.refuses = threading.Event(), [], 0, None

    def compile(self, plan, shape, widths, *, on_event):
        if any(shape.features) and shape.features not in self.asked:
            assert threading.current_thread() is not threading.main_thread()
            on_event("compiling")
            self.asked.append(shape.features)
            assert self.may_end.wait(60)
            if self.failures or (self.refuses and getattr(shape.features, self.refuses)):
                self.failures = max(0, self.failures - 1)
                self.asked.pop()
                raise OutOfMemoryError("no room for it")

    def with_features(self, state, shape):
        return state


def batch(rows=2, **options):
    programs = Compiling(rows)
    scheduler = Scheduler(programs, DecodingPlan(Precision.W4A16), rows=rows, capacity=64, serves=True, **options)
    return programs, scheduler


def request(new_tokens, sampling=None):
    return Request([1, 2, 3], new_tokens, sampling or SamplingParams())


def finish(scheduler, sequences=()):
    """Steps of a cycle until all of some, or of all, sequences are finished."""
    while not all(one.finished for one in sequences) if sequences else scheduler.busy:
        scheduler.advance(1)


def test_others_enter_run_and_end_while_programs_are_compiled():
    events = []
    programs, scheduler = batch(on_event=events.append)
    running = scheduler.add(request(50))
    scheduler.advance(1)
    scored, behind = scheduler.add(request(4, SCORED)), scheduler.add(request(6))
    finish(scheduler, [behind])
    assert running.token_ids
    assert not running.finished
    assert scored.entered_s is None
    assert scheduler.shape.features == SamplingFeatures()
    assert scheduler.num_waiting == 1
    assert events == ["compiling"]
    programs.may_end.set()
    finish(scheduler)
    assert [len(one.token_ids) for one in (running, scored, behind)] == [50, 4, 6]
    assert scheduler.shape.features.scores


def test_who_comes_while_nobody_can_be_served_does_not_wait(monkeypatch):
    """And the processor has nothing to do: each step waits for the programs for a while."""
    waits, wait = [], NextPrograms.wait
    monkeypatch.setattr(NextPrograms, "wait", lambda self, seconds: waits.append(seconds) or wait(self, seconds))
    programs, scheduler = batch()
    first = scheduler.add(request(2))
    finish(scheduler, [first])
    scored = scheduler.add(request(3, SCORED))
    for _ in range(3):
        assert scheduler.advance(1) == []
    assert waits[-3:] == [of_scheduler._LOOK_S] * 3
    assert scheduler.busy
    behind = scheduler.add(request(5))
    finish(scheduler, [behind])
    assert scored.entered_s is None
    programs.may_end.set()
    finish(scheduler)
    assert len(scored.token_ids) == 3


def test_those_that_were_put_off_come_in_their_order_and_before_others():
    programs, scheduler = batch(rows=1)
    running = scheduler.add(request(3))
    scheduler.advance(1)
    put_off = [scheduler.add(request(2, SCORED)) for _ in range(2)]
    finish(scheduler, [running])
    scheduler.advance(1)
    behind = scheduler.add(request(2))
    programs.may_end.set()
    scheduler._next_programs.wait(60.0)
    finish(scheduler)
    assert put_off[0].entered_s < put_off[1].entered_s < behind.entered_s


def test_what_is_asked_for_meanwhile_is_compiled_next():
    programs, scheduler = batch()
    running = scheduler.add(request(60))
    scheduler.advance(1)
    scored = scheduler.add(request(2, SCORED))
    scheduler.advance(1)
    biased = scheduler.add(request(2, BIASED))
    scheduler.advance(1)
    programs.may_end.set()
    finish(scheduler)
    assert all(one.finished for one in (running, scored, biased))
    assert [(one.scores, one.biases) for one in programs.asked] == [(True, False), (True, True)]


def test_programs_that_do_not_compile_are_tried_again():
    programs, scheduler = batch()
    running = scheduler.add(request(9))
    scheduler.advance(1)
    scored = scheduler.add(request(2, SCORED))
    programs.failures = 1
    programs.may_end.set()
    finish(scheduler)
    assert [len(one.token_ids) for one in (running, scored)] == [9, 2]
    assert scored.error is None


def finish_while_compiled(scheduler):
    """As :func:`finish`, but what is compiled is there after each step; all that changed."""
    changed = []
    while scheduler.busy:
        changed += scheduler.advance(1)
        scheduler._next_programs.wait(60.0)
    return changed


def test_a_kind_that_cannot_be_compiled_is_refused_to_those_who_need_it_alone():
    """Nobody else starts again, and whoever asks later has it tried again."""
    programs, scheduler = batch(rows=3)
    programs.may_end.set()
    programs.refuses = "scores"
    running = scheduler.add(request(30))
    scheduler.advance(1)
    scored, biased, usual = scheduler.add(request(2, SCORED)), scheduler.add(request(4, BIASED)), request(3)
    both = scheduler.add(request(2, SamplingParams(logprobs=1, logit_bias={5: 1.0})))
    behind = scheduler.add(usual)
    changed = finish_while_compiled(scheduler)
    assert [len(one.token_ids) for one in (running, scored, biased, both, behind)] == [30, 0, 4, 0, 3]
    for refused in (scored, both):
        assert changed.count(refused) == 1
        assert refused.finished
    told = "programs for logprobs cannot be compiled: no room for it. Requests without logprobs are served"
    assert [str(one.error) for one in (scored, both)] == [told, told]
    assert sum(name == "prefill" for name, *_ in programs.log) == 3  # of nobody twice
    assert scheduler.shape.features == SamplingFeatures.of([BIASED])
    programs.refuses = None
    again = scheduler.add(request(2, SCORED))
    finish_while_compiled(scheduler)
    assert (len(again.token_ids), again.error) == (2, None)


def test_who_needs_what_never_ran_is_the_first_to_be_suspected():
    _, scheduler = batch()
    scheduler.expect([8], SamplingFeatures(draws=True))
    drawn, scored = scheduler.add(request(2, SamplingParams(temperature=1.0))), scheduler.add(request(2, SCORED))
    assert scheduler.suspects() == [scored]
    scheduler.cancel(scored)
    assert scheduler._needed() == SamplingFeatures(draws=True)
    assert scheduler.suspects() == []
    assert not drawn.finished


def test_one_that_was_put_off_can_be_cancelled():
    programs, scheduler = batch()
    running, scored = scheduler.add(request(20)), None
    scheduler.advance(1)
    scored = scheduler.add(request(2, SCORED))
    scheduler.advance(1)
    scheduler.cancel(scored)
    assert scheduler.num_waiting == 0
    programs.may_end.set()
    finish(scheduler)
    assert running.finished
    assert scored.token_ids == []


def test_a_burst_does_not_end_for_who_cannot_enter(monkeypatch):
    """Though a row is idle."""
    ends = []

    def run(loop, state, retired, *, max_cycles, slice_cycles, ends_early):
        state, report = loop(state, retired, max_cycles=max_cycles)
        ends.append(ends_early(report))
        return state, report

    programs, scheduler = batch()
    monkeypatch.setattr(of_scheduler, "run_in_slices", run)
    scheduler.add(request(40))
    scheduler.advance(1)
    scheduler.add(request(2, SCORED))
    for _ in range(4):
        scheduler.advance(1)
    assert ends[1:4] == [False] * 3
    programs.may_end.set()
    finish(scheduler)


def test_a_batch_that_serves_nobody_compiles_first():
    """All its requests are there: nobody is kept waiting."""
    programs = FakePrograms(2)
    programs.with_features = lambda state, shape: state
    scheduler = Scheduler(programs, DecodingPlan(Precision.W4A16), rows=2, capacity=64)
    scheduler.add(request(9))
    scheduler.advance(1)
    scored = scheduler.add(request(2, SCORED))
    scheduler.advance(1)
    assert scored.entered_s is not None
    finish(scheduler)


def test_a_queue_puts_off_each_once():
    queue = RequestQueue()
    usual, scored, more = (queue.add(request(1, one)) for one in (None, SCORED, None))
    assert queue.anyone_may_enter
    queue.take_in()
    present = SamplingFeatures()
    assert [queue.next(present) for _ in range(3)] == [usual, more, None]
    assert not queue.anyone_may_enter
    assert len(queue) == 1
    assert queue.first(2) == []
    assert queue.start_again() == 0
    assert queue.anyone_may_enter
    queue.take_in()
    assert [queue.next(present.union(SamplingFeatures.of([SCORED]))) for _ in range(4)] == [usual, scored, more, None]


def test_tokens_are_those_of_a_batch_that_had_all_programs_from_the_start():
    model = tiny.language_model()
    wanted = [
        Request([5, 6, 7], 24, SamplingParams(temperature=0.8, seed=3)),
        Request([8, 9], 6, SamplingParams(logprobs=2)),
        Request([8, 9, 4], 5, SamplingParams(repetition_penalty=1.4, logit_bias={7: 2.0})),
    ]
    ways = []
    for begin in (True, False):
        scheduler = Scheduler(model.programs, model.plan("qspec"), rows=3, capacity=64, serves=True)
        sequences = [scheduler.add(wanted[0])]
        if not begin:
            scheduler.advance(1)
        sequences += [scheduler.add(one) for one in wanted[1:]]
        finish(scheduler)
        ways.append([one.token_ids for one in sequences])
    assert ways[0] == ways[1]
