"""``bench speedup`` on the CPU: what it puts together, prints and refuses. Its times there mean nothing."""

from __future__ import annotations

import json

import pytest

from qspec_jax.bench.__main__ import main
from qspec_jax.bench.decode.parts import Setting
from qspec_jax.bench.presets import PRESETS
from qspec_jax.bench.speedup import grid
from qspec_jax.bench.speedup.command import matrix, parse_chances, plan_width, table_head, table_row
from qspec_jax.bench.speedup.grid import Cell, Gain, expected_of, measure_cell
from qspec_jax.decoding.plan import DecodingPlan, Lookup
from qspec_jax.decoding.speedup import expected_tokens
from qspec_jax.errors import UsageError
from qspec_jax.model.view import View
from tests import tiny
from tests.bench.test_decode import CONFIG

FULL, BUDGET = View(activation_bits=8), View(activation_bits=8, cache_budget=512)
PLANS = [DecodingPlan(View(), view, length) for view in (FULL, BUDGET) for length in (1, 3)]
PLANS += [DecodingPlan(View(), Lookup(), 3)]


def test_expected_tokens_follow_from_the_chance_of_each_draft():
    assert expected_of([0.9], 5) == pytest.approx(expected_tokens(0.9, 5))
    assert expected_of([0.8, 0.5], 3) == pytest.approx(1 + 0.8 + 0.4 + 0.2)
    assert expected_of([0.0], 7) == 1


def test_parts_are_shared_and_the_best_plan_wins(monkeypatch):
    """A draft step is timed once for a view, a verification once for a length and whether it weighs."""
    asked = []

    def measure_parts(model, parts, setting, **options):
        asked.extend(str(part) for part in parts)
        for part in parts:
            times = {"step": 10.0, "draft": 4.0 if part.plan.num_blocks else 10.0}
            bytes_of = {"step": 100, "draft": 30 if part.plan.num_blocks else 100}
            yield grid.Measurement(
                part.name,
                "w4a16",
                None,
                part.plan.draft_length,
                **vars(setting),
                milliseconds=times.get(part.name, 10.0 + part.plan.draft_length),
                num_bytes={"all": bytes_of.get(part.name, 100)},
            )

    monkeypatch.setattr(grid, "measure_parts", measure_parts)
    setting = Setting.create(batch=4, context=8000, longest_draft=3)
    model = tiny.language_model()
    cell = measure_cell(model, PLANS, setting, lambda plan: 1 + 0.9 * plan.draft_length, repeats=1)
    assert len(asked) == len(set(asked)) == 1 + 2 + 4
    assert [gain.name for gain in cell.gains] == ["w4a8 x1", "w4a8 x3", "w4a8@512 x1", "w4a8@512 x3", "lookup x3"]
    by_name = {gain.name: gain for gain in cell.gains}
    assert by_name["w4a8@512 x3"].speedup == pytest.approx(3.7 / (3 * 0.4 + 1.3))
    assert by_name["w4a8@512 x3"].limit == pytest.approx(3.7 / (3 * 0.3 + 1))
    assert by_name["lookup x3"].speedup == pytest.approx(3.7 / 1.3)
    assert (cell.best, cell.tokens_per_s) == (by_name["lookup x3"], 400.0)
    known = {"w4a8": 2.0, "lookup": 1.5}  # of the budget nobody knows
    left = measure_cell(model, PLANS, setting, lambda plan: known.get(plan.draft_source), repeats=1)
    assert [gain.name for gain in left.gains] == ["w4a8 x1", "w4a8 x3", "lookup x3"]
    small = Setting.create(batch=4, context=300, longest_draft=3)
    measured = measure_cell(model, PLANS, small, lambda plan: 1.0, repeats=1)
    assert [gain.name for gain in measured.gains] == ["w4a8 x1", "w4a8 x3", "lookup x3"]
    assert (measured.best, measured.speedup) == (None, 1.0)


def test_a_long_name_of_a_plan_moves_no_column():
    plan = DecodingPlan(View(), View(head_bits=4, cache_budget=1024), 3)
    width = plan_width([*PLANS, plan])
    row = table_row(Cell(1, 512, 2.5, (Gain(plan.label, 3, 1.0, 1.2, 3.0, 0.9),)), width)
    assert plan.label in row
    assert len(row) == len(table_head(width))


def test_rows_and_the_matrix_say_where_plain_decoding_is_the_fastest():
    losing, winning = Gain("w4a8 x3", 3, 1.0, 1.2, 3.0, 0.9), Gain("w4a8@512 x5", 5, 0.4, 1.6, 5.4, 2.1)
    cells = [Cell(1, 512, 2.5, (losing,)), Cell(1, 8000, 8.0, (losing, winning)), Cell(16, 512, None, reason="no room")]
    assert "plain, not w4a8 x3" in table_row(cells[0], 18)
    assert table_row(cells[1], 18).split()[3:5] == ["w4a8@512", "x5"]
    assert table_row(cells[2], 18).split() == ["16", "512", *"-------"]
    lines = matrix([*cells, Cell(16, 8000, 9.0, (winning,))]).splitlines()
    assert [line.split() for line in lines[1:]] == [
        ["batch", "512", "8000"],
        ["1", "1.00", "1.50"],
        ["16", "-", "1.50"],
    ]


def test_a_grid_is_measured_and_written(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(PRESETS, "tiny", CONFIG)
    path, plot = tmp_path / "out.json", tmp_path / "out.png"
    size = ("--preset", "tiny", "--batch", "2", "--context", "20", "--draft-length", "2", "--repeats", "1")
    more = ("--steps", "2", "--lookup-acceptance", "0.3", "--json", str(path), "--plot", str(plot))
    assert main(["speedup", *size, *more]) == 0
    (cell,) = json.loads(path.read_text())["cells"]
    assert [gain["name"] for gain in cell["gains"]] == ["w4a8 x2", "lookup x2"]
    assert cell["gains"][0]["tokens_per_cycle"] == pytest.approx(1 + 0.95 + 0.95**2)
    assert all(gain["verify_ratio"] > 0 and gain["limit"] > 0 for gain in cell["gains"])
    assert "speed-up of the fastest plan over plain decoding" in capsys.readouterr().out
    assert plot.stat().st_size > 1000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--acceptance", "1.5"), "--acceptance 1.5 cannot be read; write chances from 0 to 1"),
        (("--context", "9000"), "do not fit the context of llama-3-8b, 8192"),
        (("--draft-length", "17"), "--draft-length 17 must be at most 16"),
        (("--draft-context", "some"), "use full, auto or a number of tokens"),
    ],
)
def test_wrong_options_are_refused_before_anything_is_made(capsys, monkeypatch, arguments, message):
    monkeypatch.setattr("qspec_jax.bench.synthetic.synthetic_model", lambda *a, **k: pytest.fail("work has begun"))
    assert main(["speedup", "--preset", "llama-3-8b", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_chances_are_read_by_place():
    assert parse_chances("0.95, 0.9", option="--acceptance") == [0.95, 0.9]
    with pytest.raises(UsageError):
        parse_chances("", option="--acceptance")
