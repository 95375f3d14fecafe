"""A checkpoint as tensors under canonical names: to quantise it once more, or to read it as floats."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import dequantize, unpack_codes, unpack_nested
from qspec_jax.model.head import head_format
from qspec_jax.model.parameters import HEAD, expected_parameters, head_name
from qspec_jax.weights.checkpoint.arrays import group_of
from qspec_jax.weights.checkpoint.restore import Checkpoint
from qspec_jax.weights.codes import packed
from qspec_jax.weights.source import QuantizedTensor, Source, TensorEntry


def open_saved_source(checkpoint: Checkpoint, *, floats: bool = True) -> Source:
    """The tensors of an opened checkpoint. A layer is read when the first of its tensors is.

    Args:
        checkpoint: an opened one.
        floats: give the linears of one that has both in floating point; else, the 4-bit copy.
    """
    specs = expected_parameters(checkpoint.manifest.model)
    read_group = functools.lru_cache(maxsize=2)(checkpoint.read_group)  # a layer, and its floats
    has_floats = floats and checkpoint.manifest.quantization.keep_floats
    entries = {}
    for name, spec in specs.items():
        if spec.kind == "linear" and has_floats:
            entries[name] = TensorEntry(
                spec.shape, functools.partial(_read_floats, read_group, spec.floats.path, spec.rows)
            )
        elif spec.kind == "linear":
            weight_format = checkpoint.manifest.formats[spec.module]
            codes = dataclasses.replace(weight_format, group_size=weight_format.group_size or spec.shape[1])
            read = functools.partial(_read_codes, read_group, spec.path, spec.rows)
            entries[name] = TensorEntry(spec.shape, read, codes)
        elif spec.path == "lm_head" and (bits := checkpoint.manifest.quantization.head_bits) is not None:
            read = functools.partial(_read_head, read_group)
            entries[name] = TensorEntry(spec.shape, read, requantized_from=f"{bits}-bit codes")
        else:
            entries[name] = TensorEntry(spec.shape, functools.partial(_read_floats, read_group, spec.path, spec.rows))
    manifest = checkpoint.manifest
    if (head := head_format(manifest.model, manifest.quantization, manifest.formats)) is not None:
        name = head_name(manifest.model)
        read_head = functools.partial(_read_codes, read_group, HEAD, slice(None))
        entries[name] = dataclasses.replace(entries[name], read_head=read_head, head_codes=head)
    return Source(manifest.model, checkpoint.path, entries, specs)


def _read_floats(read_group, stored: str, rows: slice) -> np.ndarray:
    return read_group(group_of(stored))[stored][rows]


def _read_head(read_group) -> np.ndarray:
    tensor = _read_codes(read_group, HEAD, slice(None))
    return np.asarray(dequantize(jax.tree.map(jnp.asarray, packed(tensor))))


def _read_codes(read_group, stored: str, rows: slice) -> QuantizedTensor:
    arrays = read_group(group_of(stored))
    offset, low = arrays.get(f"{stored}.offset"), arrays.get(f"{stored}.low")
    upper = jnp.asarray(arrays[f"{stored}.packed"][rows])
    codes = unpack_codes(upper) if low is None else unpack_nested(upper, jnp.asarray(low[rows]))
    return QuantizedTensor(
        codes=np.asarray(codes),
        scale=arrays[f"{stored}.scale"][:, rows],
        offset=None if offset is None else offset[:, rows],
        bits=4 if low is None else 8,
    )
