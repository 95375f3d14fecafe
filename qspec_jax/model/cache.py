"""The key/value cache that draft and verify share.

Each sequence has a row of ``S`` positions, its capacity. Position ``p`` holds keys and values of the token there,
and ``lengths`` says how many positions are valid. Writing (``pallas_kernels.rotate_and_write``) is by position: a
draft writes its entries provisionally, verification writes the same positions again, and a rejected token
is forgotten by a shorter length. Nothing is ever copied or cleared.
"""

from __future__ import annotations

import dataclasses
import typing

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Int32, Shaped

from qspec_jax.model.config import ModelConfig


@typing.no_type_check  # as a pytree it also holds shapes and other stand-ins for arrays
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LayerCache:
    """Keys and values of one layer, ``[B, S, KH, HD]`` (stacked layers: with a leading ``L``)."""

    keys: Shaped[Array, "*layers B S KH HD"]
    values: Shaped[Array, "*layers B S KH HD"]


@typing.no_type_check  # as a pytree it also holds shapes and other stand-ins for arrays
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """The cache of a whole model.

    Attributes:
        layers: one ``LayerCache`` per layer, or a single one whose arrays have a leading ``L`` axis.
        lengths: ``[B]`` int32, valid positions of each sequence.
    """

    layers: tuple[LayerCache, ...] | LayerCache
    lengths: Int32[Array, " B"]

    @classmethod
    def create(cls, config: ModelConfig, *, batch: int, capacity: int, dtype: DTypeLike, stacked: bool) -> KVCache:
        """An empty cache of ``capacity`` positions for each of ``batch`` sequences."""
        shape = (batch, capacity, config.num_kv_heads, config.head_dim)

        def layer(leading: tuple[int, ...]) -> LayerCache:
            return LayerCache(jnp.zeros((*leading, *shape), dtype), jnp.zeros((*leading, *shape), dtype))

        layers = layer((config.num_layers,)) if stacked else tuple(layer(()) for _ in range(config.num_layers))
        return cls(layers, jnp.zeros((batch,), jnp.int32))

    def row(self, index: Int32[Array, ""]) -> KVCache:
        """The cache of one sequence."""
        layers = jax.tree.map(lambda a: lax.dynamic_slice_in_dim(a, index, 1, a.ndim - 4), self.layers)
        return KVCache(layers, lax.dynamic_slice_in_dim(self.lengths, index, 1))

    def with_row(self, index: Int32[Array, ""], row: KVCache) -> KVCache:
        """The same cache with another sequence at ``index``."""
        layers = jax.tree.map(
            lambda a, b: lax.dynamic_update_slice_in_dim(a, b, index, a.ndim - 4), self.layers, row.layers
        )
        return KVCache(layers, lax.dynamic_update_slice_in_dim(self.lengths, row.lengths, index, 0))

    @property
    def capacity(self) -> int:
        """Positions each sequence can hold."""
        first = self.layers if isinstance(self.layers, LayerCache) else self.layers[0]
        return first.keys.shape[-3]

    @property
    def nbytes(self) -> int:
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self.layers))

    def with_lengths(self, lengths: Int32[Array, " B"]) -> KVCache:
        """The same entries with other lengths: rolls back (or, after a ragged write, fixes) each sequence."""
        return dataclasses.replace(self, lengths=lengths)
