"""File to file: every line once, in order, whatever happens to the process."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from qspec_jax import generate
from qspec_jax.commands.prompt_files import PromptLine, ResultFile, line_keys, read_prompt_file, read_prompt_lines
from qspec_jax.decoding.programs import Programs
from qspec_jax.errors import UsageError

ROOT = Path(__file__).parents[2]
NUM_PROMPTS = 60
DEFAULTS = {"max_new_tokens": 8, "chat": None, "seed": 0}
TIMES = {"waited_s", "prefill_s", "decode_s", "compile_s", "tokens_per_s"}


def write_prompts(path, entries):
    path.write_text("".join(f"{json.dumps(entry)}\n" for entry in entries))
    return path


def some_prompts(count):
    return [{"id": index, "prompt": f"w{index % 40} w{3 + index % 7}"} for index in range(count)]


def run(prompts, output, *options):
    return generate.main(["--prompt-file", str(prompts), "--output", str(output), "--slots", "4", *map(str, options)])


def without_times(path):
    return [
        {key: value for key, value in json.loads(line).items() if key not in TIMES}
        for line in path.read_text().splitlines()
    ]


# A command that stops within a line, after so many whole ones, and says so.
STOPS = """
import sys, threading
from qspec_jax import generate
from qspec_jax.commands import prompt_files

