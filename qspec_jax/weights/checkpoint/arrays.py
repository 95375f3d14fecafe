"""The one arrangement in which arrays are stored: each layer by itself, as an unrolled decoder holds them.

An array is called by its path in the decoder, ``layers.3.attention.qkv.weight.packed``. Arrays are kept in
*groups* that are written and read at once: each layer is one, ``layers.3``, and the rest is one, ``model``. What a
layer has in floating point beside its codes is one as well, ``floats.3``: who wants the codes alone reads no more.
Neither the stacking of layers nor ``group_sum``, which follows from the weight, is stored, nor the layout that kernels
read: packed weights are stored in planes.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Any, NamedTuple

import jax
import ml_dtypes
import numpy as np
from jaxtyping import Array

from pallas_kernels import Layout
from qspec_jax.model.config import ModelConfig, QuantConfig
from qspec_jax.model.decoder import Decoder, abstract_decoder
from qspec_jax.model.layouts import linears
from qspec_jax.model.linear import WeightFormat
from qspec_jax.model.parameters import FLOATS
from qspec_jax.model.sharding import from_shard_order
from qspec_jax.model.shards import parameters
from qspec_jax.weights.checkpoint.manifest import ArrayRecord
from qspec_jax.weights.placing import Placing, Stack, layout_of, of_parts, parts_of

MODEL_GROUP = "model"
FLOAT_DTYPES = ("float32", "bfloat16", "float16")
_NARROW_DTYPES = (ml_dtypes.bfloat16, np.float16)
_SAMPLE = 4096
_SCALES = (".scale", ".offset")
_GROUPS_AT_ONCE = min(4, os.cpu_count() or 1)  # each in a thread: reading, hashing and reordering leave Python alone


class _Place(NamedTuple):
    """An array of the decoder by its path, which layer of it if it is a stack, and the layout if it is packed."""

    name: str
    layer: int | None
    leaf: Any
    layout: Layout = Layout.PLANES


def group_names(config: ModelConfig, *, keep_floats: bool) -> list[str]:
    """The groups of a model, in order; with those of floats beside the codes, or without."""
    kinds = ("layers", FLOATS) if keep_floats else ("layers",)
    return [MODEL_GROUP, *(f"{kind}.{layer}" for layer in range(config.num_layers) for kind in kinds)]


def group_of(name: str) -> str:
    """The group that an array belongs to."""
    if not name.startswith("layers."):
        return MODEL_GROUP
    kind, layer = (FLOATS if name.endswith(f".{FLOATS}") else "layers"), name.split(".")[1]
    return f"{kind}.{layer}"


def expected_shapes(
    config: ModelConfig, *, quantization: QuantConfig, formats: Mapping[str, WeightFormat]
) -> dict[str, tuple[int, ...]]:
    """The shape of every array that a checkpoint of such a model holds, by name."""
    stacked = abstract_decoder(config, quantization=quantization, formats=formats)
    return {
        stored: place.leaf.shape if place.layer is None else place.leaf.shape[1:]
        for stored, place in _places(stacked).items()
    }


def stored_arrays(decoder: Decoder, group: str) -> dict[str, np.ndarray]:
    """The arrays of one group as they are stored, in host memory; on a CPU without copying them where that can be.

    Scales and offsets keep their dtype; other floats are given in the narrowest that holds their values exactly.
    """
    arrays = {}
    for stored, (name, layer, leaf, layout) in _places(decoder).items():
        if group_of(stored) == group:
            array = from_shard_order(name, _to_host(leaf, layer), decoder.config, decoder.split, layout=layout)
            arrays[stored] = array if stored.endswith(_SCALES) else narrowed(array)
    return arrays


def fill(
    decoder: Decoder,
    read_group: Callable[[str], Mapping[str, np.ndarray]],
    placing: Placing,
    progress: Callable[[Iterable], Iterable] = iter,
) -> None:
    """Gives an abstract decoder its arrays.

    Args:
        decoder: of :meth:`Placing.whole`.
        read_group: the arrays of a group. It is called for a few groups at once, in threads, and for no more before
            one of them is placed, so that the host holds those few.
        placing: puts the arrays onto their devices.
        progress: wraps the iteration over the groups.
    """
    stacks: dict[str, Stack] = {}
    placed: dict[str, Array] = {}
    places = _places(decoder)

    def read(group: str) -> dict[str, np.ndarray]:
        """A group's arrays as the decoder holds them."""
        arrays = dict(read_group(group))
        for stored in arrays:
            array = placing.arranged(places[stored].name, arrays[stored], places[stored].layout)
            wanted = array.dtype if stored.endswith(_SCALES) else places[stored].leaf.dtype
            arrays[stored] = array.astype(wanted, copy=False)
        return arrays

    groups = group_names(decoder.config, keep_floats=keeps_floats(decoder))
    # In all processes of a program in the same order, in which they agree on each array.
    at_once = _GROUPS_AT_ONCE if jax.process_count() == 1 else 1
    for _, arrays in zip(progress(groups), _in_threads(read, groups, at_once=at_once), strict=True):
        while arrays:
            stored, array = arrays.popitem()
            name, layer, _, _ = places[stored]
            if layer is None:
                placed[name] = placing.put(name, array)
            else:
                if name not in stacks:
                    stacks[name] = Stack(placing, name, num_layers=decoder.config.num_layers)
                stacks[name].write(layer, array)
    for name in list(stacks):
        placed[name] = stacks.pop(name).put()
    for name, parameter in parameters(decoder):
        value = parameter.get_value()
        parts = {part: placed[f"{name}{part}"] for part in parts_of(value)}
        parameter.set_value(of_parts(parts, layout=layout_of(value, ".packed")))


