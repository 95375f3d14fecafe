"""``bench kernels`` on the CPU: what it measures, writes and says. Its times there mean nothing."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import Layout, available_implementations
from qspec_jax.bench import options, timing
from qspec_jax.bench.__main__ import main
from qspec_jax.bench.kernels import command as kernels
from qspec_jax.bench.kernels import operands
from qspec_jax.bench.kernels.ceilings import Ceilings
from qspec_jax.bench.kernels.measure import Measurement
from qspec_jax.bench.kernels.names import IMPLEMENTATIONS, OPS
from qspec_jax.bench.kernels.plot import plot_roofline
from qspec_jax.errors import QSpecError, UsageError
from tests.pallas_kernels.test_cuda_lowering import abstract_weight, array, cuda_program

CEILINGS = Ceilings(copy_tb_per_s=2.0, bf16_top_per_s=500.0, int8_top_per_s=1000.0)
SMALL = ("kernels", "--shape", "128x64", "--repeats", "2")
on_cpu = pytest.mark.skipif(jax.default_backend() != "cpu", reason="asks what a CPU answers")


@pytest.fixture(autouse=True)
def known_ceilings(monkeypatch):
    monkeypatch.setattr("qspec_jax.bench.kernels.ceilings.measure_ceilings", lambda *, repeats: CEILINGS)


def measured(tmp_path, *arguments):
    """Exit code and the JSON of a run."""
    path = tmp_path / "out.json"
    code = main([*SMALL, *arguments, "--json", str(path)])
    return code, json.loads(path.read_text())


@on_cpu
def test_every_operation_is_measured_and_its_figures_fit_together(tmp_path):
    code, report = measured(tmp_path, "--rows", "3", "--group-size", "64", "--asymmetric")
    assert code == 0
    found = report["measurements"]
    produced = ["quantize_a8", "quantize_a4", "swiglu", "swiglu_a8", "swiglu_a4"]
    produced += ["hadamard", "swiglu_hadamard", "swiglu_hadamard_a8", "swiglu_hadamard_a4"]
    assert [one["op"] for one in found] == ["bf16", "w4a16", "w8a16", "w4a8", "w4a4", *produced]
    for one in found:
        assert one["status"] == "ok"
        assert one["clock"] == "wall"
        assert one["implementation"] == ("xla" if one["op"] == "bf16" else available_implementations()[0])
        assert one["tb_per_s"] * one["microseconds"] * 1e6 == pytest.approx(one["num_bytes"])
        assert one["share_of_copy_bandwidth"] == pytest.approx(one["tb_per_s"] / 2)
        if one["n"]:
            assert one["top_per_s"] * one["microseconds"] * 1e6 == pytest.approx(2 * 3 * 128 * 64)
            peak = 1000 if one["op"] in ("w4a8", "w4a4") else 500
            assert one["share_of_matmul_rate"] == pytest.approx(one["top_per_s"] / peak)
    rows, out = 3 * 128 * 2, 3 * 64 * 2
    weight = 64 * 128 // 2 + 2 * (2 * 64 * 2)  # codes, scales and offsets of two groups
    codes = 3 * 128 + 3 * 4
    sums = (128 // 32) * 64 * 2  # of the weight, over the groups of four-bit activations
    grouped_codes = 3 * 128 + 2 * 3 * (128 // 32) * 4
    assert {one["op"]: one["num_bytes"] for one in found} == {
        "bf16": rows + 64 * 128 * 2 + out,
        "w4a16": rows + weight + out,
        "w8a16": rows + weight + 64 * 128 // 2 + out,  # the lower nibbles
        "w4a8": codes + weight + out,
        "w4a4": grouped_codes + weight + sums + out,
        "quantize_a8": rows + codes,
        "quantize_a4": rows + grouped_codes,
        "swiglu": 2 * rows + rows,
        "swiglu_a8": 2 * rows + codes,
        "swiglu_a4": 2 * rows + grouped_codes,
        "hadamard": rows + rows,
        "swiglu_hadamard": 2 * rows + rows,
        "swiglu_hadamard_a8": 2 * rows + codes,
        "swiglu_hadamard_a4": 2 * rows + grouped_codes,
    }


@on_cpu
def test_the_report_says_where_it_comes_from_and_the_table_what_a_cpu_is_worth(tmp_path, capsys):
    code, report = measured(tmp_path, "--rows", "1,2", "--ops", "w4a16", "--group-size", "64")
    out, err = capsys.readouterr()
    assert code == 0
    facts = report["environment"]
    assert (facts["device"], facts["platform"], facts["jax"]) == ("cpu", "cpu", jax.__version__)
    assert facts["command"].startswith("python -m qspec_jax.bench kernels --shape 128x64")
    assert facts["command"] in out
    assert report["ceilings"] == {"copy_tb_per_s": 2.0, "bf16_top_per_s": 500.0, "int8_top_per_s": 1000.0}
    assert "they say nothing about a GPU" in out
    assert "wall us" in out
    table = [line.split() for line in out.splitlines() if line.startswith("w4a16")]
    assert [row[:5] for row in table] == [["w4a16", "reference", "128x64", "64", m] for m in ("1", "2")]
    assert "programs" in err
    assert "programs" not in out


@on_cpu
def test_what_an_implementation_refuses_is_a_dash_with_the_reason(tmp_path, capsys):
    code, report = measured(tmp_path, "--rows", "1", "--ops", "w4a16", "--implementations", "triton,torch,reference")
    assert code == 0
    status = {one["implementation"]: one["status"] for one in report["measurements"]}
    assert status == {"triton": "unsupported", "reference": "ok", "torch": "unsupported"}
    refused = next(one for one in report["measurements"] if one["implementation"] == "triton")
    assert "needs an NVIDIA GPU; this is cpu" in refused["reason"]
    assert refused["microseconds"] is refused["tb_per_s"] is refused["relative_error"] is None
    out, err = capsys.readouterr()
    line = next(line for line in out.splitlines() if line.split()[:2] == ["w4a16", "triton"])
    assert line.split()[5:] == ["-"] * 6
    assert "needs an NVIDIA GPU; this is cpu" in err


@on_cpu
def test_pairs_of_programs_are_timed_of_one_operation_where_asked_for(tmp_path):
    code, report = measured(
        tmp_path, "--rows", "1", "--ops", "w4a16,w4a8", "--implementations", "reference,mosaic_pairs"
    )
    assert code == 0
    named = [(one["op"], one["implementation"], one["status"]) for one in report["measurements"]]
    reference = [("w4a16", "reference", "ok"), ("w4a8", "reference", "ok")]
    assert sorted(named) == sorted([*reference, ("w4a16", "mosaic_pairs", "unsupported")])
    [refused] = [one["reason"] for one in report["measurements"] if one["status"] == "unsupported"]
    assert "needs an NVIDIA GPU" in refused
    assert "mosaic_pairs" not in kernels._all_implementations()


def test_the_kernel_that_is_timed_as_pairs_is_one(monkeypatch):
    monkeypatch.setattr("pallas_kernels.dispatch._platform_obstacle", lambda *_: None)
    weight = abstract_weight(4096, 28672, 128, True, Layout.WGMMA)
    for name, rows, is_pairs in (("mosaic", 64, False), ("mosaic", 128, True), ("mosaic_pairs", 64, True)):
        x = array(rows, 4096, dtype=jnp.bfloat16)
        program = cuda_program(lambda x, w, name=name: operands.weight_only_product(x, w, name), x, weight)
        assert ("w4a16_pairs_mosaic_gpu" in program) == is_pairs


@on_cpu
def test_activation_groups_that_do_not_divide_are_refused_with_the_reason(tmp_path):
    ops = "w4a4,quantize_a4,swiglu_a4"
    arguments = ["--shape", "100x32", "--rows", "1", "--ops", ops, "--implementations", "reference"]
    path = tmp_path / "out.json"
    assert main(["kernels", *arguments, "--json", str(path)]) == 0
    for one in json.loads(path.read_text())["measurements"]:
        assert one["status"] == "unsupported"
        assert "activation groups of 32 do not divide K=100" in one["reason"]


@on_cpu
def test_a_transform_without_a_matrix_is_refused_with_the_reason(tmp_path):
    ops = "swiglu_a8,hadamard,swiglu_hadamard_a8"
    arguments = ["--shape", "46x32", "--rows", "1", "--ops", ops, "--implementations", "reference"]
    path = tmp_path / "out.json"
    assert main(["kernels", *arguments, "--json", str(path)]) == 0
    found = json.loads(path.read_text())["measurements"]
    assert sorted((one["op"], one["status"]) for one in found) == [
        ("hadamard", "unsupported"),
        ("swiglu_a8", "ok"),
        ("swiglu_hadamard_a8", "unsupported"),
    ]
    assert all("no Hadamard matrix for K=46" in one["reason"] for one in found if one["status"] != "ok")


@pytest.mark.parametrize("factor", [1.05, float("nan")])
@on_cpu
def test_a_wrong_kernel_is_named_and_fails_the_run(tmp_path, capsys, monkeypatch, factor):
    right = operands.w4a16_matmul

    def wrong(x, weight, *, implementation):
        out = right(x, weight, implementation=implementation)
        return out if x.dtype == jnp.float32 else out * factor

    monkeypatch.setattr(operands, "w4a16_matmul", wrong)
    code, report = measured(tmp_path, "--rows", "2", "--ops", "w4a16,w4a8", "--implementations", "reference")
    assert code == 1
    status = {one["op"]: one["status"] for one in report["measurements"]}
    assert status == {"w4a16": "wrong", "w4a8": "ok"}
    out, err = capsys.readouterr()
    assert "WRONG" in out
    assert "wrong: w4a16 reference K=128 N=64 M=2: relative error" in err


@on_cpu
def test_a_kernel_that_does_not_compile_does_not_end_the_run(tmp_path, capsys, monkeypatch):
    def broken(x, weight, *, implementation):
        if x.dtype != jnp.float32:
            raise jax.errors.JaxRuntimeError("ptxas says no\nand more")
        return x @ jnp.ones((weight.num_inputs, weight.num_outputs))

    monkeypatch.setattr(operands, "w4a16_matmul", broken)
    code, report = measured(tmp_path, "--rows", "2", "--ops", "w4a16,w4a8", "--implementations", "reference")
    assert code == 1
    assert {one["op"]: one["reason"] for one in report["measurements"]} == {"w4a16": "ptxas says no", "w4a8": None}
    assert "FAILED" in capsys.readouterr().out


def test_a_call_takes_the_sum_of_all_its_kernels(monkeypatch):
    monkeypatch.setattr(timing, "kernel_clock_works", lambda: True)
    runs = iter(
        [[("w4a16", 0.010), ("add", 0.002)], [("w4a16", 0.9), ("add", 0.9)], [("w4a16", 0.011), ("add", 0.002)]]
    )
    monkeypatch.setattr(timing, "_kernels", lambda *arguments: next(runs))
    program = timing.compile_calls(lambda shared, copy: shared + copy, jnp.ones(2), [jnp.ones(2)] * 2)
    found = timing.time_calls(program, jnp.ones(2), [jnp.ones(2)] * 2, repeats=3)
    assert found.clock == "kernel"
    assert found.microseconds == pytest.approx(13.0 / 2)  # the median run, over two calls


def test_a_profiler_that_records_nothing_is_an_error(monkeypatch):
    monkeypatch.setattr(timing, "kernel_clock_works", lambda: True)
    monkeypatch.setattr(timing, "_kernels", lambda *arguments: None)
    program = timing.compile_calls(lambda shared, copy: copy, None, [jnp.ones(2)])
    with pytest.raises(QSpecError, match="end other tools that use CUPTI"):
        timing.time_calls(program, None, [jnp.ones(2)], repeats=1)


def test_the_wall_clock_counts_every_copy():
    copies = [jnp.full(4, value) for value in (1.0, 2.0, 3.0)]
    program = timing.compile_calls(lambda shared, copy: shared * copy, jnp.ones(4), copies)
    assert [float(out[0]) for out in program(jnp.ones(4), copies)] == [1.0, 2.0, 3.0]
    assert timing.time_calls(program, jnp.ones(4), copies, repeats=2).microseconds > 0


def test_weight_copies_exceed_the_cache_of_a_gpu(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert operands.num_copies(4096 * 28672 // 2) == 3
    assert operands.num_copies(4096 * 6144 // 2) * 4096 * 6144 // 2 > 150e6
    assert operands.num_copies(576 * 576 // 2) == 24


def test_the_roofline_is_a_png_with_every_series(tmp_path):
    pytest.importorskip("matplotlib")
    shape = {"k": 4096, "n": 6144, "group_size": 128, "symmetric": True}
    measurements = [
        Measurement("w4a16", "triton", rows=16, microseconds=9.0, num_bytes=13 << 20, num_operations=2**30, **shape),
        Measurement("w4a8", "triton", rows=1, status="unsupported", **shape),
    ]
    path = tmp_path / "roofline.png"
    plot_roofline(path, measurements, CEILINGS, title="a device")
    assert path.read_bytes().startswith(b"\x89PNG")


def test_a_plot_without_matplotlib_is_refused_with_the_remedy(tmp_path):
    with pytest.raises(UsageError, match=r"--plot needs matplotlib; run `pip install 'qspec-jax\[bench\]'`"):
        options.check_matplotlib(tmp_path / "roofline.png", find=lambda name: None)
    options.check_matplotlib(None, find=lambda name: None)


def test_table_rows_show_asymmetric_and_whole_row_groups():
    one = Measurement("w4a16", "triton", 4096, 6144, 4096, False, 16, microseconds=10.0, num_bytes=10**7)
    assert kernels.table_row(one, CEILINGS).split()[:8] == [
        *("w4a16", "triton", "4096x6144", "rowa", "16", "10.00", "1", "50%"),
    ]


def test_no_name_of_an_operation_or_an_implementation_moves_a_column():
    of = (4096, 6144, 4096, False, 16)
    for op, implementation in [*((op, "triton") for op in OPS), *(("w4a16", name) for name in IMPLEMENTATIONS)]:
        one = Measurement(op, implementation, *of, microseconds=10.0, num_bytes=10**7)
        assert len(kernels.table_row(one, CEILINGS)) == len(kernels.table_head("kernel")), (op, implementation)
