"""A batch that serves does without widths of chunks whose programs fail: prompts are read in others."""

from __future__ import annotations

import pytest

from qspec_jax import SamplingParams
from qspec_jax.decoding import chunks
from qspec_jax.decoding.plan import DecodingPlan
from qspec_jax.decoding.programs import Programs
from qspec_jax.decoding.sampling_params import SamplingFeatures
from qspec_jax.engine.chunk_widths import ChunkWidths
from qspec_jax.engine.requests import Request
from qspec_jax.engine.scheduler import Scheduler
from qspec_jax.errors import OutOfMemoryError, QSpecError
from qspec_jax.model.precision import Precision
from tests import tiny
from tests.engine.test_scheduler import FakePrograms

PROMPT = [5, 6, 7, 1, 2] * 8


@pytest.fixture(autouse=True)
def _narrow_chunks(monkeypatch):
    monkeypatch.setattr(chunks, "CHUNK_WIDTHS", (8, 16, 32))


class Failing(FakePrograms):
    """Programs of which those of some widths do not compile."""

    def __init__(self, rows, failing=()):
        super().__init__(rows)
        self.failing, self.asked, self.loop_fails = set(failing), [], False

    def compile(self, plan, shape, widths, *, on_event):
        self.asked.append(set(widths))
        if self.failing & set(widths) or self.loop_fails:
            raise OutOfMemoryError("no room for it")


def batch(failing, **options):
    events, programs = [], Failing(2, failing)
    options = {"serves": True, "on_event": events.append, **options}
    return programs, Scheduler(programs, DecodingPlan(Precision.W4A16), rows=2, capacity=64, **options), events


def request(length, new_tokens=4):
    return Request([1] * length, new_tokens, SamplingParams())


@pytest.fixture(scope="module")
def model():
    return tiny.language_model()


def finish(scheduler):
    while scheduler.busy:
        scheduler.advance(1)


def read(programs):
    """Widths of all chunks that were read, in order."""
    return [width for name, width, *_ in programs.log if name == "prefill"]


def test_what_cannot_be_compiled_is_read_in_narrower_chunks_and_who_runs_goes_on():
    programs, scheduler, events = batch({32})
    running = scheduler.add(request(3, 40))
    scheduler.advance(1)
    long, longer = scheduler.add(request(30)), scheduler.add(request(43))
    finish(scheduler)
    assert [len(one.token_ids) for one in (running, long, longer)] == [40, 4, 4]
    # Of 30 tokens, and of 43 of which another row holds the first 16.
    assert sorted(read(programs)) == [8, 16, 16, 16, 16]
    assert events == ["prompts are read without chunks of 32 tokens: its program cannot be compiled: no room for it"]
    tries = sum(32 in widths for widths in programs.asked)
    finish(scheduler)
    scheduler.add(request(40))
    finish(scheduler)
    assert sum(32 in widths for widths in programs.asked) == tries == 2  # with others, and alone


def test_what_cannot_be_compiled_is_padded_to_a_wider_one():
    programs, scheduler, _ = batch({8})
    short, long = scheduler.add(request(3)), scheduler.add(request(40))
    finish(scheduler)
    assert [len(one.token_ids) for one in (short, long)] == [4, 4]
    assert sorted(read(programs)) == [16, 16, 32]


def test_all_that_is_asked_for_is_compiled_but_what_cannot_be():
    programs, scheduler, events = batch({16, 32})
    scheduler.expect([8, 16, 32], SamplingFeatures())
    scheduler.compile()
    assert programs.asked[-1] == {8}
    assert len(events) == 2
    scheduler.add(request(20))
    finish(scheduler)
    assert read(programs) == [8, 8, 8]


@pytest.mark.parametrize("all_fail", [True, False])
def test_where_nothing_reads_prompts_it_is_an_error_and_all_is_tried_again(all_fail):
    """As it is where the loop does not compile, which no width is blamed for."""
    programs, scheduler, events = batch({8, 16, 32} if all_fail else ())
    programs.loop_fails = not all_fail
    long = scheduler.add(request(30))
    with pytest.raises(OutOfMemoryError, match="no room for it"):
        scheduler.advance(1)
    programs.failing, programs.loop_fails = set(), False
    finish(scheduler)
    assert len(long.token_ids) == 4
    assert read(programs) == [32]
    assert all_fail or events == []


