"""How the kernels of attention for TPUs cut heads into tiles of lanes, and slots into the blocks of their steps."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array

from pallas_kernels.decode_attention import reference
from pallas_kernels.decode_attention.tpu_masses import Weighing

LANES = 128
_ROWS = 16  # of a tile of 16 bits
_BLOCK_SLOTS = 512
_BLOCK_BYTES = 8 * 2**20  # of keys and values, two blocks of each; a kernel has 16 MiB on v5e


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What the kernel is told: tokens, queries of a key/value head, and their rows up to whole tiles.

    Attributes:
        share: heads of keys that share a tile of lanes.
        width: lanes of such a tile.
        itemsize: bytes of a key.
        block: slots that a step adds, fewer where heads are many.
    """

    num_tokens: int
    group: int
    head_dim: int
    num_kv: int
    slots: int
    window: int | None
    itemsize: int = 2

    @classmethod
    def of(cls, query: Array, keys: Array, window: int | None, **more: int) -> Any:
        """Those of arrays whose heads lie side by side."""
        (_, num_tokens, num_heads, head_dim), (_, slots, flat) = query.shape, keys.shape
        num_kv, itemsize = flat // head_dim, keys.dtype.itemsize
        return cls(num_tokens, num_heads // num_kv, head_dim, num_kv, slots, window, itemsize, **more)

    def weighing(self, block_size: int) -> Weighing:
        """How blocks are weighed, and by which rows."""
        rows = reference.weighed_tokens(self.num_tokens, self.group) * self.group
        return Weighing(block_size, self.slots, self.block, self.num_tiles, self.share, self.padded, rows)

    @property
    def rows(self) -> int:
        return self.num_tokens * self.group

    @property
    def padded(self) -> int:
        return -(-self.rows // _ROWS) * _ROWS

    @property
    def share(self) -> int:
        return min(self.num_kv, math.lcm(self.head_dim, LANES) // self.head_dim)

    @property
    def num_tiles(self) -> int:
        return pl.cdiv(self.num_kv, self.share)

    @property
    def width(self) -> int:
        return self.share * self.head_dim

    @property
    def most_slots(self) -> int:
        """Slots that a step may add: a power of two."""
        fitting = _BLOCK_BYTES // (4 * self.num_kv * self.head_dim * self.itemsize)
        return min(_BLOCK_SLOTS, 1 << max(fitting, 1).bit_length() - 1)

    @property
    def block(self) -> int:
        return min(self.slots, max(_ROWS, self.most_slots))

    @property
    def num_steps(self) -> int:
        whole = pl.cdiv(self.slots, self.block)
        if self.window is None:
            return whole
        return min(whole, pl.cdiv(self.window + self.num_tokens, self.block) + 1)

    def first_block(self, length: Array) -> Any:
        return 0 if self.window is None else jnp.maximum(length - self.window + 1, 0) // self.block

    def last_block(self, length: Array) -> Array:
        return jnp.minimum(length + self.num_tokens - 1, self.slots - 1) // self.block

    def block_of_step(self, length: Array, step: Array) -> Array:
        """The block that a step has copied: the same once more where there is nothing left to copy."""
        return jnp.minimum(self.first_block(length) + step, self.last_block(length))

    def lanes(self, tile: int) -> slice:
        start = tile * self.width
        return slice(start, min(start + self.width, self.num_kv * self.head_dim))

    def tokens(self, shape: tuple[int, int]) -> Array:
        """In a kernel: the token of each row of a tile."""
        return lax.broadcasted_iota(jnp.int32, shape, 0) % self.padded // self.group

    def seen(self, block: Array, length: Array, shape: tuple[int, int]) -> Array:
        """In a kernel: which slots of a block the rows of a tile see."""
        slot = block * self.block + lax.broadcasted_iota(jnp.int32, shape, 1)
        position = length + self.tokens(shape)
        seen = slot <= jnp.minimum(position, self.slots - 1)
        return seen if self.window is None else seen & (slot > position - self.window)
