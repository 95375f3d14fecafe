"""Requests in, results out: in order, each for itself, and what is finished when the user has enough."""

from __future__ import annotations

import itertools
import sys

import pytest

from qspec_jax.engine import pipeline as pipelines
from qspec_jax.engine.scheduler import Scheduler
from qspec_jax.errors import UsageError
from qspec_jax.model.precision import Precision
from tests import tiny

PROMPTS = [[5, 6, 7], [30, 31], [60] * 9, [8], [11, 12, 13]]


@pytest.fixture(scope="module")
def model():
    return tiny.language_model()


def pipeline(model, batch_size=2):
    return model.pipeline(model.plan("w4a16"), batch_size=batch_size, max_seq_len=64)


def tokens(results):
    return [result.token_ids for result in results]


@pytest.fixture(scope="module")
def expected(model):
    return tokens(model.generate(PROMPTS, mode="w4a16", max_new_tokens=12, max_seq_len=64, batch_size=2))


def test_results_come_in_the_order_of_submission_whatever_is_finished_first(model, expected):
    batch = pipeline(model)
    limits = [12, 2, 1, 5, 12]
    for prompt, limit in zip(PROMPTS, limits, strict=True):
        batch.submit(prompt, max_new_tokens=limit)
    assert len(batch) == len(PROMPTS)
    assert tokens(batch.results()) == [ids[:limit] for ids, limit in zip(expected, limits, strict=True)]
    assert len(batch) == 0


def test_requests_may_be_submitted_while_results_are_taken(model, expected):
    batch, waiting, got = pipeline(model), list(PROMPTS[1:]), []
    batch.submit(PROMPTS[0], max_new_tokens=12)
    for result in batch.results():
        got.append(result.token_ids)
        if waiting:
            batch.submit(waiting.pop(0), max_new_tokens=12)
    assert got == expected
    batch.submit(PROMPTS[2], max_new_tokens=12)  # after all are finished
    assert tokens(batch.results()) == [expected[2]]


def test_a_request_that_cannot_be_served_fails_alone(model, expected):
    batch = pipeline(model)
    batch.submit(PROMPTS[0], max_new_tokens=12)
    batch.submit([])
    batch.submit(PROMPTS[1], max_new_tokens=64)
    batch.submit(PROMPTS[1], sampling={"temperatur": 1})
    batch.submit(PROMPTS[1], sampling={"top_k": 1.5})
    batch.submit([200])
    batch.submit(PROMPTS[1], max_new_tokens=12)
    first, *failed, last = batch.results()
    assert tokens([first, last]) == expected[:2]
    assert [result.finish_reason for result in failed] == ["error"] * 5
    messages = [
        "is empty",
        "do not fit max_seq_len=64",
        "'temperatur' is no sampling",
        "top_k=1.5: use a whole",
        "0..95",
    ]
    for result, message in zip(failed, messages, strict=True):
        assert message in result.error


@pytest.fixture
def interrupted_in_the_eighth_step(monkeypatch):
    """Ctrl-C comes once, after seven short steps."""
    advance, calls = Scheduler.advance, []

    def advance_until_interrupted(self, max_cycles=None):
        calls.append(1)
        if len(calls) == 8:
            raise KeyboardInterrupt
        return advance(self, 2)

    monkeypatch.setattr(Scheduler, "advance", advance_until_interrupted)


@pytest.mark.usefixtures("interrupted_in_the_eighth_step")
def test_interrupting_raises_and_then_there_is_what_is_finished_and_what_there_is_of_the_rest(model, expected):
    batch = pipeline(model)
    for prompt in PROMPTS:
        batch.submit(prompt, max_new_tokens=12)
    with pytest.raises(KeyboardInterrupt):
        batch.collect()
    results = batch.interrupt()
    reasons = [result.finish_reason for result in results]
    assert reasons == ["length", "length", "interrupted", "interrupted", "interrupted"]
    assert tokens(results[:2]) == expected[:2]
    for result, whole in zip(results[2:], expected[2:], strict=True):
        assert result.token_ids == whole[: len(result.token_ids)]
    assert 0 < len(results[2].token_ids) < 12
    assert results[4].token_ids == []


