"""Calls of the process that leads are those that the others make, on states of their own; no program is compiled."""

from __future__ import annotations

import dataclasses
import gc
import pickle
from contextlib import nullcontext

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from qspec_jax import DecodingPlan, QuantConfig, View
from qspec_jax.decoding.chunks import Shape
from qspec_jax.decoding.following import Follower, FollowingPrograms, programs_of
from qspec_jax.decoding.led_programs import LeadingPrograms, tell_load
from qspec_jax.decoding.programs import Programs
from qspec_jax.decoding.state import DecodeState, PromptChunk, PromptPieces, Report
from qspec_jax.device import processes
from qspec_jax.device.processes import End, Group
from qspec_jax.errors import DeviceError, OutOfMemoryError, UsageError
from qspec_jax.model.decoder import Decoder
from tests import tiny

SHAPE, PLAN = Shape(2, 64), DecodingPlan(View())
MESH = Mesh([jax.local_devices()], ("data", "model"))
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

    for name in ("idle_state", "with_rows_of", "with_features", "made"):
        monkeypatch.setattr(Programs, name, lambda self, *given, name=name: note(self, name, *given))
    for name in ("prefill", "read_pieces", "loop"):

        def run(self, *given, name=name, **options):
            return note(self, name, *given, *options.values()), empty(Report)

        monkeypatch.setattr(Programs, name, run)
    for name in ("compile", "lay_out_weights"):
        monkeypatch.setattr(Programs, name, lambda self, *given, name=name, **_: note(self, name, *given) and None)
    for name, run in (("function", lambda array: jnp.asarray(array) + 1), ("repetition", lambda state, count: state)):

        def make(self, *given, name=name, run=run, **options):
            self.noted.calls.append((name, *given))

            def called(*arguments):
                self.noted.calls.append(("call", *arguments))
                return self.noted.state() if name == "repetition" else run(*arguments)

            return called

        monkeypatch.setattr(Programs, name, make)
    monkeypatch.setattr(Programs, "__init__", lambda self, *_: self.__dict__.update(noted=Made(), decoder=None))
    for module in ("led_programs", "following"):
        monkeypatch.setattr(f"qspec_jax.decoding.{module}.digest", lambda _: "the same")


class Said(Group):
    """Processes whose leader tells a list, and whose others hear it, as what is pickled."""

    def __init__(self, process=0, told=None):
        super().__init__(None, process, 2)
        self.said = [] if told is None else told

    def tell(self, message):
        if self.over is not None:
            raise DeviceError(self.over)
        self.said.append(message)

    def meet(self, number):
        pass

    def hear(self):
        for message in self.said[self._told :]:
            self._told += 1
            yield pickle.loads(pickle.dumps(message))


def leading(told):
    return LeadingPrograms(object.__new__(Decoder), MESH, Said(told=told))


def followed(told):
    follower = Follower(Said(1, [*told, End(3)]), renamed={})
    follower.arrived.append(programs := FollowingPrograms(object.__new__(Decoder)))
    assert follower.follow() == 3
    return programs


def run_a_batch(programs):
    programs.compile(PLAN, SHAPE, (32,))
    state = programs.idle_state(SHAPE)
    chunk = PromptChunk(**dict.fromkeys(field.name for field in dataclasses.fields(PromptChunk)))
    chunk = dataclasses.replace(chunk, tokens=jnp.ones((2, 32), jnp.int32))
    state, _ = programs.prefill(PLAN, SHAPE, state, chunk, np.arange(2), np.arange(2), 2)
    pieces = dataclasses.replace(empty(PromptPieces), rows=np.arange(4))
    state, _ = programs.read_pieces(PLAN, SHAPE, state, pieces, chunk, np.arange(2), np.arange(2), 1)
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
        "lay_out_weights", "compile", "idle_state", "prefill", "read_pieces", "loop", "with_features"
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


def scored(decoder, array):
    return array


def begun(decoder):
    return empty(DecodeState)


def test_scores_and_repetitions_are_made_by_all_and_read_where_they_are_asked_for(base):
    led = leading(told := [])
    assert led.function(scored)(jnp.arange(3)).tolist() == [1, 2, 3]
    repeated = led.repetition(PLAN, begun, advance=scored)
    state = repeated(led.made(begun), 4)
    assert isinstance(repeated(state, 5), DecodeState)
    others = followed(told)
    assert [call[0] for call in others.noted.calls] == ["function", "call", "repetition", "made", "call", "call"]
    assert kinds(others.noted.calls) == kinds(led.noted.calls)
    assert isinstance(others.noted.calls[1][1], np.ndarray)
    assert others.noted.calls[-1][2] == 5
    with pytest.raises(UsageError, match="several processes run only functions of a module"):
        led.function(lambda decoder: decoder)


