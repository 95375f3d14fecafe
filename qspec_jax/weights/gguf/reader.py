"""The reader of the ``gguf`` package, faster at the lists of a file's metadata."""

from __future__ import annotations

import struct
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, ReaderField

from qspec_jax.errors import UnsupportedModelError

_REMOVED_TYPES = {  # from llama.cpp, by their numbers
    4: "Q4_2",
    5: "Q4_3",
    31: "Q4_0_4_4",
    32: "Q4_0_4_8",
    33: "Q4_0_8_8",
    36: "IQ4_NL_4_4",
    37: "IQ4_NL_4_8",
    38: "IQ4_NL_8_8",
}
_OF_FORKS = range(97, 400)  # ik_llama.cpp's own
_KNOWN_TYPES = {int(kind) for kind in GGMLQuantizationType}


class Reader(GGUFReader):
    """Works on a plain view of the memory map, and reads a list, such as the vocabulary, in one loop or at once.

    Slicing an ``np.memmap``, and up to three arrays for every entry, cost most of the reading time.
    """

    @property
    # pyrefly: ignore[bad-override-mutable-attribute]: the base assigns a memory map, and reads what is kept of it
    def data(self) -> np.ndarray:
        return self._data

    @data.setter
    def data(self, mapped: np.ndarray) -> None:
        self._data = np.asarray(mapped)

    def _build_tensors(self, start_offs: int, fields: list[ReaderField]) -> None:
        for field in fields:
            *_, kind, _ = field.parts
            _check_type(field.name, int(kind[0]))
        super()._build_tensors(start_offs, fields)

    def _get_field_parts(self, orig_offs: int, raw_type: Any) -> tuple[int, list, list[int], list]:
        if raw_type != GGUFValueType.ARRAY or self.byte_order == "S":
            return super()._get_field_parts(orig_offs, raw_type)
        kind, count = self._get(orig_offs, np.uint32), self._get(orig_offs + 4, np.uint64)
        data, of_kind = self._data[orig_offs + 12 :], GGUFValueType(kind[0])
        if of_kind == GGUFValueType.STRING:
            entries, size = _read_strings(data, int(count[0]))
        elif of_kind in self.gguf_scalar_to_np:
            entries, size = _read_numbers(data, int(count[0]), np.dtype(self.gguf_scalar_to_np[of_kind]))
        else:
            return super()._get_field_parts(orig_offs, raw_type)
        indices = list(range(2, 2 + len(entries)))
        return 12 + size, [kind, count, *entries], indices, [GGUFValueType.ARRAY, of_kind]


def _check_type(name: str, kind: int) -> None:
    """Raises UnsupportedModelError for the number of a type that exists and is not read; others are damage."""
    if kind in _KNOWN_TYPES or kind >= _OF_FORKS.stop:
        return
    if kind in _REMOVED_TYPES:
        origin = f"{_REMOVED_TYPES[kind]}, which llama.cpp has removed; it repacks Q4_0 when it loads, instead"
    elif kind in _OF_FORKS:
        origin = "one of a fork of llama.cpp, such as ik_llama.cpp"
    else:
        origin = "newer than the installed gguf package; try pip install --upgrade gguf"
    raise UnsupportedModelError(
        f"tensor {name} is of type {kind}, {origin}. Supported: Q4_0, Q4_1 and Q8_0, whose codes are kept, and what "
        "the gguf package dequantises: make one from the original model"
    )


def _read_strings(data: np.ndarray, count: int) -> tuple[list[np.ndarray], int]:
    """The bytes of ``count`` strings, each behind its length in 64 bits, and how many bytes they take together."""
    strings, end, length_of, buffer = [], 0, struct.Struct("=Q"), data.data
    for _ in range(count):
        if end + length_of.size > len(data):
            raise ValueError("a list of strings goes beyond the end")
        start = end + length_of.size
        end = start + length_of.unpack_from(buffer, end)[0]
        strings.append(data[start:end])
    return strings, end


def _read_numbers(data: np.ndarray, count: int, dtype: np.dtype) -> tuple[list[np.ndarray], int]:
    """One array of ``count`` numbers, and how many bytes they take."""
    size = count * dtype.itemsize
    if size > len(data):
        raise ValueError("a list of numbers goes beyond the end")
    return [data[:size].view(dtype)], size
