"""``bench decode`` on the CPU: what it measures, writes and says. Its times there mean nothing."""

from __future__ import annotations

import dataclasses
import json
import statistics
import sys
import time
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import pallas_kernels
from qspec_jax.bench import timing
from qspec_jax.bench.__main__ import main
from qspec_jax.bench.decode import command as decode
from qspec_jax.bench.decode import measure as decode_measure
from qspec_jax.bench.decode import request as decode_request
from qspec_jax.bench.decode import tables as decode_tables
from qspec_jax.bench.decode.measure import Measurement, by_kernel, measure_parts, speculations
from qspec_jax.bench.decode.parts import Part, Setting, context_state, decoding_parts, pass_bytes
from qspec_jax.bench.decode.speedup import Speculation
from qspec_jax.bench.presets import PRESETS
from qspec_jax.decoding.plan import DecodingPlan
from qspec_jax.decoding.programs import Programs
from qspec_jax.evaluation.scores import DraftScore
from qspec_jax.model.config import ModelConfig
from qspec_jax.model.precision import Precision
from qspec_jax.model.view import View
from tests import tiny
from tests.weights import tiny_checkpoints

CONFIG = dataclasses.replace(ModelConfig.from_hf(tiny.BASE_HF_CONFIG), eos_token_ids=())
SETTING = Setting.create(batch=2, context=20, longest_draft=3)
SMALL = ("decode", "--preset", "tiny", "--batch", "2", "--context", "20", "--repeats", "3", "--steps", "2")
SCORE = DraftScore("w4a8", 2, 4, 64, 50, 0.8, 2.6, (0.9, 0.7), 4)
on_cpu = pytest.mark.skipif(jax.default_backend() != "cpu", reason="asks what a CPU answers")


@pytest.fixture(autouse=True)
def known_device(monkeypatch):
    monkeypatch.setitem(PRESETS, "tiny", CONFIG)
    monkeypatch.setattr("qspec_jax.bench.kernels.ceilings.measure_copy", lambda *, repeats: 2.0)


@pytest.fixture(scope="module")
def model():
    return tiny.language_model()


@pytest.fixture
def nothing_runs(monkeypatch):
    def refuse(*arguments, **options):
        raise AssertionError("work has begun")

    monkeypatch.setattr(Programs, "lower_repetition", refuse)
    monkeypatch.setattr("qspec_jax.bench.synthetic.synthetic_model", refuse)
    monkeypatch.setattr("qspec_jax.load", refuse)


def report_of(tmp_path, *arguments):
    path = tmp_path / "out.json"
    code = main([*SMALL, *arguments, "--json", str(path)])
    return code, json.loads(path.read_text())


@on_cpu
def test_every_part_is_measured_and_its_figures_fit_together(tmp_path, capsys):
    drafts = ("--draft", "w4a8", "--draft-length", "2")
    code, report = report_of(tmp_path, "--mode", "qspec", *drafts)
    assert code == 0
    found = report["measurements"]
    assert [(one["part"], one["precision"], one["draft"], one["draft_length"]) for one in found] == [
        ("step", "w4a16", None, 0),
        ("draft", "w4a8", "w4a8", 2),
        ("verify", "w4a16", None, 2),
        ("cycle", "w4a16", "w4a8", 2),
    ]
    for one in found:
        assert (one["status"], one["batch"], one["context"], one["capacity"]) == ("ok", 2, 20, 64)
        assert one["milliseconds"] == statistics.median(one["runs_ms"])
        assert (len(one["runs_ms"]), one["repetitions"]) == (3, 2)
        assert one["compile_s"] > 0
        num_bytes = sum(one["num_bytes"].values())
        assert one["share_of_bound"] * one["milliseconds"] == pytest.approx(num_bytes / 2e12 * 1e3)
        assert one["kernels"] is one["idle_share"] is None
        step = one["part"] == "step"
        assert one["tokens_per_s"] == (pytest.approx(2e3 / one["milliseconds"]) if step else None)
    (speculation,) = report["speculation"]
    plain, draft, verify, cycle = (one["milliseconds"] for one in found)
    assert speculation["draft_ratio"] == pytest.approx(draft / plain)
    assert speculation["verify_ratio"] == pytest.approx(verify / plain)
    assert speculation["gap_ms"] == pytest.approx(cycle - 2 * draft - verify)
    assert speculation["costs"]["loop"] == pytest.approx(cycle / plain)
    assert speculation["accepted"] is None
    (made,) = report["models"]
    assert (made["weights"], made["formats"]) == ("synthetic", [{"group_size": 64, "symmetric": True, "bits": 4}])
    out, err = capsys.readouterr()
    assert "tiny, synthetic weights, 4-bit in groups of 64 (symmetric)" in out
    assert "they say nothing about a GPU" in out
    rows = [line.split() for line in out.splitlines()]
    assert f"{cycle:.3f}" in next(row for row in rows if row[:1] == ["cycle"])
    assert next(row for row in rows if row[:1] == ["step"])[10] == "-"  # idle
    assert ["w4a8", "2", "2", "20"] in [row[:4] for row in rows]
    assert "compiling cycle w4a16, 2 w4a8 drafts, batch 2, context 20" in err.splitlines()[2]


