"""Checks annotations as ``jaxtyping.jaxtyped`` does, in a fifth of its time: most of what tests call is annotated.

``jaxtyped`` binds the arguments of each call to a signature, and checks all of them twice. Here beartype checks them
once, and only calls whose annotations name axes remember what these axes are. What axes are called by f-strings of
arguments, which the packages do not do, is not supported.
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
    hints = _hints(function)
    function.__annotations__ = hints
    checked = _checked(function)
    if not any("jaxtyping" in repr(hint) for hint in hints.values()):
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
