"""Fills a decoder from a source, one tensor at a time.

Each tensor is read, quantised and written into its place in host memory, and each array goes to its device, or the
devices of a mesh (:mod:`qspec_jax.weights.placing`), once it is complete: nothing is compiled but the quantisation
itself. Tensors that share an array (query, key and value; gate and up) are written into their rows of it, and layers
of a scanned model into their stack. The peak is the finished model plus the largest array of a layer.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from pallas_kernels import Layout, QuantizedWeight
from pallas_kernels.arrays.weight import check_group_size
from pallas_kernels.dispatch import REFERENCE
from qspec_jax.device.memory import explain_out_of_memory
from qspec_jax.device.sizes import size_text
from qspec_jax.errors import CheckpointError, RequantizationWarning, UsageError
from qspec_jax.model.blocks import DecoderLayer
from qspec_jax.model.config import ModelConfig, QuantConfig
from qspec_jax.model.decoder import Decoder
from qspec_jax.model.head import head_format
from qspec_jax.model.linear import WeightFormat
from qspec_jax.model.parameters import (
    HEAD,
    ParameterSpec,
    check_activation_groups,
    head_name,
    largest_group_size,
    layer_anatomy,
)
from qspec_jax.model.shards import parameters
from qspec_jax.weights.codes import with_tensor
from qspec_jax.weights.placing import CODES, Placing, Stack, of_parts, parts_of
from qspec_jax.weights.source import QuantizedTensor, Source, TensorEntry, read_entry

_DEFAULT = Placing()


class _Place(NamedTuple):
    """Where a canonical tensor goes: a parameter by its path, its first row there, its layer if stacked."""

    path: str
    row: int
    layer: int | None

    @property
    def array(self) -> tuple[str, int | None]:
        """What is complete at once."""
        return self.path, self.layer


class _Target(NamedTuple):
    """A tensor, and the places that it is written to."""

    entry: TensorEntry
    places: tuple[_Place, ...]


def load_decoder(
    source: Source,
    *,
    quantization: QuantConfig | None,
    formats: Mapping[str, WeightFormat] | None,
    dtype: DTypeLike,
    kernels: str | None,
    scan_layers: bool,
    drafts: Source | None = None,
    placing: Placing = _DEFAULT,
    progress: Callable[[Iterable], Iterable] = iter,
) -> Decoder:
    """Builds the decoder of a checkpoint on its device, or on a mesh.

    Args:
        source: an opened, checked checkpoint.
        quantization: how to quantise its linears, None to keep them in floating point.
        formats: what :func:`weight_formats` returns for them.
        dtype: of everything that is not quantised.
        kernels: implementation name for the matmuls, None for the best that works.
        scan_layers: see ``Decoder``.
        drafts: a source that the 4-bit copy of the linears is read from, where floats are kept besides; None for the
            same one.
        placing: puts each array where it belongs: the default device, or a mesh.
        progress: wraps the iteration over the tensors.

    Raises:
        CheckpointError: a tensor cannot be read, or not be rounded.
        OutOfMemoryError: the model does not fit; raised before reading where that can be told.

    Warns:
        RequantizationWarning: linears that are quantised in the file are rounded a second time, or linears that it
            leaves in floating point are rounded.
    """
    keeps_floats = quantization is not None and quantization.keep_floats
    if quantization is not None and not keeps_floats:  # whose quality does not depend on the 4-bit copy
        _warn_of_requantization(source, formats, quantization)

    decoder = placing.whole(
        source.config,
        quantization=quantization,
        formats=formats,
        kernels=kernels,
        dtype=dtype,
        scan_layers=scan_layers,
    )
    placing.check_memory(decoder, name=source.path.name)
    copied = drafts if keeps_floats and drafts is not None else source
    targets = {name: _targets(decoder, spec, source, copied, keeps_floats) for name, spec in source.specs.items()}
    size = size_text(placing.num_bytes(decoder))
    with explain_out_of_memory(f"while loading {source.path.name}, whose weights take {size}"):
        _Filling(decoder, targets, placing).run(progress)
        return jax.block_until_ready(placing.finished(decoder))


class _Filling:
    """Parameters that are abstract before, and on their devices after."""

    def __init__(self, module: nnx.Module, targets: Mapping[str, Sequence[_Target]], placing: Placing):
        self._parameters, self._targets, self._placing = dict(parameters(module)), targets, placing
        self._tensors_to_come = Counter(
            place.array for some in targets.values() for target in some for place in target.places
        )
        self._layers_of = Counter(path for path, _ in self._tensors_to_come)
        self._layers_to_come = Counter(self._layers_of)
        self._incomplete: dict[tuple[str, int | None], Any] = {}  # values in host memory, in planes
        self._stacks: dict[str, dict[str, Stack]] = {}

    def run(self, progress: Callable[[Iterable], Iterable]) -> None:
        """Reads every tensor into its places."""
        for name in progress(list(self._targets)):
            for target in self._targets[name]:
                self._read(name, target)

    def _read(self, name: str, target: _Target) -> None:
        """Reads a tensor into its places, and lets go of it."""
        tensor = read_entry(name, target.entry)
        for place in target.places:
            try:
                self._write(place, tensor)
            except UsageError as error:  # the file says so, not an argument
                raise CheckpointError(f"cannot round tensor {name}: {error}") from error
            self._tensors_to_come[place.array] -= 1
            if not self._tensors_to_come[place.array]:
                self._complete(*place.array)

    def _write(self, place: _Place, tensor: np.ndarray | QuantizedTensor) -> None:
        """Writes a tensor into its rows of an array, which is allocated by the first that comes."""
        target = self._incomplete.get(place.array)
        if target is None:
            target = _allocated(self._parameters[place.path].get_value(), stacked=place.layer is not None)
        self._incomplete[place.array] = with_tensor(target, place.row, tensor)

    def _complete(self, path: str, layer: int | None) -> None:
        """Gives an array to its devices, or to its stack, and a stack that has all its layers to its devices."""
        parameter, value = self._parameters[path], self._incomplete.pop((path, layer))
        layout = getattr(parameter.get_value(), "layout", Layout.PLANES)

        def arranged(part: str, array: np.ndarray) -> np.ndarray:
            return self._placing.arranged(f"{path}{part}", array, layout if part in CODES else Layout.PLANES)

        arrays = {part: arranged(part, array) for part, array in parts_of(value).items()}
        if layer is None:
            placed = {part: self._placing.put(f"{path}{part}", array) for part, array in arrays.items()}
            parameter.set_value(of_parts(placed, layout=layout))
            return
        options: Any = {"num_layers": self._layers_of[path]}
        stacks = self._stacks.setdefault(
            path, {part: Stack(self._placing, f"{path}{part}", **options) for part in arrays}
        )
        for part, array in arrays.items():
            stacks[part].write(layer, array)
        self._layers_to_come[path] -= 1
        if not self._layers_to_come[path]:
            placed = {part: stack.put() for part, stack in self._stacks.pop(path).items()}
            parameter.set_value(of_parts(placed, layout=layout))


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
    targets = {
        spec.name: [_Target(source.entries[spec.name], (_Place(spec.array, spec.first_row, layer=None),))]
        for spec in specs
    }
    _Filling(layer, targets, _DEFAULT).run(iter)
    return layer


def _warn_of_requantization(
    source: Source, formats: Mapping[str, WeightFormat] | None, quantization: QuantConfig
) -> None:
    """Warns once, naming the types, if codes of the checkpoint cannot be kept, or it has kept linears from rounding.

    Rounding linears to 8 bits loses nothing worth a warning.
    """
    nested = {path for path, one in (formats or {}).items() if one.bits == 8}
    linears = {name: source.entries[name] for name, spec in source.specs.items() if spec.kind == "linear"}
    to_four = [name for name in linears if source.specs[name].module not in nested]
    again = {name: kind for name in to_four if (kind := linears[name].requantized_from) is not None}
    kept = [name for name, entry in linears.items() if entry.codes is not None]
    in_float = [name for name in to_four if name not in again and name not in kept]
    problems = []
    if again:
        problems.append(
            f"{len(again)} of {len(linears)} linears are stored as {', '.join(sorted(set(again.values())))}; they are "
            "dequantised and rounded to 4 bits a second time, which costs quality. Use Q4_0, Q4_1 or Q8_0, whose codes "
            "are kept, or the unquantised checkpoint"
        )
    if in_float and (again or kept):
        problems.append(
            f"{len(in_float)} of {len(linears)} linears, {in_float[0]} for one, are left in floating point by this "
            "quantised checkpoint; they are rounded to 4 bits here, which costs quality. Use a checkpoint whose "
            "linears are all quantised, or load it with quantization=None"
        )
    head, bits = source.entries[head_name(source.config)], quantization.head_bits
    if head.requantized_from is not None and bits is not None and kept_head(source, quantization) is None:
        kept = "a file whose head is Q8_0, with head_bits=8"
        if head.head_codes is not None:
            kept = f"head_bits={head.head_codes.bits}, which keeps its codes"
        problems.append(
            f"the LM head is stored as {head.requantized_from}; it is dequantised and rounded to {bits} bits a second "
            f"time, which costs quality. Use head_bits=16, or {kept}"
        )
    if problems:
        warnings.warn(
            f"{source.path.name}: {'. Also, '.join(problems)}",
            RequantizationWarning,
            stacklevel=4,  # the caller of qspec_jax.load
        )


def usual_quantization(source: Source, verify: str) -> QuantConfig:
    """How floats are rounded where nobody says how; large symmetric groups have the fastest kernels for 8 bits."""
    if verify != "w8a16":
        return QuantConfig()
    return QuantConfig(group_size=largest_group_size(source.config), symmetric=True, bits=8)


def check_bits(path: Path, quantization: QuantConfig | None, verify: str) -> None:
    """Raises UsageError if 8-bit weights are to verify, and the codes of a checkpoint have fewer bits."""
    if verify == "w8a16" and (quantization is None or quantization.bits == 4):
        raise UsageError(
            f"verify='w8a16' reads 8-bit weights, and those of {path.name} are 4-bit codes already; use "
            "verify='w4a16', a checkpoint in floating point, a GGUF file in Q8_0, or what quantize --bits 8 writes"
        )


def weight_formats(source: Source, quantization: QuantConfig | None) -> dict[str, WeightFormat] | None:
    """The format of each linear: that of its imported parts if it has any, else the configured one.

    An array that several tensors share has one format. It is symmetric only if all its imported parts
    are, and parts that are not imported are rounded onto the imported grid. It has 8 bits if any part has; parts in
    4 bits then give it an offset, which keeps them exact. None for a float model.

    Raises:
        UsageError: the group size of weights, or one asked for of activations, does not divide a linear's inputs.
    """
    if quantization is None:
        return None
    _check_said_activations(source.config, quantization)
    default = WeightFormat.of(quantization)
    imported: dict[str, set[WeightFormat]] = {path: set() for path in layer_anatomy(source.config).linears}
    for name, spec in source.specs.items():
        if spec.kind == "linear" and (codes := source.entries[name].codes) is not None:
            imported[spec.module].add(codes)
    formats = {name: _joint_format(found) or default for name, found in imported.items()}
    _check_group_sizes(source.config, formats)
    return formats | imported_head(source, quantization)


def imported_head(source: Source, quantization: QuantConfig) -> dict[str, WeightFormat]:
    """The format of an LM head whose codes a source has, where it is not the usual one: among those of linears."""
    codes = kept_head(source, quantization)
    return {} if codes is None or codes == head_format(source.config, quantization) else {HEAD: codes}


def kept_head(source: Source, quantization: QuantConfig) -> WeightFormat | None:
    """The format of the LM head's codes in a source, if they have the bits that are asked for."""
    codes, wanted = source.entries[head_name(source.config)].head_codes, head_format(source.config, quantization)
    return None if codes is None or wanted is None or codes.bits != wanted.bits else codes


