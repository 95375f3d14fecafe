"""What one of the devices that share a model has of it, and in which order the shared arrays lie.

Linears that read the residual stream are split along their outputs, those that write it along their inputs (Megatron,
Shoeybi et al., 2019). A device thus has some heads, with their queries, keys, values and cache, some channels of the
MLP, and besides some tokens of the vocabulary. With fewer key/value heads than devices, several devices have the same
one. What a device sees is a smaller decoder, to whose shapes kernels and layouts are chosen as ever.

*Shard order* makes each device's part of an array one piece, and that piece what a decoder of this size holds. Of four
devices, ``q0`` being the query heads of the first::

    qkv, gate_up     q k v                  ->   q0 k0 v0   q1 k1 v1   q2 k2 v2   q3 k3 v3
    output, down     two planes of K codes  ->   two planes of K/4 codes for each device, side by side

A weight of ``output`` or ``down`` with one scale for its whole row has that scale on every device.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import jax
import numpy as np
from jax.sharding import PartitionSpec
from jaxtyping import Int, Shaped

from pallas_kernels import Layout
from pallas_kernels.arrays.weight import order_bytes
from qspec_jax.device.mesh import DATA, MODEL
from qspec_jax.errors import UsageError
from qspec_jax.model.config import ModelConfig, QuantConfig
from qspec_jax.model.linear import WeightFormat
from qspec_jax.model.parameters import HEAD, layer_anatomy

_VOCABULARY = ("embedding", "lm_head", "quantized_head")
_CODES = (".packed", ".low")
_PER_GROUP = ("scale", "offset", "group_sum")


def local_config(config: ModelConfig, split: int) -> ModelConfig:
    """What one of ``split`` devices has of a model that :func:`check_split` lets through."""
    if split == 1:
        return config
    return dataclasses.replace(
        config,
        num_heads=config.num_heads // split,
        num_kv_heads=max(1, config.num_kv_heads // split),
        intermediate_size=config.intermediate_size // split,
        vocab_size=config.vocab_size // split,
    )


def cached_config(config: ModelConfig, split: int) -> ModelConfig:
    """The model with as many key/value heads as the caches of all devices have together."""
    return dataclasses.replace(config, num_kv_heads=max(config.num_kv_heads, split)) if split > 1 else config


def local_formats(
    config: ModelConfig, formats: Mapping[str, WeightFormat | None], split: int
) -> dict[str, WeightFormat | None]:
    """How the part of each linear that a device has is stored: with the groups of the whole one."""
    linears = layer_anatomy(config).linears

    def local(path: str, stored: WeightFormat | None) -> WeightFormat | None:
        if split == 1 or stored is None or path == HEAD or stored.group_size != linears[path].num_inputs:
            return stored
        return dataclasses.replace(stored, group_size=None)

    return {path: local(path, stored) for path, stored in formats.items()}


def check_split(
    config: ModelConfig, split: int, *, quantization: QuantConfig | None, formats: Mapping[str, WeightFormat | None]
) -> None:
    """Raises UsageError if a model does not split among so many devices, with the numbers that work.

    Args:
        config: of the model.
        split: devices of the axis ``model``.
        quantization: how draft activations are quantised; None for a model in floating point.
        formats: of each linear, by its path in a layer.
    """
    problems = list(_obstacles(config, split, quantization, formats))
    if not problems:
        return
    options = quantization, formats
    *others, last = [str(n) for n in range(1, config.num_heads + 1) if not list(_obstacles(config, n, *options))]
    fitting = f"{', '.join(others)} or {last}" if others else last
    raise UsageError(
        f"mesh: {MODEL}={split} does not split {', '.join(problems)}; of this model, use {MODEL}={fitting}"
    )


def _obstacles(
    config: ModelConfig, split: int, quantization: QuantConfig | None, formats: Mapping[str, WeightFormat | None]
) -> Iterator[str]:
    """What does not split among so many devices, in words."""
    if split == 1:
        return
    heads, kv_heads, channels = config.num_heads, config.num_kv_heads, config.intermediate_size
    if heads % split:
        yield f"{heads} query heads"
    if kv_heads % split and split % kv_heads:
        yield f"{kv_heads} key/value heads"
    if channels % split:
        yield f"{channels} channels of the MLP"
    if config.vocab_size % split:
        yield f"{config.vocab_size} tokens of the vocabulary"
    if config.down_hadamard and config.hadamard_block is None:
        yield f"a Hadamard transform of all {channels} channels (rotate the model with blocks: see quantize)"
    elif config.down_hadamard and config.hadamard_block and channels % (split * config.hadamard_block):
        yield f"{channels} channels into whole Hadamard blocks of {config.hadamard_block}"
    for path, spec in layer_anatomy(config).linears.items():
        stored = formats.get(path)
        if stored is not None and spec.writes_stream:
            yield from _split_groups(path, spec.num_inputs, split, stored, quantization)


def _split_groups(
    path: str, num_inputs: int, split: int, stored: WeightFormat, quantization: QuantConfig | None
) -> Iterator[str]:
    """The groups of a linear's inputs that would lie on two devices."""
    groups = {"weight": None if stored.group_size == num_inputs else stored.group_size}
    if quantization is not None:
        groups |= {"W4A4": quantization.w4a4.group_size, "W4A8": quantization.w4a8.group_size}
    if num_inputs % (2 * split):
        yield f"{num_inputs} inputs of {path} into pairs of codes"
    for name, size in groups.items():
        if size is not None and num_inputs % (split * size):
            yield f"{num_inputs} inputs of {path} into whole {name} groups of {size}"