def test_a_step_takes_no_longer_for_those_that_wait(model):
    """Counted in lines of Python, as clocks differ."""
    lines = {}
    for count in (3, 40, 400):  # the first compiles
        batch, seen = pipeline(model), []
        for _ in range(count):
            batch.submit([5], max_new_tokens=2)
        results = batch.results()

        def note(frame, event, argument, seen=seen):
            if "engine" not in frame.f_code.co_filename:
                return None
            seen.append(event)
            return note

        before = sys.gettrace()
        sys.settrace(note)
        try:
            for _ in range(min(count, 11)):  # the first step takes in what has arrived
                next(results)
        finally:
            sys.settrace(before)
        lines[count] = len(seen)
    assert lines[400] == lines[40]


@pytest.mark.usefixtures("interrupted_in_the_eighth_step")
def test_who_asks_for_results_gets_the_interruption_and_a_loop_ends(model, expected):
    finished = []

    def ask_for_each():
        for prompt in PROMPTS:
            finished.extend(model.generate([prompt], mode="w4a16", max_new_tokens=12, max_seq_len=64))

    with pytest.raises(KeyboardInterrupt):
        ask_for_each()
    assert 0 < len(finished) < len(PROMPTS)
    (after,) = model.generate([PROMPTS[3]], mode="w4a16", max_new_tokens=12, max_seq_len=64)
    assert after.token_ids == expected[3]


def test_progress_shows_finished_requests_and_speed(model, capsys):
    model.generate(PROMPTS, mode="w4a16", max_new_tokens=12, max_seq_len=64, batch_size=2, progress=True)
    shown = capsys.readouterr().err
    assert "5/5" in shown
    assert "tokens/s" in shown
    assert "tokens/cycle" in shown


def test_the_times_of_a_request_add_up(model):
    results = model.generate(PROMPTS, mode="w4a16", max_new_tokens=12, max_seq_len=64, batch_size=1)
    stats = [result.stats for result in results]
    assert all(one.prefill_s > 0 and one.decode_s > 0 for one in stats)
    for one, next_one in itertools.pairwise(stats):
        assert next_one.waited_s >= one.prefill_s + one.decode_s


def test_a_pipeline_goes_on_after_an_interruption(model, expected):
    batch = pipeline(model)
    for prompt in PROMPTS[:3]:
        batch.submit(prompt, max_new_tokens=12)
    assert len(batch.interrupt()) == 3
    batch.submit(PROMPTS[3], max_new_tokens=12)
    assert tokens(batch.results()) == [expected[3]]


@pytest.mark.parametrize("place", range(3))
def test_an_interruption_while_texts_are_made_loses_no_result(model, expected, monkeypatch, place):
    batch, made, result_of = pipeline(model), [], pipelines.result_of
    for prompt in PROMPTS[:3]:
        batch.submit(prompt, max_new_tokens=12)

    def interrupted(*arguments, **options):
        made.append(1)
        if len(made) == place + 1:
            raise KeyboardInterrupt
        return result_of(*arguments, **options)

    monkeypatch.setattr(pipelines, "result_of", interrupted)
    with pytest.raises(KeyboardInterrupt):
        batch.collect()
    assert tokens(batch.interrupt()) == expected[:3]
    assert (len(batch), batch.interrupt()) == (0, [])


def test_a_pipeline_has_a_plan_that_its_model_can_run(model):
    for plan in ("qspec", 3, Precision.W4A16, [model.plan()]):
        for use in (lambda plan: model.pipeline(plan), lambda plan: model.attempt([5], plan)):
            with pytest.raises(UsageError, match=r"^plan=.*: use what LanguageModel\.plan returns"):
                use(plan)
    with pytest.raises(UsageError, match="requests has 'text'; use what "):
        model.run(["text"], model.plan())
    unquantised = tiny.language_model(quantization=None)
    with pytest.raises(UsageError, match="w4a16 needs 4-bit weights"):
        unquantised.pipeline(model.plan("w4a16"))


def test_a_pipeline_needs_room(model):
    with pytest.raises(UsageError, match="batch_size=2147483647 must be at most 1048576"):
        model.pipeline(batch_size=2**31 - 1)
    with pytest.raises(UsageError, match="batch_size=0 must be at least 1"):
        model.pipeline(batch_size=0)
    with pytest.raises(UsageError, match="max_seq_len=257 must be between 1 and the model's context of 256"):
        model.pipeline(max_seq_len=257)