def _check_group_sizes(config: ModelConfig, formats: Mapping[str, WeightFormat]) -> None:
    for name, weight_format in formats.items():
        num_inputs = layer_anatomy(config).linears[name].num_inputs
        try:
            check_group_size(num_inputs, weight_format.group_size or num_inputs, what=name)
        except ValueError as error:
            raise UsageError(f"cannot quantise this model: {error}") from error


def _check_said_activations(config: ModelConfig, quantization: QuantConfig) -> None:
    """Refuses groups of activations that are asked for. The usual ones may not fit: who drafts with them is told."""
    usual = QuantConfig()
    for name in ("w4a4", "w4a8"):
        if (asked := getattr(quantization, name)) != getattr(usual, name):
            check_activation_groups(config, asked, what=name)


def _joint_format(formats: set[WeightFormat]) -> WeightFormat | None:
    if not formats:
        return None
    sizes = {weight_format.group_size for weight_format in formats}
    if len(sizes) > 1:
        raise CheckpointError(f"checkpoint: parts of one linear are quantised in different group sizes: {sizes}")
    bits = {weight_format.bits for weight_format in formats}
    symmetric = len(bits) == 1 and all(weight_format.symmetric for weight_format in formats)
    wide = any(weight_format.wide for weight_format in formats)
    return WeightFormat(sizes.pop(), symmetric, max(bits), wide)


