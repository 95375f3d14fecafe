"""A service: tokens come as they are made, an answer is what the request yields alone, and its end frees its row."""

from __future__ import annotations

import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import jax
import pytest

from qspec_jax.decoding.programs import Programs
from qspec_jax.decoding.sampling_params import SamplingParams
from qspec_jax.engine.answer import Answer
from qspec_jax.engine.request_queue import RequestQueue
from qspec_jax.engine.requests import Request
from qspec_jax.errors import OutOfMemoryError, QSpecError, UsageError
from tests import tiny

LENGTH = 128
LONG = {"max_new_tokens": 110}


class Letters:
    """A tokenizer, and its decoder of a stream, in which a token is a letter."""

    eos_token_ids = ()
    special_tokens: dict[int, str] = {}  # noqa: RUF012
    has_chat_template = False

    def stream_decoder(self):
        return self

    def decode(self, tokens):
        return "".join(chr(ord("A") + token) for token in tokens)

    push = decode

    def finish(self):
        return ""


@pytest.fixture(scope="module")
def model():
    made = tiny.language_model()
    made.tokenizer = Letters()
    return made


@pytest.fixture
def service(model):
    with model.service(model.plan("w4a16"), batch_size=2, max_seq_len=LENGTH) as made:
        made._scheduler._pace.burst_s = 0.003  # pieces also of a model that is so small
        yield made
        wait_until(lambda: made.num_rows_in_use == made.num_waiting == len(made) == 0)


