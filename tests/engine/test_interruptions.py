"""Ctrl-C, wherever it comes: it is raised, and whoever goes on gets each result once, as without it."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

import qspec_jax
from qspec_jax import SamplingParams
from qspec_jax.decoding.programs import Programs
from qspec_jax.errors import OutOfMemoryError
from tests import tiny

PROMPTS = [[5, 6, 7], [30, 31], [60] * 9, [8], [11, 12, 13]]
SAMPLING = [{}, {"temperature": 1.2, "seed": 4}, {"logprobs": 2}, {"presence_penalty": 0.5}, {}]
LIMITS = [9, 1, 5, 12, 2]
# Of the engine, counted as they run: some, or with QSPEC_JAX_THOROUGH=1 all.
LINES = range(1, 1200, 1 if os.environ.get("QSPEC_JAX_THOROUGH", "0") != "0" else 97)
ENGINE = Path(qspec_jax.__file__).parent / "engine"


@pytest.fixture(scope="module")
def model():
    return tiny.language_model()


def filled(model, mode="qspec"):
    batch = model.pipeline(model.plan(mode, draft="w4a8"), batch_size=2, max_seq_len=64)
    for prompt, sampling, limit in zip(PROMPTS, SAMPLING, LIMITS, strict=True):
        batch.submit(prompt, max_new_tokens=limit, sampling=SamplingParams.of(sampling))
    return batch


def described(result):
    return result.token_ids, result.finish_reason, result.logprobs, result.top_logprobs


@pytest.fixture(scope="module")
def expected(model):
    return [described(result) for result in filled(model).results()]


def take(batch, kind=KeyboardInterrupt):
    """All results, and how often taking them was interrupted."""
    got, count = [], 0
    for _ in range(100):
        try:
            for result in batch.results():
                got.append(described(result))
            break
        except kind:
            count += 1
    return got, count


@pytest.mark.parametrize("name", ["prefill", "loop", "compile", "idle_state"])
@pytest.mark.parametrize("after", [False, True])
def test_an_interruption_of_a_dispatch_loses_nothing(model, expected, monkeypatch, name, after):
    """Also one that comes when the device has used the state up."""
    original, calls = getattr(Programs, name), []

    def interrupted(self, *arguments, **options):
        calls.append(name)
        if after:
            result = original(self, *arguments, **options)
        if len(calls) in (1, 3, 4):
            raise KeyboardInterrupt
        return result if after else original(self, *arguments, **options)

    monkeypatch.setattr(Programs, name, interrupted)
    batch = filled(model)
    got, count = take(batch)
    assert got == expected
    assert count == sum(len(calls) >= number for number in (1, 3, 4))
    assert batch.totals.requests == len(PROMPTS)
    assert batch.totals.tokens == sum(len(result[0]) for result in expected)


def test_an_error_of_the_device_loses_nothing(model, expected, monkeypatch):
    original, calls = Programs.loop, []

    def fails_once(self, *arguments, **options):
        calls.append(1)
        result = original(self, *arguments, **options)
        if len(calls) == 2:
            raise OutOfMemoryError("full")
        return result

    monkeypatch.setattr(Programs, "loop", fails_once)
    assert take(filled(model), OutOfMemoryError) == (expected, 1)


def test_an_interruption_that_a_library_reports_as_another_error_is_one(model, expected, monkeypatch):
    original, calls = Programs.prefill, []

    def interrupted(self, *arguments, **options):
        calls.append(1)
        try:
            if len(calls) == 1:
                raise KeyboardInterrupt
        except KeyboardInterrupt as error:
            raise SystemError("returned a result with an exception set") from error
        if len(calls) == 2:
            raise OutOfMemoryError("full")
        return original(self, *arguments, **options)

    monkeypatch.setattr(Programs, "prefill", interrupted)
    batch = filled(model)
    with pytest.raises(KeyboardInterrupt):
        next(batch.results())
    try:
        raise KeyboardInterrupt
    except KeyboardInterrupt:
        with pytest.raises(OutOfMemoryError):  # which has nothing to do with what is handled here
            next(batch.results())
    assert take(batch) == (expected, 0)


class Interrupter:
    """Raises KeyboardInterrupt before a line of the engine in this thread; Python then asks it no more."""

    def __init__(self, line):
        self.line, self.lines = line, 0

    def __call__(self, frame, event, argument):
        return self.count if Path(frame.f_code.co_filename).parent == ENGINE else None

    def count(self, frame, event, argument):
        self.lines += event == "line"
        if self.lines == self.line:
            raise KeyboardInterrupt
        return self.count


@pytest.mark.parametrize("line", LINES)
def test_an_interruption_before_any_line_loses_nothing(model, expected, line):
    batch, interrupter = filled(model), Interrupter(line)
    before = sys.gettrace()
    sys.settrace(interrupter)
    try:
        got, count = take(batch)
    finally:
        sys.settrace(before)
    assert got == expected
    assert count == (interrupter.lines >= line)


def test_generate_raises_an_interruption(model, monkeypatch):
    def interrupted(self, *arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(Programs, "loop", interrupted)
    with pytest.raises(KeyboardInterrupt):
        model.generate(PROMPTS, max_new_tokens=8, max_seq_len=64)
