"""Checks annotations as ``jaxtyping.jaxtyped`` does, in a fifth of its time: most of what tests call is annotated.

``jaxtyped`` binds the arguments of each call to a signature, and checks all of them twice. Here beartype checks them
once, and only calls whose annotations name axes remember what these axes are. What axes are called by f-strings of
arguments, which the packages do not do, is not supported. A function within a function is made anew by every call of
that one, and what checks it is written and compiled only for the first.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import types
import typing
from typing import Any

import beartype
import jaxtyping
from jaxtyping._storage import pop_shape_memo, push_shape_memo

_original = jaxtyping.jaxtyped
_checked = beartype.beartype(conf=beartype.BeartypeConf(violation_type=jaxtyping.TypeCheckError))

_checked_within = {}  # by code and names of the module: what checks a function within another one, and if it names axes


def install(packages: list[str]) -> None:
    """Checks the annotations of what is imported from these packages from now on."""
    jaxtyping.install_import_hook(packages, "beartype.beartype")
    jaxtyping.jaxtyped = _jaxtyped


def _jaxtyped(*, typechecker):
    return functools.partial(_decorate, typechecker=typechecker)


def _decorate(function, *, typechecker):
    """Plain functions and dataclasses, cheaply; what jaxtyping does with generators and coroutines is left to it."""
    if dataclasses.is_dataclass(function) and "__init__" in vars(function):
        function.__init__ = _decorate(function.__init__, typechecker=typechecker)
        return function
    plain = isinstance(function, types.FunctionType) and not inspect.isgeneratorfunction(function)
    if not plain or inspect.iscoroutinefunction(function) or inspect.isasyncgenfunction(function):
        return _original(function, typechecker=typechecker)
    if not function.__annotations__:
        return function
    key = (function.__code__, id(function.__globals__))
    if key in _checked_within:
        checked, names_axes = _checked_within[key]
        checked = _for_another(checked, function)
    else:
        hints = _hints(function)
        function.__annotations__ = hints
        checked, names_axes = _checked(function), any("jaxtyping" in repr(hint) for hint in hints.values())
        if "<locals>" in function.__qualname__ and "__beartype_func" in (checked.__kwdefaults__ or ()):
            _checked_within[key] = checked, names_axes
    if not names_axes:
        return checked

    @functools.wraps(function)
    def with_axes(*arguments, **options):
        __tracebackhide__ = True
        push_shape_memo({})
        try:
            return checked(*arguments, **options)
        finally:
            pop_shape_memo()

    return with_axes


def _for_another(checked, function):
    """What checks a function, for another one of the same code, whose closure and defaults may differ."""
    other = types.FunctionType(checked.__code__, checked.__globals__)
    other.__kwdefaults__ = {**checked.__kwdefaults__, "__beartype_func": function}
    other.__dict__.update(checked.__dict__)
    return functools.update_wrapper(other, function)


def _hints(function) -> dict[str, Any]:
    """What the annotations name; as in jaxtyping anything where that is a name of another scope."""
    try:
        return typing.get_type_hints(function, include_extras=True)
    except Exception:
        return {name: _hint(hint, function.__globals__) for name, hint in function.__annotations__.items()}


def _hint(hint, names: dict[str, Any]):
    holder = types.SimpleNamespace(__annotations__={"hint": hint})
    try:
        return typing.get_type_hints(holder, names, include_extras=True)["hint"]
    except Exception:
        return Any
