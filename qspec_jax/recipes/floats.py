"""A source whose tensors are all read as floats, whatever they are in the file."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import QuantizedWeight, dequantize, pack_codes
from qspec_jax.weights.source import QuantizedTensor, Source, TensorEntry


def as_floats(source: Source) -> Source:
    """The source with its 4-bit codes dequantised to float32 as they are read."""
    entries = {name: float_entry(entry) for name, entry in source.entries.items()}
    return dataclasses.replace(source, entries=entries)


def float_entry(entry: TensorEntry) -> TensorEntry:
    """The tensor read as floats."""
    if entry.four_bit is None:
        return entry

    def read() -> np.ndarray:
        tensor = entry.read()
        assert isinstance(tensor, QuantizedTensor)
        offset = None if tensor.offset is None else jnp.asarray(tensor.offset)
        return np.asarray(_dequantize_codes(jnp.asarray(tensor.codes), jnp.asarray(tensor.scale), offset))

    return TensorEntry(entry.shape, read)


@jax.jit
def _dequantize_codes(codes: jax.Array, scale: jax.Array, offset: jax.Array | None) -> jax.Array:
    return dequantize(QuantizedWeight(pack_codes(codes), scale, offset))
