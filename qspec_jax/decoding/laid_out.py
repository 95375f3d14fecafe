"""A decoder with its weights in one order, and the programs that were compiled for it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from typing import Any

import jax
from flax import nnx

from qspec_jax.device.memory import explain_out_of_memory
from qspec_jax.errors import UsageError
from qspec_jax.model.decoder import Decoder


class LaidOut:
    """A decoder's arrays as its weights are laid out, and the programs that take them so.

    Attributes:
        leaves: the arrays.
        compiled: the programs by what they are for.
        under_way: events of those that a thread compiles, set when it is done.
        longest_packed: what the function of :mod:`qspec_jax.decoding.packing` has said of the decoder; None before it
            was asked, which takes 20 ms for 32 layers.
        rounds_in_vain: the same of that function of :mod:`qspec_jax.model.layouts`.
    """

    def __init__(self, decoder: Decoder):
        self._graph, state = nnx.split(decoder)
        self.leaves, self._structure = jax.tree.flatten(state)
        self.compiled: dict[tuple[Any, ...], Any] = {}
        self.under_way: dict[tuple[Any, ...], threading.Event] = {}
        self.longest_packed: int | None = None
        self.rounds_in_vain: bool | None = None

    def merge(self, leaves: list[jax.Array]) -> Decoder:
        """The decoder with some arrays."""
        return nnx.merge(self._graph, jax.tree.unflatten(self._structure, leaves))

    def is_like(self, other: LaidOut) -> bool:
        """Whether programs of one take the arrays of the other."""
        ours, theirs = ((one._graph, one._structure, _described(one.leaves)) for one in (self, other))
        return ours == theirs


def _described(leaves: Sequence[Any]) -> list[tuple[Any, ...]]:
    return [(leaf.shape, leaf.dtype, leaf.weak_type) for leaf in leaves]


def compile_all(
    lowerings: Iterable[Callable[[], jax.stages.Lowered]], lock: AbstractContextManager[Any]
) -> list[jax.stages.Compiled]:
    """Lowers one after the other, with a lock, and compiles side by side: XLA lets go of Python meanwhile."""
    with explain_out_of_memory("while compiling"), ThreadPoolExecutor() as pool:
        try:
            compilations = []
            for lower in lowerings:
                with lock:
                    lowered = lower()
                compilations.append(pool.submit(lowered.compile))
            return [compilation.result() for compilation in compilations]
        except NotImplementedError as error:  # a kernel asked for by name
            raise UsageError(f"this model cannot run as asked: {error}") from error
