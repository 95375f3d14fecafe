"""Arrays in one line: their dtype and shape, never their values, which may be on a device, abstract or many."""

from __future__ import annotations

import dataclasses
from typing import Any


def shown(value: Any) -> str:
    """``float32[8,64]`` for an array or what stands for one; the ``repr`` of anything else."""
    shape, dtype = getattr(value, "shape", None), getattr(value, "dtype", None)
    if shape is None or dtype is None or dataclasses.is_dataclass(value):
        return repr(value)
    return f"{dtype}[{','.join(map(str, shape))}]"


def with_shapes(instance: Any) -> str:
    """The ``repr`` of a dataclass of arrays; fields that are None are left out."""
    fields = ((field.name, getattr(instance, field.name)) for field in dataclasses.fields(instance))
    listed = ", ".join(f"{name}={shown(value)}" for name, value in fields if value is not None)
    return f"{type(instance).__name__}({listed})"
