"""``rotate_and_write`` for TPUs: XLA rotates, a Pallas kernel writes the few new slots in place; no TPU has run it.

No copy is smaller than a tile, which has 16 slots of 16 bits: the tiles that the new tokens fall into are read, merged
and written back. It reads and writes caches ``[B, S, KH * HD]``, as the kernel of ``decode_attention`` does.
"""

from __future__ import annotations

import functools
from typing import Any

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
    batch, num_slots, width = keys.shape
    num_tokens = new_keys.shape[1]
    if num_tokens > MAX_DECODE_TOKENS:  # a prefill writes as much as it reads: XLA does that well
        keys = reference.write(keys[:, :, None], new_keys[:, :, None], lengths)[:, :, 0]
        return keys, reference.write(values[:, :, None], new_values[:, :, None], lengths)[:, :, 0]
    block = min(_SLOTS, num_slots)
    num_blocks = pl.cdiv(num_slots, block)

    def slot_block(b, step, lengths):
        return b, jnp.minimum(lengths[b] // block + step, num_blocks - 1), 0

    slot_spec = pl.BlockSpec((None, block, width), slot_block)
    new_spec = pl.BlockSpec((None, num_tokens, width), lambda b, step, lengths: (b, 0, 0))
    cache = jax.ShapeDtypeStruct(keys.shape, keys.dtype)
    new_keys_and_values: Any = pl.pallas_call(
        functools.partial(_kernel, num_tokens=num_tokens, slot_block=slot_block),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(batch, pl.cdiv(num_tokens - 1, block) + 1),
            in_specs=[slot_spec, slot_spec, new_spec, new_spec],
            out_specs=[slot_spec, slot_spec],
        ),
        out_shape=[cache, cache],
        input_output_aliases={1: 0, 2: 1},
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        interpret=interpret,
        name="write_slots",
    )(lengths, keys, values, new_keys, new_values)
    return tuple(new_keys_and_values)


def _kernel(lengths_ref, keys_ref, values_ref, new_keys_ref, new_values_ref, *out_refs, num_tokens: int, slot_block):
    row = pl.program_id(0)
    block = keys_ref.shape[0]
    first = slot_block(row, pl.program_id(1), lengths_ref)[1] * block
    for slots_ref, new_ref, out_ref in zip(
        (keys_ref, values_ref), (new_keys_ref, new_values_ref), out_refs, strict=True
    ):
        merged, new = slots_ref[...].astype(jnp.float32), new_ref[...].astype(jnp.float32)
        slot = first + lax.broadcasted_iota(jnp.int32, merged.shape, 0)
        for token in range(num_tokens):
            merged = jnp.where(slot == lengths_ref[row] + token, new[token : token + 1], merged)
        out_ref[...] = merged.astype(out_ref.dtype)