def test_a_batch_that_serves_nobody_fails_at_once():
    _, scheduler, events = batch({32}, serves=False)
    scheduler.add(request(30))
    with pytest.raises(OutOfMemoryError, match="no room for it"):
        scheduler.advance(1)
    assert events == []


def test_what_has_read_anything_is_never_left_out():
    """Programs for other kinds of sampling fail those who ask for them."""
    programs, scheduler, _ = batch(())
    first = scheduler.add(request(30))
    finish(scheduler)
    programs.failing = {32}
    scheduler.add(request(30))
    with pytest.raises(OutOfMemoryError, match="no room for it"):
        scheduler.advance(1)
    assert not scheduler.leave_out_width(OutOfMemoryError("no room for it"))
    assert len(first.token_ids) == 4


def test_the_longest_chunks_that_are_left_are_such_as_rows_may_share():
    widths = ChunkWidths()
    with pytest.raises(ZeroDivisionError), widths.first_read(32):
        raise ZeroDivisionError
    assert widths.leave_out_failed(multiple=32) is None
    assert widths.are_all
    with pytest.raises(ZeroDivisionError), widths.first_read(32):
        raise ZeroDivisionError
    assert widths.leave_out_failed(multiple=16) == 32
    assert widths.usable == (8, 16)
    assert widths.leave_out_failed(multiple=16) is None


def test_what_failed_in_a_step_before_is_not_blamed():
    """Of two failures the second one may have another cause: here the cache cannot be made again."""
    programs, scheduler, _ = batch(())

    def fails(*arguments, **options):
        raise OutOfMemoryError("full")

    scheduler.add(request(30))
    programs.prefill = fails
    with pytest.raises(OutOfMemoryError):
        scheduler.advance(1)
    programs.idle_state = fails
    with pytest.raises(OutOfMemoryError):
        scheduler.advance(1)
    assert not scheduler.leave_out_width(OutOfMemoryError("full"))


@pytest.mark.parametrize("where", ["compile", "prefill"])
def test_a_service_reads_by_what_does_not_fail_and_nobody_fails(model, where, monkeypatch):
    """Whether a program cannot be compiled, or not run; before and after, tokens are those of chunks that it has."""
    original, said = getattr(Programs, where), []
    with monkeypatch.context() as patch:
        patch.setattr(chunks, "CHUNK_WIDTHS", (8, 16))
        (expected,) = model.generate([PROMPT], max_new_tokens=9, mode="w4a16")

    def fails(self, plan, shape, *arguments, **options):
        wide = 32 in arguments[0] if where == "compile" else arguments[1].tokens.shape[1] == 32
        if wide:
            raise OutOfMemoryError("full; use a smaller model")
        return original(self, plan, shape, *arguments, **options)

    monkeypatch.setattr(Programs, where, fails)
    with model.service(model.plan("w4a16"), batch_size=2, max_seq_len=128, on_event=said.append) as service:
        answers = [service.submit(prompt, max_new_tokens=9) for prompt in ([5, 6], PROMPT, PROMPT)]
        assert [len(one.result(60.0).token_ids) for one in answers] == [9, 9, 9]
        assert [one.result(60.0).token_ids for one in answers[1:]] == [expected.token_ids] * 2
        assert service.submit(PROMPT, max_new_tokens=9).result(60.0).token_ids == expected.token_ids
    failed = {"compile": "its program cannot be compiled", "prefill": "its program has failed"}[where]
    assert [line for line in said if "prompts are read without" in line] == [
        f"prompts are read without chunks of 32 tokens: {failed}: full; use a smaller model"
    ]


def test_a_service_that_can_read_nothing_fails_what_waits_and_nothing_later(model, monkeypatch):
    def fails(self, *arguments, **options):
        raise OutOfMemoryError("full")

    with model.service(model.plan("w4a16"), batch_size=2, max_seq_len=128) as service:
        with monkeypatch.context() as patch:
            patch.setattr(Programs, "prefill", fails)
            answer = service.submit(PROMPT, max_new_tokens=9)
            with pytest.raises(QSpecError, match="the request failed: full"):
                answer.result(60.0)
        assert len(service.submit(PROMPT, max_new_tokens=9).result(60.0).token_ids) == 9
