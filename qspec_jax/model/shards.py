"""A decoder whose arrays lie on a mesh: which shapes they have there, and how it is made of the arrays of a whole one.

Whoever reads a model fills :meth:`Shards.whole` with arrays in shard order, each on its devices
(``weights/placing.py``), and :meth:`Shards.filled` makes the decoder of the mesh of them.

Leaves of the decoder of a mesh are arrays of all devices, in shard order (``sharding.py``); in the program of a device
they are its own part, and the decoder is a smaller one.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.typing import DTypeLike

from pallas_kernels import Layout, QuantizedWeight
from qspec_jax.device.mesh import MODEL
from qspec_jax.model.config import ModelConfig, QuantConfig
from qspec_jax.model.decoder import Decoder, abstract_decoder
from qspec_jax.model.linear import WeightFormat, complete_formats
from qspec_jax.model.parameters import layer_anatomy
from qspec_jax.model.sharding import check_split, spec_of


@dataclasses.dataclass(frozen=True)
class Shards:
    """How a model lies on a mesh.

    Attributes:
        mesh: with the axes ``data`` and ``model``.
        local: what one device has: shapes and dtypes, and the layouts of its weights.
        build: an abstract decoder of the same model, for as many devices as it is told.
    """

    mesh: Mesh
    local: Decoder
    build: Callable[..., Decoder]

    @classmethod
    def of(
        cls,
        config: ModelConfig,
        mesh: Mesh,
        *,
        quantization: QuantConfig | None,
        formats: Mapping[str, WeightFormat] | None,
        dtype: DTypeLike,
        kernels: str | None,
        scan_layers: bool,
    ) -> Shards:
        """Of a model and how it runs; arguments as of :func:`abstract_decoder`.

        Raises:
            UsageError: the model does not split among the devices of ``model``; the message has the numbers that work.
        """
        split = mesh.shape[MODEL]
        complete = complete_formats(layer_anatomy(config).linears, quantization, formats)
        check_split(config, split, quantization=quantization, formats=complete)
        options: dict[str, Any] = {"quantization": quantization, "formats": formats, "dtype": dtype}
        build = functools.partial(abstract_decoder, config, **options, kernels=kernels, scan_layers=scan_layers)
        return cls(mesh, build(split=split), build)

    @property
    def split(self) -> int:
        """Devices that share the model."""
        return self.local.split

    def whole(self) -> Decoder:
        """An abstract decoder of the whole model, with 4-bit codes in ``Layout.PLANES``, for a reader to fill."""
        decoder = self.build()
        for _, parameter in parameters(decoder):
            if isinstance(weight := parameter.get_value(), QuantizedWeight):
                parameter.set_value(dataclasses.replace(weight, layout=Layout.PLANES))
        return decoder

    def shapes(self) -> Decoder:
        """The decoder of the mesh as shapes, dtypes and shardings, for programs to be compiled for."""

        shapes: dict[str, tuple[int, ...]] = {}
        for name, parameter in parameters(self.whole()):
            _map_parts(lambda path, leaf: shapes.update({path: leaf.shape}), name, parameter.get_value())

        def on_mesh(path: str, leaf: Any) -> Any:
            # What one device has does not tell one scale for the whole row from one for each device.
            sharding = NamedSharding(self.mesh, spec_of(path, shapes[path]))
            sizes = [size * (self.mesh.shape[axis] if axis else 1) for size, axis in _axes(leaf.shape, sharding.spec)]
            return jax.ShapeDtypeStruct(tuple(sizes), leaf.dtype, sharding=sharding)

        return self._with_arrays(lambda name, value: _map_parts(on_mesh, name, value))

    def filled(self, whole: Decoder) -> Decoder:
        """The decoder of the mesh with the arrays of one that :meth:`whole` made, which are on their devices by now."""
        placed = dict(parameters(whole))

        def of_whole(name: str, value: Any) -> Any:
            found = placed[name].get_value()
            return dataclasses.replace(found, layout=value.layout) if isinstance(value, QuantizedWeight) else found

        return self._with_arrays(of_whole)

    def _with_arrays(self, arrays: Callable[[str, Any], Any]) -> Decoder:
        """A decoder of the mesh, each parameter of which is what a function makes of its name and that of a device."""
        decoder = nnx.clone(self.local)
        for name, parameter in parameters(decoder):
            parameter.set_value(arrays(name, parameter.get_value()))
        return decoder


def parameters(module: nnx.Module) -> Iterator[tuple[str, nnx.Param]]:
    """All parameters of a decoder, or of a layer, by their paths: ``layers.3.attention.qkv.weight``."""
    for path, _ in nnx.to_flat_state(nnx.state(module, nnx.Param)):
        found: Any = module
        for step in path:
            found = found[step] if isinstance(step, int) else getattr(found, str(step))
        yield ".".join(map(str, path)), found


def _map_parts(function: Callable[[str, Any], Any], name: str, value: Any) -> Any:
    """A parameter with what a function makes of the path of each of its arrays, and of the array."""
    if not isinstance(value, QuantizedWeight):
        return function(name, value)
    names = [field.name for field in dataclasses.fields(value) if not field.metadata.get("static")]
    made = {
        part: function(f"{name}.{part}", getattr(value, part)) for part in names if getattr(value, part) is not None
    }
    return dataclasses.replace(value, **made)


def _axes(shape: tuple[int, ...], spec: Any) -> Iterator[tuple[int, str | None]]:
    """Each size of a shape with the axis of the mesh that it is split along."""
    return zip(shape, [*spec, *[None] * (len(shape) - len(spec))], strict=True)