def test_bytes_are_those_of_the_arrays_and_the_cache_that_a_pass_reads(model):
    model.programs.lay_out_weights(model.plan(draft="w4a4"))
    arrays = jax.tree.leaves_with_path(nnx.state(model.decoder))
    names = [(jax.tree_util.keystr(path), array.nbytes) for path, array in arrays]
    layers = sum(size for name, size in names if "embedding" not in name and "lm_head" not in name)
    sums = sum(size for name, size in names if "group_sum" in name)
    assert sums > 0
    slot = 2 * CONFIG.num_layers * CONFIG.num_kv_heads * CONFIG.head_dim * 4
    table = CONFIG.vocab_size * CONFIG.hidden_size * 4
    row = CONFIG.hidden_size * 4
    step = pass_bytes(model, View.of(Precision.W4A16), SETTING, new_tokens=1)
    assert step == {"weights": layers - sums, "lm_head": table, "embedding": 2 * row, "cache": 2 * 21 * slot}
    draft = pass_bytes(model, View.of(Precision.W4A4), SETTING, new_tokens=1)
    assert draft["weights"] == layers
    verify = pass_bytes(model, View.of(Precision.W4A16), SETTING, new_tokens=4)
    assert (verify["embedding"], verify["cache"]) == (2 * 4 * row, 2 * 24 * slot)
    cycle = Part("cycle", model.plan(draft="w4a4", draft_length=3)).num_bytes(model, SETTING)
    assert cycle == {kind: verify[kind] + 3 * draft[kind] for kind in verify}


@pytest.mark.parametrize(("context", "read"), [(100, 100), (1023, 1023), (1024, 512), (1100, 512)])
def test_a_draft_with_a_budget_reads_the_cache_from_the_length_on_that_the_engine_says(model, context, read):
    plan = model.plan(draft="w4a16")
    setting = Setting.create(batch=1, context=context, longest_draft=3)
    slot = 2 * CONFIG.num_layers * CONFIG.num_kv_heads * CONFIG.head_dim * 4
    assert Part("draft", plan).num_bytes(model, setting)["cache"] == (read + 1) * slot
    plain, cycle = (model.cycle_bytes(one, rows=1, context=context) for one in (model.plan("w4a16"), plan))
    assert cycle - plain == 3 * (plain - (context - read) * slot)


@pytest.mark.parametrize("context", [20, 96])
def test_a_context_that_is_shorter_than_the_budget_fills_the_table_of_blocks(model, context):
    """With a cache that is not: what its drafts then read is a table of as many blocks as ever."""
    plan = model.plan(draft="w4a16", draft_context=112)
    setting = Setting(1, context, 128)
    (measured,) = measure_parts(model, [Part("cycle", plan)], setting, repeats=1, repetitions=1)
    assert (measured.status, measured.draft) == ("ok", "w4a16@112")
    blocks = context_state(model.decoder, setting, num_blocks=plan.num_blocks).cache.blocks
    assert np.asarray(blocks).tolist() == np.broadcast_to(np.arange(7), blocks.shape).tolist()


def test_long_names_of_drafts_move_no_column():
    plan = DecodingPlan(Precision.W4A16, View(head_bits=4, cache_budget=1024), 3)
    parts = [Part(name, plan) for name in ("draft", "cycle")]
    widths = decode_tables.name_widths(parts)
    rows = [
        decode_tables.table_row(Measurement(part.name, part.view.name, part.source, 3, 1, 2, 3), 1.0, widths)
        for part in parts
    ]
    assert len({len(line) for line in [decode_tables.table_head(widths), *rows]}) == 1
    one = Speculation(plan.draft_source, 3, 1, 2, 1.0, 0.5, 1.0, 2.5, None, verify="w4a16")
    head, *lines = decode_tables.speculation_table([one]).splitlines()[-3:]
    assert all(line.startswith(f"{plan.draft_source} ") for line in lines)
    assert len(lines[0]) == len(head.removesuffix("  measured"))


