"""The masses of blocks, weighed by the kernel of ``decode_attention`` for TPUs while it has their exponentials.

A product with zeros and ones adds up the exponentials of each block, for all blocks of a step at once. Cut into three
bfloat16 pieces, they lose nothing in the matrix unit. Sums are relative to the largest logit so far, as totals are.
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, BFloat16, Float32

from pallas_kernels.backends.tpu import words
from pallas_kernels.backends.tpu.dots import dot

_LANES = 128
_ROWS = 16  # of a tile of 16 bits
_BYTES = 4 * 2**20  # of sums and masses


@dataclasses.dataclass(frozen=True)
class Weighing:
    """Which blocks are weighed, and by which rows.

    Attributes:
        block_size: slots of a block.
        slots: of the cache.
        step: those that a step of the kernel adds.
        tiles, share: tiles of lanes, and heads in each.
        padded: rows of a head; the first ``num_rows`` of them weigh.
    """

    block_size: int
    slots: int
    step: int
    tiles: int
    share: int
    padded: int
    num_rows: int

    @property
    def kept(self) -> int:
        """Rows of a head that are kept."""
        return pl.cdiv(self.num_rows, _ROWS) * _ROWS

    @property
    def groups(self) -> int:
        """Groups of 128 blocks, of which a step adds to one."""
        return pl.cdiv(pl.cdiv(self.slots, self.block_size), _LANES)

    @property
    def masses_shape(self) -> tuple[int, ...]:
        """Of a sequence, as the kernel writes them."""
        return self.tiles, self.groups, self.share, _LANES

    @property
    def sums_shape(self) -> tuple[int, ...]:
        return self.tiles, self.groups, self.share * self.kept, _LANES

    @property
    def is_served(self) -> bool:
        """Whether blocks lie within a step, and sums within the kernel's memory."""
        fits = 4 * _LANES * self.tiles * self.groups * self.share * (self.kept + _ROWS) <= _BYTES
        return fits and (self.step >= self.slots or self.step % self.block_size == 0)

    def belongs(self, step: Array) -> BFloat16[Array, "slots 128"]:
        """One where a slot of a step is of a block of its group."""
        shape = self.step, _LANES
        slot, lane = (lax.broadcasted_iota(jnp.int32, shape, axis) for axis in (0, 1))
        first = step * pl.cdiv(self.step, self.block_size) % _LANES
        return (slot // self.block_size + first == lane).astype(jnp.bfloat16)

    def add(self, sums_ref, weights: Array, kept: Array, belongs: Array, step: Array) -> None:
        """Adds the exponentials of a step ``[rows, slots]`` to the sums of a tile; ``kept`` scales what there is."""
        pieces = jnp.concatenate(words.bfloat16_pieces(self._own(weights)))
        parts = jnp.split(dot(pieces, belongs), 3)
        scale = self._own(kept)
        for group in range(self.groups):
            sums_ref[group] = sums_ref[group] * scale
        own = step * pl.cdiv(self.step, self.block_size) // _LANES
        sums_ref[own] += parts[0] + parts[1] + parts[2]

    def finish(self, masses_ref, sums_ref, totals: Array) -> None:
        """Writes the masses of a tile, whose rows have these totals ``[rows, 1]``."""
        totals = self._own(totals)
        row = lax.broadcasted_iota(jnp.int32, totals.shape, 0) % self.kept
        scale = jnp.where(row < self.num_rows, 1 / (totals * self.num_rows), 0.0)
        for group in range(self.groups):
            shares = sums_ref[group] * scale
            for head in range(self.share):
                own = shares[head * self.kept : (head + 1) * self.kept]
                masses_ref[group, head : head + 1] = jnp.sum(own, axis=0, keepdims=True)

    def _own(self, rows: Array) -> Array:
        """Of the rows of a tile those that are kept."""
        starts = range(0, self.share * self.padded, self.padded)
        return jnp.concatenate([rows[start : start + self.kept] for start in starts])

    def by_heads(self, masses: Float32[Array, "B tiles groups share 128"], num_kv: int) -> Float32[Array, "B KH NB"]:
        """The masses as the public function returns them."""
        masses = masses.transpose(0, 1, 3, 2, 4).reshape(masses.shape[0], self.tiles * self.share, -1)
        return masses[:, :num_kv, : pl.cdiv(self.slots, self.block_size)]
