"""Where the arrays of a decoder go: onto the default device, or onto a mesh, each device its share.

Whoever reads a model has one array at a time in host memory, as checkpoints store it: whole, its rows in the order of
the projections, its bytes in planes. :meth:`Placing.arranged` puts rows and bytes into the order that devices hold, and
:meth:`Placing.put` gives each device what it holds and no more. Layers that are stacked are cut as they come
(:class:`Stack`): a host never has the stack of another one's devices.

An array is called by its path in the decoder, ``layers.3.mlp.down.weight.packed``; layer 0 stands for a stack.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array

from pallas_kernels import Layout, QuantizedWeight
from pallas_kernels.arrays.weight import order_bytes
from qspec_jax.device.memory import check_memory, sharing_memory
from qspec_jax.model.config import ModelConfig
from qspec_jax.model.decoder import Decoder, abstract_decoder, num_bytes
from qspec_jax.model.sharding import spec_of, to_shard_order
from qspec_jax.model.shards import Shards, parameters

_Region = tuple[tuple[int | None, int | None], ...]  # of an array: first and end of each axis
_WEIGHT_ARRAYS = ("packed", "scale", "offset", "low")
CODES = (".packed", ".low")  # parts of a parameter whose bytes have an order


class Placing:
    """All arrays go to the default device, as they are. Others override how they are ordered and cut."""

    def whole(self, config: ModelConfig, **options: Any) -> Decoder:
        """An abstract decoder for a reader to fill, of the shapes that are stored; ``options`` of abstract_decoder."""
        return abstract_decoder(config, **options)

    def finished(self, decoder: Decoder) -> Decoder:
        """What a decoder of :meth:`whole` is, once its parameters hold arrays that were put onto their devices."""
        return decoder

    def num_bytes(self, decoder: Decoder) -> int:
        """Bytes of an abstract decoder's arrays on a device."""
        return num_bytes(decoder)

    def check_memory(self, decoder: Decoder, *, name: str) -> None:
        """Raises OutOfMemoryError where the arrays of an abstract decoder cannot fit."""
        check_memory(self.num_bytes(decoder), what=f"the weights of {name}")

    def sharding(self, path: str, shape: tuple[int, ...]) -> NamedSharding | None:
        """How an array of :meth:`arranged` is cut; None for the default device."""
        return None

    def arranged(self, path: str, array: np.ndarray, layout: Layout = Layout.PLANES) -> np.ndarray:
        """A stored array, or one layer of a stack, as devices hold it, in host memory.

        Args:
            path: of the array.
            array: with 4-bit codes in ``Layout.PLANES``.
            layout: of those codes in the decoder of :meth:`whole`.
        """
        return order_bytes(array, layout)

    def put(self, path: str, array: np.ndarray) -> Array:
        """Gives the devices of this process what they hold of an array of :meth:`arranged`."""
        sharding = self.sharding(path, array.shape)
        if sharding is None:
            return jax.device_put(array)
        return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


class MeshPlacing(Placing):
    """Arrays go to the devices of a mesh in shard order (``model/sharding.py``)."""

    def __init__(self, shards: Shards):
        self._shards = shards
        values = ((name, parameter.get_value()) for name, parameter in parameters(shards.local))
        self._layouts = {f"{name}{part}": layout_of(value, part) for name, value in values for part in CODES}

    def whole(self, config: ModelConfig, **options: Any) -> Decoder:
        """See the base; what the decoder is, the shards know."""
        return self._shards.whole()

    def finished(self, decoder: Decoder) -> Decoder:
        """See the base."""
        return self._shards.filled(decoder)

    def num_bytes(self, decoder: Decoder) -> int:
        """See the base."""
        return num_bytes(self._shards.local)

    def check_memory(self, decoder: Decoder, *, name: str) -> None:
        """See the base."""
        together, of = sharing_memory(self._shards.mesh), self._shards.mesh.size
        check_memory(together * self.num_bytes(decoder), what=f"what {together} of {of} devices have of {name}")

    def sharding(self, path: str, shape: tuple[int, ...]) -> NamedSharding | None:
        """See the base."""
        return NamedSharding(self._shards.mesh, spec_of(path, shape))

    def arranged(self, path: str, array: np.ndarray, layout: Layout = Layout.PLANES) -> np.ndarray:
        """See the base; the layout is that of the kernels that read a device's part."""
        config, split = self._shards.local.config, self._shards.split
        return to_shard_order(path, array, config, split, layout=self._layouts.get(path, Layout.PLANES))


class Stack:
    """The stack of an array of all layers, of which the host has what its devices will hold."""

    def __init__(self, placing: Placing, path: str, *, num_layers: int):
        self._placing, self._path, self._num_layers = placing, path, num_layers
        self._shape: tuple[int, ...] = ()
        self._shares: dict[_Region, np.ndarray] = {}
        self._regions: Mapping[Any, _Region] | None = None  # by device

    def write(self, layer: int, array: np.ndarray) -> None:
        """Takes a layer, an array of :meth:`Placing.arranged`; the stack gets the widest dtype of its layers."""
        if not self._shares:
            self._begin(array)
        for region, share in self._shares.items():
            if share.dtype.itemsize < array.dtype.itemsize:
                share = self._shares[region] = share.astype(array.dtype)
            share[layer] = array[_index(region)]

    def _begin(self, array: np.ndarray) -> None:
        self._shape = array.shape
        sharding = self._placing.sharding(self._path, array.shape)
        if sharding is not None:
            indices = sharding.addressable_devices_indices_map(array.shape)
            self._regions = {device: _region(index) for device, index in indices.items() if index is not None}
        for region in {((None, None),) * array.ndim} if self._regions is None else {*self._regions.values()}:
            self._shares[region] = np.empty((self._num_layers, *array[_index(region)].shape), array.dtype)

    def put(self) -> Array:
        """The stack on its devices; what the host had of it is let go."""
        shares, self._shares = self._shares, {}
        layer = self._placing.sharding(self._path, self._shape)
        if layer is None or self._regions is None:
            return jax.device_put(shares.popitem()[1])
        sharding = NamedSharding(layer.mesh, PartitionSpec(None, *layer.spec))
        on_devices = [jax.device_put(shares[region], device) for device, region in self._regions.items()]
        return jax.make_array_from_single_device_arrays((self._num_layers, *self._shape), sharding, on_devices)


def _region(index: tuple[slice, ...]) -> _Region:
    """An index of slices, which Python before 3.12 takes for no key."""
    return tuple((one.start, one.stop) for one in index)


def _index(region: _Region) -> tuple[slice, ...]:
    return tuple(slice(start, stop) for start, stop in region)


def parts_of(value: Any) -> dict[str, Any]:
    """The arrays of a parameter by what follows its path; the sums of a weight, which follow from it, are left out."""
    if not isinstance(value, QuantizedWeight):
        return {"": value}
    arrays = {f".{name}": getattr(value, name) for name in _WEIGHT_ARRAYS}
    return {name: array for name, array in arrays.items() if array is not None}


def layout_of(value: Any, part: str) -> Layout:
    """The order of the bytes of a part of a parameter."""
    return value.layout if isinstance(value, QuantizedWeight) and part in CODES else Layout.PLANES


def of_parts(parts: Mapping[str, Any], *, layout: Layout) -> Any:
    """The parameter of some arrays, the inverse of :func:`parts_of`."""
    if "" in parts:
        return parts[""]
    arrays: Any = (parts[".packed"], parts[".scale"], parts.get(".offset"))
    return QuantizedWeight(*arrays, layout=layout, low=parts.get(".low"))
