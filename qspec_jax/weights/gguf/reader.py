"""The reader of the ``gguf`` package, faster at the lists of a file's metadata."""

from __future__ import annotations

import struct
from typing import Any

import numpy as np
from gguf import GGUFReader, GGUFValueType


class Reader(GGUFReader):
    """Works on a plain view of the memory map, and reads a list, such as the vocabulary, in one loop or at once.

    Slicing an ``np.memmap``, and up to three arrays for every entry, cost most of the reading time.
    """

    @property
    def data(self) -> np.ndarray:
        return self._data

    @data.setter
    def data(self, mapped: np.ndarray) -> None:
        self._data = np.asarray(mapped)

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
