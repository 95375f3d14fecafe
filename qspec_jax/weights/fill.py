"""Fills a decoder from a source, one tensor at a time.

Each tensor is read, quantised and written into its place in host memory, and each array goes to the device
once it is complete: nothing is compiled but the quantisation itself. Tensors that share an array (query, key
and value; gate and up; all layers of a scanned model) are written into their rows of it. The peak is the
finished model plus the largest tensor.
"""

from __future__ import annotations

import dataclasses
import functools
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from pallas_kernels import QuantizedWeight, dequantize, pack_codes, with_layout
from pallas_kernels.arrays.weight import SYMMETRIC_ZERO_POINT, check_group_size
from pallas_kernels.dispatch import REFERENCE
from qspec_jax.device.memory import check_memory, explain_out_of_memory
from qspec_jax.errors import CheckpointError, RequantizationWarning, UsageError
from qspec_jax.model.blocks import DecoderLayer
from qspec_jax.model.config import ModelConfig, QuantConfig
from qspec_jax.model.decoder import Decoder, abstract_decoder, num_bytes
from qspec_jax.model.linear import WeightFormat
from qspec_jax.model.parameters import ParameterSpec, layer_anatomy
from qspec_jax.quantization.rtn import quantize_rtn
from qspec_jax.weights.source import QuantizedTensor, Source, TensorEntry


class _Place(NamedTuple):
    """Where a canonical tensor goes: a parameter of the decoder, its first row there, its layer if stacked."""

    parameter: nnx.Param
    row: int
    layer: int | None


def load_decoder(
    source: Source,
    *,
    quantization: QuantConfig | None,
    formats: Mapping[str, WeightFormat] | None,
    dtype: DTypeLike,
    kernels: str | None,
    scan_layers: bool,
    progress: Callable[[Iterable], Iterable] = iter,
) -> Decoder:
    """Builds the decoder of a checkpoint on the default device.

    Args:
        source: an opened, checked checkpoint.
        quantization: how to quantise its linears, None to keep them in floating point.
        formats: what :func:`weight_formats` returns for them.
        dtype: of everything that is not quantised.
        kernels: implementation name for the matmuls, None for the best that works.
        scan_layers: see ``Decoder``.
        progress: wraps the iteration over the tensors.

    Raises:
        CheckpointError: a tensor cannot be read.
        OutOfMemoryError: the model does not fit; raised before reading where that can be told.

    Warns:
        RequantizationWarning: linears that are quantised in the file are rounded a second time, or linears that it
            leaves in floating point are rounded.
    """
    if quantization is not None:
        _warn_of_requantization(source)

    decoder = abstract_decoder(
        source.config,
        quantization=quantization,
        formats=formats,
        kernels=kernels,
        dtype=dtype,
        scan_layers=scan_layers,
    )
    needed = num_bytes(decoder)
    check_memory(needed, what=f"the weights of {source.path.name}")
    places = {name: _place(decoder, spec) for name, spec in source.specs.items()}
    with explain_out_of_memory(f"while loading {source.path.name}, whose weights take {needed / 1e9:.2f} GB"):
        _fill(places, source.entries, progress)
        return jax.block_until_ready(decoder)


def _fill(
    places: Mapping[str, _Place], entries: Mapping[str, TensorEntry], progress: Callable[[Iterable], Iterable]
) -> None:
    """Reads every tensor that has a place into it; the parameters are abstract before, and on the device after."""
    parts_to_come = Counter(id(place.parameter) for place in places.values())
    for name in progress(list(places)):
        parameter = places[name].parameter
        _write_tensor(places[name], _read(name, entries[name]))
        parts_to_come[id(parameter)] -= 1
        if not parts_to_come[id(parameter)]:
            parameter.set_value(jax.tree.map(jax.device_put, parameter.get_value()))


def load_layer(source: Source, index: int) -> DecoderLayer:
    """One layer of a checkpoint in float32, whatever it is in the file: 4-bit codes are dequantised.

    Raises:
        CheckpointError: a tensor cannot be read.
    """
    config = source.config
    formats = dict.fromkeys(layer_anatomy(config).linears)
    layer = nnx.eval_shape(
        lambda: DecoderLayer(config, formats=formats, quantization=None, kernels=REFERENCE, dtype=jnp.float32)
    )
    specs = [spec for spec in source.specs.values() if spec.layer == index]
    places = {spec.name: _Place(_at(layer, spec.array), spec.first_row, layer=None) for spec in specs}
    _fill(places, source.entries, iter)
    return layer


def _warn_of_requantization(source: Source) -> None:
    """Warns once, naming the types, if codes of the checkpoint cannot be kept, or it has kept linears from rounding."""
    linears = {name: source.entries[name] for name, spec in source.specs.items() if spec.kind == "linear"}
    again = {name: kind for name, entry in linears.items() if (kind := entry.requantized_from) is not None}
    four_bit = [name for name, entry in linears.items() if entry.four_bit is not None]
    in_float = [name for name in linears if name not in again and name not in four_bit]
    problems = []
    if again:
        problems.append(
            f"{len(again)} of {len(linears)} linears are stored as {', '.join(sorted(set(again.values())))}; they are "
            "dequantised and rounded to 4 bits a second time, which costs quality. Use Q4_0 or Q4_1, whose codes are "
            "kept, or the unquantised checkpoint"
        )
    if in_float and (again or four_bit):
        problems.append(
            f"{len(in_float)} of {len(linears)} linears, {in_float[0]} for one, are left in floating point by this "
            "quantised checkpoint; they are rounded to 4 bits here, which costs quality. Use a checkpoint whose "
            "linears are all quantised, or load it with quantization=None"
        )
    if problems:
        warnings.warn(
            f"{source.path.name}: {'. Also, '.join(problems)}",
            RequantizationWarning,
            stacklevel=4,  # the caller of qspec_jax.load
        )