def keeps_floats(decoder: Decoder) -> bool:
    """Whether a decoder has its linears in floating point beside their codes."""
    return any(linear.floats is not None for linear in linears(decoder))


def _in_threads(function: Callable[[str], Any], items: Sequence[str], *, at_once: int) -> Iterator[Any]:
    """The results for all items as they come, of which at most ``at_once`` are under way or waiting to be taken."""
    left = list(reversed(items))
    with ThreadPoolExecutor(at_once) as pool:
        running: set[Future[Any]] = set()
        while left or running:
            while left and len(running) < at_once:
                running.add(pool.submit(function, left.pop()))
            finished = next(iter(wait(running, return_when=FIRST_COMPLETED).done))
            running.remove(finished)
            yield finished.result()


def narrowed(array: np.ndarray) -> np.ndarray:
    """A float32 array in 16 bits if these hold every value of it exactly, else unchanged."""
    if array.dtype != np.float32:
        return array
    for dtype in _NARROW_DTYPES:
        if _holds(array.reshape(-1)[:_SAMPLE], dtype) and _holds(array, dtype):
            return array.astype(dtype)
    return array


def dtype_fits(name: str, record: ArrayRecord) -> bool:
    """Whether an array is stored in a dtype that its place in the model can have."""
    kind = name.rsplit(".", 1)[-1]
    scales = ("float16", "float32")
    allowed = {"packed": ("uint8",), "low": ("uint8",), "scale": scales, "offset": scales}
    return record.dtype in allowed.get(kind, FLOAT_DTYPES)


def _holds(array: np.ndarray, dtype: Any) -> bool:
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        there_and_back = array.astype(dtype).astype(np.float32)
    return bool(np.array_equal(there_and_back.view(np.uint32), array.view(np.uint32)))


def _places(decoder: Decoder) -> dict[str, _Place]:
    """Where each stored array is in the decoder, by the name it is stored under."""
    places = {}
    for name, parameter in parameters(decoder):
        value = parameter.get_value()
        for part, leaf in parts_of(value).items():
            layout = layout_of(value, part)
            path = f"{name}{part}"
            if decoder.scan_layers and path.startswith("layers.0."):
                inner = path.removeprefix("layers.0.")
                for layer in range(decoder.config.num_layers):
                    places[f"layers.{layer}.{inner}"] = _Place(path, layer, leaf, layout)
            else:
                places[path] = _Place(path, None, leaf, layout)
    return places


def _to_host(array: Array, layer: int | None) -> np.ndarray:
    """An array, or one layer of a stack; a view of it on a CPU that holds it whole."""
    if jax.default_backend() == "cpu":
        return np.asarray(array) if layer is None else np.asarray(array)[layer]
    one = array if layer is None else array[layer]
    # Another handle of the same buffer: an array keeps the host copy that was made of it.
    return np.asarray(one.addressable_data(0) if one.is_fully_replicated else one)