class Watched:
    def __init__(self, path):
        self.file = opened(path)

    def __getattr__(self, name):
        return getattr(self.file, name)

    def write(self, data):
        global whole
        if whole:
            whole -= 1
            return self.file.write(data)
        self.file.write(data[: len(data) // 2])
        print("half a line", flush=True)
        threading.Event().wait()

opened, prompt_files._open, whole = prompt_files._open, Watched, int(sys.argv[1])
generate.main(sys.argv[2:])
"""


@pytest.mark.usefixtures("loaded")  # of the run that is not killed
def test_a_run_that_is_killed_twice_ends_as_one_that_is_not(tiny_path, tmp_path):
    prompts = write_prompts(tmp_path / "in.jsonl", some_prompts(NUM_PROMPTS))
    output, whole = tmp_path / "out.jsonl", tmp_path / "whole.jsonl"
    options = ["--model", str(tiny_path), "--max-new-tokens", "24", "--slots", "4"]
    command = ["--prompt-file", str(prompts), "--output", str(output), *options]
    environment = {**os.environ, "QSPEC_JAX_CACHE": str(tmp_path / "cache"), "PYTHONPATH": str(ROOT)}
    for lines_before, lines_more in ((0, 10), (10, 20)):
        python = [sys.executable, "-c", STOPS, str(lines_more)]
        process = subprocess.Popen([*python, *command], env=environment, stdout=subprocess.PIPE)
        said = process.stdout.readline()
        process.kill()
        process.communicate()
        assert (said, process.returncode) == (b"half a line\n", -signal.SIGKILL)
        assert num_lines(output) == lines_before + lines_more
        assert not output.read_bytes().endswith(b"\n")
    assert run(prompts, output, *options) == 0
    assert run(prompts, whole, *options) == 0
    assert without_times(output) == without_times(whole)
    assert [entry["id"] for entry in without_times(whole)] == list(range(NUM_PROMPTS))


def num_lines(path):
    return path.read_bytes().count(b"\n") if path.exists() else 0


@pytest.mark.usefixtures("loaded")
def test_a_line_may_have_options_and_fails_alone(tmp_path, capsys):
    entries = [
        {"prompt": "w5 w6", "max_new_tokens": 3, "note": "ignored"},
        {"prompt": "w5 w6", "temperature": 1.5, "seed": 4, "logprobs": 1, "max_new_tokens": 12},
        {"prompt": "w5 w6", "temperature": "hot"},
        {"prompt": "w5 " * 255},
        {"prompt": ""},
        {"prompt": "w5 w6"},
    ]
    prompts, output = write_prompts(tmp_path / "in.jsonl", entries), tmp_path / "out.jsonl"
    assert run(prompts, output, "--max-new-tokens", 12) == 1
    got = without_times(output)
    assert [entry["finish_reason"] == "error" for entry in got] == [False, False, True, True, True, False]
    assert got[0]["token_ids"] == got[5]["token_ids"][:3]
    assert got[1]["token_ids"] != got[5]["token_ids"]
    assert got[2]["error"] == "temperature='hot': use a number"
    assert "do not fit" in got[3]["error"]
    assert "prompt 5 failed: prompt 5 is empty" in capsys.readouterr().err


@pytest.mark.usefixtures("loaded")
def test_what_was_written_is_continued_and_a_broken_last_line_written_again(tmp_path, capsys):
    prompts, output = write_prompts(tmp_path / "in.jsonl", some_prompts(9)), tmp_path / "out.jsonl"
    assert run(prompts, output, "--max-new-tokens", 4) == 0
    expected, content = without_times(output), output.read_bytes()
    for cut in (0, 5, 40, content.index(b"\n"), content.index(b"\n") + 1, len(content) - 1, len(content)):
        output.write_bytes(content[:cut])
        assert run(prompts, output, "--max-new-tokens", 4) == 0
        assert without_times(output) == expected
    assert "9 of 9 results are in" in capsys.readouterr().err


@pytest.mark.parametrize("change", ["prompts", "options", "order", "fewer prompts", "no results at all"])
def test_an_output_of_another_run_is_refused_and_left_alone(tmp_path, change):
    lines = [PromptLine("a"), PromptLine("b"), PromptLine("c")]
    path = tmp_path / "out.jsonl"
    file = ResultFile(path, line_keys(lines, DEFAULTS, {}))
    for _ in lines:
        file.write({"text": "x"})
    file.close()
    if change == "no results at all":
        path.write_text("a diary without a line break")
    others = {"prompts": [PromptLine("a"), PromptLine("B")], "order": lines[::-1], "fewer prompts": lines[:2]}
    defaults = {**DEFAULTS, "max_new_tokens": 9} if change == "options" else DEFAULTS
    before = path.read_bytes()
    with pytest.raises(UsageError, match="is not the result of this prompt with these options; name another --output"):
        ResultFile(path, line_keys(others.get(change, lines), defaults, {}))
    assert path.read_bytes() == before


def test_more_prompts_at_the_end_are_more_work_not_another_run(tmp_path):
    lines, path = [PromptLine("a"), PromptLine("b")], tmp_path / "out.jsonl"
    file = ResultFile(path, line_keys(lines[:1], DEFAULTS, {}))
    file.write({"text": "x"})
    file.close()
    file = ResultFile(path, line_keys(lines, DEFAULTS, {}))
    assert file.num_finished == 1
    file.close()


def test_an_output_that_cannot_be_written_is_a_usage_error(tmp_path):
    with pytest.raises(UsageError, match="cannot write --output"):
        ResultFile(tmp_path / "missing" / "out.jsonl", [])


def test_lines_are_prompts_or_conversations(tmp_path):
    messages = [{"role": "user", "content": "Hello"}]
    entries = [
        {"prompt": "a", "id": "x", "top_k": 3, "label": 1},
        {"messages": messages, "max_new_tokens": 2, "kind": "chat"},
    ]
    path = write_prompts(tmp_path / "in.jsonl", entries)
    assert read_prompt_lines(path) == [
        PromptLine("a", {"top_k": 3}, "x"),
        PromptLine(messages, {"max_new_tokens": 2}, kind="chat"),
    ]


SYSTEM, ASKED, ANSWER = ({"role": role, "content": role[0]} for role in ("system", "user", "assistant"))


@pytest.mark.parametrize(
    ("prompt", "messages", "expected"),
    {
        "the last message": ("u", [SYSTEM, ASKED, ANSWER, ASKED], [SYSTEM, ASKED, ANSWER, ASKED]),
        "the first one, with its answer": ("u", [ASKED, ANSWER], "u"),  # which needs no chat template
        "that after a system message": ("u", [SYSTEM, ASKED, ANSWER], [SYSTEM, ASKED]),
        "no prompt": ("", [ASKED], [ASKED]),
        "null for a prompt": (None, [ASKED], [ASKED]),
        "no messages": ("u", [], "u"),
        "null for messages": ("u", None, "u"),
        "a conversation for a prompt": ([SYSTEM, ASKED], None, [SYSTEM, ASKED]),
        "the same with its answer": ([SYSTEM, ASKED], [SYSTEM, ASKED, ANSWER], [SYSTEM, ASKED]),
    }.values(),
)
def test_a_prompt_beside_messages_is_the_one_of_them_that_is_answered(tmp_path, prompt, messages, expected):
    prompts = write_prompts(tmp_path / "in.jsonl", [{"prompt": prompt, "messages": messages}])
    assert [(line.prompt, line.error) for line in read_prompt_lines(prompts)] == [(expected, None)]


@pytest.mark.parametrize("messages", [[ASKED], [SYSTEM, ASKED, ANSWER], [{"role": "user"}], "u", {"a": 1}])
@pytest.mark.parametrize("prompt", ["s", ["u"], 0, [ANSWER, ASKED]])
def test_a_line_with_two_prompts_fails_alone(tmp_path, prompt, messages):
    entries = [{"prompt": prompt, "messages": messages, "id": 7}, {"prompt": "a"}]
    failed, other = read_prompt_lines(write_prompts(tmp_path / "in.jsonl", entries))
    assert (failed.id, failed.prompt, other) == (7, prompt if prompt == "s" else "", PromptLine("a"))
    assert "so it has two prompts; leave one out, or make it null" in failed.error


def test_a_kind_is_a_text(tmp_path):
    path = write_prompts(tmp_path / "in.jsonl", [{"prompt": "a", "kind": ["chat"]}])
    with pytest.raises(UsageError, match=r'in\.jsonl:1 has "kind": \["chat"\]; give it a text'):
        read_prompt_lines(path)


@pytest.mark.parametrize(
    "entry", [{"text": "a"}, {"prompt": 3}, {"messages": []}, {"messages": [{"role": "user"}]}, {"messages": "a"}]
)
def test_a_line_without_a_prompt_is_named(tmp_path, entry):
    path = write_prompts(tmp_path / "in.jsonl", [{"prompt": "fine"}, entry])
    with pytest.raises(UsageError, match=r'in\.jsonl:2 has no text under "prompt" and no "messages"'):
        read_prompt_lines(path)


def test_options_of_lines_that_a_command_does_not_mind_are_told(tmp_path, capsys):
    """Of ``evaluate`` and ``bench``, whose figures would be taken for those of the options."""
    entries = [{"prompt": "a", "kind": "chat"}, {"prompt": "a", "chat": False, "ignore_eos": True, "seed": None}]
    path = write_prompts(tmp_path / "in.jsonl", entries)
    assert read_prompt_file(path) == ["a", "a"]
    assert f"chat, ignore_eos of lines of {path}: no effect, as all prompts have" in capsys.readouterr().err
    assert read_prompt_file(write_prompts(tmp_path / "in.jsonl", entries[:1])) == ["a"]
    assert capsys.readouterr().err == ""


def test_seeds_count_up_with_the_lines():
    lines = [PromptLine("a"), PromptLine("a"), PromptLine("a", {"seed": 9})]
    seeds = [line.resolved(DEFAULTS, index)["sampling"]["seed"] for index, line in enumerate(lines)]
    assert seeds == [0, 1, 9]
    last = PromptLine("a", {"seed": 2**32 - 1}, sample=2), PromptLine("a")
    seeds = [line.resolved({**DEFAULTS, "seed": 2**32 - 1}, 1)["sampling"]["seed"] for line in last]
    assert seeds == [1, 0]


@pytest.mark.usefixtures("loaded")
def test_samples_stop_strings_and_log_probabilities_reach_the_file(tmp_path):
    entries = [{"prompt": "w5 w6", "seed": 3, "kind": "chat"}, {"prompt": "w7", "logprobs": 1}]
    prompts, output = write_prompts(tmp_path / "in.jsonl", entries), tmp_path / "out.jsonl"
    options = ["--max-new-tokens", 9, "--temperature", 1.2, "--num-samples", 2, "--slots", 3]
    assert run(prompts, output, *options) == 0
    first, second, *others = without_times(output)
    assert [first["prompt"], second["prompt"]] == ["w5 w6", "w5 w6"]
    assert [one.get("kind") for one in (first, second, *others)] == ["chat", "chat", None, None]
    assert first["token_ids"] != second["token_ids"]
    assert [len(one["logprobs"]) == len(one["token_ids"]) for one in others] == [True, True]
    words = first["text"].split()
    stopped = tmp_path / "stopped.jsonl"
    assert run(prompts, stopped, *options, "--stop", f"{words[2]}") == 0
    assert without_times(stopped)[0]["text"].split() == words[: words.index(words[2])]


def test_what_is_left_is_compiled_while_the_model_is_loaded(tiny_path, tmp_path, monkeypatch):
    """The loop, and one width of filling: the long prompt of the first run needs no program any more."""
    adopted, adopt = [], Programs.adopt

    def adopting(self, others):
        adopted.append(len(others))
        adopt(self, others)
        monkeypatch.setattr(Programs, "_compile_missing", None)  # nothing is missing from here on

    long, *short = {"prompt": "w1 " * 40}, *some_prompts(3)
    for entries in ([long], [long, *short]):
        with monkeypatch.context() as patch:
            patch.setattr(Programs, "adopt", adopting)
            compile_missing = Programs._compile_missing
            prompts = write_prompts(tmp_path / "in.jsonl", entries)
            assert run(prompts, tmp_path / "out.jsonl", "--model", tiny_path, "--max-new-tokens", 8) == 0
        monkeypatch.setattr(Programs, "_compile_missing", compile_missing)
    assert adopted == [2, 2]


# What results do not depend on, and what the options of each line say.
_ELSEWHERE = {"help", "debug", "json", "stream", "output", "prompt", "prompt_file", "batch_size", "num_samples", "chat"}
_ELSEWHERE |= {
    "max_new_tokens",
    "stop",
    "logprobs",
    "typical_acceptance",
    *generate._defaults(generate.build_parser().parse_args([])),
}
_ELSEWHERE |= {"coordinator", "num_processes", "process_id"}


def test_a_file_goes_on_with_the_same_settings_alone():
    """Every option but those above is a part of what identifies a result."""
    parser = generate.build_parser()
    others = {"draft_length": 5, "max_seq_len": 99, "kv": "int8", "head_bits": 8, "show_draft": True}
    for action in parser._actions:
        if (name := action.dest) not in _ELSEWHERE:
            asked = parser.parse_args([])
            other = next((one for one in action.choices or () if one != action.default and name != "kv"), "another")
            setattr(asked, name, others.get(name, other))
            assert generate._settings(asked) != generate._settings(parser.parse_args([])), name


@pytest.mark.parametrize("name", ["prompts.csv", "Prompts.TSV", "prompts.parquet"])
def test_lines_of_a_table_are_no_prompts(tmp_path, name):
    path = tmp_path / name
    path.write_text('id,prompt\n1,"a, b"\n')
    with pytest.raises(UsageError, match=r'is a table, which is not read; write lines such as \{"prompt": TEXT\}'):
        read_prompt_lines(path)