def test_a_sliding_window_bounds_the_cache_that_is_read():
    windowed = tiny.language_model(dataclasses.replace(CONFIG, sliding_window=5, tie_word_embeddings=True))
    found = pass_bytes(windowed, View.of(Precision.W4A8), SETTING, new_tokens=1)
    slot = 2 * CONFIG.num_layers * CONFIG.num_kv_heads * CONFIG.head_dim * 4
    assert found["cache"] == 2 * (5 + 1) * slot
    table = CONFIG.vocab_size * CONFIG.hidden_size * 4
    assert found["lm_head"] == table
    assert found["weights"] == windowed.nbytes - table


@pytest.mark.parametrize("name", ["draft", "verify"])
def test_a_repetition_runs_its_part_and_goes_back_to_the_context(model, name):
    plan = model.plan(draft="w4a8", draft_length=3)
    before = context_state(model.decoder, SETTING)
    after = jax.jit(lambda state: Part(name, plan).advance(model.decoder, state, plan=plan))(before)
    for field in ("num_tokens", "finished", "max_new_tokens"):
        assert np.array_equal(getattr(after, field), getattr(before, field))
    assert np.array_equal(after.cache.lengths, [20, 20])
    written = np.any(after.cache.layers.keys != before.cache.layers.keys, axis=(0, 1, 3))
    assert np.flatnonzero(written).tolist() == list(range(20, 23 if name == "draft" else 24))


def test_parts_are_measured_once_and_what_they_are_compared_with_is_added(model):
    parts = decoding_parts(model, ["qspec"], drafts=["auto", "w4a8", "w4a4"], draft_lengths=[1, 3])
    labels = [str(part) for part in parts]
    assert labels[0] == "step w4a16"
    assert labels.count("verify w4a16, 2 tokens") == labels.count("verify w4a16, 4 tokens") == 1
    assert [label for label in labels if "3 w4a8 drafts" in label] == [
        "draft w4a8, 3 w4a8 drafts",
        "cycle w4a16, 3 w4a8 drafts",
    ]
    assert len(parts) == 1 + 4 + 2 + 4
    assert [str(part) for part in decoding_parts(model, ["w4a8"])] == ["step w4a8"]
    assert [str(part) for part in decoding_parts(model, ["lookup"], drafts=["w4a8"], draft_lengths=[3])] == [
        "step w4a16",
        "verify w4a16, 4 tokens",
        "cycle w4a16, 3 lookup drafts",
    ]


def test_drafts_that_read_what_verifies_are_no_parts(model):
    """Neither by their names, nor in a cache that a budget pays for."""
    asked = {"drafts": ["w4a8", "w4a16"], "draft_lengths": [3], "draft_contexts": ["full", 128]}
    parts = decoding_parts(model, ["qspec"], **asked)
    assert [part.source for part in parts if part.name == "cycle"] == ["w4a8", "w4a8@128", "w4a16@128"]
    left = ["step w4a16", "draft w4a8, 3 w4a8 drafts", "verify w4a16, 4 tokens", "cycle w4a16, 3 w4a8 drafts"]
    for changed in ({}, {"draft_contexts": [128]}, {"draft_contexts": [128], "drafts": ["w4a16", "w4a8"]}):
        parts = decoding_parts(model, ["qspec"], **{**asked, **changed})
        in_cache = dict.fromkeys(one for part in parts if (one := part.in_cache(64)).exists)
        assert [str(part) for part in in_cache] == left


