"""The key/value cache that draft and verify share.

Each sequence has a row of ``S`` positions, its capacity. Position ``p`` holds keys and values of the token there,
and ``lengths`` says how many positions are valid. Writing (``pallas_kernels.rotate_and_write``) is by position: a
draft writes its entries provisionally, verification writes the same positions again, and a rejected token
is forgotten by a shorter length. Nothing is ever copied or cleared.

In a cache of int8 (``pallas_kernels/arrays/int8_cache.py``) a length that forgets more than the last pass has written
must be a multiple of ``KEY_BLOCK``: from there on, no query sees keys from before it unrounded.
"""

from __future__ import annotations

import dataclasses
import functools
import typing
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Int32, Shaped

from pallas_kernels import EVERYTHING, Int8Cache
from pallas_kernels.arrays.empty import zeros
from pallas_kernels.arrays.int8_cache import KEY_BLOCK, RING
from pallas_kernels.arrays.shown import shown, with_shapes
from qspec_jax.model.config import ModelConfig

KV_OF_MODEL, KV_INT8 = "model", "int8"
KV_FORMATS = (KV_OF_MODEL, KV_INT8)
"""What keys and values are kept as: in the dtype of the model, or as int8."""


def position_bytes(config: ModelConfig, *, dtype_bytes: int, kv: str = KV_OF_MODEL) -> int:
    """Bytes that each position of a row adds to its cache, in all layers; ``dtype_bytes`` are those of the model."""
    width = config.num_kv_heads * config.head_dim
    if kv == KV_INT8:
        return config.num_layers * (2 * width + 4 * config.num_kv_heads + -(-4 * width // KEY_BLOCK))
    return 2 * config.num_layers * width * dtype_bytes


def row_bytes(config: ModelConfig, *, dtype_bytes: int, kv: str = KV_OF_MODEL) -> int:
    """Bytes of a row's cache besides, whatever its positions: of int8, the newest keys in the dtype of the model."""
    width = config.num_kv_heads * config.head_dim
    return config.num_layers * RING * width * dtype_bytes if kv == KV_INT8 else 0


def restart_multiple(kv: str) -> int:
    """Of which a length must be a multiple that forgets more than the last pass has written; 1 for any length."""
    return KEY_BLOCK if kv == KV_INT8 else 1


@typing.no_type_check  # as a pytree it also holds shapes and other stand-ins for arrays
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LayerCache:
    """Keys and values of one layer, ``[B, S, KH * HD]`` (stacked layers: with a leading ``L``).

    Heads lie side by side. On CPUs and GPUs that is the memory of four axes; on TPUs it is the only order that no
    kernel has to copy first.
    """

    keys: Shaped[Array, "*layers B S W"]
    values: Shaped[Array, "*layers B S W"]

    def __repr__(self) -> str:
        return with_shapes(self)


@typing.no_type_check  # as a pytree it also holds shapes and other stand-ins for arrays
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """The cache of a whole model.

    Attributes:
        layers: one ``LayerCache`` or ``Int8Cache`` per layer, or a single one whose arrays have a leading ``L`` axis.
        lengths: ``[B]`` int32, valid positions of each sequence.
        blocks: ``[B, L, KH, N]`` int32, the blocks of positions that a view with a budget reads, or ``EVERYTHING`` as
            the first of them; None where no view has one. Whatever stands here, only drafts depend on it.
    """

    layers: tuple[LayerCache | Int8Cache, ...] | LayerCache | Int8Cache
    lengths: Int32[Array, " B"]
    blocks: Int32[Array, "B L KH N"] | None = None

    def __repr__(self) -> str:
        layers = f"{len(self.layers)} layers of" if isinstance(self.layers, tuple) else "stacked layers"
        return f"KVCache({layers} {with_shapes(self._first)}, lengths={shown(self.lengths)})"

    @classmethod
    def create(
        cls,
        config: ModelConfig,
        *,
        batch: int,
        capacity: int,
        dtype: DTypeLike,
        stacked: bool,
        num_blocks: int = 0,
        kv: str = KV_OF_MODEL,
    ) -> KVCache:
        """An empty cache of ``capacity`` positions for each of ``batch`` sequences.

        ``num_blocks`` are those that a view with a budget reads, 0 where there is no such view. ``kv`` is one of
        ``KV_FORMATS``.
        """
        heads: Any = {"num_kv_heads": config.num_kv_heads, "head_dim": config.head_dim}
        shape = (batch, capacity, config.num_kv_heads * config.head_dim)

        def layer(leading: tuple[int, ...]) -> LayerCache | Int8Cache:
            if kv == KV_INT8:
                return Int8Cache.zeros(batch=batch, capacity=capacity, **heads, dtype=dtype, layers=leading)
            return LayerCache(zeros((*leading, *shape), dtype), zeros((*leading, *shape), dtype))

        layers = layer((config.num_layers,)) if stacked else tuple(layer(()) for _ in range(config.num_layers))
        table = (batch, config.num_layers, config.num_kv_heads, num_blocks)
        blocks = jnp.full(table, EVERYTHING, jnp.int32) if num_blocks else None
        return cls(layers, zeros((batch,), jnp.int32), blocks)

    def row(self, index: Int32[Array, ""]) -> KVCache:
        """The cache of one sequence."""
        layers = jax.tree.map(lambda a: lax.dynamic_slice_in_dim(a, index, 1, a.ndim - 3), self.layers)
        one = functools.partial(lax.dynamic_slice_in_dim, start_index=index, slice_size=1)
        return KVCache(layers, one(self.lengths), None if self.blocks is None else one(self.blocks))

    def with_row(self, index: Int32[Array, ""], row: KVCache) -> KVCache:
        """The same cache with another sequence at ``index``."""
        layers = jax.tree.map(
            lambda a, b: lax.dynamic_update_slice_in_dim(a, b, index, a.ndim - 3), self.layers, row.layers
        )
        ours, theirs = ((cache.lengths, cache.blocks) for cache in (self, row))
        lengths, blocks = jax.tree.map(lambda a, b: lax.dynamic_update_slice_in_dim(a, b, index, 0), ours, theirs)
        return KVCache(layers, lengths, blocks)

    def with_entries_of(self, smaller: KVCache) -> KVCache:
        """The same positions with the entries and lengths of another cache, which has as many rows and fewer positions.

        Nobody has weighed the blocks of its rows.
        """
        layers = jax.tree.map(lambda a, b: a.at[..., : b.shape[-2], : b.shape[-1]].set(b), self.layers, smaller.layers)
        return dataclasses.replace(self, layers=layers, lengths=smaller.lengths)

    @property
    def capacity(self) -> int:
        """Positions each sequence can hold."""
        return self._first.keys.shape[-2]

    @property
    def _first(self) -> LayerCache | Int8Cache:
        """The first layer, or the stack of all."""
        return self.layers[0] if isinstance(self.layers, tuple) else self.layers

    @property
    def nbytes(self) -> int:
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self.layers))

    def with_lengths(self, lengths: Int32[Array, " B"]) -> KVCache:
        """The same entries with other lengths: rolls back (or, after a ragged write, fixes) each sequence."""
        return dataclasses.replace(self, lengths=lengths)

    def with_everything_listed(self, rows: Bool[Array, " B"] | None = None) -> KVCache:
        """The same cache, of which a view with a budget reads all: nobody knows which blocks matter.

        Of all rows, or of some; the others list their first blocks.
        """
        if self.blocks is None:
            return self
        first = jnp.where(True if rows is None else rows[:, None, None, None], EVERYTHING, 0)
        numbers = jnp.arange(self.blocks.shape[-1], dtype=jnp.int32)
        return dataclasses.replace(self, blocks=jnp.broadcast_to(numbers + first, self.blocks.shape))
