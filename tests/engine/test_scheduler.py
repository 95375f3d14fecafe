"""Continuous batching: a request yields the same whatever runs beside it, and nothing is compiled on the way."""

from __future__ import annotations

import random
import sys
import threading
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from qspec_jax import SamplingParams
from qspec_jax.decoding import chunks, programs
from qspec_jax.decoding.chunks import Shape
from qspec_jax.decoding.plan import DecodingPlan
from qspec_jax.decoding.programs import Programs, Report
from qspec_jax.decoding.sampling_params import SamplingFeatures
from qspec_jax.engine.burst import SLICE_S
from qspec_jax.engine.reading import Reading
from qspec_jax.engine.requests import Request
from qspec_jax.engine.scheduler import Scheduler
from qspec_jax.errors import OutOfMemoryError
from qspec_jax.model.cache import KV_OF_MODEL
from qspec_jax.model.precision import Precision
from tests import tiny

WIDTHS = (8, 16)  # of chunks here: a prompt of more than 16 tokens enters in several
CAPACITY = 128
SAMPLING = [
    SamplingParams(),
    SamplingParams(temperature=0.9, seed=5),
    SamplingParams(temperature=1.3, top_p=0.9, seed=6),
    SamplingParams(temperature=1.0, top_k=7, frequency_penalty=0.4, repetition_penalty=1.2, seed=7),
    SamplingParams(repetition_penalty=1.3),
    SamplingParams(stop_token_ids=(27, 39)),
]


def requests(count, *, sampling=SAMPLING):
    """Prompts of 1 to 60 tokens, with 1 to 40 new ones."""
    rng = random.Random(count)
    made = []
    for index in range(count):
        params = sampling[index % len(sampling)]
        prompt = [rng.randrange(96) for _ in range(rng.choice((1, 5, 8, 13, 16, 17, 33, 60)))]
        made.append(Request(prompt, rng.choice((1, 2, 9, 40)), params))
    return made


@pytest.fixture(scope="module")
def model():
    return tiny.language_model()


@pytest.fixture(autouse=True)
def _narrow_chunks(monkeypatch):
    monkeypatch.setattr(chunks, "CHUNK_WIDTHS", WIDTHS)


def run(model, wanted, *, rows, order=None, mode="qspec", max_cycles=None):
    """The tokens of each request."""
    scheduler = Scheduler(model.programs, model.plan(mode, draft="w4a8"), rows=rows, capacity=CAPACITY)
    order = range(len(wanted)) if order is None else order
    sequences = {index: scheduler.add(wanted[index]) for index in order}
    while scheduler.busy:
        scheduler.advance(max_cycles)
    assert scheduler.totals.requests == len(wanted)
    return [sequences[index].token_ids for index in range(len(wanted))], scheduler.totals


