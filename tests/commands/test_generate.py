"""The command line: what it prints where, and how it fails."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import types
from pathlib import Path

import jax
import pytest
from tqdm import tqdm

import qspec_jax
from qspec_jax import generate
from qspec_jax.commands import prompt_files
from qspec_jax.commands.run import say
from tests.weights import tiny_checkpoints

ROOT = Path(__file__).parents[2]
KEYS = {
    *("prompt", "prompt_token_ids", "text", "token_ids", "finish_reason", "mode", "draft", "draft_length", "cycles"),
    *("error", "waited_s", "logprobs", "top_logprobs", "choices", "reused_prompt_tokens"),
    *("drafted", "accepted", "accepted_lengths", "acceptance_rate", "tokens_per_cycle", "prefill_s", "decode_s"),
    *("compile_s", "tokens_per_s", "device", "kernels"),
}


def run(capsys, *arguments):
    """Exit code, standard output, standard error."""
    code = generate.main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.fixture(scope="module")
def demo_model(demo_gguf):
    return qspec_jax.load(demo_gguf, kernels="reference")


@pytest.fixture
def demo(demo_model, monkeypatch):
    """Commands find the demo model already loaded."""
    monkeypatch.setattr(qspec_jax, "load", lambda *arguments, **options: demo_model)


@pytest.mark.newest_jax
@pytest.mark.usefixtures("demo")
def test_text_goes_to_stdout_and_figures_to_stderr(capsys):
    code, out, err = run(capsys, "--prompt", "Why is the sky blue?", "--max-new-tokens", 16)
    assert code == 0
    assert out.startswith("The answer")
    figures = err.splitlines()[-1]
    assert "compiling" in err
    for part in ("16 tokens", "tokens/s", "acceptance", "tokens/cycle", "w4a8 drafts of 3", "reference kernels"):
        assert part in figures


def test_a_start_says_how_long_programs_took_to_compile_or_to_find(demo_model, monkeypatch, capsys):
    def load(*_, compile_ahead, **__):
        compile_ahead(demo_model)
        return demo_model

    monkeypatch.setattr(qspec_jax, "load", load)
    code, _, err = run(capsys, "--prompt", "Why is the sky blue?", "--max-new-tokens", 4)
    assert code == 0
    assert f"programs took {demo_model.programs.compile_s:.1f} s" in err.splitlines()


@pytest.mark.parametrize(
    ("mode", "more", "said"),
    [
        ("qspec", ["--stream", "--prompt", "w4"], "nothing is drafted"),
        ("lookup-qspec", [], "drafts are looked up alone"),
    ],
)
def test_drafts_that_a_small_cache_lacks_are_told_once(model, monkeypatch, capsys, mode, more, said):
    """They are missed ahead of loading, after it, and by each prompt that is streamed."""

    def load(*_, compile_ahead, **__):
        compile_ahead(model)
        return model

    monkeypatch.setattr(qspec_jax, "load", load)
    options = ("--mode", mode, "--draft", "w4a16", "--draft-context", 256, "--max-new-tokens", 2)
    code, _, err = run(capsys, "--prompt", "w3", *more, *options)
    told = [line for line in err.splitlines() if "would read all of a cache" in line]
    assert (code, told) == (0, [f"{said}: w4a16@256 x3 would read all of a cache of 64, as its verification does"])


def test_a_line_stands_above_a_progress_bar(monkeypatch):
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    with tqdm(total=3, file=stream):
        say("compiling ...")
    assert "compiling ..." in stream.getvalue().splitlines()  # a bar that is drawn anew begins a line there, too


def test_stop_tokens_of_the_model_are_ignored_for_those_who_ask():
    for given, expected in (([], False), (["--ignore-eos"], True)):
        arguments = generate.build_parser().parse_args(["--prompt", "a", *given])
        assert generate._defaults(arguments)["ignore_eos"] is expected


@pytest.mark.parametrize("half_imported", [None, types.SimpleNamespace()], ids=["no tqdm", "tqdm being imported"])
def test_a_line_is_written_where_there_are_no_bars(monkeypatch, capsys, half_imported):
    monkeypatch.setitem(sys.modules, "tqdm", half_imported)
    say("compiling ...")
    assert capsys.readouterr().err == "compiling ...\n"


@pytest.mark.usefixtures("loaded")
def test_json_has_one_complete_object_per_prompt(capsys, tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "Name a color."}\n\n{"prompt": "Name a fruit."}\n')
    arguments = ("--prompt", "Hello", "--prompt-file", prompts, "--max-new-tokens", 8, "--draft", "w4a4", "--json")
    code, out, _ = run(capsys, *arguments)
    assert code == 0
    entries = [json.loads(line) for line in out.splitlines()]
    assert [entry["prompt"] for entry in entries] == ["Hello", "Name a color.", "Name a fruit."]
    assert all(set(entry) == KEYS for entry in entries)
    assert all((entry["mode"], entry["draft"], entry["draft_length"]) == ("qspec", "w4a4", 3) for entry in entries)


@pytest.mark.parametrize(("given", "json"), [(["--logprobs", "1"], False), (["--stream"], True)])
@pytest.mark.usefixtures("loaded")
def test_options_of_another_kind_of_output_are_told(capsys, given, json):
    arguments = ("--prompt", "w3", "--max-new-tokens", 2, "--mode", "w4a16", *given)
    said = f"{given[0]}: no effect on {'JSON' if json else 'text'}"
    for options in ([], ["--json"]):
        code, _, err = run(capsys, *arguments, *options)
        assert (code, said in err) == (0, bool(options) == json)


@pytest.mark.usefixtures("loaded")
def test_streaming_prints_the_same_text(capsys):
    arguments = ("--prompt", "Name a color.", "--max-new-tokens", 24)
    _, at_once, _ = run(capsys, *arguments, "--no-stream")
    _, streamed, err = run(capsys, *arguments, "--stream")
    assert streamed == at_once
    assert "24 tokens" in err or "stop" in err or "tokens/cycle" in err


@pytest.mark.newest_jax
@pytest.mark.usefixtures("loaded")
def test_a_seed_samples_the_same_text_at_once_and_streamed(capsys):
    arguments = ("--prompt", "Name a color.", "--max-new-tokens", 8, "--temperature", 1.5, "--top-p", 0.9, "--seed", 4)
    _, out, _ = run(capsys, *arguments)
    _, streamed, _ = run(capsys, *arguments, "--stream")
    _, greedy, _ = run(capsys, *arguments[:4])
    assert streamed == out != greedy


@pytest.mark.usefixtures("loaded")
def test_several_prompts_are_told_apart(capsys):
    arguments = ("--max-new-tokens", 4, "--mode", "w4a16", "--batch-size", 1)
    _, out, _ = run(capsys, "--prompt", "Hello", "--prompt", "Goodbye", *arguments)
    assert out.index("### Hello") < out.index("### Goodbye")


@pytest.mark.usefixtures("demo")
def test_without_the_chat_template_the_prompt_is_continued(capsys):
    """A prompt of so many tokens as one in the template, which needs no other program."""
    prompt = " ".join(map(str, range(1, 16)))
    _, out, _ = run(capsys, "--prompt", prompt, "--no-chat", "--max-new-tokens", 4, "--json")
    entry = json.loads(out)
    assert len(entry["prompt_token_ids"]) == len(prompt)
    assert entry["text"].startswith(" 16")


@pytest.mark.usefixtures("demo")
def test_a_prompt_longer_than_the_cache_is_a_usage_error(capsys):
    code, out, err = run(capsys, "--prompt", "word " * 100, "--max-seq-len", 64, "--max-new-tokens", 8)
    assert (code, out) == (2, "")
    assert "do not fit max_seq_len=64; shorten the prompt, lower max_new_tokens or raise max_seq_len" in err


@pytest.mark.newest_jax
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "there is no prompt; give --prompt TEXT or --prompt-file FILE"),
        (["--prompt", ""], "prompt 1 is empty"),
        (["--prompt", "a", "--draft-length", "0"], "--draft-length 0 must be at least 1"),
        (["--prompt", "a", "--draft-length", "99"], "--draft-length 99 must be at most 16"),
        (["--prompt", "a", "--max-new-tokens", "-5"], "--max-new-tokens -5 must be at least 1"),
        (["--prompt", "a", "--batch-size", "0"], "--batch-size 0 must be at least 1"),
        (["--prompt", "a", "--slots", "0"], "--batch-size 0 must be at least 1"),
        (["--prompt", "a", "--max-seq-len", "0"], "--max-seq-len 0 must be at least 1"),
        (["--prompt", "a", "--temperature", "-1"], "temperature=-1.0: use 0 (greedy) or more"),
        (["--prompt", "a", "--typical-acceptance", "2"], "typical_acceptance=2.0: use more than 0"),
        (["--prompt", "a", "--num-samples", "2000000000"], "--num-samples 2000000000 must be at most 1048576"),
        (["--prompt", "a", "--prompt-file", "/dev/null"], "--prompt-file /dev/null has no prompt"),
        (["--prompt-file", "/nonexistent/prompts.txt"], "cannot read --prompt-file /nonexistent/prompts.txt"),
    ],
)
def test_usage_errors_exit_with_2_before_a_model_is_loaded(capsys, monkeypatch, arguments, message):
    monkeypatch.setattr(qspec_jax, "load", lambda *a, **k: pytest.fail("loaded a model"))
    code, out, err = run(capsys, *arguments)
    assert (code, out) == (2, "")
    assert message in err
    assert len(err.strip().splitlines()) == 1


@pytest.mark.parametrize(
    "option", [["--mode", "w4a2"], ["--kernels", "cutlass"], ["--group-size", "48"], ["--dtype", "int8"]]
)
def test_unknown_choices_exit_with_2_and_name_the_known(capsys, option):
    with pytest.raises(SystemExit) as raised:
        generate.main(["--prompt", "a", *option])
    assert raised.value.code == 2
    assert "choose from" in capsys.readouterr().err


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="asks for GPU kernels where there is none")
def test_kernels_that_do_not_work_here_exit_with_2(capsys):
    code, _, err = run(capsys, "--prompt", "a", "--kernels", "triton")
    assert code == 2
    assert "kernels='triton' does not work on this cpu device; use auto or one of reference" in err


def test_an_unknown_model_exits_with_1(capsys):
    code, out, err = run(capsys, "--prompt", "a", "--model", "/nonexistent/model.gguf")
    assert (code, out) == (1, "")
    assert "no such file or directory" in err


def test_a_prompt_file_line_that_is_not_an_object_with_a_prompt_is_named(capsys, tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "fine"}\n{"text": "not"}\n')
    code, _, err = run(capsys, "--prompt-file", path)
    assert code == 2
    assert "prompts.jsonl:2" in err
    path.write_text('{"prompt": \n')
    code, _, err = run(capsys, "--prompt-file", path)
    assert code == 2
    assert "prompts.jsonl:1 is not JSON" in err


def test_a_text_file_has_a_prompt_per_line(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("first\n\n  \nsecond {line}\n{third\n")
    assert prompt_files.read_prompt_file(path) == ["first", "second {line}", "{third"]


@pytest.mark.parametrize("damage", ["missing shard", "truncated", "wrong dtype"])
def test_a_damaged_checkpoint_exits_with_1_and_one_message(capsys, tmp_path, damage):
    config = tiny_checkpoints.hf_config()
    tensors = tiny_checkpoints.hf_tensors(config)
    if damage == "wrong dtype":
        tensors["model.norm.weight"] = tensors["model.norm.weight"].astype("int32")
    path = tiny_checkpoints.write_hf(tmp_path / "model", config, tensors, num_shards=2)
    shard = sorted(path.glob("*.safetensors"))[-1]
    if damage == "missing shard":
        shard.unlink()
    elif damage == "truncated":
        shard.write_bytes(shard.read_bytes()[:-100])
    code, out, err = run(capsys, "--prompt", "a", "--model", path)
    assert (code, out) == (1, "")
    assert "error: " in err
    assert "Traceback" not in err


def test_a_group_size_that_does_not_divide_exits_with_2(capsys, tmp_path):
    config = tiny_checkpoints.hf_config()
    path = tiny_checkpoints.write_hf(tmp_path / "model", config, tiny_checkpoints.hf_tensors(config))
    code, _, err = run(capsys, "--prompt", "a", "--model", path, "--group-size", 128)
    assert code == 2
    assert "K=64 is not a multiple of group_size=128; use 32 or 64" in err


@pytest.mark.newest_jax
def test_the_process_reports_an_error_without_a_traceback_unless_asked():
    command = [sys.executable, "-m", "qspec_jax.generate", "--prompt", "a", "--model", "no/such/model.gguf"]
    plain = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert (plain.returncode, plain.stdout) == (1, "")
    assert plain.stderr.strip().splitlines()[-1].startswith("error: ")
    assert "Traceback" not in plain.stderr
    debug = subprocess.run([*command, "--debug"], capture_output=True, text=True, cwd=ROOT)
    assert debug.returncode != 0
    assert "Traceback" in debug.stderr
