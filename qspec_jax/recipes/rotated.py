"""A source seen through a rotation: each tensor is rotated when it is read."""

from __future__ import annotations

import dataclasses
import functools

import numpy as np

from qspec_jax.model.parameters import ParameterSpec, expected_parameters
from qspec_jax.quantization.rotation import (
    Rotation,
    random_rotation,
    require_unrotated,
    rotate_parameter,
    rotated_config,
)
from qspec_jax.weights.source import Source, TensorEntry


def rotate_source(source: Source, rotation: Rotation | None = None) -> Source:
    """The source with its model rotated (see :mod:`qspec_jax.quantization.rotation`), still read tensor by tensor.

    Args:
        source: all of whose tensors are read as floats.
        rotation: the matrices; None for QuaRot's.

    Raises:
        UsageError: the model is rotated already, or its MLP has a size without a Hadamard matrix.
    """
    rotation = random_rotation(source.config) if rotation is None else rotation
    require_unrotated(source.config)
    config, specs = source.config, source.specs
    if rotation.fold_gains:
        config = rotated_config(config, hadamard_block=rotation.hadamard_block)
        specs = expected_parameters(config)  # a head that was tied is one more
    entries = {}
    for name, spec in specs.items():
        entry = source.entries[name if name in source.entries else "embedding.weight"]
        gain = spec.norm_before if rotation.fold_gains else None
        read = functools.partial(_read, spec, entry, rotation, None if gain is None else source.entries[gain])
        entries[name] = dataclasses.replace(entry.without_head_codes(), read=read)
    return Source(config, source.path, entries, specs)


def _read(spec: ParameterSpec, entry: TensorEntry, rotation: Rotation, gain: TensorEntry | None) -> np.ndarray:
    tensor, gain_tensor = entry.read(), None if gain is None else gain.read()
    assert isinstance(tensor, np.ndarray)
    assert gain_tensor is None or isinstance(gain_tensor, np.ndarray)
    return rotate_parameter(spec, tensor, rotation, gain=gain_tensor)
