"""Lines of JSON from anywhere, read and written so that every program can read what comes out."""

from __future__ import annotations

import codecs
import json
import math
from pathlib import Path
from typing import Any

from qspec_jax.errors import UsageError

MAX_DEPTH = 100  # of lists and objects in one another
_SUFFIXES = (".jsonl", ".ndjson", ".jsonlines", ".json")
_KINDS = {dict: "an object", list: "a list", str: "a text", bool: "true or false", type(None): "null"}


class UnreadableValueError(UsageError):
    """An object that is JSON, with a value in it that cannot be read."""


def names_json_lines(path: Path) -> bool:
    """Whether a file's name says that there is an object on each line."""
    return path.suffix.lower() in _SUFFIXES


def parse_object(line: str) -> dict[str, Any]:
    """The object of a line.

    Raises:
        UnreadableValueError: it nests too deep, or has a name twice, or a number with too many digits.
        UsageError: it is no JSON, or no object.
    """
    try:
        value = json.loads(line, parse_int=_whole_number, object_pairs_hook=_object)
    except json.JSONDecodeError as error:
        raise UsageError(f"is not JSON: {error.msg} at column {error.colno}") from error
    except RecursionError:
        raise UnreadableValueError(_TOO_DEEP) from None
    if not isinstance(value, dict):
        raise UsageError(f"is {_KINDS.get(type(value), 'a number')}, not an object")
    return value


_TOO_DEEP = f"nests lists and objects deeper than {MAX_DEPTH}"


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):  # of which Python would take the last, and others the first
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise UnreadableValueError(f"has {json.dumps(twice)[:60]} twice")
    return made


def _whole_number(digits: str) -> int:
    try:
        return int(digits)
    except ValueError:  # Python reads 4,300 digits
        raise UnreadableValueError(f"has a number of {len(digits)} digits") from None


def flaw(value: Any) -> str | None:
    """Why a value of JSON cannot be handed on, None if it can: it nests too deep, or is no valid text or number."""
    left = [(value, 0)]
    while left:
        one, depth = left.pop()
        if depth > MAX_DEPTH:
            return _TOO_DEEP
        if isinstance(one, dict):
            left += [(part, depth + 1) for pair in one.items() for part in pair]
        elif isinstance(one, list):
            left += [(part, depth + 1) for part in one]
        elif isinstance(one, float) and not math.isfinite(one):
            return f"has {one}, which JSON has not"
        elif isinstance(one, str) and not _is_text(one):
            return "has half of a surrogate pair, which is no text"
    return None


def _is_text(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def dumps(value: Any, encoding: str | None = None, *, indent: int | None = None) -> str:
    """JSON, on one line unless it is indented. A number that is none is null.

    What the encoding lacks is escaped, and so are characters that some programs take for the end of a line.

    Args:
        value: of JSON's types.
        encoding: of what it is written to; None is UTF-8.
        indent: of each level, if it is to have lines.
    """
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False, indent=indent)
    except ValueError:
        text = json.dumps(_finite(value), ensure_ascii=False, indent=indent)
    encoding = encoding or "utf-8"
    return text.translate(_LINE_ENDS).encode(encoding, _ESCAPES).decode(encoding)


_LINE_ENDS = {code: f"\\u{code:04x}" for code in (0x85, 0x2028, 0x2029)}


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _escaped(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return json.dumps(error.object[error.start : error.end])[1:-1], error.end


_ESCAPES = "qspec_jax.json"
codecs.register_error(_ESCAPES, _escaped)
