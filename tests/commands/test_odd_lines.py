"""Lines and files as people have them: each odd one fails alone and is named, and nothing that was finished is lost."""

from __future__ import annotations

import io
import json
import os
import shutil
import sys
import types
from pathlib import Path

import pytest

import qspec_jax
from qspec_jax import generate
from qspec_jax.commands import prompt_files
from qspec_jax.commands.prompt_files import PromptLine, ResultFile, read_prompt_lines
from qspec_jax.engine.scheduler import Scheduler
from qspec_jax.errors import UsageError
from qspec_jax.model.config import QuantConfig
from qspec_jax.weights.checkpoint.save import save_checkpoint
from tests import tiny
from tests.commands import test_prompt_files as files
from tests.commands.test_prompt_files import num_lines, some_prompts, without_times, write_prompts


def run(prompts, output, *options):
    """Two rows of few positions, as most tests here: they share two programs."""
    return files.run(prompts, output, "--slots", 2, "--max-new-tokens", 4, *options)


@pytest.mark.usefixtures("loaded")
def test_a_stream_goes_the_way_of_the_batch(tmp_path, capsys):
    """Six lines, of which the second is too long and the fourth none: the others come, and the right ones are named."""
    lines = ["w5 w6", "w5 " * 255, "w7", '{"prompt": "w8", "top_k": "few"}', "w9", "w1 w2"]
    prompts = tmp_path / "in.txt"
    prompts.write_text("\n\n".join(lines))
    arguments = ["--prompt", "w3", "--prompt-file", str(prompts), "--max-new-tokens", "4", "--num-samples", "2"]
    arguments += ["--batch-size", "2"]
    said = []
    for how in ("--stream", "--no-stream"):
        assert generate.main([*arguments, how]) == 1
        out, err = capsys.readouterr()
        failed = [line for line in err.splitlines() if line.startswith("prompt ")]
        said.append((out, failed))
    assert said[0] == said[1]
    assert out.count("### ") == 14
    assert [line[:15] for line in failed] == ["prompt 3 failed", "prompt 5 failed"]
    assert failed[0].endswith(
        f"do not fit the model's context of 256; shorten the prompt, lower max_new_tokens ({prompts}:3)"
    )
    assert failed[1] == f"prompt 5 failed: top_k='few': use a whole number ({prompts}:7)"


@pytest.mark.usefixtures("loaded")
def test_a_stream_of_which_nothing_can_run_is_a_usage_error(capsys):
    for how in ("--stream", "--no-stream"):
        assert generate.main(["--prompt", "w5 " * 255, "--prompt", "w1", "--max-new-tokens", "256", how]) == 2
        assert "do not fit" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["in.jsonl", "in.JSONL", "in.ndjson", "in.json", "in.txt"])
@pytest.mark.parametrize("line", ['"hello"', "5", "null", "[]", '"prompt": "x"}', '{"prompt": "x"', "plain text"])
def test_a_line_that_is_no_object_is_named_where_objects_are_expected(tmp_path, name, line):
    """By the name of the file, or where its first line is one."""
    path = tmp_path / name
    path.write_text(f'\n{{"prompt": "fine"}}\n\n{line}\n', encoding="utf-8-sig")
    with pytest.raises(UsageError, match=r"in\..*:4 is (not JSON|.*, not an object).*; a line is "):
        read_prompt_lines(path)


DAMAGED = [
    '{"prompt": "x"',
    '{"prompt": "x"},',
    '{"prompt": "x"} {"prompt": "y"}',
    "{'prompt': 'x'}",
    '[{"prompt": "x"}]',
    '"prompt": "x"}',
]


@pytest.mark.parametrize("line", [*DAMAGED, "// a comment", "["])
def test_a_line_that_is_meant_as_an_object_is_named_wherever_it_stands(tmp_path, line):
    """The first line, where nothing but the lines says what they are; it became a prompt before."""
    path = tmp_path / "in.txt"
    path.write_text("\n".join([line, *['{"prompt": "fine"}'] * 2]))
    with pytest.raises(UsageError, match=r"in\.txt:1 is (not JSON|.*, not an object)"):
        read_prompt_lines(path)