def wait_until(condition, seconds=60.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


def alone(service, prompt, **options):
    """What a request yields while nothing else runs, taken at once."""
    return service.submit(prompt, **options).result(60.0)


def test_a_cache_may_be_made_before_anybody_comes(model, monkeypatch):
    made, idle_state = [], model.programs.idle_state
    monkeypatch.setattr(model.programs, "idle_state", lambda shape: made.append(shape) or idle_state(shape))
    with model.service(model.plan("w4a16"), batch_size=2, max_seq_len=LENGTH) as service:
        expected = alone(service, [5, 6, 7], **LONG)
    with model.service(model.plan("w4a16"), batch_size=2, max_seq_len=LENGTH) as service:
        assert len(made) == 1
        service.compile()
        service.allocate()
        assert len(made) == 2
        compiled = model.num_compilations
        answer = service.submit([5, 6, 7], **LONG)
        service.allocate()  # there is one: nothing happens, whatever runs
        assert answer.result(60.0).token_ids == expected.token_ids
        assert (len(made), model.num_compilations) == (2, compiled)


def test_a_cache_that_does_not_fit_is_told_when_it_is_made(model, monkeypatch):
    def exhausted(shape):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 17179869184 bytes.")

    monkeypatch.setattr(model.programs, "idle_state", exhausted)
    with (
        model.service(model.plan("w4a16"), batch_size=2, max_seq_len=LENGTH) as service,
        pytest.raises(OutOfMemoryError, match="while making the cache"),
    ):
        service.allocate()


def test_pieces_come_as_they_are_made_and_are_the_result(service, monkeypatch):
    """However slow the reader is: here the batch waits for it."""
    expected = alone(service, [5, 6, 7], **LONG)
    pieces, advance = [], service._scheduler.advance

    def advance_once_it_was_read():
        made = max((len(one.token_ids) for one in service._scheduler._rows.sequences if one is not None), default=0)
        wait_until(lambda: sum(len(piece.token_ids) for piece in pieces) >= made - 8)
        return advance(2)

    monkeypatch.setattr(service._scheduler, "advance", advance_once_it_was_read)
    answer = service.submit([5, 6, 7], **LONG)
    for piece in answer:
        pieces.append(piece)
    assert len(pieces) > 2
    assert [piece.finished for piece in pieces] == [False] * (len(pieces) - 1) + [True]
    result = answer.result()
    assert "".join(piece.text for piece in pieces) == result.text == expected.text
    assert [token for piece in pieces for token in piece.token_ids] == result.token_ids == expected.token_ids
    assert (answer.done, answer.take()) == (True, None)


def test_a_stop_string_is_never_shown_whatever_the_pieces(service):
    text = alone(service, [5, 6, 7], **LONG).text
    for place in (3, 40, 90):
        stop = text[place : place + 4]
        pieces = list(service.submit([5, 6, 7], **LONG, sampling={"stop": [stop]}))
        assert "".join(piece.text for piece in pieces) == text[: text.index(stop)]


def test_what_is_cancelled_frees_its_row_and_changes_no_other(service):
    rng = random.Random(0)
    prompts = [[rng.randrange(96) for _ in range(rng.choice((1, 9, 30)))] for _ in range(12)]
    expected = [alone(service, prompt, max_new_tokens=20).token_ids for prompt in prompts]
    with ThreadPoolExecutor(4) as pool:

        def ask(index):
            answer = service.submit(prompts[index], max_new_tokens=20)
            if index % 3 == 0:
                for _ in zip(range(index % 2), answer, strict=False):
                    pass
                answer.cancel()
            return answer.result(60.0)

        results = list(pool.map(ask, range(12)))
    for index, result in enumerate(results):
        if result.finish_reason == "interrupted":
            assert index % 3 == 0
            assert result.token_ids == expected[index][: len(result.token_ids)]
        else:
            assert result.token_ids == expected[index]


def test_one_that_waits_is_cancelled_before_it_has_a_row(service):
    running = [service.submit([5, 6], **LONG) for _ in range(2)]
    waiting = service.submit([7, 8], **LONG)
    waiting.cancel()
    result = waiting.result(60.0)
    assert (result.finish_reason, result.token_ids, result.text) == ("interrupted", [], "")
    assert waiting.sequence.cancelled  # in the engine, too
    assert list(waiting)[-1].finished
    for answer in running:
        answer.cancel()
        answer.cancel()


def test_one_that_leaves_before_a_step_has_seen_it_gets_no_row():
    queue, request = RequestQueue(), Request([5, 6], 4, SamplingParams())
    gone, other = queue.add(request), queue.add(request)
    queue.drop(gone)
    queue.take_in()
    assert (len(queue), queue.next(), queue.next()) == (1, other, None)


def test_those_that_left_while_they_waited_are_not_kept(service):
    running = [service.submit([5, 6], **LONG) for _ in range(2)]
    for _ in range(50):
        service.submit([7, 8], **LONG).cancel()
    wait_until(lambda: service.num_waiting <= 2 and len(service) <= 2)
    for answer in running:
        answer.cancel()


def test_one_that_is_done_before_its_answer_is_there_is_handed_out(service, monkeypatch):
    """A step under way may take in, and finish, what another thread is still adding."""
    begun, added, ended, advance = *(threading.Event() for _ in range(3)), service._scheduler.advance

    def step():
        begun.set()
        assert added.wait(60.0)
        changed = advance()
        ended.set()
        return changed

    class Late(Answer):
        def __init__(self, *arguments, **options):
            added.set()
            assert ended.wait(60.0)
            super().__init__(*arguments, **options)

    other = service.submit([5], **LONG)
    monkeypatch.setattr(service._scheduler, "advance", step)
    assert begun.wait(60.0)
    monkeypatch.setattr("qspec_jax.engine.service.Answer", Late)
    answer = service.submit([7], max_new_tokens=1)
    assert len(answer.result(60.0).token_ids) == 1
    other.cancel()


def test_a_request_that_cannot_be_served_is_refused_at_once(service):
    with pytest.raises(UsageError, match="do not fit max_seq_len"):
        service.submit([5] * 100, **LONG)
    with pytest.raises(UsageError, match="temperature"):
        service.submit([5], sampling={"temperature": -1})


def test_an_error_of_the_device_that_passes_is_not_seen(service, monkeypatch):
    expected, original, calls = alone(service, [5, 6, 7], **LONG), Programs.loop, []

    def fails_once(self, *arguments, **options):
        calls.append(1)
        if len(calls) == 2:
            raise OutOfMemoryError("full")
        return original(self, *arguments, **options)

    monkeypatch.setattr(Programs, "loop", fails_once)
    pieces = list(service.submit([5, 6, 7], **LONG))
    assert len(calls) > 2
    assert [token for piece in pieces for token in piece.token_ids] == expected.token_ids
    assert "".join(piece.text for piece in pieces) == expected.text


def test_an_error_that_stays_fails_what_runs_and_nothing_later(service, monkeypatch):
    def fails(self, *arguments, **options):
        raise OutOfMemoryError("full")

    with monkeypatch.context() as patch:
        patch.setattr(Programs, "loop", fails)
        answers = [service.submit([5, 6, 7], **LONG) for _ in range(3)]
        for answer in answers:
            with pytest.raises(QSpecError, match="the request failed: full"):
                list(answer)
            with pytest.raises(QSpecError, match="the request failed: full"):
                answer.result(60.0)
        wait_until(lambda: service.num_rows_in_use == 0)
    assert service.submit([5, 6, 7], max_new_tokens=5).result(60.0).finish_reason == "length"


@pytest.mark.parametrize("where", ["compile", "loop"])
def test_a_kind_of_sampling_that_fails_ends_those_who_ask_for_it_alone(model, monkeypatch, where):
    """Whether its programs cannot be compiled, or not run; who asks as usual is served meanwhile, and later."""
    original, options = getattr(Programs, where), {"max_new_tokens": 9, "sampling": {"logprobs": 1}}

    def fails(self, plan, shape, *arguments, **options):
        if shape.features.scores:
            raise OutOfMemoryError("full; use a smaller model")
        return original(self, plan, shape, *arguments, **options)

    said = []
    with model.service(model.plan("w4a16"), batch_size=2, max_seq_len=LENGTH, on_event=said.append) as service:
        service._scheduler._pace.burst_s = 0.003
        expected = alone(service, [5, 6, 7], **LONG).token_ids
        with monkeypatch.context() as patch:
            patch.setattr(Programs, where, fails)
            running = service.submit([5, 6, 7], **LONG)
            failing = [service.submit([5, 6], **options) for _ in range(2)]
            for answer in failing:
                with pytest.raises(QSpecError, match=r"the request failed: .*full; use a smaller model"):
                    list(answer)
                assert answer.finish_reason == "error"
            assert running.result(60.0).token_ids == expected
            assert alone(service, [5, 6, 7], **LONG).token_ids == expected
        assert [line for line in said if line.startswith("requests have failed: ") and "smaller model" in line]
        assert len(service.submit([5, 6], **options).result(60.0).logprobs) == 9


def test_text_that_cannot_be_made_fails_its_request_alone(service, monkeypatch):
    def fails(tokens):
        raise ValueError("no such token")

    good, bad = service.submit([5, 6], max_new_tokens=9), service.submit([5, 6, 7], **LONG)
    monkeypatch.setattr(bad._watch, "push", fails)
    with pytest.raises(QSpecError, match="no such token"):
        bad.result(60.0)
    assert len(good.result(60.0).token_ids) == 9


def test_a_service_that_is_closed_ends_what_runs_and_takes_no_more(model):
    service = model.service(model.plan("w4a16"), batch_size=2, max_seq_len=LENGTH)
    answers = [service.submit([5, 6], **LONG) for _ in range(4)]
    taken = threading.Thread(target=lambda: [list(answer) for answer in answers], daemon=True)
    taken.start()
    assert service.close(60.0)
    taken.join(60.0)
    assert not taken.is_alive()
    assert {answer.result(0.0).finish_reason for answer in answers} <= {"interrupted", "length"}
    with pytest.raises(QSpecError, match="closed"):
        service.submit([5, 6], **LONG)
    assert service.close()


def test_a_result_is_waited_for_no_longer_than_is_asked(service):
    with pytest.raises(TimeoutError):
        service.submit([5, 6], **LONG).result(0.0)


def test_a_service_tells_when_an_answer_changes_and_when_it_is_done(model):
    ended, changed = [], threading.Event()
    with model.service(model.plan("w4a16"), batch_size=2, max_seq_len=LENGTH, on_end=ended.append) as service:
        answer = service.submit([5, 6], max_new_tokens=3, on_change=changed.set)
        assert changed.wait(60)
        answer.result(60.0)
        wait_until(lambda: ended == [answer])


def test_callbacks_that_fail_end_their_answer_at_most(model):
    told, calls = [], []

    def tell(event):
        told.append(event)
        raise ZeroDivisionError("another one")

    def fail(*answer):
        calls.append(answer)
        raise ZeroDivisionError("a mistake of the caller")

    options = {"batch_size": 2, "max_seq_len": LENGTH, "on_event": tell, "on_end": fail}
    with model.service(model.plan("w4a16"), **options) as service:
        service._scheduler._pace.burst_s = 0.003
        failing = service.submit([5, 6], on_change=fail, **LONG)
        cancelled = service.submit([5, 6], on_change=fail, **LONG)
        cancelled.cancel()
        with pytest.raises(QSpecError, match="the request failed: a mistake of the caller"):
            failing.result(60.0)
        assert len(service.submit([5, 6], max_new_tokens=3).result(60.0).token_ids) == 3
        wait_until(lambda: "on_end has failed: ZeroDivisionError: a mistake of the caller" in told)
        assert calls.count(()) == 2  # of each answer once