@pytest.fixture(scope="module")
def alone(model):
    """What each request yields with the batch to itself."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunks, "CHUNK_WIDTHS", WIDTHS)
        wanted = requests(18)
        yielded, _ = run(model, wanted, rows=1)
        assert any(1 < len(ids) < request.max_new_tokens for ids, request in zip(yielded, wanted, strict=True))
        return yielded


def test_a_request_yields_the_same_in_any_order_and_row_and_among_any_neighbours(model, alone):
    wanted, order = requests(18), list(range(18))
    for shuffle in (None, 1, 2):
        if shuffle is not None:
            random.Random(shuffle).shuffle(order)
        assert run(model, wanted, rows=3, order=order)[0] == alone
    assert run(model, wanted, rows=3, max_cycles=1)[0] == alone
    assert run(model, wanted, rows=3, mode="w4a16")[0] == alone


def test_a_prompt_in_pieces_yields_what_it_yields_at_once(model, alone, monkeypatch):
    monkeypatch.setattr(chunks, "CHUNK_WIDTHS", (64,))
    assert run(model, requests(18), rows=3)[0] == alone


def test_the_number_of_compilations_stays_constant(model, alone):
    """Also of those that JAX makes on its own, for operations outside of the programs."""
    compiled = []

    def listen(event, seconds, **_):
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(seconds)

    run(model, requests(50), rows=3)
    before = model.num_compilations
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        run(model, requests(150), rows=3)
        assert (model.num_compilations, compiled) == (before, [])
        jax.jit(lambda a: a + len(compiled))(np.float32(1))
        assert compiled, "the listener hears nothing"
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def test_a_feature_that_only_a_later_request_needs_changes_no_earlier_one(model, alone):
    wanted = requests(18)
    scheduler = Scheduler(model.programs, model.plan(draft="w4a8"), rows=3, capacity=CAPACITY)
    sequences = [scheduler.add(wanted[0])]
    scheduler.advance(1)
    assert scheduler.shape.features == SamplingFeatures()
    sequences += [scheduler.add(request) for request in wanted[1:]]
    while scheduler.busy:
        scheduler.advance()
    assert [sequence.token_ids for sequence in sequences] == alone


def test_a_cancelled_sequence_makes_room_and_changes_no_other(model, alone):
    wanted = requests(18)
    scheduler = Scheduler(model.programs, model.plan(draft="w4a8"), rows=3, capacity=CAPACITY)
    sequences = [scheduler.add(request) for request in wanted]
    longest = max(range(3), key=lambda index: wanted[index].max_new_tokens)
    for _ in range(4):
        scheduler.advance(1)
    assert not sequences[longest].finished
    scheduler.cancel(sequences[longest])
    while scheduler.busy:
        scheduler.advance()
    cut = sequences[longest].token_ids
    assert cut == alone[longest][: len(cut)]
    assert len(cut) < len(alone[longest])
    others = [index for index in range(18) if index != longest]
    assert [sequences[index].token_ids for index in others] == [alone[index] for index in others]


def test_totals_are_those_of_the_sequences(model, alone):
    yielded, totals = run(model, requests(18), rows=3)
    assert totals.tokens == sum(map(len, yielded))
    assert totals.sequence_cycles <= totals.cycles * 3
    assert totals.occupancy > 0.5
    assert totals.tokens_per_cycle * totals.sequence_cycles >= totals.tokens - len(yielded)


class OnDevice:
    """An array of which a part is got by another program of the device, after those that have been dispatched."""

    def __init__(self, array):
        self.array = array

    def __array__(self, dtype=None, copy=None):
        return self.array

    def __getitem__(self, index):
        raise AssertionError("part of an array on the device")


class FakePrograms(Programs):
    """Yields one token per cycle, the same for all, and notes what it is asked for."""

    most_tokens = 64
    packing = False
    decoder = SimpleNamespace(kv=KV_OF_MODEL)

    def __init__(self, rows):
        self.rows, self.log, self.compile_s = rows, [], 0.0
        self.left, self.counts = np.zeros(rows, int), np.zeros(rows, int)

    def compile(self, plan, shape, widths, *, on_event):
        pass

    def save_costs(self):
        pass

    def idle_state(self, shape):
        return "state"

    def _report(self, cycles):
        tokens = np.tile(np.arange(self.most_tokens), (self.rows, 1))
        lengths = np.tile(self.counts[:, None], (1, 17))
        arrays = tokens, self.counts.copy(), self.left <= 0, lengths
        return "state", Report(*map(OnDevice, arrays), np.int32(cycles))

    def prefill(self, plan, shape, state, chunks, rows, sources, count):
        for chunk, row in enumerate(rows[:count]):
            last = chunks.last[chunk]
            self.left[row] = chunks.max_new_tokens[chunk] - 1 if last else 0
            self.counts[row] = int(last)
        self.log.append(("prefill", chunks.tokens.shape[1], rows[:count].tolist()))
        return self._report(0)

    def loop(self, plan, shape, state, retired, *, max_cycles, until_finished):
        self.left[retired] = 0
        cycles = 0
        while cycles < max_cycles and (self.left <= 0).sum() < until_finished:
            active = self.left > 0
            self.counts += active
            self.left -= active
            cycles += 1
        self.log.append(("loop", until_finished))
        return self._report(cycles)


def fake_run(wanted, *, rows, **options):
    fake = FakePrograms(rows)
    scheduler = Scheduler(fake, DecodingPlan(Precision.W4A16), rows=rows, capacity=64, **options)
    sequences = [scheduler.add(Request([1] * length, new, SamplingParams())) for length, new in wanted]
    while scheduler.busy:
        scheduler.advance(4)
    assert [len(sequence.token_ids) for sequence in sequences] == [new for _, new in wanted]
    return fake.log


def test_a_row_is_filled_again_as_soon_as_it_is_idle():
    log = fake_run([(3, 2), (3, 9), (3, 5)], rows=2)
    assert log[:4] == [("prefill", 8, [0, 1]), ("loop", 1), ("prefill", 8, [0]), ("loop", 2)]


def test_no_cycle_runs_before_all_that_have_rows_have_read():
    log = fake_run([(3, 20), (40, 2), (40, 4)], rows=2)
    read = *(("prefill", 16, [1]),) * 2, ("prefill", 8, [1])
    assert log[:6] == [("prefill", 8, [0]), *read, ("loop", 1), read[-1]]  # the row holds the others of the third


@pytest.mark.parametrize(("chunk_s", "names"), [(0.04, ["prefill"] * 3 + ["loop"]), (0.3, ["prefill"])])
def test_a_step_reads_for_as_long_as_a_burst_lasts_where_nobody_is_served(chunk_s, names, monkeypatch):
    """An interruption waits for no more than that."""
    fake = FakePrograms(2)
    scheduler = Scheduler(fake, DecodingPlan(Precision.W4A16), rows=2, capacity=64, burst_s=0.5)
    monkeypatch.setattr(scheduler._pace.reading, "_chunk_s", chunk_s)
    scheduler.add(Request([1] * 40, 9, SamplingParams()))
    scheduler.advance(4)
    assert [name for name, *_ in fake.log] == names


def test_a_long_prompt_enters_piece_by_piece_while_others_are_served():
    log = fake_run([(3, 20), (40, 2)], rows=2, serves=True)
    assert log[:7] == [
        *(("prefill", 8, [0]), ("prefill", 16, [1]), ("loop", 2)),
        *(("prefill", 16, [1]), ("loop", 2)),
        *(("prefill", 8, [1]), ("loop", 2)),
    ]


def test_chunks_that_take_no_time_are_read_at_once(monkeypatch):
    monkeypatch.setattr("qspec_jax.engine.reading._MOST_WAIT_S", 9.0)
    log = fake_run([(3, 20), (40, 2)], rows=2, serves=True)
    assert log[:6] == [
        *(("prefill", 8, [0]), ("prefill", 16, [1]), ("loop", 2)),
        *(("prefill", 16, [1]), ("prefill", 8, [1]), ("loop", 2)),
    ]


def test_those_that_decode_wait_for_few_chunks_and_get_their_share(monkeypatch):
    monkeypatch.setattr("qspec_jax.engine.reading._MOST_WAIT_S", 0.05)
    reading = Reading()
    assert reading.is_enough(1, more=1)  # nobody knows yet what a chunk takes
    assert reading.burst_s(decoding=3, rows=4) is None
    reading.note(4, 0.040)
    assert [reading.is_enough(chunks, more=1) for chunks in (1, 4, 5)] == [False, False, True]
    assert reading.is_enough(1, more=5)
    assert [reading.is_enough(chunks, more=5, most_s=0.5) for chunks in (1, 45, 46)] == [False, False, True]
    assert reading.burst_s(decoding=4, rows=4) == pytest.approx(0.020)
    assert reading.burst_s(decoding=1, rows=4) == pytest.approx(0.005)


def test_a_burst_begins_before_the_tokens_of_the_last_one_are_looked_at(monkeypatch):
    """Who dispatches it would else wait until Python lets it in, as seldom as every 5 ms; here it never does."""
    began, received = [], []

    class Noting(FakePrograms):
        def loop(self, *arguments, **limits):
            began.append(len(received))
            return super().loop(*arguments, **limits)

    scheduler = Scheduler(Noting(1), DecodingPlan(Precision.W4A16), rows=1, capacity=64)
    receive = scheduler._receive

    def noting(report, sequences, made_s):
        received.append(len(began))
        return receive(report, sequences, made_s)

    monkeypatch.setattr(scheduler, "_receive", noting)
    monkeypatch.setattr("qspec_jax.engine.scheduler._HAND_OVER_S", 0.05)  # long enough on a busy machine
    scheduler.add(Request([1, 2], 40, SamplingParams()))
    interval = sys.getswitchinterval()
    try:
        scheduler.advance(4)  # starts the thread
        sys.setswitchinterval(1000)
        for _ in range(5):
            scheduler.advance(4)
    finally:
        sys.setswitchinterval(interval)
    assert received[-5:] == [2, 3, 4, 5, 6]  # bursts that had begun


def test_a_request_of_one_token_needs_no_cycle():
    assert fake_run([(3, 1)] * 5, rows=2).count(("prefill", 8, [0, 1])) == 2


def test_the_first_token_of_a_prompt_does_not_wait_for_the_chunk_after_it():
    """Also where dispatching a chunk lasts as long as the chunk itself."""
    may_end, was_free = threading.Event(), []

    class SlowPrograms(FakePrograms):
        def loop(self, *arguments, **limits):
            was_free.append(may_end.wait(timeout=60))
            return super().loop(*arguments, **limits)

    scheduler = Scheduler(SlowPrograms(1), DecodingPlan(Precision.W4A16), rows=1, capacity=64)
    sequence = scheduler.add(Request([1, 2], 3, SamplingParams()))
    assert scheduler.advance() == [sequence]
    assert len(sequence.token_ids) == 1
    may_end.set()
    while scheduler.busy:
        scheduler.advance()
    assert len(sequence.token_ids) == 3
    assert was_free == [True]


def test_an_error_of_a_chunk_reaches_who_waits_for_it():
    class FailingPrograms(FakePrograms):
        def loop(self, *arguments, **limits):
            raise OutOfMemoryError("full")

    scheduler = Scheduler(FailingPrograms(1), DecodingPlan(Precision.W4A16), rows=1, capacity=64)
    scheduler.add(Request([1, 2], 3, SamplingParams()))
    scheduler.advance()
    with pytest.raises(OutOfMemoryError, match="full"):
        scheduler.advance()


def test_an_error_of_what_comes_next_loses_nothing_of_the_chunk_before_it():
    class FailingPrograms(FakePrograms):
        def prefill(self, plan, shape, state, chunks, rows, sources, count):
            if self.log:
                raise KeyboardInterrupt
            return super().prefill(plan, shape, state, chunks, rows, sources, count)

    scheduler = Scheduler(FailingPrograms(2), DecodingPlan(Precision.W4A16), rows=2, capacity=64)
    short, long, _ = (scheduler.add(Request([1, 2], new, SamplingParams())) for new in (2, 9, 5))
    scheduler.advance()
    with pytest.raises(KeyboardInterrupt):  # while the third takes the row of the first
        scheduler.advance()
    assert (len(short.token_ids), short.finished) == (2, True)
    assert (len(long.token_ids), long.finished) == (2, False)


def test_shapes_of_other_features_are_other_programs(model):
    plan = model.plan(draft="w4a8")
    greedy, drawing = Shape(3, CAPACITY), Shape(3, CAPACITY, SamplingFeatures(draws=True))
    assert programs._loop_key(plan, greedy) != programs._loop_key(plan, drawing)


class Serving(FakePrograms):
    """Notes the cycles of each dispatch; ``comes[n]`` is called while dispatch ``n`` of them runs."""

    def __init__(self, rows, comes):
        super().__init__(rows)
        self.comes, self.cycles = comes, []

    def loop(self, *arguments, max_cycles, until_finished):
        self.comes.get(len(self.cycles), lambda: None)()
        state, report = super().loop(*arguments, max_cycles=max_cycles, until_finished=until_finished)
        self.cycles.append(int(report.cycles))
        return state, report


def serve(monkeypatch, comes, *, rows, slice_cycles=3, first=(40,)):
    """Requests of a batch that serves in bursts of 16 cycles, and those that come meanwhile."""
    fake = Serving(rows, comes)
    scheduler = Scheduler(fake, DecodingPlan(Precision.W4A16), rows=rows, capacity=64, serves=True)
    fitting = {None: 16, SLICE_S: slice_cycles}
    monkeypatch.setattr(scheduler._pace, "cycles", lambda *, seconds, **_: fitting[seconds])
    for new in first:
        scheduler.add(Request([1, 2], new, SamplingParams()))
    return fake, scheduler


def test_a_burst_ends_when_somebody_comes_who_can_have_a_row(monkeypatch):
    comes = {}
    fake, scheduler = serve(monkeypatch, comes, rows=2)
    added = []
    comes[1] = lambda: added.append(scheduler.add(Request([1, 2, 3], 8, SamplingParams())))
    scheduler.advance()
    scheduler.advance()
    assert fake.cycles[:2] == [3, 3]  # of 16
    assert [name for name, *_ in fake.log[:4]] == ["prefill", "loop", "loop", "prefill"]
    while scheduler.busy:
        scheduler.advance()
    assert len(added[0].token_ids) == 8
    assert scheduler.totals.cycles == sum(fake.cycles)


def test_who_comes_while_a_prompt_is_read_waits_for_one_slice_where_there_is_room(monkeypatch):
    fake, scheduler = serve(monkeypatch, {}, rows=2)
    read, added = fake.prefill, []

    def prefill(*arguments, **options):
        added.append(scheduler.add(Request([1, 2, 3], 8, SamplingParams())) if not added else None)
        return read(*arguments, **options)

    monkeypatch.setattr(fake, "prefill", prefill)
    scheduler.advance()
    scheduler.advance()
    assert fake.cycles[0] == 3  # of 16, and nobody had finished
    assert [name for name, *_ in fake.log[:3]] == ["prefill", "loop", "prefill"]


def test_who_comes_to_a_full_batch_has_the_row_that_is_free_first(monkeypatch):
    comes = {}
    fake, scheduler = serve(monkeypatch, comes, rows=2, first=(40, 6))
    added = []
    comes[0] = lambda: added.append(scheduler.add(Request([1, 2, 3], 8, SamplingParams())))
    scheduler.advance()
    scheduler.advance()
    assert fake.cycles[:2] == [3, 3]  # the other one has made its five tokens after the prompt's by then
    assert [name for name, *_ in fake.log[:4]] == ["prefill", "loop", "loop", "prefill"]


def test_a_burst_that_nobody_comes_to_is_as_long_as_ever(monkeypatch):
    fake, scheduler = serve(monkeypatch, {}, rows=2)
    scheduler.advance()
    assert scheduler.advance()[0].token_ids == list(range(17))
    assert fake.cycles[:6] == [3, 3, 3, 3, 3, 1]


def test_a_batch_that_serves_reads_few_prompts_before_those_that_decode(monkeypatch):
    """In the order in which they came; a batch that does not reads one chunk of each."""
    fake, scheduler = serve(monkeypatch, {}, rows=4)
    scheduler.advance()
    for length in (3, 9, 5):
        scheduler.add(Request([1] * length, 2, SamplingParams()))
    while scheduler.busy:
        monkeypatch.setattr(scheduler._pace.reading, "_chunk_s", 0.04)
        scheduler.advance()
    assert [rows for name, *_, rows in fake.log if name == "prefill"] == [[0], [1], [2], [3]]
