"""Fills a decoder from a checkpoint source, one tensor at a time.

The decoder's arrays are allocated first; then each tensor is read, quantised and written into its place,
so that the peak is the finished model plus the largest tensor. Tensors that share an array (query, key
and value; gate and up; all layers of a scanned model) are written into their rows of it.
"""

from __future__ import annotations

import functools
import re
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array

from pallas_kernels import QuantizedWeight, dequantize, pack_codes
from pallas_kernels.packing import SYMMETRIC_ZERO_POINT, check_group_size
from qspec_jax.config import ModelConfig, QuantConfig
from qspec_jax.errors import CheckpointError, RequantizationWarning, UsageError
from qspec_jax.linear import WeightFormat
from qspec_jax.loading.parameters import CheckpointSource, QuantizedTensor, TensorEntry, expected_parameters
from qspec_jax.memory import check_memory, explain_out_of_memory
from qspec_jax.modeling import Decoder, linear_inputs
from qspec_jax.quantization import quantize_rtn

_LAYER_NAME = re.compile(r"layers\.(\d+)\.(.+)\.(weight|bias)")
_GLOBAL_NAME = re.compile(r"(embedding|lm_head|final_norm)\.weight")
# Of the projections that share an array, the module that holds it and the place among its parts.
PART_OF = {
    "attention.query": ("attention.qkv", 0),
    "attention.key": ("attention.qkv", 1),
    "attention.value": ("attention.qkv", 2),
    "mlp.gate": ("mlp.gate_up", 0),
    "mlp.up": ("mlp.gate_up", 1),
}


class _Place(NamedTuple):
    """Where a canonical tensor goes: a parameter of the decoder, its first row there, its layer if stacked."""

    parameter: nnx.Param
    row: int
    layer: int | None


