"""What cycles take, from what some of them took: of other loads, contexts and plans, and in other processes."""

from __future__ import annotations

import json

import pytest

from qspec_jax.decoding.costs import CostTable, PassBytes, Setting
from qspec_jax.decoding.plan import DecodingPlan
from qspec_jax.model.view import View
from tests.engine.test_chooser import BUDGET, BYTES, DRAFTING, PLAIN


def test_costs_tell_those_of_other_contexts_and_plans():
    costs = CostTable(BYTES)
    draft, longer = DRAFTING[-2], DRAFTING[-1]
    costs.note(PLAIN, 0.010, Setting(16, 16, 8192))
    assert costs.known(PLAIN, Setting(16, 16, 8192)) == pytest.approx(0.010)
    at_4096 = costs.known(PLAIN, Setting(16, 16, 4096))
    expected = 0.010 * BYTES.of_cycle(PLAIN, rows=16, context=4096) / BYTES.of_cycle(PLAIN, rows=16, context=8192)
    assert at_4096 == pytest.approx(expected)
    assert costs.known(PLAIN, Setting(8, 8, 8192)) is costs.known(PLAIN, Setting(16, 16, 128)) is None
    assert not costs.is_exact(PLAIN, Setting(16, 16, 4096))
    by_bytes = costs.guess(draft, {PLAIN: 0.010}, Setting(16, 16, 8192))
    assert 0.01 < by_bytes < 0.01 * (draft.draft_length + 1)
    by_length = costs.guess(longer, {PLAIN: 0.010, draft: 0.020}, Setting(16, 16, 8192))
    assert by_length == pytest.approx(0.010 + 0.010 * longer.draft_length / draft.draft_length)


@pytest.mark.parametrize("step_s", [0.0, 0.0013], ids=["bytes alone", "mostly kernels"])
def test_costs_of_a_batch_that_empties(step_s):
    """Known at full load and at half of it, they are known for few rows, in which attention reads nothing of others."""
    rows, context, costs = 64, 8192, CostTable(PassBytes(75_000_000, 23_040))
    draft = DecodingPlan(View(), BUDGET, 3)

    def seconds(plan: DecodingPlan, setting: Setting) -> float:
        passes = 1 + (plan.draft_length if plan.draft_view is not None else 0)
        return costs.num_bytes.of_cycle(plan, rows=setting.active, context=setting.context) / 3e12 + passes * step_s

    for plan, active in ((PLAIN, 64), (PLAIN, 30), (draft, 64)):
        setting = Setting(rows, active, context)
        for _ in range(2):
            costs.note(plan, seconds(plan, setting), setting)
    for plan, active in ((PLAIN, 20), (PLAIN, 50), (PLAIN, 1), (draft, 50), (draft, 20), (draft, 1)):
        setting = Setting(rows, active, context)
        assert costs.known(plan, setting) == pytest.approx(seconds(plan, setting), rel=0.1)


def test_a_step_that_takes_longer_than_its_bytes_says_what_drafts_take():
    """Small models: nearly all of a step takes the same, however little a draft reads."""
    setting, draft = Setting(4, 4, 8192), DecodingPlan(View(), BUDGET, 1)
    guesses = []
    for bandwidth in (None, 4.3e12):
        costs = CostTable(PassBytes(142_000_000, 23_040), bandwidth=bandwidth)
        costs.note(PLAIN, 0.0013, setting)
        guesses.append(costs.guess(draft, {PLAIN: 0.0013}, setting))
    by_bytes, by_time = guesses
    assert by_bytes < 0.0013 * 1.4
    assert 0.0013 * 1.6 < by_time < 0.0013 * 2


def test_steps_measured_at_several_loads_are_sound_together():
    costs = CostTable(BYTES)
    for active in (16, 12, 8):
        assert not costs.is_sound(PLAIN, Setting(16, active, 4096))
        costs.note(PLAIN, 0.010, Setting(16, active, 4096), weight=0.0134)
    assert costs.is_sound(PLAIN, Setting(16, 8, 4096))


def test_costs_are_kept(tmp_path):
    path = tmp_path / "costs" / "table.json"
    costs = CostTable(BYTES, path)
    costs.save()
    assert not path.exists()  # nothing was measured
    costs.note(PLAIN, 0.010, Setting(16, 16, 8192))
    costs.acceptance["w4a8"] = [0.9, 0.8]
    costs.note_kinds("w4a8", [[(3.0, 1.0)]])
    costs.save()
    assert [file.name for file in path.parent.iterdir()] == ["table.json"]
    read = CostTable(BYTES, path)
    assert read.known(PLAIN, Setting(16, 16, 8192)) == pytest.approx(0.010)
    assert read.acceptance == {"w4a8": [0.9, 0.8]}
    assert list(read.kinds["w4a8"]) == [[(3.0, 1.0)]]


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", json.dumps({"seconds": {"x": 3}, "acceptance": {}})])
def test_a_damaged_table_is_as_good_as_none(tmp_path, content):
    path = tmp_path / "table.json"
    path.write_text(content)
    assert CostTable(BYTES, path).known(PLAIN, Setting(1, 1, 64)) is None
