"""Fields of configurations as people give them, of any type: checked by name, and turned into values of Python."""

from __future__ import annotations

import operator
from typing import Any

from qspec_jax.errors import UsageError

_LARGEST = 2**31 - 1  # that the device counts to


def whole(name: str, value: Any, *, or_none: bool = False) -> int | None:
    """A whole number; None only where it means something.

    Raises:
        UsageError: it is none, or too large for the device.
    """
    if value is None and or_none:
        return None
    try:
        number = operator.index(_number(value))
    except Exception as error:  # whatever an object raises
        raise UsageError(f"{name} must be a whole number, and is of type {type(value).__name__}") from error
    if abs(number) > _LARGEST:
        raise UsageError(f"{name} must be a whole number below 2**31")
    return number


def real(name: str, value: Any) -> float:
    """A number, whole or not.

    Raises:
        UsageError: it is none.
    """
    try:
        return float(_number(value))
    except Exception as error:
        raise UsageError(f"{name} must be a number, and is of type {type(value).__name__}") from error


def truth(name: str, value: Any) -> bool:
    """A truth value.

    Raises:
        UsageError: it is none.
    """
    if not isinstance(found := _plain(value), bool):
        raise UsageError(f"{name} must be True or False, and is of type {type(value).__name__}")
    return found


def _plain(value: Any) -> Any:
    """A scalar of NumPy or JAX as a value of Python; others as they are."""
    return value.item() if getattr(value, "shape", None) == () and hasattr(value, "item") else value


def _number(value: Any) -> Any:
    found = _plain(value)
    if isinstance(found, (bool, str, bytes)) or hasattr(found, "shape"):
        raise TypeError
    return found
