"""Contracts of how the programs are compiled."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx

from pallas_kernels import Layout, early_launch
from qspec_jax import programs
from qspec_jax.config import ModelConfig, QuantConfig
from qspec_jax.linear import Linear
from qspec_jax.modeling import Decoder
from qspec_jax.speculative import DecodingPlan
from qspec_jax.types import Precision
from tests import tiny

PLAIN = DecodingPlan(Precision.W4A16)
CYCLES = DecodingPlan(Precision.W4A16, Precision.W4A8, 3)


def test_only_a_loop_on_a_gpu_looks_seldom_whether_to_go_on(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert programs.cycles_per_check(PLAIN) > programs.cycles_per_check(CYCLES) > 1
    monkeypatch.setattr(jax, "default_backend", lambda: "cpu")
    assert programs.cycles_per_check(PLAIN) == programs.cycles_per_check(CYCLES) == 1


@pytest.fixture
def on_hopper(monkeypatch):
    monkeypatch.setattr(early_launch, "is_supported", lambda: True)


def large_decoder(hidden_size=4096, layout=Layout.WGMMA, *, scan_layers=False):
    """A decoder of shapes, with the layout that Mosaic reads."""
    sizes = {"hidden_size": hidden_size, "intermediate_size": 4 * hidden_size}
    config = ModelConfig.from_hf({**tiny.BASE_HF_CONFIG, **sizes})
    decoder = nnx.eval_shape(lambda: Decoder(config, quantization=QuantConfig(), scan_layers=scan_layers))
    for _, linear in nnx.iter_modules(decoder):
        if isinstance(linear, Linear):
            linear.weight.set_value(dataclasses.replace(linear.weight.get_value(), layout=layout))
    return decoder


@pytest.mark.usefixtures("on_hopper")
def test_kernels_start_early_in_models_with_large_layers_that_are_not_cut_out_of_an_array():
    assert programs.launches_early(large_decoder())
    assert not programs.launches_early(large_decoder(2048))
    assert not programs.launches_early(large_decoder(layout=Layout.PLANES))
    assert not programs.launches_early(large_decoder(scan_layers=True))


def test_kernels_start_early_on_no_other_device():
    assert programs.compiler_options(large_decoder()) == {}


@pytest.mark.usefixtures("on_hopper")
@pytest.mark.parametrize("starts_early", [False, True])
def test_programs_are_traced_as_they_are_compiled(monkeypatch, starts_early):
    """Kernels that start early in a program that XLA compiles as any other could be wrong."""
    monkeypatch.setattr(programs, "_LARGE_LAYER", -1 if starts_early else 1)
    traced, original = [], Linear.partial_sums

    def watched(linear, x, *, precision):
        traced.append(early_launch.is_enabled())
        return original(linear, x, precision=precision)

    monkeypatch.setattr(Linear, "partial_sums", watched)
    model, shape = programs.Programs(tiny.decoder(scan_layers=False)), programs.Shape(rows=1, slots=64)
    state = jax.eval_shape(lambda: model.idle_state(shape))
    lowerings = [
        lambda: model.lower_loop(PLAIN, shape),
        lambda: model.lower_fill(PLAIN, shape, 32),
        lambda: model.lower_repetition(PLAIN, state),
    ]
    for lower in lowerings:
        traced.clear()
        jax.clear_caches()  # layers that are alike are traced once
        lower()
        assert set(traced) == {starts_early}
    assert programs.compiler_options(model.decoder) == (early_launch.COMPILER_OPTIONS if starts_early else {})
    assert not early_launch.is_enabled()


def test_xla_knows_the_options_of_an_early_launch():
    jax.jit(lambda x: x + 1).lower(1.0).compile(early_launch.COMPILER_OPTIONS)


@pytest.mark.parametrize("mode", ["w4a16", "qspec"])
def test_looking_seldom_whether_to_go_on_changes_no_result(monkeypatch, mode):
    prompts = [[5], list(range(30)), [6, 7], [8]]

    def results():
        model = tiny.language_model()
        found = model.generate(prompts, mode=mode, draft="w4a8", max_new_tokens=9, batch_size=3)
        return [(one.token_ids, one.finish_reason, one.stats.accepted_lengths) for one in found]

    expected = results()
    monkeypatch.setattr(programs, "cycles_per_check", lambda plan: 4)
    assert results() == expected


def test_cycles_are_run_in_whole_rounds_and_counted(monkeypatch):
    monkeypatch.setattr(programs, "cycles_per_check", lambda plan: 4)
    model = tiny.language_model()
    shape = programs.Shape(rows=2, slots=64)
    model.programs.compile(PLAIN, shape, [])
    idle, none_retired = model.programs.idle_state(shape), np.zeros(2, bool)
    state, report = model.programs.loop(PLAIN, shape, idle, none_retired, max_cycles=6, until_finished=2)
    assert int(report.cycles) == 0  # nothing to do
    running = dataclasses.replace(state, finished=state.finished & False, max_new_tokens=state.max_new_tokens + 50)
    _, report = model.programs.loop(PLAIN, shape, running, none_retired, max_cycles=6, until_finished=2)
    assert int(report.cycles) == 8
    assert report.num_tokens.tolist() == [8, 8]