def test_a_call_that_fails_halfway_is_the_last_one(base, monkeypatch):
    led = leading([])
    state = led.idle_state(SHAPE)

    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(Programs, "loop", interrupt)
    with pytest.raises(KeyboardInterrupt):
        led.loop(PLAN, SHAPE, state, RETIRED, max_cycles=1, until_finished=1)
    with pytest.raises(DeviceError, match=r"cannot go on together after an error of this one \(KeyboardInterrupt\)"):
        led.idle_state(SHAPE)


def test_one_who_follows_does_nothing_of_its_own(base):
    programs = FollowingPrograms(object.__new__(Decoder))
    for name, given in (("compile", (PLAN, SHAPE, ())), ("lay_out_weights", (PLAN,)), ("function", (scored,))):
        with pytest.raises(UsageError, match="this process follows process 0, which alone generates"):
            getattr(programs, name)(*given)


def test_one_process_has_programs_of_its_own(base):
    assert type(programs_of(object.__new__(Decoder), None)) is Programs


def load_one(model=None, mesh="", draft_model=None, seed=0, fails=False):
    """Stands for ``qspec_jax.load``."""
    tell_load(load_one, {"model": model, "mesh": mesh, "seed": seed})
    if fails:
        raise UsageError("cannot be loaded")
    return programs_of(tiny.decoder(seed=seed), MESH)


def one_after_the_other(monkeypatch, lead, follow, renamed=None):
    """What those who follow do, after what process 0 does."""
    monkeypatch.setattr(processes, "current", leader := Said())
    lead()
    monkeypatch.setattr(processes, "current", other := Said(1, [*leader.said, End()]))
    other.follower = Follower(other, renamed=renamed)
    try:
        follow()
        return other.follower.follow()
    finally:
        monkeypatch.setattr(processes, "current", None)


def nothing():
    pass


@pytest.mark.parametrize(
    ("lead", "follow", "error"),
    [
        (load_one, load_one, None),
        (lambda: load_one("a"), lambda: load_one("b"), None),  # where it lies on another host
        (load_one, nothing, "process 0 loads a model, and this process does not; call qspec_jax.load in all"),
        (nothing, load_one, "this process loads a model, and process 0 does not"),
        (lambda: load_one(mesh="data=2"), load_one, "mesh is  here and data=2 in process 0"),
        (load_one, lambda: load_one(seed=1), "seed is 1 here and 0 in process 0"),
        (lambda: (load_one(), load_one(seed=1)), lambda: (load_one(), load_one(seed=1)), None),
    ],
)
def test_a_script_loads_the_same_models_in_all_processes(monkeypatch, lead, follow, error):
    if error is None:
        assert one_after_the_other(monkeypatch, lead, follow) == 0
        return
    with pytest.raises(UsageError, match=error):
        one_after_the_other(monkeypatch, lead, follow)


def test_commands_load_what_process_0_loads_under_their_own_names_and_let_it_go(monkeypatch):
    kept, names = [], []

    def lead():
        kept.append(load_one("theirs"))
        load_one("another")
        gc.collect()
        kept.append(load_one("theirs", seed=1))

    def digested(decoder):
        names.append(len(processes.current.follower._models) if not processes.current.leads else None)
        return "the same"

    for module in ("led_programs", "following"):
        monkeypatch.setattr(f"qspec_jax.decoding.{module}.digest", digested)
    assert one_after_the_other(monkeypatch, lead, nothing, renamed={"theirs": "mine"}) == 0
    assert names[-3:] == [0, 1, 1]  # the second is let go before the third is there


def test_another_model_is_refused_by_who_follows(monkeypatch):
    """By the norms, which every device has whole."""
    monkeypatch.setattr(processes, "current", leader := Said())
    led = programs_of(tiny.decoder(), MESH)
    assert isinstance(led, LeadingPrograms)
    for decoder, is_other in (
        (tiny.decoder(), False),
        (tiny.decoder(seed=1), True),
        (tiny.decoder(quantization=QuantConfig(64)), True),
    ):
        follower = Follower(Said(1, [*leader.said, End()]))
        follower.arrived.append(FollowingPrograms(decoder))
        with pytest.raises(UsageError, match="the model here is not that of") if is_other else nullcontext():
            follower.follow()