def weight_formats(source: Source, quantization: QuantConfig | None) -> dict[str, WeightFormat] | None:
    """The format of each linear: that of its imported 4-bit parts if it has any, else the configured one.

    An array that several tensors share has one format. It is symmetric only if all its imported parts
    are, and parts that are not imported are rounded onto the imported grid. None for a float model.

    Raises:
        UsageError: the group size does not divide a linear's inputs.
    """
    if quantization is None:
        return None
    default = WeightFormat(quantization.group_size, quantization.symmetric)
    imported: dict[str, set[WeightFormat]] = {path: set() for path in layer_anatomy(source.config).linears}
    for name, spec in source.specs.items():
        if spec.kind == "linear" and (four_bit := source.entries[name].four_bit) is not None:
            imported[spec.module].add(four_bit)
    formats = {name: _joint_format(found) or default for name, found in imported.items()}
    _check_group_sizes(source.config, formats)
    return formats


def _check_group_sizes(config: ModelConfig, formats: Mapping[str, WeightFormat]) -> None:
    for name, weight_format in formats.items():
        num_inputs = layer_anatomy(config).linears[name].num_inputs
        try:
            check_group_size(num_inputs, weight_format.group_size or num_inputs, what=name)
        except ValueError as error:
            raise UsageError(f"cannot quantise this model: {error}") from error


def _joint_format(formats: set[WeightFormat]) -> WeightFormat | None:
    if not formats:
        return None
    sizes = {weight_format.group_size for weight_format in formats}
    if len(sizes) > 1:
        raise CheckpointError(f"checkpoint: parts of one linear are quantised in different group sizes: {sizes}")
    return WeightFormat(sizes.pop(), all(weight_format.symmetric for weight_format in formats))


def _place(decoder: Decoder, spec: ParameterSpec) -> _Place:
    if spec.layer is None:
        return _Place(_at(decoder, spec.array), spec.first_row, layer=None)
    if decoder.scan_layers:
        return _Place(_at(decoder.layers[0], spec.array), spec.first_row, spec.layer)
    return _Place(_at(decoder.layers[spec.layer], spec.array), spec.first_row, layer=None)


def _at(module: nnx.Module, path: str) -> nnx.Param:
    found = functools.reduce(getattr, path.split("."), module)
    assert isinstance(found, nnx.Param), path
    return found


def _read(name: str, entry: TensorEntry) -> np.ndarray | QuantizedTensor:
    try:
        return entry.read()
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot read tensor {name}: {error}") from error


def _write_tensor(place: _Place, tensor: np.ndarray | QuantizedTensor) -> None:
    """Writes a tensor into its rows of a parameter in host memory, which is allocated by the first that comes."""
    target = jax.tree.map(_allocated, place.parameter.get_value())
    rows = slice(place.row, place.row + _num_rows(tensor))
    if isinstance(target, QuantizedWeight):
        part = _as_format(tensor, group_size=target.group_size, symmetric=target.symmetric)
        part = with_layout(part, target.layout)
        target = _widened(target, part.scale.dtype)
        _layer_of(target.packed, place)[rows] = part.packed
        _layer_of(target.scale, place)[:, rows] = part.scale
        if target.offset is not None:
            _layer_of(target.offset, place)[:, rows] = part.offset
    else:
        if isinstance(tensor, QuantizedTensor):
            tensor = np.asarray(dequantize(jax.tree.map(jnp.asarray, _packed(tensor))))
        _layer_of(target, place)[rows] = tensor
    place.parameter.set_value(target)


def _allocated(array: Any) -> np.ndarray:
    return array if isinstance(array, np.ndarray) else np.empty(array.shape, array.dtype)


def _num_rows(tensor: np.ndarray | QuantizedTensor) -> int:
    return len(tensor.codes if isinstance(tensor, QuantizedTensor) else tensor)


def _layer_of(array: Any, place: _Place) -> Any:
    return array if place.layer is None else array[place.layer]


def _widened(weight: QuantizedWeight, dtype: DTypeLike) -> QuantizedWeight:
    """The weight with scales and offsets that hold those of ``dtype`` exactly: float16 where that is enough."""
    if jnp.dtype(dtype).itemsize <= weight.scale.dtype.itemsize:
        return weight
    offset = None if weight.offset is None else weight.offset.astype(dtype)
    return dataclasses.replace(weight, scale=weight.scale.astype(dtype), offset=offset)


def _as_format(tensor: np.ndarray | QuantizedTensor, *, group_size: int, symmetric: bool) -> QuantizedWeight:
    """The tensor in 4 bits, as arrays in host memory."""
    if not isinstance(tensor, QuantizedTensor):
        weight = quantize_rtn(jnp.asarray(tensor), group_size=group_size, symmetric=symmetric)
        return jax.tree.map(np.asarray, weight)
    weight = _packed(tensor)
    if weight.symmetric and not symmetric:
        return dataclasses.replace(weight, offset=SYMMETRIC_ZERO_POINT * weight.scale)
    return weight


def _packed(tensor: QuantizedTensor) -> QuantizedWeight:
    arrays: Any = (pack_codes(tensor.codes), tensor.scale, tensor.offset)
    return QuantizedWeight(*arrays)
