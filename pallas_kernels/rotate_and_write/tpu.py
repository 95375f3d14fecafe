"""``rotate_and_write`` for TPUs: XLA rotates, a Pallas kernel writes the few new slots in place; no TPU has run it.

No copy is smaller than a tile, which has 16 slots of 16 bits: the tiles that the new tokens fall into are read, merged
and written back. It reads and writes caches ``[B, S, KH * HD]``, as the kernel of ``decode_attention`` does.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32, Int32

from pallas_kernels.arrays.partial_sums import PartialSums, value_of
from pallas_kernels.decode_attention.reference import MAX_DECODE_TOKENS
from pallas_kernels.rotate_and_write import reference

_SLOTS = 16
_SLOTS_OF_BYTES = 32
LANES = 128


def obstacle(dtype: DTypeLike | None = None) -> str | None:
    """Why this kernel cannot serve a call, as the end of a sentence; None if it can."""
    if dtype is not None and jnp.dtype(dtype) == jnp.float16:
        return "needs float32 or bfloat16: a TPU does not load float16"
    return None


@functools.partial(jax.jit, static_argnames="interpret")
def rotate_and_write(
    qkv: Float[Array, "B T heads HD"] | PartialSums,
    cosine: Float32[Array, "B T half_HD"],
    sine: Float32[Array, "B T half_HD"],
    keys: Float[Array, "rows S KH HD"],
    values: Float[Array, "rows S KH HD"],
    lengths: Int32[Array, " B"],
    *,
    rows: Int32[Array, " B"] | None = None,
    interpret: Any = False,
) -> tuple[Float[Array, "B T H HD"], Float[Array, "rows S KH HD"], Float[Array, "rows S KH HD"]]:
    """See the public function. XLA writes where sequences name their rows."""
    if rows is not None:
        return reference.rotate_and_write(qkv, cosine, sine, keys, values, lengths, rows=rows)
    num_kv_heads = keys.shape[2]
    first_key = qkv.shape[2] - 2 * num_kv_heads
    query, key, value = jnp.split(value_of(qkv), (first_key, first_key + num_kv_heads), axis=2)
    new = _flat(reference.rotate(key, cosine, sine)), _flat(value)
    new_keys, new_values = write(_flat(keys), _flat(values), *new, lengths, interpret=interpret)
    return reference.rotate(query, cosine, sine), new_keys.reshape(keys.shape), new_values.reshape(values.shape)


def _flat(heads: Array) -> Array:
    return heads.reshape(*heads.shape[:2], -1)


def write(
    keys: Float[Array, "B S W"],
    values: Float[Array, "B S W"],
    new_keys: Float[Array, "B T W"],
    new_values: Float[Array, "B T W"],
    lengths: Int32[Array, " B"],
    *,
    interpret: Any = False,
) -> tuple[Float[Array, "B S W"], Float[Array, "B S W"]]:
    """The caches with new slots from ``lengths`` on, in place where the caller gives them up."""
    num_tokens = new_keys.shape[1]
    if num_tokens > MAX_DECODE_TOKENS:  # a prefill writes as much as it reads: XLA does that well
        keys = reference.write(keys[:, :, None], new_keys[:, :, None], lengths)[:, :, 0]
        return keys, reference.write(values[:, :, None], new_values[:, :, None], lengths)[:, :, 0]
    ours = [Written(cache, new) for cache, new in ((keys, new_keys), (values, new_values))]
    keys, values = write_tiles(ours, lengths, num_tokens=num_tokens, interpret=interpret)
    return keys, values


class Written(NamedTuple):
    """An array of a cache, and the entries of new tokens; in a kernel, which has references to them, their shapes.

    Attributes:
        cache: ``[B, S, W]``, or ``[B, W, S]`` with slots in lanes.
        new: ``[B, T, W]``, or ``[B, W, T]``.
        in_lanes: whether slots are the last axis.
        is_ring: position ``p`` is in slot ``p % S``, which is whole tiles.
    """

    cache: Array | jax.ShapeDtypeStruct
    new: Array | jax.ShapeDtypeStruct
    in_lanes: bool = False
    is_ring: bool = False

    @property
    def tile(self) -> int:
        """Slots that are read and written at a time: no copy is smaller."""
        least = LANES if self.in_lanes else _SLOTS_OF_BYTES if self.cache.dtype.itemsize == 1 else _SLOTS
        return min(least, self.num_slots)

    @property
    def num_slots(self) -> int:
        return self.cache.shape[2 if self.in_lanes else 1]

    def tile_of_step(self, length: Array, step: Array) -> Array:
        """That which a step merges; the last one again where new tokens are past it."""
        at, count = length // self.tile + step, pl.cdiv(self.num_slots, self.tile)
        return at % count if self.is_ring else jnp.minimum(at, count - 1)

    @property
    def specs(self) -> tuple[pl.BlockSpec, pl.BlockSpec]:
        """Of the cache and of the new entries."""
        shape = (self.cache.shape[1], self.tile) if self.in_lanes else (self.tile, self.cache.shape[2])

        def place(b: Array, step: Array, lengths: Any) -> tuple[Any, ...]:
            tile = self.tile_of_step(lengths[b], step)
            return (b, 0, tile) if self.in_lanes else (b, tile, 0)

        whole = pl.BlockSpec((None, *self.new.shape[1:]), lambda b, step, lengths: (b, 0, 0))
        return pl.BlockSpec((None, *shape), place), whole

    @property
    def in_kernel(self) -> Written:
        """Without the arrays, of which a kernel may hold none."""
        return self._replace(cache=shape_of(self.cache), new=shape_of(self.new))

    def merged(self, slots_ref: Any, new_ref: Any, length: Array, step: Array) -> Array:
        """In a kernel: a tile with the tokens that are in it."""
        wide = jnp.int32 if slots_ref.dtype == jnp.int8 else jnp.float32
        slots, new = slots_ref[...].astype(wide), new_ref[...].astype(wide)
        axis = int(self.in_lanes)
        first = self.tile_of_step(length, step) * self.tile
        slot = first + lax.broadcasted_iota(jnp.int32, slots.shape, axis)
        for token in range(new.shape[axis]):
            position = (length + token) % self.num_slots if self.is_ring else length + token
            one = new[:, token : token + 1] if self.in_lanes else new[token : token + 1]
            slots = jnp.where(slot == position, one, slots)
        return slots.astype(slots_ref.dtype)


def write_tiles(arrays: Sequence[Written], lengths: Array, *, num_tokens: int, interpret: Any) -> list[Array]:
    """The caches with the new entries, in place where the caller gives them up."""
    steps = max(pl.cdiv(num_tokens - 1, one.tile) for one in arrays) + 1
    specs = [one.specs for one in arrays]
    of_caches = [of_cache for of_cache, _ in specs]
    results: Any = pl.pallas_call(
        functools.partial(_kernel, arrays=[one.in_kernel for one in arrays]),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(lengths.shape[0], steps),
            in_specs=[*of_caches, *[of_new for _, of_new in specs]],
            out_specs=of_caches,
        ),
        out_shape=[shape_of(one.cache) for one in arrays],
        input_output_aliases={1 + index: index for index in range(len(arrays))},
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        interpret=interpret,
        name="write_slots",
    )(lengths, *[one.cache for one in arrays], *[one.new for one in arrays])
    return list(results)


def shape_of(array: Array | jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(array.shape, array.dtype)


def _kernel(lengths_ref, *refs, arrays: Sequence[Written]):
    count = len(arrays)
    slots_refs, new_refs, out_refs = refs[:count], refs[count : 2 * count], refs[2 * count :]
    length, step = lengths_ref[pl.program_id(0)], pl.program_id(1)
    for one, slots_ref, new_ref, out_ref in zip(arrays, slots_refs, new_refs, out_refs, strict=True):
        out_ref[...] = one.merged(slots_ref, new_ref, length, step)
