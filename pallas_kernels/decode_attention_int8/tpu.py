"""``decode_attention_int8`` as a Pallas kernel for TPUs, compiled for v5e, v6e and 7x; no TPU has run it.

It is the kernel of ``decode_attention`` with other logits. The scales of a block of keys multiply the queries, those of
values the exponentials, so that the matrix unit multiplies codes, which 16 bits hold exactly. A step that has the block
of the oldest new token, or those behind it, has logits of the ring's keys as well. Of both a row takes those that it
sees by its own position, and all slots are added in the order of their positions.

Blocks that a table does not list are masked, and read all the same: a draft with a budget saves nothing here.

No bit of a row depends on how many tokens are beside it, as far as the matrix unit adds in one order.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Float32, Int32

from pallas_kernels.arrays.int8_cache import KEY_BLOCK, RING, Int8Cache
from pallas_kernels.backends.tpu.dots import dot
from pallas_kernels.block_attention.reference import EVERYTHING
from pallas_kernels.decode_attention import tpu as whole
from pallas_kernels.decode_attention_int8 import reference

_BYTES = 12 * 2**20  # of keys, values and rings, two blocks of each; a kernel has 16 MiB on v5e
_SCALE_ROWS = 8  # of a tile of 32 bits
_HALF = 64  # a block of keys begins at a multiple of it in the ring, and may wrap there


def obstacle(num_tokens: int, head_dim: int, *, blocks: bool = False) -> str | None:
    """Why this kernel cannot serve a call, as the end of a sentence; None if it can."""
    del blocks  # any table will do
    return whole.obstacle(num_tokens, head_dim)


def cache_obstacle(cache: Int8Cache) -> str | None:
    """The same of a cache."""
    return whole.obstacle(1, cache.head_dim, cache.recent_keys.dtype)


@dataclasses.dataclass(frozen=True)
class _Sizes(whole.Sizes):
    """Those of ``decode_attention``, with whole blocks of keys in a step.

    Attributes:
        ring_bytes: of a ring, of which there are two as well.
    """

    ring_bytes: int = 0

    @classmethod
    def of_cache(cls, query: Array, cache: Int8Cache, window: int | None) -> _Sizes:
        _, slots, width = cache.recent_keys.shape
        return cls.of(query, cache.keys, window, ring_bytes=slots * width * cache.recent_keys.dtype.itemsize)

    @property
    def most_slots(self) -> int:
        fitting = (_BYTES - 2 * self.ring_bytes) // (4 * self.num_kv * self.head_dim)
        return min(super().most_slots, 1 << max(fitting, 1).bit_length() - 1)

    @property
    def block(self) -> int:
        return min(pl.cdiv(self.slots, KEY_BLOCK) * KEY_BLOCK, max(KEY_BLOCK, self.most_slots))

    @property
    def blocks_of_keys(self) -> int:
        """Of a step."""
        return self.block // KEY_BLOCK

    @property
    def scale_rows(self) -> int:
        """Rows of scales that are copied for a step: more than it needs, as no copy is smaller than a tile."""
        return min(_SCALE_ROWS, pl.cdiv(self.slots, KEY_BLOCK))


@functools.partial(jax.jit, static_argnames=("window", "interpret"))
def decode_attention_int8(
    query: Float[Array, "B T H HD"],
    cache: Int8Cache,
    lengths: Int32[Array, " B"],
    *,
    window: int | None,
    interpret: Any = False,
) -> Float[Array, "B T H HD"]:
    """See the public function."""
    sizes = _Sizes.of_cache(query, cache, window)
    return whole.call(query, _reader(cache, sizes), lengths, sizes, None, interpret=interpret)[0]


@functools.partial(jax.jit, static_argnames=("block_size", "window", "interpret"))
def decode_attention_int8_with_masses(
    query: Float[Array, "B T H HD"],
    cache: Int8Cache,
    lengths: Int32[Array, " B"],
    *,
    block_size: int,
    window: int | None,
    interpret: Any = False,
) -> tuple[Float[Array, "B T H HD"], Float32[Array, "B KH blocks"]]:
    """See the public function. XLA weighs blocks that do not fit the kernel's, and reads the keys a second time."""
    sizes = _Sizes.of_cache(query, cache, window)
    weighing = sizes.weighing(block_size)
    reader = _reader(cache, sizes)
    if weighing.is_served:
        out, masses = whole.call(query, reader, lengths, sizes, weighing, interpret=interpret)
        return out, weighing.by_heads(masses, sizes.num_kv)
    options: Any = {"block_size": block_size, "window": window}
    _, masses = reference.decode_attention_int8_with_masses(query, cache, lengths, **options)
    return whole.call(query, reader, lengths, sizes, None, interpret=interpret)[0], masses


