"""Texts of a command line, whatever the locale takes their bytes for."""

from __future__ import annotations

import argparse
import os

import pytest

from qspec_jax import generate
from qspec_jax.commands.options import text_of


@pytest.fixture
def in_ascii(monkeypatch):
    """As in a process with ``LANG=C PYTHONUTF8=0``, whose bytes beyond ASCII become halves of characters."""
    monkeypatch.setattr(os, "fsencode", lambda text: text.encode("ascii", "surrogateescape"))
    return lambda text, encoding="utf-8": text.encode(encoding).decode("ascii", "surrogateescape")


def test_prompts_and_stop_strings_are_utf_8_in_any_locale(in_ascii):
    arguments = generate.build_parser().parse_args(
        ["--prompt", in_ascii("é 🙂"), "--stop", in_ascii("日本"), "--prompt", "a"]
    )
    assert (arguments.prompt, arguments.stop) == (["é 🙂", "a"], ["日本"])


def test_a_text_of_another_encoding_is_refused_with_a_remedy(in_ascii):
    for text in (in_ascii("é", "latin-1"), "\ud83d"):
        with pytest.raises(argparse.ArgumentTypeError, match=r"not UTF-8; .*--prompt-file"):
            text_of(text)