@on_cpu
def test_drafts_that_are_looked_up_cost_a_verification(tmp_path, capsys):
    code, report = report_of(tmp_path, "--mode", "lookup", "--draft-length", "2")
    assert code == 0
    found = [(one["part"], one["draft"], one["draft_length"], one["status"]) for one in report["measurements"]]
    assert found == [("step", None, 0, "ok"), ("verify", None, 2, "ok"), ("cycle", "lookup", 2, "ok")]
    plain, verify, cycle = report["measurements"]
    assert cycle["num_bytes"] == verify["num_bytes"]  # no pass more
    (speculation,) = report["speculation"]
    assert (speculation["draft"], speculation["draft_ratio"]) == ("lookup", 0.0)
    assert speculation["costs"]["loop"] == pytest.approx(cycle["milliseconds"] / plain["milliseconds"])
    assert "2 lookup drafts" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [(NotImplementedError, "unsupported", 0), (jax.errors.JaxRuntimeError, "failed", 1)],
)
@on_cpu
def test_what_does_not_run_is_a_dash_with_the_reason(tmp_path, capsys, monkeypatch, error, status, code):
    def lower(self, plan, state, *, advance):
        raise error("no such kernel\nand more")

    monkeypatch.setattr(Programs, "lower_repetition", lower)
    found_code, report = report_of(tmp_path, "--mode", "w4a16")
    assert found_code == code
    (one,) = report["measurements"]
    assert (one["status"], one["reason"], one["milliseconds"]) == (status, "no such kernel", None)
    out, err = capsys.readouterr()
    assert next(line for line in out.splitlines() if line.startswith("step")).split()[6:12] == ["-"] * 6
    assert "no such kernel" in err


def four_measurements():
    setting = {"batch": 1, "context": 20, "capacity": 64}
    return [
        Measurement("step", "w4a16", None, 0, milliseconds=4.0, **setting),
        Measurement("draft", "w4a8", "w4a8", 2, milliseconds=3.0, **setting),
        Measurement("verify", "w4a16", None, 2, milliseconds=5.0, **setting),
        Measurement("cycle", "w4a16", "w4a8", 2, milliseconds=12.0, **setting),
    ]


def test_speculation_needs_all_of_its_parts():
    step, draft, verify, cycle = four_measurements()
    (found,) = speculations([step, draft, verify, cycle], {("w4a8", 2): SCORE})
    assert (found.plain_ms, found.draft_ms, found.verify_ms, found.cycle_ms) == (4.0, 3.0, 5.0, 12.0)
    assert found.accepted == SCORE
    failed = dataclasses.replace(verify, status="failed", milliseconds=None)
    assert speculations([step, draft, failed, cycle], {}) == []
    elsewhere = dataclasses.replace(cycle, batch=2)
    assert speculations([step, draft, verify, elsewhere], {}) == []


def pause(repetitions):
    time.sleep(1e-4 * int(repetitions))


def with_idle_loops(monkeypatch):
    """Loops that are there at once and do nothing, for longer than the kernels that are said to run in them."""
    lowered = types.SimpleNamespace(compile=lambda: lambda leaves, state, repetitions: pause(repetitions) or state)
    monkeypatch.setattr(Programs, "lower_repetition", lambda self, *arguments, **options: lowered)


def with_kernels(monkeypatch, recorded):
    """A kernel clock that sees the given launches in every run of a program."""
    with_idle_loops(monkeypatch)
    for module in (timing, decode_measure):
        monkeypatch.setattr(module, "kernel_clock_works", lambda: True)
    monkeypatch.setattr(decode_measure, "recorded_kernels", lambda run: run() and recorded)


@on_cpu
def test_floating_point_weights_are_another_model_and_measured_last(tmp_path, monkeypatch):
    with_idle_loops(monkeypatch)
    code, report = report_of(tmp_path, "--mode", "float,w4a16", "--asymmetric", "--group-size", "32")
    assert code == 0
    four_bit, floats = report["measurements"]
    assert (four_bit["precision"], floats["precision"]) == ("w4a16", "float")
    shapes = [CONFIG.hidden_size * (sum(CONFIG.qkv_sizes) + 2 * CONFIG.intermediate_size)]
    shapes += [CONFIG.hidden_size * (CONFIG.qkv_sizes[0] + CONFIG.intermediate_size)]
    linears = CONFIG.num_layers * sum(shapes)
    norms = (2 * CONFIG.num_layers + 1) * CONFIG.hidden_size * 4
    assert floats["num_bytes"]["weights"] == 4 * linears + norms
    assert four_bit["num_bytes"]["weights"] == linears // 2 + 2 * 2 * linears // 32 + norms
    assert [one["formats"] for one in report["models"]] == [[{"group_size": 32, "symmetric": False, "bits": 4}], []]


