"""Contracts of ``bench tpu``: how bundles are counted, and what the command prints. One needs libtpu."""

from __future__ import annotations

import importlib.util
import json

import pytest

from qspec_jax.bench.__main__ import main
from qspec_jax.bench.tpu import cases, command
from qspec_jax.bench.tpu.bundles import cycles_by_operation, parse
from qspec_jax.bench.tpu.compiler import GENERATIONS
from qspec_jax.errors import QSpecError

# A pipeline of 3 steps (5 turns) of 6 bundles, in which a loop of 4 turns has 3 bundles; a bundle without a mark in it.
PROGRAM = """= control target key start
LB: loop body

     0   :  { %s1 = smov 0 }
   0x1 LB: > { %s2 = sadd.s32 1, %s1 /* iteration index, stage = 0 */ }
   0x2   : > { %v1 = vadd.f32 %v0, %v0 }
   0x3   :  { %7070 = dma.hbm_to_vmem
second_minor_factor: 1 */ } /* End region 29 */
   0x4 LB: >> { %s4 = sadd.s32 8, %s3  ;;  %v2 = vadd.f32 %v1, %v1 }
   0x5   : >> { %p1 = scmp.ge.s32.totalorder %s4, 32 /* loop exit test */ }
   0x6   : >> { %9 = sbr.rel (!%p1) target = $region2 }
   0x7   : > { %p0 = scmp.ge.s32.totalorder %s2, 5 /* loop exit test */ }
   0x8   : > { %9 = sbr.rel (!%p0) target = $region1 }
   0x9   : > { %v3 = vadd.f32 %v2, %v2 }
   0xa   :  { %10 = vsyncpa [#allocation4], 1 }
""".splitlines()


def test_cycles_are_bundles_times_turns():
    program = parse(PROGRAM)
    (pipeline,) = program.inner
    (loop,) = pipeline.inner
    assert (program.bundles, pipeline.bundles, loop.bundles) == (2, 6, 3)
    assert (pipeline.turns, loop.turns) == (3, 4)
    assert program.cycles() == 2 + 3 * (6 + 4 * 3)


def test_a_loop_whose_branch_is_not_known_ends_where_the_marks_do():
    program = parse([line for line in PROGRAM if not line.startswith("   0x5")])
    assert [loop.cycles() for loop in program.inner[0].inner] == [2]
    assert program.cycles() == 2 + 3 * (6 + 2)


def test_operations_are_told_apart_and_other_prints_passed_over(tmp_path):
    for name in (
        "17-w4a16.1-71",
        "17-slice.2-66",
        "17-TLP-73",
        "17-<late-finalization>-68",
        "17-x-70-schedule-analysis",
    ):
        (tmp_path / f"{name}{'_' if 'schedule' in name else '-'}final_bundles.txt").write_text("\n".join(PROGRAM))
    assert cycles_by_operation(tmp_path) == {"w4a16.1": 56, "slice.2": 56}


def test_the_command_knows_the_generations_and_operations_without_jax():
    assert tuple(GENERATIONS) == command.GENERATIONS
    assert cases.OPS == command.OPS


RESULT = {"op": "w4a16", "shape": "8 x 4096x6144", "status": "ok", "is_kernel": True}
RESULT |= {"cycles": 300, "cycles_of_bytes": 200, "temporary_bytes": 0, "vmem_bytes": 8_200_000}


def test_it_prints_a_line_for_each_call_and_says_that_nothing_was_measured(monkeypatch, capsys, tmp_path):
    given = []
    failed = {"op": "head", "shape": "8", "status": "failed", "error": "no VMEM"}
    outcomes = {"v5e": [RESULT], "7x": [{**RESULT, "is_kernel": False}, failed]}
    monkeypatch.setattr(command, "counted", lambda name, settings: given.append(settings) or iter(outcomes[name]))
    monkeypatch.setenv("TPU_LIBRARY_PATH", __file__)
    path = tmp_path / "report.json"
    assert main(["tpu", "--generations", "v5e,7x", "--ops", "w4a16,head", "--json", str(path)]) == 1
    out = capsys.readouterr().out
    assert out.startswith("counted, not measured")
    ends = [["1.50", "8.2", "0"], ["8.2", "0", "XLA"], ["FAILED:", "no", "VMEM"]]
    assert [line.split()[-3:] for line in out.splitlines()[2:]] == ends
    assert given[0]["ops"] == ["w4a16", "head"]
    report = json.loads(path.read_text())
    assert [result["name"] for result in report["results"]] == ["v5e", "7x", "7x"]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--generations", "v4"], "v4 is unknown; use some of v5e, v6e, 7x"),
        (["--ops", "sum"], "sum is unknown; use some of w4a16"),
        (["--rows", "0"], "--rows"),
        (["--group-size", "96"], "--group-size 96 does not divide the rows of llama-3-8b"),
    ],
)
def test_usage_errors_come_before_anything_is_compiled(argv, message, capsys):
    assert main(["tpu", *argv]) == 2
    assert message in capsys.readouterr().err


def test_without_the_compiler_nothing_is_begun(monkeypatch, capsys):
    monkeypatch.setattr(command.importlib.util, "find_spec", lambda name: None)
    monkeypatch.delenv("TPU_LIBRARY_PATH", raising=False)
    assert main(["tpu"]) == 1
    out, err = capsys.readouterr()
    assert not out
    assert err == "error: the TPU's compiler, libtpu, is not installed; run pip install 'qspec-jax[tpu]'\n"


def test_a_process_that_ends_early_is_an_error(monkeypatch):
    monkeypatch.setattr(command.sys, "executable", "false")
    with pytest.raises(QSpecError, match="the compiler for v5e ended early: exit code 1"):
        list(command.counted("v5e", {}))


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu")
def test_a_kernel_is_compiled_and_counted():
    settings = {"model": "smollm2-135m", "rows": 1, "tokens": 1, "context": 256, "group_size": 32, "ops": ["write"]}
    (result,) = command.counted("v6e", settings)
    assert (result["status"], result["is_kernel"], result["temporary_bytes"]) == ("ok", True, 0)
    assert 50 < result["cycles"] < 5000
    assert 10_000 < result["vmem_bytes"] < 1_000_000
