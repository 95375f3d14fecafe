"""Programs on a mesh: each is one ``shard_map``, in which a device runs a decoder of its own (``model/sharding.py``).

XLA's own partitioner has nothing to decide then: the only collectives are those that ``model/collectives.py`` names,
two per layer and two more for each pass, and the sums and reports over rows of ``data``.

What the host gives a program (chunks, rows, counts) is the same on all devices, and each takes what is its own. So is
what the host reads of it.
"""

from __future__ import annotations

import dataclasses
import functools
import threading
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from qspec_jax.decoding.chunks import Shape
from qspec_jax.decoding.device_graphs import Graphs, compiler_options
from qspec_jax.decoding.state import DecodeState, with_rows_of
from qspec_jax.device.mesh import DATA, MODEL
from qspec_jax.model.sharding import cache_specs

_SAME = PartitionSpec()
# Two programs that devices begin in different orders would wait for each other's messages for ever.
_dispatching = threading.RLock()
_returned: list[Any] = []  # by the last program, where the next one has to wait for it


class OnMesh:
    """How the programs of a decoder run on a mesh.

    Attributes:
        mesh: with the axes ``data`` and ``model``.
        rows_over: the axis over which rows are split; None where all devices have all rows.
    """

    def __init__(self, mesh: Mesh):
        self.mesh = mesh
        self._makers: dict[Shape, jax.stages.Compiled] = {}
        self.rows_over = DATA if mesh.shape[DATA] > 1 else None
        # A CPU runs programs at the same time that need nothing of each other, and gloo then mixes their messages up.
        devices = mesh.devices.ravel()
        self._mixes_up = devices[0].platform == "cpu" and len({one.process_index for one in devices}) > 1

    @property
    def num_row_shards(self) -> int:
        """Into how many parts the rows of a batch are split."""
        return self.mesh.shape[DATA]

    def lower(
        self,
        program: Callable[..., Any],
        leaves: Sequence[Any],
        state: DecodeState,
        *others: Any,
        reports: bool = True,
        graphs: Graphs = Graphs.USUAL,
    ) -> jax.stages.Lowered:
        """Lowers ``program(leaves, state, *others)``; its state is donated.

        Args:
            program: of one device. It returns a state, and with ``reports`` something that is the same on all devices.
            leaves: the arrays of a decoder of the mesh, or their shapes with shardings.
            state: of all rows; its shapes are enough.
            others: what is the same on all devices.
            reports: see ``program``.
            graphs: what a GPU records of it.
        """
        options = compiler_options(graphs, on_mesh=True)
        of_state, same = self.state_specs(state), jax.tree.map(lambda _: _SAME, others)
        specs = _specs_of(leaves), of_state, *same
        mapped = self.map(program, specs, (of_state, _SAME) if reports else of_state)
        shapes = self._shapes((state, *others), (of_state, *same))
        return jax.jit(mapped, donate_argnums=1, compiler_options=options or None).lower(leaves, *shapes)

    def map_same(self, program: Callable[..., Any], leaves: Sequence[Any]) -> Callable[..., Any]:
        """``program(leaves, others)`` of one device, whose result is the same on all, as one of all devices."""
        return self.map(program, (_specs_of(leaves), _SAME), _SAME)

    def map(self, program: Callable[..., Any], in_specs: Any, out_specs: Any) -> Callable[..., Any]:
        """A program of one device as one of all."""
        # Kernels do not say over which axes their results vary, which JAX would check otherwise.
        return jax.shard_map(
            functools.wraps(program)(lambda *arguments: program(*arguments)),
            mesh=self.mesh,
            in_specs=in_specs,
            out_specs=out_specs,
            check_vma=False,
        )

    def run(self, program: Any, *arguments: Any) -> Any:
        """Calls a compiled program. Of all threads one at a time hands work to the devices."""
        with _dispatching:
            if not self._mixes_up:
                return program(*arguments)
            while _returned:
                jax.block_until_ready(_returned.pop())
            returned = program(*arguments)
            _returned.append(min(jax.tree.leaves(returned), key=lambda array: array.nbytes))  # and no cache
            return returned

    def state_specs(self, state: DecodeState) -> DecodeState:
        """How the arrays of a state lie: rows over ``data``, and heads of the cache over ``model``."""
        rows = PartitionSpec(DATA)
        cache = jax.tree.map(lambda _: rows, state.cache)
        blocks = None if cache.blocks is None else PartitionSpec(DATA, None, MODEL)
        cache = dataclasses.replace(cache, layers=cache_specs(state.cache.layers), blocks=blocks)
        others = jax.tree.map(lambda _: rows, state.without_cache())
        return dataclasses.replace(others, cache=cache)

    def made(self, shape: Shape, make: Callable[[Shape], DecodeState]) -> DecodeState:
        """A new state of a shape, each device's part of which is made on that device; compiled once for each shape."""
        if shape not in self._makers:
            held = [make]

            def arrays() -> DecodeState:
                return jax.tree.map(jnp.asarray, held[0](shape))

            shardings = self.shardings(jax.eval_shape(arrays))
            self._makers[shape] = jax.jit(arrays, out_shardings=shardings).lower().compile()
            held.clear()  # JAX keeps the function for a while, which is to keep no decoder
        return self.run(self._makers[shape])

    def placed(self, state: DecodeState) -> DecodeState:
        """A state some of whose arrays are in host memory, on the mesh."""

        def place(array: Any, sharding: NamedSharding) -> jax.Array:
            if isinstance(array, np.ndarray):
                return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])
            return array

        return jax.tree.map(place, state, self.shardings(state))

    def with_rows_of(self, state: DecodeState, smaller: DecodeState) -> DecodeState:
        """:func:`qspec_jax.decoding.state.with_rows_of` of states on the mesh; the first is used up."""
        move = jax.jit(with_rows_of, out_shardings=self.shardings(state), donate_argnums=0)
        return self.run(move, state, smaller)

    def shardings(self, state: DecodeState) -> DecodeState:
        """How the arrays of a state lie on the devices; its shapes are enough."""
        return self._shardings(self.state_specs(state))

    def _shardings(self, specs: Any) -> Any:
        return jax.tree.map(lambda spec: NamedSharding(self.mesh, spec), specs, is_leaf=_is_spec)

    def _shapes(self, arrays: Any, specs: Any) -> Any:
        """Shapes and dtypes of arrays with how they lie."""

        def shape(array: Any, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(np.shape(array), array.dtype, sharding=sharding)

        return jax.tree.map(shape, arrays, self._shardings(specs))


def _specs_of(leaves: Sequence[Any]) -> list[PartitionSpec]:
    return [leaf.sharding.spec for leaf in leaves]


def _is_spec(value: Any) -> bool:
    return isinstance(value, PartitionSpec)