@pytest.mark.parametrize("line", DAMAGED)
def test_a_damaged_object_among_texts_is_named(tmp_path, line):
    path = tmp_path / "in.txt"
    path.write_text(f"# a text\n{{a}} text\n[a] text\nPrompt: text\n{line}\n")
    with pytest.raises(UsageError, match=r"in\.txt:5 is (not JSON|.*, not an object)"):
        read_prompt_lines(path)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_a_byte_order_mark_is_no_part_of_the_first_line(tmp_path, encoding):
    for name, text in (("in.jsonl", '{"prompt": "één"}\r\n'), ("in.txt", "één\r\n")):
        path = tmp_path / name
        path.write_bytes(text.encode(encoding))
        assert read_prompt_lines(path) == [PromptLine("één")]


ODD = {
    "half a surrogate in the id": '{"prompt": "w1", "id": "\\ud83d"}',
    "half a surrogate in the prompt": '{"prompt": "w1 \\ud83d", "id": "kept"}',
    "half a surrogate in a message": '{"messages": [{"role": "user", "content": "\\udc00"}]}',
    "half a surrogate in the kind": '{"prompt": "w1", "kind": "\\udc00"}',
    "an id that is no number": '{"prompt": "w1", "id": NaN}',
    "an id that is too large": '{"prompt": "w1", "id": [1e999]}',
    "a deep id": '{"prompt": "w1", "id": ' + "[" * 100_000 + "]" * 100_000 + "}",
    "an id a little deep": '{"prompt": "w1", "id": ' + "[" * 150 + "]" * 150 + "}",
    "a long number": '{"prompt": "w1", "id": ' + "1" * 5000 + "}",
    "a long temperature": '{"prompt": "w1", "temperature": 1' + "0" * 400 + "}",
    "a deep option": '{"prompt": "w1", "stop": ' + "[" * 500 + "]" * 500 + "}",
    "two names of an option": '{"prompt": "w1", "max_tokens": 3, "max_new_tokens": 4}',
    "samples": '{"prompt": "w1", "n": 2}',
    "two prompts": '{"prompt": "w1", "prompt": "w2"}',
    "a message without content": '{"messages": [{"role": "user", "tool_calls": []}]}',
}


@pytest.mark.usefixtures("loaded")
def test_odd_lines_fail_alone_before_the_work_and_are_named(tmp_path, capsys):
    prompts, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    fine = '{"prompt": "w5 w6", "id": 1, "max_tokens": 3, "temperature": null, "note": NaN}'
    prompts.write_text("\n".join([fine, *ODD.values(), fine.replace(": 1,", ": 2,")]))
    for _ in range(2):  # and once more, when all is there
        assert run(prompts, output) == 1
        said = capsys.readouterr().err.splitlines()
        named = [line for line in said if line.startswith("prompt ")]
        for number, line in enumerate(named, 2):
            assert line.startswith(f"prompt {number} failed: ")
            assert line.endswith(f" ({prompts}:{number})")
        assert len(named) == len(ODD)
    entries = [json.loads(line) for line in output.read_bytes().decode().splitlines()]
    assert [entry["finish_reason"] for entry in entries] == ["length", *["error"] * len(ODD), "length"]
    assert [entry.get("id") for entry in entries[:3]] == [1, None, "kept"]
    assert entries[0]["token_ids"] == entries[-1]["token_ids"]
    assert len(entries[0]["token_ids"]) == 3
    assert generate.main(["--prompt-file", str(prompts), "--json", "--slots", "2"]) == 1
    printed = [json.loads(line)["finish_reason"] for line in capsys.readouterr().out.splitlines()]
    assert printed == [entry["finish_reason"] for entry in entries]


