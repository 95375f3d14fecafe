"""Sizes as people read them. Imports no JAX."""

from __future__ import annotations

_UNITS = (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3))


def size_text(num_bytes: int) -> str:
    """A number of bytes in the unit that fits, with three digits: ``25.2 MB``; less than a kB in bytes."""
    for unit, size in _UNITS:
        if (value := num_bytes / size) >= 0.9995:  # what is less would not be rounded to one
            return f"{value:,.{2 if value < 9.995 else 1 if value < 99.95 else 0}f} {unit}"
    return f"{num_bytes} B"