def load_decoder(
    source: CheckpointSource,
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
        RequantizationWarning: linears that are quantised in the file are rounded a second time.
    """
    if quantization is not None:
        _warn_of_requantization(source)

    def build() -> Decoder:
        return Decoder(
            source.config,
            quantization=quantization,
            formats=formats,
            kernels=kernels,
            dtype=dtype,
            scan_layers=scan_layers,
        )

    needed = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(nnx.eval_shape(build)))
    check_memory(needed, what=f"the weights of {source.path.name}")
    with explain_out_of_memory(f"while loading {source.path.name}, whose weights take {needed / 1e9:.2f} GB"):
        decoder = build()
        for name, entry in progress(list(source.entries.items())):
            _write_tensor(_place(decoder, source.config, name), _read(name, entry))
        return jax.block_until_ready(decoder)


def _warn_of_requantization(source: CheckpointSource) -> None:
    """Warns once, naming the types, if linears of the checkpoint are quantised but their codes cannot be kept."""
    specs = expected_parameters(source.config)
    linears = [entry.requantized_from for name, entry in source.entries.items() if specs[name].kind == "linear"]
    if kinds := sorted({kind for kind in linears if kind is not None}):
        count = sum(kind is not None for kind in linears)
        warnings.warn(
            f"{source.path.name}: {count} of {len(linears)} linears are stored as {', '.join(kinds)}; they are "
            "dequantised and rounded to 4 bits a second time, which costs quality. Use Q4_0 or Q4_1, whose codes are "
            "kept, or the unquantised checkpoint",
            RequantizationWarning,
            stacklevel=4,  # the caller of qspec_jax.load
        )


def weight_formats(source: CheckpointSource, quantization: QuantConfig | None) -> dict[str, WeightFormat] | None:
    """The format of each linear: that of its imported 4-bit parts if it has any, else the configured one.

    An array that several tensors share has one format. It is symmetric only if all its imported parts
    are, and parts that are not imported are rounded onto the imported grid. None for a float model.

    Raises:
        UsageError: the group size does not divide a linear's inputs.
    """
    if quantization is None:
        return None
    default = WeightFormat(quantization.group_size, quantization.symmetric)
    imported: dict[str, set[WeightFormat]] = {name: set() for name in linear_inputs(source.config)}
    for name, entry in source.entries.items():
        matched = _LAYER_NAME.fullmatch(name)
        if entry.four_bit is not None and matched:
            module, _ = PART_OF.get(matched[2], (matched[2], 0))
            imported[module].add(WeightFormat(entry.four_bit.group_size, entry.four_bit.symmetric))
    formats = {name: _joint_format(found) or default for name, found in imported.items()}
    _check_group_sizes(source.config, formats)
    return formats


def _check_group_sizes(config: ModelConfig, formats: Mapping[str, WeightFormat]) -> None:
    for name, weight_format in formats.items():
        num_inputs = linear_inputs(config)[name]
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


def _place(decoder: Decoder, config: ModelConfig, name: str) -> _Place:
    if matched := _GLOBAL_NAME.fullmatch(name):
        module = getattr(decoder, matched[1])
        return _Place(module.weight if matched[1] == "final_norm" else module, row=0, layer=None)
    matched = _LAYER_NAME.fullmatch(name)
    assert matched is not None, name
    layer = int(matched[1])
    path, part = PART_OF.get(matched[2], (matched[2], 0))
    part_sizes = {"attention.qkv": config.qkv_sizes, "mlp.gate_up": (config.intermediate_size,) * 2}
    module = decoder.layers[0 if decoder.scan_layers else layer]
    for attribute in path.split("."):
        module = getattr(module, attribute)
    row = sum(part_sizes[path][:part]) if path in part_sizes else 0
    return _Place(getattr(module, matched[3]), row, layer if decoder.scan_layers else None)


def _read(name: str, entry: TensorEntry) -> np.ndarray | QuantizedTensor:
    try:
        return entry.read()
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot read tensor {name}: {error}") from error


def _write_tensor(place: _Place, tensor: np.ndarray | QuantizedTensor) -> None:
    target = place.parameter.get_value()
    if isinstance(target, QuantizedWeight):
        part = _as_format(tensor, group_size=target.group_size, symmetric=target.symmetric)
        target = _widened(target, part.scale.dtype)
        offset = None
        if target.offset is not None and part.offset is not None:
            offset = _write(target.offset, part.offset, place.layer, (0, place.row))
        written = QuantizedWeight(
            packed=_write(target.packed, part.packed, place.layer, (place.row, 0)),
            scale=_write(target.scale, part.scale, place.layer, (0, place.row)),
            offset=offset,
        )
    else:
        floats = dequantize(_packed(tensor)) if isinstance(tensor, QuantizedTensor) else jnp.asarray(tensor)
        written = _write(target, floats, place.layer, (place.row,) + (0,) * (floats.ndim - 1))
    place.parameter.set_value(written)


def _widened(weight: QuantizedWeight, dtype: DTypeLike) -> QuantizedWeight:
    """The weight with scales and offsets that hold those of ``dtype`` exactly: float16 where that is enough."""
    if jnp.dtype(dtype).itemsize <= weight.scale.dtype.itemsize:
        return weight
    offset = None if weight.offset is None else weight.offset.astype(dtype)
    return QuantizedWeight(weight.packed, weight.scale.astype(dtype), offset)


def _as_format(tensor: np.ndarray | QuantizedTensor, *, group_size: int, symmetric: bool) -> QuantizedWeight:
    if not isinstance(tensor, QuantizedTensor):
        return quantize_rtn(jnp.asarray(tensor), group_size=group_size, symmetric=symmetric)
    weight = _packed(tensor)
    if weight.symmetric and not symmetric:
        return QuantizedWeight(weight.packed, weight.scale, SYMMETRIC_ZERO_POINT * weight.scale)
    return weight


def _packed(tensor: QuantizedTensor) -> QuantizedWeight:
    offset = None if tensor.offset is None else jnp.asarray(tensor.offset)
    return QuantizedWeight(_pack_codes(jnp.asarray(tensor.codes)), jnp.asarray(tensor.scale), offset)


_pack_codes = jax.jit(pack_codes)


def _write(target: Array, part: Array, layer: int | None, start: tuple[int, ...]) -> Array:
    if layer is not None:
        part, start = part[None], (layer, *start)
    return _write_at(target, part, jnp.asarray(start, jnp.int32))


@functools.partial(jax.jit, donate_argnums=0)
def _write_at(target: Array, part: Array, start: Array) -> Array:
    return lax.dynamic_update_slice(target, part.astype(target.dtype), tuple(start))