def test_the_breakdown_adds_up_launches_per_step_and_what_is_left_is_idle(tmp_path, capsys, monkeypatch):
    with_kernels(monkeypatch, [("matmul", 1e-3), ("norm", 0.5e-3), ("matmul", 3e-3)] * 8)
    code, report = report_of(tmp_path, "--mode", "w4a16", "--breakdown")
    assert code == 0
    (one,) = report["measurements"]
    assert one["kernels"] == [["matmul", 2.0, pytest.approx(4.0)], ["norm", 1.0, pytest.approx(0.5)]]
    assert one["kernel_ms"] == pytest.approx(4.5e-3)
    assert one["idle_share"] == pytest.approx(1 - 4.5e-3 / one["milliseconds"])
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["4.00", "2", "matmul"] in rows
    assert rows.index(["4.00", "2", "matmul"]) < rows.index(["0.50", "1", "norm"])


def test_how_long_nothing_runs_is_not_known_where_kernels_overlap(tmp_path, capsys, monkeypatch):
    with_kernels(monkeypatch, [("matmul", 1e6)] * 8)
    code, report = report_of(tmp_path, "--mode", "w4a16")
    assert code == 0
    (one,) = report["measurements"]
    assert one["kernel_ms"] > one["milliseconds"]
    assert one["idle_share"] is None


def test_a_loop_whose_kernels_are_not_recorded_is_no_idle_loop(tmp_path, capsys, monkeypatch):
    with_kernels(monkeypatch, [])
    code, report = report_of(tmp_path, "--mode", "w4a16", "--breakdown")
    assert code == 0
    assert report["measurements"][0]["idle_share"] is None
    assert "recorded no kernel of this loop" in capsys.readouterr().out


def test_kernels_of_a_draft_are_counted_per_draft():
    assert by_kernel([("a", 2.0), ("b", 3.0), ("a", 4.0)], 3) == (("a", 2 / 3, 2000.0), ("b", 1 / 3, 1000.0))


@pytest.mark.parametrize("fails", [False, True])
def test_cupti_is_detached_whatever_happens(monkeypatch, fails):
    events = []
    cupti = types.SimpleNamespace(
        _cupti_init=lambda: events.append("init"),
        _cupti_get_timings=lambda finalize: events.append(("read", finalize)) or [("kernel", 0.5)],
    )
    profiler = types.SimpleNamespace(mosaic_gpu_lib=types.SimpleNamespace(_mosaic_gpu_ext=cupti))
    monkeypatch.setitem(sys.modules, "jax.experimental.mosaic.gpu.profiler", profiler)

    def run():
        events.append("run")
        if fails:
            raise ValueError("broken")
        return jnp.ones(1)

    if fails:
        with pytest.raises(ValueError, match="broken"):
            timing.recorded_kernels(run)
    else:
        assert timing.recorded_kernels(run) == [("kernel", 0.5)]
    assert events == ["init", "run", ("read", True)]


TRACE = """
planes {
  name: "/device:GPU:%d"
  lines {
    name: "Stream #7(Compute)" events { metadata_id: 1 duration_ps: 2000000 } events { metadata_id: 2 duration_ps: 9 }
  }
  lines { name: "XLA Ops" events { metadata_id: 1 duration_ps: 2000000 } }
  event_metadata { key: 1 value { id: 1 name: "matmul" } }
  event_metadata { key: 2 value { id: 2 name: "MemcpyD2D" } }
}
"""


def test_kernels_of_several_gpus_are_read_from_a_trace_of_xla(monkeypatch):
    host = 'planes { name: "/host:CPU" lines { name: "python" events { metadata_id: 1 } } }'
    space = jax.profiler.ProfileData.text_proto_to_serialized_xspace(TRACE % 0 + TRACE % 1 + host)
    trace = jax.profiler.ProfileData.from_serialized_xspace(space)
    assert timing.kernels_of(trace) == [("matmul", 0.002)] * 2


def test_with_several_gpus_xla_traces_the_kernels(monkeypatch):
    ran = []
    monkeypatch.setattr(jax, "local_device_count", lambda: 2)
    assert timing.recorded_kernels(lambda: ran.append(1) or jnp.ones(1)) == []  # of a CPU
    assert ran == [1]


def test_repetitions_fill_a_quarter_of_a_second(model, monkeypatch):
    with_idle_loops(monkeypatch)
    monkeypatch.setattr(decode_measure._Loop, "_run", lambda self, repetitions: 0.01 * repetitions)
    (one,) = measure_parts(model, [Part("step", model.plan("w4a8"))], SETTING, repeats=2)
    assert one.repetitions == 25
    assert one.milliseconds == pytest.approx(10)
    (one,) = measure_parts(model, [Part("draft", model.plan(draft="w4a8", draft_length=2))], SETTING, repeats=1)
    assert one.milliseconds == pytest.approx(5)


