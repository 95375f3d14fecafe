"""Arguments of operations, checked by their annotations: what is no array of so many axes is named.

Operations themselves check how arguments fit together, and of floating-point arrays which dtypes they take.
"""

from __future__ import annotations

import enum
import functools
import inspect
import operator
import types
import typing
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

_P = ParamSpec("_P")
_T = TypeVar("_T")


def checked(function: Callable[_P, _T]) -> Callable[_P, _T]:
    """An operation that raises ValueError, with its name and the argument's, for what the annotation does not take.

    Checked are arrays by their axes, and integers and truth values by their dtype; whole numbers; and the types of this
    package. Annotations are read at the first call.
    """
    signature = inspect.signature(function)

    @functools.cache
    def kinds() -> dict[str, tuple[Any, ...]]:
        hints = typing.get_type_hints(function)
        return {name: _alternatives(hints[name]) for name in signature.parameters if name in hints}

    @functools.wraps(function)
    def call(*arguments: _P.args, **options: _P.kwargs) -> _T:
        try:
            given = signature.bind(*arguments, **options).arguments
        except TypeError:  # the call says what is missing or unknown
            return function(*arguments, **options)
        for name, value in given.items():
            if name in kinds() and (told := _flaw(value, kinds()[name])) is not None:
                raise ValueError(f"{function.__name__}: {name} {told}")
        return function(*arguments, **options)

    return call


def _alternatives(hint: Any) -> tuple[Any, ...]:
    is_union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    return typing.get_args(hint) if is_union else (hint,)


def _flaw(value: Any, kinds: tuple[Any, ...]) -> str | None:
    """What is wrong with a value of which nothing is taken; None where something is, or where it is not checked."""
    if value is None and type(None) in kinds:
        return None
    told = [_flaw_of_kind(value, kind) for kind in kinds if kind is not type(None)]
    return None if None in told or not told else told[0]


def _flaw_of_kind(value: Any, kind: Any) -> str | None:
    if hasattr(kind, "dim_str"):
        return _flaw_of_array(value, kind.dim_str.split(), kind.dtypes)
    if kind is int:
        return None if _is_whole(value) else f"is {value!r}; use a whole number"
    if isinstance(kind, type) and kind.__module__.startswith("pallas_kernels") and not isinstance(value, kind):
        members = [str(one) for one in kind] if issubclass(kind, enum.Enum) else []
        return f"is of type {type(value).__name__}; use {' or '.join(members) or kind.__name__}"
    return None


def _flaw_of_array(value: Any, axes: list[str], dtypes: Any) -> str | None:
    shape, dtype = getattr(value, "shape", None), getattr(value, "dtype", None)
    use = f"use an array [{', '.join('...' if axis.startswith('*') else axis for axis in axes)}]"
    if shape is None or dtype is None:
        return f"is of type {type(value).__name__}; {use}"
    least = sum(not axis.startswith("*") for axis in axes) + (axes[-1:] != [] and axes[-1].startswith("*"))
    has_more = any(axis.startswith("*") for axis in axes)
    if len(shape) < least or (len(shape) > least and not has_more):
        return f"is {dtype}{list(shape)}; {use}"
    wanted = set(dtypes) if isinstance(dtypes, (list, tuple)) else set()
    if wanted == {"int32"}:  # others are cast
        return None if str(dtype).startswith(("int", "uint")) else f"is {dtype}{list(shape)}; {use} of int32"
    if wanted and wanted <= {"bool", "uint8"} and str(dtype) not in wanted:
        return f"is {dtype}{list(shape)}; {use} of {' or '.join(wanted)}"
    return None


def _is_whole(value: Any) -> bool:
    try:
        operator.index(value)
    except TypeError:
        return False
    return True
