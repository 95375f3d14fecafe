"""``generate --show-draft``: marks in a file, colours on a terminal, token ids in JSON."""

from __future__ import annotations

import json
import sys

import pytest

from qspec_jax import generate
from qspec_jax.commands import output
from qspec_jax.engine.results import GenerationResult

ARGUMENTS = ["--prompt", "w1 w2 w3", "--max-new-tokens", "12", "--show-draft", "--draft", "w4a8"]


def run(capsys, *arguments):
    code = generate.main([*ARGUMENTS, *arguments])
    return code, *capsys.readouterr()


@pytest.mark.usefixtures("loaded")
def test_drafts_are_marked_coloured_or_listed(capsys, monkeypatch):
    _, marked, _ = run(capsys)
    assert "accepted draft  {+correction+}  {*bonus token*}  [-rejected draft-]" in marked
    assert "draft  3 " in marked
    monkeypatch.setattr(generate, "is_colored", lambda stream: stream is sys.stdout)
    _, colored, _ = run(capsys)
    assert "\x1b[" in colored and "\x1b[" not in marked  # noqa: PT018
    _, listed, _ = run(capsys, "--json")
    entry = json.loads(listed)
    assert [token for cycle in entry["drafts"] for token in cycle["tokens"]] == entry["token_ids"][1:]


def test_a_stream_has_them_in_its_result(model):
    *_, result = model.stream("w1 w2 w3", draft="w4a8", max_new_tokens=12, keep_drafts=True)
    assert isinstance(result, GenerationResult)
    assert "rejected draft" in repr(result.show())


@pytest.mark.usefixtures("loaded")
def test_plain_decoding_has_nothing_to_show_and_says_so(capsys):
    code, out, _ = run(capsys, "--mode", "w4a16")
    assert (code, "w4a16 is plain decoding: there are no drafts to show" in out) == (0, True)


def test_a_text_is_not_shown_as_it_comes(capsys):
    code, out, err = run(capsys, "--stream")
    assert (code, out) == (2, "")
    assert "leave --stream out" in err


@pytest.mark.parametrize(
    ("terminal", "environment", "colored"),
    [
        (True, {}, True),
        (True, {"NO_COLOR": ""}, True),
        (True, {"NO_COLOR": "1"}, False),
        (True, {"TERM": "dumb"}, False),
        (False, {}, False),
        (None, {}, False),
    ],
)
def test_colours_are_for_terminals_that_show_them(monkeypatch, terminal, environment, colored):
    for name, value in {"TERM": "xterm", **environment}.items():
        monkeypatch.setenv(name, value)
    if "NO_COLOR" not in environment:
        monkeypatch.delenv("NO_COLOR", raising=False)

    class Stream:
        def isatty(self):
            return terminal

    assert output.is_colored(None if terminal is None else Stream()) is colored
