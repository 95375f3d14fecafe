"""Texts of any encoding that says what it is."""

from __future__ import annotations

import gzip
import io
import sys
import types
from pathlib import Path

import pytest

from qspec_jax.errors import UsageError
from qspec_jax.files.text import decode, read_text

TEXT = "één\n日本 🙂\n"


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_a_byte_order_mark_says_how_to_read(encoding):
    assert decode(TEXT.encode(encoding)) == TEXT


@pytest.mark.parametrize("codec", ["utf-16-be", "utf-32-be"])
def test_the_order_of_bytes_may_be_either(codec):
    assert decode(("\ufeff" + TEXT).encode(codec)) == TEXT


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_lines_end_in_any_of_three_ways(end):
    assert decode(f"a{end}b{end}".encode()) == "a\nb\n"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"fine\n\xff\xfa", "line 2 is not UTF-8 .*; save it as UTF-8"),
        ("fine\nUTF-16".encode("utf-16-le"), "line 1 has zero bytes, as UTF-16 has and no text"),
        (b"\xff\xfea", "line 1 is not UTF-16-LE"),
        (gzip.compress(b"fine"), r"it is packed \(gzip\); unpack it first"),
    ],
    ids=["Latin-1", "UTF-16 without a mark", "half a character", "gzip"],
)
def test_what_is_no_text_is_refused_with_its_line(tmp_path, data, message):
    path = tmp_path / "in.txt"
    path.write_bytes(data)
    with pytest.raises(UsageError, match=f"cannot read --text .*in.txt: {message}"):
        read_text(path, what="--text")


def test_a_dash_is_the_standard_input(monkeypatch):
    monkeypatch.setattr(sys, "stdin", types.SimpleNamespace(buffer=io.BytesIO(TEXT.encode("utf-16"))))
    assert read_text(Path("-"), what="--text") == TEXT
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(UsageError, match="cannot read --text -: there is no standard input"):
        read_text(Path("-"), what="--text")