def split_of(path: str) -> Literal["outputs", "inputs", "vocabulary"] | None:
    """Along what an array of the decoder is split, by its path; None for what every device has."""
    if path.partition(".")[0] in _VOCABULARY:
        return "vocabulary"
    if ".qkv." in path or ".gate_up." in path:
        return "outputs"
    if (".attention.output." in path or ".mlp.down." in path) and not path.endswith(".bias"):
        return "inputs"
    return None


def split_axis(path: str, shape: tuple[int, ...]) -> int | None:
    """The axis along which an array of a whole shape is split, from the last (-1); None for what every device has."""
    split, part = split_of(path), path.rpartition(".")[2]
    if split == "outputs":
        return -1 if part in (*_PER_GROUP, "bias") else -2
    if split == "inputs":
        shares_row = part in ("scale", "offset") and shape[-2] == 1
        return None if shares_row else (-2 if part in _PER_GROUP else -1)
    if split == "vocabulary":
        return -1 if part in _PER_GROUP else -2
    return None


def spec_of(path: str, shape: tuple[int, ...]) -> PartitionSpec:
    """How an array of the decoder lies on a mesh, by its path and its whole shape."""
    axis = split_axis(path, shape)
    if axis is None:
        return PartitionSpec()
    return PartitionSpec(*(MODEL if place == len(shape) + axis else None for place in range(len(shape))))


def cache_specs(layers: Any) -> Any:
    """How the arrays of a cache's layers lie on a mesh, each by its name: rows over ``data``, heads over ``model``.

    Heads lie side by side in the last axis, but for the scales of values ``[B, KH, S]``.
    """

    def spec(path: tuple[Any, ...], array: Any) -> PartitionSpec:
        axes: list[str | None] = [None] * array.ndim
        axes[-3], axes[-2 if path[-1].name == "value_scales" else -1] = DATA, MODEL
        return PartitionSpec(*axes)

    return jax.tree_util.tree_map_with_path(spec, layers)


def to_shard_order(
    path: str, array: np.ndarray, config: ModelConfig, split: int, *, layout: Layout = Layout.PLANES
) -> np.ndarray:
    """An array of a whole decoder in host memory as ``split`` devices share it.

    Args:
        path: of the array.
        array: 4-bit codes in ``Layout.PLANES``.
        config: of the whole model.
        split: devices of the axis ``model``.
        layout: of 4-bit codes, as each device has them.
    """
    if split > 1 and (order := _row_order(path, config, split)) is not None:
        axis = split_axis(path, array.shape)
        assert axis is not None
        array = np.take(array, order, axis=axis)
    elif split > 1 and split_of(path) == "inputs" and path.endswith(_CODES):
        array = _repacked(array, split, inverse=False)
    return order_bytes(array, layout) if path.endswith(_CODES) else array


def from_shard_order(
    path: str, array: np.ndarray, config: ModelConfig, split: int, *, layout: Layout = Layout.PLANES
) -> np.ndarray:
    """The inverse of :func:`to_shard_order`."""
    if path.endswith(_CODES):
        array = order_bytes(array, layout, inverse=True)
    if split > 1 and (order := _row_order(path, config, split)) is not None:
        axis = split_axis(path, array.shape)
        assert axis is not None
        return np.take(array, np.unique(order, return_index=True)[1], axis=axis)
    if split > 1 and split_of(path) == "inputs" and path.endswith(_CODES):
        return _repacked(array, split, inverse=True)
    return array


def _row_order(path: str, config: ModelConfig, split: int) -> Int[np.ndarray, " rows"] | None:
    """The rows of an array of several projections, device by device; None where they stay in order."""
    if split_of(path) != "outputs":
        return None
    if ".gate_up." in path:
        return np.arange(2 * config.intermediate_size).reshape(2, split, -1).swapaxes(0, 1).reshape(-1)
    local, rows = local_config(config, split), np.arange(sum(config.qkv_sizes)).reshape(-1, config.head_dim)
    query, key, value = np.split(rows, np.cumsum([config.num_heads, config.num_kv_heads]))
    by_device = []
    for device in range(split):
        first, first_kv = device * local.num_heads, device * config.num_kv_heads // split
        kv = slice(first_kv, first_kv + local.num_kv_heads)
        by_device += [query[first : first + local.num_heads], key[kv], value[kv]]
    return np.concatenate(by_device).reshape(-1)


def _repacked(
    packed: Shaped[np.ndarray, "*rows half_K"], split: int, *, inverse: bool
) -> Shaped[np.ndarray, "*rows half_K"]:
    """Two planes of all inputs as two planes of the inputs of each device, or the other way round.

    The inputs are ``2 * split`` runs. Of all inputs, the first ``split`` runs are the low plane; of those of a device,
    the first of its two is.
    """
    size = packed.shape[-1] // split

    def place(run: int, *, by_device: bool) -> tuple[int, int]:
        """Which run of bytes holds a run of inputs, and how far its codes are shifted."""
        at, plane = divmod(run, 2) if by_device else reversed(divmod(run, split))
        return at, 4 * plane

    made = np.zeros_like(packed)
    for run in range(2 * split):
        (source, down), (target, up) = place(run, by_device=inverse), place(run, by_device=not inverse)
        codes = (packed[..., source * size : (source + 1) * size] >> down) & 0xF
        made[..., target * size : (target + 1) * size] |= codes << up
    return made
