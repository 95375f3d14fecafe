"""Text files as other programs write them: with or without a byte order mark, lines ended in any of three ways."""

from __future__ import annotations

import codecs
import sys
from pathlib import Path

from qspec_jax.errors import UsageError

STANDARD_INPUT = "-"
# The mark of UTF-32 begins with that of UTF-16.
_MARKS = {
    codecs.BOM_UTF8: "utf-8",
    codecs.BOM_UTF32_LE: "utf-32-le",
    codecs.BOM_UTF32_BE: "utf-32-be",
    codecs.BOM_UTF16_LE: "utf-16-le",
    codecs.BOM_UTF16_BE: "utf-16-be",
}
# What other files begin with, and what to do with them.
_PACKED = {
    b"\x1f\x8b": "gzip",
    b"PK\x03\x04": "zip",
    b"\x28\xb5\x2f\xfd": "zstandard",
    b"\xfd7zXZ\x00": "xz",
    b"BZh91AY&SY": "bzip2",
}


def read_text(path: Path, *, what: str) -> str:
    """The text of a file, or of the standard input for ``-``; lines end with ``\\n``.

    Args:
        path: of the file.
        what: it is, for messages: an option.

    Raises:
        UsageError: it cannot be read, or is no text.
    """
    try:
        return decode(_read(path))
    except (OSError, ValueError) as error:
        reason = error.strerror or error if isinstance(error, OSError) else error
        raise UsageError(f"cannot read {what} {path}: {reason}") from error


def decode(data: bytes) -> str:
    """UTF-8, or what a byte order mark names; lines end with ``\\n``.

    Raises:
        ValueError: it is something else.
    """
    if kind := next((name for beginning, name in _PACKED.items() if data.startswith(beginning)), None):
        raise ValueError(f"it is packed ({kind}); unpack it first")
    mark = next((mark for mark in _MARKS if data.startswith(mark)), b"")
    encoding = _MARKS.get(mark, "utf-8")
    try:
        text = data[len(mark) :].decode(encoding)
    except UnicodeDecodeError as error:
        number = data[: len(mark) + error.start].count(b"\n") + 1
        raise ValueError(f"line {number} is not {encoding.upper()} ({error.reason}); save it as UTF-8") from error
    if "\0" in text:
        number = text[: text.index("\0")].count("\n") + 1
        raise ValueError(f"line {number} has zero bytes, as UTF-16 has and no text; save it as UTF-8")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def is_standard_input(path: Path) -> bool:
    """Whether a path stands for the standard input."""
    return str(path) == STANDARD_INPUT


def _read(path: Path) -> bytes:
    if not is_standard_input(path):
        return path.read_bytes()
    if sys.stdin is None:
        raise ValueError("there is no standard input")
    return sys.stdin.buffer.read()
