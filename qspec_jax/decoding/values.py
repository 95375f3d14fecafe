"""Single values as users give them, from JSON or Python, checked and converted. Imports neither JAX nor NumPy.

A number may be a scalar or an array without dimensions of NumPy or JAX. A truth value is no number, and a number with a
fraction, or a float at all, is no whole number.
"""

from __future__ import annotations

import operator
import re
import reprlib
import sys
from collections.abc import Mapping
from typing import Any

from qspec_jax.errors import UsageError

INT32_MAX = 2**31 - 1
MAX_COUNT = 2**20  # of what the host holds one by one: rows of a batch, samples of a prompt
_HUGE = 2**63
FLOAT32_MAX = 3.4028234e38
SMALLEST = 5e-324
FLOAT32_TINY = 1.1754944e-38  # the device may take what is smaller for 0
_TOKEN = re.compile(r"0|-?[1-9][0-9]{0,18}")

_short = reprlib.Repr()
_short.maxstring = _short.maxother = _short.maxlong = 60


def shown(value: Any) -> str:
    """A value in a message: short, in one line, whatever it is."""
    try:
        return " ".join(_short.repr(value).split("\n"))
    except Exception:  # an integer of 5,000 digits, an object's own
        return f"<{type(value).__name__}>"


def refuse(name: str, value: Any, allowed: str) -> UsageError:
    """The error that says what was given and what is allowed."""
    return UsageError(f"{name}={shown(value)}: use {allowed}{untraced(value)}")


def untraced(value: Any) -> str:
    """What to do about a value that a program will know once it runs; empty for any other."""
    jax = sys.modules.get("jax")  # without which nothing is traced
    is_traced = jax is not None and isinstance(value, jax.core.Tracer)
    return ", which is known while a program is traced (make it static, or call this outside of jit)" * is_traced


def plain(value: Any) -> Any:
    """A scalar or an array without dimensions, of NumPy, JAX or the like, as a value of Python; others as they are."""
    if hasattr(value, "dtype") and getattr(value, "shape", None) == () and hasattr(value, "item"):
        return value.item()
    return value


def whole(
    name: str, value: Any, allowed: str, *, least: int, most: int = INT32_MAX, kind: str = "a whole number"
) -> int:
    """A whole number within limits; ``allowed`` says which, and ``kind`` what is none at all.

    Raises:
        UsageError: it is none.
    """
    try:
        number = plain(value)
        if isinstance(number, bool):
            raise TypeError
        number = operator.index(number)
    except Exception as error:  # whatever an object raises
        raise refuse(name, value, kind) from error
    if not least <= number <= most:
        raise refuse(name, value, allowed)
    return number


def between(name: str, value: Any, least: int, most: int, allowed: str) -> int:
    """A whole number within limits; its error says that it ``must be`` what is allowed.

    Raises:
        UsageError: it is none.
    """
    number = whole(name, value, allowed, least=-_HUGE, most=_HUGE)
    if not least <= number <= most:
        raise UsageError(f"{name}={number} must be {allowed}")
    return number


def at_least_1(name: str, value: Any) -> int:
    """A whole number from 1 on, that an array of the device can hold.

    Raises:
        UsageError: it is none.
    """
    number = between(name, value, -_HUGE, INT32_MAX, "at most 2**31 - 1")
    return between(name, number, 1, INT32_MAX, "at least 1")


def real(
    name: str, value: Any, allowed: str, *, least: float, most: float, or_zero: bool = False, kind: str = "a number"
) -> float:
    """A finite number within limits, or 0 with ``or_zero``; ``allowed`` and ``kind`` as above.

    Raises:
        UsageError: it is none.
    """
    try:
        number = plain(value)
        if isinstance(number, (bool, complex, str, bytes, bytearray)) or hasattr(number, "shape"):
            raise TypeError
        number = float(number)
    except OverflowError as error:  # an integer of 400 digits
        raise refuse(name, value, allowed) from error
    except Exception as error:  # whatever an object raises
        raise refuse(name, value, kind) from error
    if not (least <= number <= most or (or_zero and number == 0)):  # neither is true of NaN
        raise refuse(name, value, allowed)
    return number + 0.0  # of -0.0 makes 0.0, which is equal but divides otherwise


def truth(name: str, value: Any, allowed: str) -> bool:
    """A truth value.

    Raises:
        UsageError: it is none.
    """
    try:
        found = plain(value)
    except Exception as error:  # whatever an object raises
        raise refuse(name, value, allowed) from error
    if not isinstance(found, bool):
        raise refuse(name, value, allowed)
    return found


def listed(name: str, value: Any, kind: str) -> list[Any]:
    """The members of a list, or of what goes for one: texts, mappings and sets do not.

    Raises:
        UsageError: it is none.
    """
    try:
        if isinstance(value, (str, bytes, bytearray, Mapping, set, frozenset)):
            raise TypeError
        return list(value)
    except Exception as error:  # an array without dimensions, or whatever an object raises
        raise refuse(name, value, kind) from error


def token_id(name: str, value: Any, *, or_text: bool = True) -> int:
    """A token id, also as the text that it is where JSON has it as a key.

    Raises:
        UsageError: it is none.
    """
    number = int(value) if or_text and isinstance(value, str) and _TOKEN.fullmatch(value) else value
    return whole(name, number, "token ids, 0 to 2**31 - 1", least=0, kind="token ids, whole numbers")


def text(name: str, value: Any, allowed: str) -> str:
    """A text that can be written as UTF-8.

    Raises:
        UsageError: it is none, or has half of a character.
    """
    if not isinstance(value, str):
        raise refuse(name, value, allowed)
    check_text(name, value)
    return str(value)


def check_text(what: str, value: str) -> None:
    """Refuses half a character.

    Raises:
        UsageError: a surrogate stands alone: no text in UTF-8, which is what tokenizers read, has one.
    """
    try:
        value.encode()
    except UnicodeEncodeError as error:
        half = value[error.start]
        raise UsageError(
            f"{what} has half a character, {half!r} at place {error.start}, which no UTF-8 text has; remove it"
        ) from error


def printable(value: str) -> str:
    """A text with escapes for halves of characters, which cannot be written."""
    return value.encode(errors="backslashreplace").decode()
