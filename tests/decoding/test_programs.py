"""Contracts of how the programs are compiled."""

from __future__ import annotations

import dataclasses
import itertools

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

from pallas_kernels.backends import early_launch
from qspec_jax.decoding import chunks, lowering, programs
from qspec_jax.decoding.plan import DecodingPlan
from qspec_jax.model.config import ModelConfig, QuantConfig
from qspec_jax.model.decoder import abstract_decoder
from qspec_jax.model.linear import Linear
from qspec_jax.model.precision import Precision
from tests import tiny

PLAIN = DecodingPlan(Precision.W4A16)
CYCLES = DecodingPlan(Precision.W4A16, Precision.W4A8, 3)


def test_only_a_loop_on_a_gpu_looks_seldom_whether_to_go_on(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert lowering.cycles_per_check(PLAIN) > lowering.cycles_per_check(CYCLES) > 1
    monkeypatch.setattr(jax, "default_backend", lambda: "cpu")
    assert lowering.cycles_per_check(PLAIN) == lowering.cycles_per_check(CYCLES) == 1


_unused_slots = itertools.count(1000)


@pytest.mark.parametrize("early", [False, True])
def test_loops_are_traced_for_an_early_launch_and_prefills_never(monkeypatch, early):
    monkeypatch.setattr(lowering, "launches_early", lambda decoder, plan, cache: early)
    traced, original = [], Linear.partial_sums

    def watched(linear, x, *, view):
        traced.append(early_launch.is_enabled())
        return original(linear, x, view=view)

    monkeypatch.setattr(Linear, "partial_sums", watched)
    model = programs.Programs(tiny.decoder(scan_layers=False))
    lowerings = [
        (early, lambda shape: model.lower_loop(PLAIN, shape)),
        (early, lambda shape: model.lower_repetition(PLAIN, jax.eval_shape(lambda: model.idle_state(shape)))),
        (False, lambda shape: model.lower_prefill(PLAIN, shape, 32)),
    ]
    for expected, lower in lowerings:
        traced.clear()
        shape = chunks.Shape(rows=1, capacity=next(_unused_slots))  # layers that are alike are traced once
        with early_launch.early_launch(not expected):  # what the caller traces is not ours
            lower(shape)
        assert set(traced) == {expected}
    assert not early_launch.is_enabled()


@pytest.mark.parametrize("mode", ["w4a16", "qspec"])
def test_looking_seldom_whether_to_go_on_changes_no_result(monkeypatch, mode):
    prompts = [[5], list(range(30)), [6, 7], [8]]

    def results():
        model = tiny.language_model()
        found = model.generate(prompts, mode=mode, draft="w4a8", max_new_tokens=9, batch_size=3)
        return [(one.token_ids, one.finish_reason, one.stats.accepted_lengths) for one in found]

    expected = results()
    monkeypatch.setattr(lowering, "cycles_per_check", lambda plan: 4)
    assert results() == expected


def test_cycles_are_run_in_whole_rounds_and_counted(monkeypatch):
    monkeypatch.setattr(lowering, "cycles_per_check", lambda plan: 4)
    model = tiny.language_model()
    shape = chunks.Shape(rows=2, capacity=64)
    model.programs.compile(PLAIN, shape, [])
    idle, none_retired = model.programs.idle_state(shape), np.zeros(2, bool)
    state, report = model.programs.loop(PLAIN, shape, idle, none_retired, max_cycles=6, until_finished=2)
    assert int(report.cycles) == 0  # nothing to do
    running = dataclasses.replace(state, finished=state.finished & False, max_new_tokens=state.max_new_tokens + 50)
    _, report = model.programs.loop(PLAIN, shape, running, none_retired, max_cycles=6, until_finished=2)
    assert int(report.cycles) == 8
    assert report.num_tokens.tolist() == [8, 8]


def test_room_for_a_cache_is_asked_for_before_it_is_there_and_not_again(monkeypatch):
    """What is free later lacks the cache of the batch that runs: other plans and features are compiled all the same."""
    asked = []
    monkeypatch.setattr(programs.Programs, "check_cache", lambda self, **sizes: asked.append(sizes))
    monkeypatch.setattr(programs.Programs, "_compile_missing", lambda self, wanted, keys: dict.fromkeys(wanted))
    of_model = programs.Programs(tiny.decoder())
    shape = chunks.Shape(2, 64)
    of_model.compile(PLAIN, shape, [32])
    of_model.compile(CYCLES, shape, [])
    of_model.compile(PLAIN, shape._replace(lookup=True), [32])
    assert asked == [{"rows": 2, "capacity": 64}]
    of_model.compile(PLAIN, shape._replace(capacity=128), [32])
    assert len(asked) == 2


def test_a_cache_is_checked_by_what_the_devices_of_a_memory_have(monkeypatch):
    asked = []
    monkeypatch.setattr(programs, "check_memory", lambda needed, *, what: asked.append((needed, what)))
    config = ModelConfig.from_hf(tiny.BASE_HF_CONFIG)
    options = {"quantization": QuantConfig(), "formats": None, "kernels": "reference"}
    programs.Programs(abstract_decoder(config, **options)).check_cache(rows=4, capacity=64)
    mesh = Mesh(np.array(jax.local_devices() * 4).reshape(2, 2), ("data", "model"))
    on_mesh = programs.Programs(abstract_decoder(config, split=2, **options), mesh)
    for backend in ("gpu", "cpu"):
        monkeypatch.setattr(jax, "default_backend", lambda backend=backend: backend)
        on_mesh.check_cache(rows=4, capacity=64)
    (one, what), (each, on_one), (together, _) = asked
    assert what == "the caches of 4 sequences of 64 tokens"
    assert on_one == f"on 1 of 4 devices, {what}"
    assert each * 4 == one
    assert together == each * len(mesh.local_devices)