@on_cpu
def test_the_acceptance_of_a_real_model_is_marked(tmp_path, capsys, monkeypatch):
    config = tiny_checkpoints.hf_config()
    path = tiny_checkpoints.write_hf(tmp_path / "model", config, tiny_checkpoints.hf_tensors(config))
    monkeypatch.setattr("qspec_jax.load", lambda path, **options: tiny.language_model())
    monkeypatch.setattr(decode, "fitting_prompts", lambda model, request: request.prompts)
    monkeypatch.setattr(decode_measure, "measure_parts", lambda *arguments, **options: iter(four_measurements()))
    asked = {}

    def score_drafts(model, prompts, plans, **options):
        asked.update(options, prompts=prompts, plans=[(plan.draft_source, plan.draft_length) for plan in plans])
        return [SCORE]

    monkeypatch.setattr("qspec_jax.evaluation.scores.score_drafts", score_drafts)
    out_path = tmp_path / "out.json"
    small = [argument for argument in SMALL if argument not in ("--preset", "tiny")]
    drafts = ("--mode", "qspec", "--draft", "w4a8", "--draft-length", "2")
    assert main([*small, "--model", str(path), *drafts, "--json", str(out_path)]) == 0
    assert asked["plans"] == [("w4a8", 2)]
    assert asked["prompts"] == decode_request._PROMPTS
    report = json.loads(out_path.read_text())
    assert report["models"][0]["weights"] == "loaded"
    accepted = report["speculation"][0]["accepted"]
    assert accepted["tokens_per_cycle"] == 2.6
    assert f"at {accepted['alpha']:.0%} (2.60 tokens per cycle)" in capsys.readouterr().out


@pytest.mark.parametrize(("text", "block"), [("32", 32), ("row", 128)])
@on_cpu
def test_steps_of_a_rotated_model_have_its_transforms(tmp_path, monkeypatch, text, block):
    blocks = []

    def rotate(gate_up, *, block, **settings):
        blocks.append(block)
        return pallas_kernels.swiglu_quantize(gate_up, **settings)

    monkeypatch.setattr(pallas_kernels, "swiglu_hadamard_quantize", rotate)
    code, report = report_of(tmp_path, "--mode", "w4a8", "--hadamard-block", text)
    assert code == 0
    assert blocks
    assert set(blocks) == {block}
    assert report["models"][0]["name"] == f"tiny with transforms of {block}"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--preset", "llama-9"], "--preset llama-9 is unknown; use one of llama-2-7b, llama-3-8b"),
        (["--batch", "0"], "--batch 0 cannot be read; write positive whole numbers"),
        (["--batch", "1,-4"], "--batch 1,-4 cannot be read"),
        (["--context", "8190"], "--context 8190 and 4 more tokens do not fit the context of smollm2-135m, 8192; "),
        (["--mode", "w4a2"], "--mode w4a2 is unknown; use some of qspec, w4a16"),
        (["--draft", "w4a2"], "--draft w4a2 is unknown; use some of auto, w4a4, w4a8, w4a16"),
        (["--draft", "w4a16", "--verify", "w4a16"], "draft='w4a16' with draft_context='full' reads what verify="),
        (["--draft-length", "17"], "--draft-length 17 must be at most 16"),
        (["--group-size", "128"], "--group-size 128: attention.qkv: K=576 is not a multiple of group_size=128"),
        (["--repeats", "0"], "--repeats 0 must be at least 1"),
        (["--steps", "0"], "--steps 0 must be at least 1"),
        (["--json", "/nonexistent/out.json"], "there is no directory /nonexistent; create it first"),
        (["--plot", "/"], "--plot / is a directory"),
        (["--prompt-file", "prompts.txt"], "--prompt-file measures the acceptance of a real model; give --model"),
        (["--model", "default", "--preset", "tiny"], "--preset and --asymmetric choose synthetic weights"),
        (["--hadamard-block", "100"], "--hadamard-block 100: use one divisor of the MLP's 1536 values, or row"),
        (["--hadamard-block", "6"], "cannot rotate this model"),
        (["--kernels", "triton"], "kernels='triton' does not work on this cpu device"),
        (["--breakdown"], "--breakdown needs an NVIDIA GPU"),
    ],
)
@on_cpu
def test_usage_errors_come_before_any_work(capsys, nothing_runs, arguments, message):
    assert main(["decode", *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert message in err
    assert len(err.strip().splitlines()) == 1
