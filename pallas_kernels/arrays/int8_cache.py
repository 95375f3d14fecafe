"""The keys and values of a layer as int8, with the newest keys as they are.

Keys have a scale for each channel of a block of ``KEY_BLOCK`` positions (KIVI, Liu et al., 2024, quantises them so
because a few channels of keys are far louder than the rest). Values have one for each token and head::

    keys[s, c]   = codes[s, c] * key_scales[s // KEY_BLOCK, c]
    values[s, c] = codes[s, c] * value_scales[head of c, s]

Which keys a query sees as int8 depends on its own position ``p`` alone: those of all blocks before the one that ``p``
is in. Keys of its own block it sees unrounded, from a ring of the newest ones: position ``s`` is in slot ``s % RING``.
Hence a query sees the same whether it runs alone or among others, and wherever a prompt was cut.

A block is quantised by the pass that writes its last position. Keys of drafts that are rejected may be in it for a
while. Whoever sees the block comes after it, and the pass that rewrites the last position makes all of it again: no
token that is kept has seen them.
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32, Int8, Int32

from pallas_kernels.arrays.empty import zeros
from pallas_kernels.arrays.rounding import SMALLEST_SCALE, Rounding
from pallas_kernels.arrays.shown import with_shapes

KEY_BLOCK = 128  # positions that share the scales of their keys
# Slots of newest keys: a block but for its last position, and as many as a pass of a few tokens writes (17), in whole
# tiles of 64.
RING = 192
_LARGEST_CODE = 127


@typing.no_type_check  # as a pytree it also holds shapes and other stand-ins for arrays
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Int8Cache:
    """Keys and values of one layer (stacked layers: with a leading ``L``); heads lie side by side, ``W = KH * HD``.

    Attributes:
        keys: ``[B, S, W]`` int8 codes, of whole blocks.
        key_scales: ``[B, ceil(S / KEY_BLOCK), W]`` float32.
        recent_keys: ``[B, RING, W]`` in the dtype of the model, the newest keys.
        values: ``[B, S, W]`` int8 codes.
        value_scales: ``[B, KH, S]`` float32.
    """

    keys: Int8[Array, "*layers B S W"]
    key_scales: Float32[Array, "*layers B NB W"]
    recent_keys: Float[Array, "*layers B R W"]
    values: Int8[Array, "*layers B S W"]
    value_scales: Float32[Array, "*layers B KH S"]

    def __repr__(self) -> str:
        return with_shapes(self)

    @classmethod
    def zeros(
        cls,
        *,
        batch: int,
        capacity: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: DTypeLike,
        layers: tuple[int, ...] = (),
    ) -> Int8Cache:
        """An empty one."""
        width, shape = num_kv_heads * head_dim, (*layers, batch)
        return cls(
            keys=zeros((*shape, capacity, width), jnp.int8),
            key_scales=zeros((*shape, -(-capacity // KEY_BLOCK), width), jnp.float32),
            recent_keys=zeros((*shape, RING, width), dtype),
            values=zeros((*shape, capacity, width), jnp.int8),
            value_scales=zeros((*shape, num_kv_heads, capacity), jnp.float32),
        )

    @property
    def num_kv_heads(self) -> int:
        return self.value_scales.shape[-2]

    @property
    def head_dim(self) -> int:
        return self.keys.shape[-1] // self.num_kv_heads


def codes_and_scales(
    x: Float32[Array, " *values"],
    magnitude: Float32[Array, " *broadcast"],
    *,
    reciprocal: Callable[[Array], Array] = lambda scale: 1 / scale,
    rounding: Rounding = jnp.round,
) -> tuple[Int8[Array, " *values"], Float32[Array, " *broadcast"]]:
    """The codes of values, and the scales of a largest magnitude, in shapes that broadcast.

    Kernels spell the reciprocal and the rounding, half to even, in their own instructions; see ``rounding.py``.
    """
    scale = jnp.maximum(magnitude * jnp.float32(1 / _LARGEST_CODE), jnp.float32(SMALLEST_SCALE))
    codes = jnp.clip(rounding(x * reciprocal(scale)), jnp.float32(-_LARGEST_CODE), jnp.float32(_LARGEST_CODE))
    return codes.astype(jnp.int8), scale


def quantize(x: Float[Array, " *values"], *, axis: int) -> tuple[Int8[Array, " *values"], Float32[Array, " *scales"]]:
    """Codes, and the scales that values along an axis share, without that axis."""
    x = x.astype(jnp.float32)
    codes, scales = codes_and_scales(x, jnp.max(jnp.abs(x), axis=axis, keepdims=True))
    return codes, jnp.squeeze(scales, axis)


def int8_before(positions: Int32[Array, " *tokens"]) -> Int32[Array, " *tokens"]:
    """The position before which a query at each of these sees keys as int8: where its block begins."""
    return positions // KEY_BLOCK * KEY_BLOCK


def dequantized_keys(cache: Int8Cache, dtype: DTypeLike) -> Float[Array, "B S W"]:
    """All keys of whole blocks."""
    scales = jnp.repeat(cache.key_scales, KEY_BLOCK, axis=-2)[..., : cache.keys.shape[-2], :]
    return (cache.keys.astype(jnp.float32) * scales).astype(dtype)


def dequantized_values(cache: Int8Cache, dtype: DTypeLike) -> Float[Array, "B S W"]:
    """All values."""
    scales = jnp.repeat(jnp.swapaxes(cache.value_scales, -1, -2), cache.head_dim, axis=-1)
    return (cache.values.astype(jnp.float32) * scales).astype(dtype)