def _place(decoder: Decoder, spec: ParameterSpec) -> _Place:
    if spec.layer is None:
        return _Place(spec.array, spec.first_row, layer=None)
    if decoder.scan_layers:
        return _Place(f"layers.0.{spec.array}", spec.first_row, spec.layer)
    return _Place(spec.path, spec.first_row, layer=None)


def _targets(
    decoder: Decoder, spec: ParameterSpec, source: Source, copied: Source, keeps_floats: bool
) -> list[_Target]:
    """Where a parameter goes, and the floats beside a 4-bit copy of it, which may come from elsewhere."""
    own, place = source.entries[spec.name], _place(decoder, spec)
    if spec.name == head_name(source.config):
        return list(_head_targets(decoder, spec, own))
    if not keeps_floats or spec.kind != "linear":
        return [_Target(own, (place,))]
    floats = _place(decoder, spec.floats)
    if copied is source:
        return [_Target(own, (place, floats))]
    return [_Target(copied.entries[spec.name], (place,)), _Target(own, (floats,))]


def _head_targets(decoder: Decoder, spec: ParameterSpec, entry: TensorEntry) -> Iterator[_Target]:
    """The arrays that the tensor of the LM head goes to: its floats, and its codes, which it may bring itself."""
    floats = [_Place(spec.module, 0, layer=None)] if spec.module == "embedding" or decoder.lm_head is not None else []
    codes = [_Place(HEAD, 0, layer=None)] if decoder.quantized_head is not None else []
    weight = None if decoder.quantized_head is None else decoder.quantized_head.get_value()
    if weight is not None and not _is_of(weight, entry.head_codes):  # rounded as floats are
        floats, codes = [*floats, *codes], []
    if floats:
        yield _Target(entry, tuple(floats))
    if codes and entry.read_head is not None:
        yield _Target(dataclasses.replace(entry, read=entry.read_head), tuple(codes))


def _is_of(weight: QuantizedWeight, codes: WeightFormat | None) -> bool:
    """Whether codes of a format fit into a weight as they are."""
    if codes is None:
        return False
    return (weight.bits, weight.symmetric, weight.group_size) == (
        *(codes.bits, codes.symmetric),
        codes.group_size or weight.num_inputs,
    )


def _allocated(value: Any, *, stacked: bool) -> Any:
    """Arrays in host memory for an abstract parameter, or for one layer of a stack."""
    return jax.tree.map(lambda leaf: np.empty(leaf.shape[stacked:], leaf.dtype), value)
