"""``bench scaling``: what it prints and writes, and what it refuses. The formulas are in ``tests/decoding``."""

from __future__ import annotations

import json

import pytest

from qspec_jax.bench.__main__ import main
from qspec_jax.bench.scaling.command import KINDS, NOTICE
from qspec_jax.bench.scaling.hardware import HARDWARE


def test_each_mesh_that_fits_the_model_is_a_line_for_each_batch(capsys, tmp_path):
    path = tmp_path / "scaling.json"
    assert main(["scaling", "--preset", "llama-3-70b", "--devices", "8", "--json", str(path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == NOTICE
    meshes = ("data=8,model=1", "data=4,model=2", "data=2,model=4", "data=1,model=8")
    assert [line.split()[:2] for line in lines[3:]] == [[mesh, batch] for mesh in meshes for batch in ("1", "16")]
    report = json.loads(path.read_text())
    assert report["settings"]["preset"] == "llama-3-70b"
    assert [one["mesh"] for one in report["results"][::2]] == list(meshes)
    assert report["results"][-1]["rows"] == 16
    assert all(one["fits"] for one in report["results"])


def test_a_cache_of_int8_takes_half_and_its_drafts_have_a_budget_on_gpus_alone(capsys, tmp_path):
    def found(*arguments):
        path = tmp_path / "scaling.json"
        assert main(["scaling", "--mesh", "model=2", "--batch", "16", *arguments, "--json", str(path)]) == 0
        report = json.loads(path.read_text())
        assert report["settings"]["kv"] == ("int8" if "int8" in arguments else "model")
        assert ("in a cache of int8" in capsys.readouterr().out) == ("int8" in arguments)
        return report["results"][0]

    bfloat16, int8 = found(), found("--kv", "int8")
    codes, scales, newest = 2 * 4 * 128, 4 * 4 + 4 * 4 * 128 // 128, 2 * 192 * 4 * 128
    assert int8["cache_bytes"] == 16 * 32 * (4096 * (codes + scales) + newest)
    assert 0.5 < int8["cache_bytes"] / bfloat16["cache_bytes"] < 0.55
    assert int8["step_s"] < bfloat16["step_s"]
    assert int8["cycle_s"] < found("--kv", "int8", "--draft-context", "full")["cycle_s"]
    on_tpu = [found("--hardware", "v5e", "--kv", "int8", "--draft-context", name) for name in ("auto", "full")]
    assert on_tpu[0] == on_tpu[1]


def test_what_does_not_fit_says_so_and_predicts_no_speed(capsys):
    assert main(["scaling", "--preset", "llama-3.1-405b", "--mesh", "model=2", "--batch", "1"]) == 0
    line = capsys.readouterr().out.splitlines()[-1]
    assert line.split()[:3] == ["data=1,model=2", "1", "107.8"]
    assert line.endswith("  does not fit")


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["--mesh", "model=3"], "model=3 does not split 32 query heads"),
        (["--mesh", "model=2", "--mesh", "pipe=2"], "use data=N,model=N"),
        (["--mesh", "model=2", "--devices", "2"], "two ways to say which meshes"),
        (["--devices", "5000"], "--devices 5000 must be at most 4096"),
        (["--acceptance", "1.5"], "--acceptance 1.5 must be between 0 and 1"),
        (["--context", "0"], "--context 0 must be at least 1"),
        (["--draft-length", "0"], "--draft-length 0 must be at least 1"),
        (["--json", "/nowhere/x.json"], "--json /nowhere/x.json"),
    ],
)
def test_errors_come_before_any_line(capsys, arguments, error):
    assert main(["scaling", *arguments]) != 0
    said = capsys.readouterr()
    assert error in said.err
    assert said.out == ""


def test_every_kind_of_device_is_there():
    assert tuple(HARDWARE) == KINDS
    assert all(HARDWARE[name].name == name for name in KINDS)