def test_a_file_of_odd_lines_alone_is_refused_before_a_model_is_loaded(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(qspec_jax, "load", lambda *a, **k: pytest.fail("loaded a model"))
    path = tmp_path / "in.jsonl"
    path.write_text(ODD["an id that is no number"])
    assert generate.main(["--prompt-file", str(path)]) == 2
    assert f'{path}:1: "id" has nan, which JSON has not' in capsys.readouterr().err


@pytest.mark.usefixtures("loaded")
def test_lines_with_one_id_are_named(tmp_path, capsys):
    ids = [7, "7", {"a": 1, "b": 2}, 7, {"b": 2, "a": 1}, None, None]
    prompts = write_prompts(tmp_path / "in.jsonl", [{"prompt": "w1", "id": one, "max_tokens": 1} for one in ids])
    assert run(prompts, tmp_path / "out.jsonl") == 0
    said = [line for line in capsys.readouterr().err.splitlines() if "the same id" in line]
    assert said == [
        f"{prompts}:{one} and {prompts}:{other} have the same id; results are told apart by their order alone"
        for one, other in ((1, 4), (3, 5))
    ]


@pytest.mark.usefixtures("loaded")
def test_a_second_run_into_one_file_is_refused_at_once(tmp_path, capsys):
    prompts, output = write_prompts(tmp_path / "in.jsonl", some_prompts(3)), tmp_path / "out.jsonl"
    other = tmp_path / "link.jsonl"
    other.symlink_to(output)
    first = ResultFile(output, [])
    for name in (output, other):
        assert run(prompts, name) == 1
        assert f"error: --output {name} is being written by another run" in capsys.readouterr().err
    first.close()
    assert run(prompts, other) == 0
    assert num_lines(output) == 3


@pytest.mark.usefixtures("loaded")
def test_what_was_finished_is_kept_where_the_disk_is_full(tmp_path, capsys, monkeypatch):
    prompts, output = write_prompts(tmp_path / "in.jsonl", some_prompts(6)), tmp_path / "out.jsonl"
    opened = prompt_files._open

    class Small:
        """A file on a disk that has room for some bytes."""

        def __init__(self, path, room):
            self.file, self.room = opened(path), room

        def __getattr__(self, name):
            return getattr(self.file, name)

        def write(self, data):
            if not self.room:
                raise OSError(28, "No space left on device")
            written = self.file.write(data[: self.room])
            self.room -= written
            return written

    with monkeypatch.context() as patch:
        patch.setattr(prompt_files, "_open", lambda path: Small(path, 2000))
        assert run(prompts, output) == 1
    kept = num_lines(output)
    assert 0 < kept < 6
    assert output.read_bytes().endswith(b"\n")
    said = capsys.readouterr().err.splitlines()[-1]
    left = f"{kept} of 6 results are in it, and the same command goes on with it"
    assert said == f"error: cannot write --output {output}: No space left on device; {left}"
    assert run(prompts, output) == 0
    assert [entry["id"] for entry in without_times(output)] == list(range(6))


@pytest.mark.parametrize("name", ["/dev/null", "-", "a directory", "a pipe"])
def test_what_is_no_file_is_refused_before_the_work(tmp_path, capsys, monkeypatch, name):
    monkeypatch.setattr(qspec_jax, "load", lambda *a, **k: pytest.fail("loaded a model"))
    path = Path(name) if name in ("/dev/null", "-") else tmp_path / "out"
    if name == "a directory":
        path.mkdir()
    elif name == "a pipe":
        os.mkfifo(path)
    assert generate.main(["--prompt", "a", "--output", str(path)]) == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1
    assert said[0].startswith(f"error: cannot write --output {path}: ")


@pytest.mark.usefixtures("loaded")
def test_an_interrupted_batch_shows_what_there_is_and_exits_with_130(capsys, monkeypatch):
    advance, calls = Scheduler.advance, []

    def advance_until_interrupted(self, max_cycles=None):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return advance(self, 1)

    monkeypatch.setattr(Scheduler, "advance", advance_until_interrupted)
    arguments = ["--prompt", "w1", "--prompt", "w2", "--max-new-tokens", "40"]
    assert generate.main([*arguments, "--json"]) == 130
    out, err = capsys.readouterr()
    assert [json.loads(line)["finish_reason"] for line in out.splitlines()] == ["interrupted"] * 2
    assert err.splitlines()[-1] == "interrupted"
    calls.clear()
    assert generate.main([*arguments, "--stream"]) == 130


@pytest.mark.usefixtures("loaded")
def test_a_dash_reads_prompts_from_the_standard_input(tmp_path, capsys, monkeypatch):
    text = '{"prompt": "w5 w6", "id": "é"}\n{"prompt": "w7"}\n'.encode("utf-8-sig")
    monkeypatch.setattr(sys, "stdin", types.SimpleNamespace(buffer=io.BytesIO(text)))
    assert generate.main(["--prompt-file", "-", "--json", "--max-new-tokens", "2"]) == 0
    first, second = map(json.loads, capsys.readouterr().out.splitlines())
    assert (first["id"], first["prompt"], second["prompt"]) == ("é", "w5 w6", "w7")
    monkeypatch.setattr(sys, "stdin", types.SimpleNamespace(buffer=io.BytesIO(text + b"5\n")))
    assert generate.main(["--prompt-file", "-"]) == 2
    assert "error: standard input:3 is a number, not an object" in capsys.readouterr().err


def test_a_model_is_known_by_its_real_path(tiny_path, tmp_path, monkeypatch):
    (tmp_path / "link").symlink_to(tiny_path)
    monkeypatch.chdir(tiny_path.parent)
    identity = prompt_files.model_identity
    names = [str(tiny_path), "model", "./model/", "../" + tiny_path.parent.name + "/model", str(tmp_path / "link")]
    (one,) = {identity(name) for name in names}
    assert one.startswith(f"{os.path.realpath(tiny_path)}/")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    assert identity("model") != identity(str(tiny_path))
    assert identity("some/hub-id") == "some/hub-id"
    assert identity(None) == identity("default") == "default"


def test_a_checkpoint_that_was_written_anew_is_another_model(tmp_path):
    found = []
    for seed in range(2):
        decoder = tiny.decoder(seed=seed)
        save_checkpoint(tmp_path / "c", decoder, tokenizer=None, quantization=QuantConfig(), overwrite=True)
        found.append(prompt_files.model_identity(str(tmp_path / "c")))
        assert prompt_files.model_identity(str(tmp_path / "c")) == found[-1]
    assert found[0] != found[1]


@pytest.mark.parametrize("changed", ["a.safetensors", "config.json", "tokenizer.json", "m-00002-of-00002.gguf"])
def test_a_model_that_was_trained_anew_is_another_one_and_one_that_was_copied_is_not(tmp_path, changed):
    files = {"a.safetensors": os.urandom(1 << 16), "b.safetensors": b"", "config.json": b"{}", "notes.json": b"{}"}
    if changed.endswith("gguf"):
        files = {f"m-0000{part}-of-00002.gguf": os.urandom(1 << 16) for part in (1, 2)}
    path = tmp_path / "model"
    path.mkdir()
    for name, content in files.items():
        (path / name).write_bytes(content)
    model = path / "m-00001-of-00002.gguf" if changed.endswith("gguf") else path
    first = prompt_files.model_identity(str(model))
    for name in files:
        os.utime(path / name, (0, 0))
    (path / "notes.json").write_text("[]")
    assert prompt_files.model_identity(str(model)) == first
    content = bytearray(files.get(changed, b"{}"))
    content[len(content) // 2 :] = os.urandom(len(content) // 2)  # half of the tensors
    (path / changed).write_bytes(content)
    assert prompt_files.model_identity(str(model)) != first


def test_the_demo_model_is_one_however_it_is_called(demo_gguf):
    assert prompt_files.model_identity(str(demo_gguf)) == "default"


@pytest.mark.usefixtures("loaded")
def test_a_run_goes_on_with_a_file_by_any_name_of_its_model_and_not_with_another(tiny_path, tmp_path, capsys):
    prompts, output = write_prompts(tmp_path / "in.jsonl", some_prompts(2)), tmp_path / "out.jsonl"
    link, own = tmp_path / "model", shutil.copytree(tiny_path, tmp_path / "own")
    link.symlink_to(own)
    assert run(prompts, output, "--model", own) == 0
    assert run(prompts, output, "--model", link) == 0
    (own / "config.json").write_text("{ }")
    assert run(prompts, output, "--model", link) == 2
    assert "is not the result of this prompt" in capsys.readouterr().err
    link.unlink()
    link.mkdir()
    assert run(prompts, output, "--model", link) == 2
    assert "is not the result of this prompt" in capsys.readouterr().err
