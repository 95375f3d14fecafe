"""A source whose tensors are all read as floats, whatever they are in the file."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import dequantize
from qspec_jax.weights.codes import packed
from qspec_jax.weights.source import QuantizedTensor, Source, TensorEntry


def as_floats(source: Source) -> Source:
    """The source with its codes dequantised to float32 as they are read."""
    entries = {name: float_entry(entry) for name, entry in source.entries.items()}
    return dataclasses.replace(source, entries=entries)


def float_entry(entry: TensorEntry) -> TensorEntry:
    """The tensor read as floats."""
    if entry.codes is None:
        return entry

    def read() -> np.ndarray:
        tensor = entry.read()
        assert isinstance(tensor, QuantizedTensor)
        return np.asarray(_dequantized(jax.tree.map(jnp.asarray, packed(tensor))))

    return TensorEntry(entry.shape, read)


_dequantized = jax.jit(dequantize)
