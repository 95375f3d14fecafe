"""Calls of the process that leads are those that the others make, on states of their own; no program is compiled."""

from __future__ import annotations

import dataclasses
import gc
import pickle
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from qspec_jax import DecodingPlan, QuantConfig, View
from qspec_jax.decoding import led_programs
from qspec_jax.decoding.chunks import Shape
from qspec_jax.decoding.led_programs import LeadingPrograms, follow
from qspec_jax.decoding.programs import Programs
from qspec_jax.decoding.state import DecodeState, PromptChunk, Report
from qspec_jax.device import processes
from qspec_jax.errors import OutOfMemoryError, UsageError
from qspec_jax.model.decoder import Decoder
from tests import tiny

SHAPE, PLAN = Shape(2, 64), DecodingPlan(View())
RETIRED = np.zeros(2, bool)


def empty(kind):
    return kind(**dict.fromkeys(field.name for field in dataclasses.fields(kind)))


class Made:
    """Stands for the programs of a process: what was asked of them, and with which states."""

    def __init__(self):
        self.calls, self.alive = [], {}

    def state(self):
        made = empty(DecodeState)
        self.alive[id(made)] = made  # none gets the identity of another
        return made


@pytest.fixture
def base(monkeypatch):
    """The methods of the base class, which note who calls them with which states."""

    def note(self, name, *given):
        self.noted.calls.append((name, *given))
        return self.noted.state()

    for name in ("idle_state", "with_rows_of", "with_features"):
        monkeypatch.setattr(Programs, name, lambda self, *given, name=name: note(self, name, *given))
    for name in ("prefill", "loop"):

        def run(self, *given, name=name, **options):
            return note(self, name, *given, *options.values()), empty(Report)

        monkeypatch.setattr(Programs, name, run)
    for name in ("compile", "lay_out_weights"):
        monkeypatch.setattr(Programs, name, lambda self, *given, name=name, **_: note(self, name, *given) and None)
    monkeypatch.setattr(Programs, "__init__", lambda self, *_: setattr(self, "noted", Made()))


def leading(told):
    mesh = Mesh([jax.local_devices()], ("data", "model"))
    return LeadingPrograms(object.__new__(Decoder), mesh, told.append)


def followed(told):
    programs = Programs(object.__new__(Decoder))
    follow(programs, [pickle.loads(pickle.dumps(call)) for call in told])
    return programs


def run_a_batch(programs):
    programs.compile(PLAN, SHAPE, (32,))
    state = programs.idle_state(SHAPE)
    chunk = PromptChunk(**dict.fromkeys(field.name for field in dataclasses.fields(PromptChunk)))
    chunk = dataclasses.replace(chunk, tokens=jnp.ones((2, 32), jnp.int32))
    state, _ = programs.prefill(PLAN, SHAPE, state, chunk, np.arange(2), np.arange(2), 2)
    state, _ = programs.loop(PLAN, SHAPE, state, RETIRED, max_cycles=4, until_finished=1)
    return programs.with_features(state, SHAPE._replace(kept_drafts=3))


def kinds(calls):
    """Calls with each state by how many there were before it."""
    known, found = {}, []
    for name, *given in calls:
        states = [known.setdefault(id(one), len(known)) for one in given if isinstance(one, DecodeState)]
        found.append((name, states, [one for one in given if isinstance(one, (int, Shape, DecodingPlan))]))
    return found


def test_others_make_the_same_calls_on_the_states_that_they_made_themselves(base):
    led = leading(told := [])
    run_a_batch(led)
    others = followed(told)
    assert [call[0] for call in others.noted.calls] == [
        "lay_out_weights", "compile", "idle_state", "prefill", "loop", "with_features"
    ]  # fmt: skip
    assert kinds(others.noted.calls) == kinds(led.noted.calls)
    states = [one for call in others.noted.calls for one in call if isinstance(one, DecodeState)]
    assert all(id(one) in others.noted.alive for one in states)
    chunk = next(one for one in others.noted.calls[3] if isinstance(one, PromptChunk))
    assert isinstance(chunk.tokens, np.ndarray)


def test_states_that_nobody_needs_are_let_go_by_all(base):
    led = leading(told := [])
    first, second = led.idle_state(SHAPE), led.idle_state(SHAPE)
    third = led.with_rows_of(second, first)  # uses the second up
    del first, second
    led.noted = Made()
    gc.collect()
    led.with_features(third, SHAPE)
    assert sorted(told[-1].dropped) == [0, 1]
    assert followed(told).noted.calls[-1][0] == "with_features"


def test_a_program_that_others_cannot_compile_is_none_that_they_need(base, monkeypatch):
    led = leading(told := [])
    led.compile(PLAN, SHAPE, ())
    led.idle_state(SHAPE)

    def fail(self, *given, **options):
        raise OutOfMemoryError("too large")

    monkeypatch.setattr(Programs, "compile", fail)
    assert [call[0] for call in followed(told).noted.calls] == ["lay_out_weights", "idle_state"]
    monkeypatch.setattr(Programs, "idle_state", fail)
    with pytest.raises(OutOfMemoryError):
        followed(told)


def test_what_is_no_program_of_a_batch_is_refused(base):
    led = leading([])
    with pytest.raises(UsageError, match="scores are computed by one process"):
        led.function(lambda decoder: decoder)
    with pytest.raises(UsageError, match="passes are timed by one process"):
        led.lower_repetition(PLAN, empty(DecodeState))


def test_one_process_has_programs_of_its_own(base):
    assert type(led_programs.programs_of(object.__new__(Decoder), None)) is Programs


def test_another_model_is_refused_by_who_follows(monkeypatch):
    """By the norms, which every device has whole."""
    told = []
    monkeypatch.setattr(processes, "current", SimpleNamespace(leads=True, tell=told.append))
    mesh = Mesh([jax.local_devices()], ("data", "model"))
    led = led_programs.programs_of(tiny.decoder(), mesh)
    assert isinstance(led, LeadingPrograms)
    follow(Programs(tiny.decoder()), told)
    for other in (tiny.decoder(seed=1), tiny.decoder(quantization=QuantConfig(64))):
        with pytest.raises(UsageError, match="the model here is not that of process 0"):
            follow(Programs(other), told)