@functools.partial(jax.jit, static_argnames=("block_size", "window", "interpret"))
def block_attention_int8(
    query: Float[Array, "B T H HD"],
    cache: Int8Cache,
    lengths: Int32[Array, " B"],
    blocks: Int32[Array, "B L KH N"],
    layer: Int32[Array, ""],
    *,
    block_size: int,
    window: int | None,
    interpret: Any = False,
) -> Float[Array, "B T H HD"]:
    """See the public function. All of the cache is read: a table saves its sequence nothing but what lies past it."""
    sizes = _Sizes.of_cache(query, cache, window)
    table = jnp.take(blocks, layer, axis=1)[..., None]  # [B, KH, N, 1]
    of_slot = jnp.arange(sizes.slots, dtype=jnp.int32) // block_size
    listed = (table == of_slot).any(axis=2) | (table[:, :, 0] == EVERYTHING)  # [B, KH, S]
    reader = _reader(cache, sizes, listed.astype(jnp.float32))
    return whole.call(query, reader, lengths, sizes, None, interpret=interpret)[0]


def _reader(cache: Int8Cache, sizes: _Sizes, *listed: Array) -> whole.CacheReader:
    width, slots = sizes.num_kv * sizes.head_dim, whole.slots_spec(sizes)
    steps = max(1, sizes.scale_rows // sizes.blocks_of_keys)  # that share rows of scales

    def scale_rows(b, s, lengths):
        return b, sizes.block_of_step(lengths[b], s) // steps if sizes.slots > KEY_BLOCK * _SCALE_ROWS else 0, 0

    def slots_of_heads(b, s, lengths):
        return b, 0, sizes.block_of_step(lengths[b], s)

    by_heads = pl.BlockSpec((None, sizes.num_kv, sizes.block), slots_of_heads)
    specs = [
        slots,
        pl.BlockSpec((None, sizes.scale_rows, width), scale_rows),
        whole.whole_spec(RING, width),
        slots,
        by_heads,
        *[by_heads for _ in listed],
    ]
    arrays = cache.keys, cache.key_scales, cache.recent_keys, cache.values, cache.value_scales, *listed
    name = "block_attention_int8" if listed else "decode_attention_int8"
    add, add_newest = (functools.partial(_add_tile, with_ring=with_ring) for with_ring in (False, True))
    return whole.CacheReader(arrays, specs, add, name, (_has_newest, add_newest))


def _has_newest(block: Array, length: Array, sizes: _Sizes) -> Array:
    """Whether a row may see keys of a block of slots as they are."""
    return (block + 1) * sizes.block > length // KEY_BLOCK * KEY_BLOCK


def _add_tile(refs, tile: int, query, state, block, length, sizes: _Sizes, *, with_ring: bool) -> tuple[Array, Array]:
    """As :class:`whole.CacheReader` says."""
    keys_ref, scales_ref, ring_ref, values_ref, value_scales_ref, *listed_refs = refs
    shape, lanes = (query.shape[0], sizes.block), sizes.lanes(tile)
    own = (length + sizes.tokens((shape[0], KEY_BLOCK))) // KEY_BLOCK  # the block that a row's position is in

    def logits_of(part: int) -> Array:
        number = block * sizes.blocks_of_keys + part
        scale = _row_of_scales(scales_ref[:, lanes], number)
        codes = keys_ref[part * KEY_BLOCK : (part + 1) * KEY_BLOCK, lanes].astype(query.dtype)
        scaled = (query.astype(jnp.float32) * scale).astype(query.dtype)
        of_codes = dot(scaled, codes, contract=(1, 1))
        if not with_ring:
            return of_codes
        starts = [pl.multiple_of((number * KEY_BLOCK + half) % RING, _HALF) for half in (0, _HALF)]
        newest = jnp.concatenate([ring_ref[pl.ds(start, _HALF), lanes] for start in starts])
        return jnp.where(number < own, of_codes, dot(query, newest, contract=(1, 1)))

    logits = jnp.concatenate([logits_of(part) for part in range(sizes.blocks_of_keys)], axis=1)
    values = values_ref[:, lanes].astype(query.dtype)
    scales = _by_rows(value_scales_ref, tile, shape, sizes)
    seen = sizes.seen(block, length, shape)
    for listed_ref in listed_refs:
        seen &= _by_rows(listed_ref, tile, shape, sizes) > 0
    return whole.add_logits(state, logits, values, seen, sizes, value_scales=scales)


def _row_of_scales(rows: Array, number: Array) -> Array:
    """The scales of a block of keys ``[1, width]``: no single row is loaded from where a kernel computes; or zeros."""
    here = lax.broadcasted_iota(jnp.int32, rows.shape, 0) == number % _SCALE_ROWS
    return jnp.sum(jnp.where(here, rows, 0.0), axis=0, keepdims=True)


def _by_rows(ref, tile: int, shape: tuple[int, int], sizes: _Sizes) -> Array:
    """What slots have for a head, for its rows in a tile."""
    heads = [min(tile * sizes.share + head, sizes.num_kv - 1) for head in range(sizes.share)]
    rows = [jnp.broadcast_to(ref[head : head + 1, :], (sizes.padded, shape[1])) for head in heads]
    return jnp.concatenate(rows)
