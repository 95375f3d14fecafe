"""Contracts of how the programs are compiled."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest

from qspec_jax import programs
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
