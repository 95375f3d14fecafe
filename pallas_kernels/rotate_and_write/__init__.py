"""Rotary embedding of new queries and keys, and their entry into the key/value cache, in one operation."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int32

from pallas_kernels.arrays.arguments import checked
from pallas_kernels.arrays.further_sequences import call_for_rows
from pallas_kernels.arrays.partial_sums import PartialSums
from pallas_kernels.decode_attention import by_heads
from pallas_kernels.dispatch import TPU, TRITON, Implementations

_OP = "rotate_and_write"
# A file has rotate_and_write and obstacle(dtype); FURTHER_SEQUENCES, if it takes queries of some.
_IMPLEMENTATIONS = Implementations(__name__, {TRITON: "gpu_triton", TPU: "tpu"})
_DTYPES = (jnp.float32, jnp.bfloat16, jnp.float16)


@checked
def rotate_and_write(
    qkv: Float[Array, "B_all T heads HD"] | PartialSums,
    cosine: Float32[Array, "B T half_HD"],
    sine: Float32[Array, "B T half_HD"],
    keys: Float[Array, "rows S *heads"],
    values: Float[Array, "rows S *heads"],
    lengths: Int32[Array, " B"],
    *,
    rows: Int32[Array, " B"] | None = None,
    implementation: str | None = None,
) -> tuple[Float[Array, "B_all T H HD"], Float[Array, "rows S *heads"], Float[Array, "rows S *heads"]]:
    """Rotates queries and keys, and writes keys and values into the cache; the equations stand in the reference.

    The Triton kernel writes into the memory of ``keys`` and ``values`` where a program may give it up (a loop's
    carry, a donated argument), and touches only the slots of the new tokens.

    Args:
        qkv: ``[B_all, T, H + 2 * KH, HD]`` float32, bfloat16 or float16: the heads of queries, then keys, then values;
            or the partial sums of it. Of sequences after the first ``B``, if there are any, nothing is written.
        cosine, sine: ``[B, T, HD / 2]`` float32, of the angle of each pair of each token.
        keys, values: ``[B, S, KH * HD]`` in the dtype of ``qkv``, or ``[B, S, KH, HD]``.
        lengths: ``[B]`` int32, tokens of each sequence before this call: token ``t`` takes slot ``lengths + t``. One
            past the last slot is dropped.
        rows: ``[B]`` int32, the row of the cache of each sequence, where the cache has others or several sequences
            are pieces of one: no two write the same slot. What a negative one has is dropped. None for a row each.
        implementation: a name of ``IMPLEMENTATIONS``, or None for the best that works.

    Returns:
        The rotated queries ``[B_all, T, H, HD]``, unspecified for sequences after the first ``B``, and the caches with
        the new entries.

    Raises:
        ValueError: shapes or dtypes do not fit together, or the name of the implementation is unknown.
        NotImplementedError: the named implementation cannot serve this call.
    """
    given = keys.shape, values.shape
    keys, values = by_heads(keys, qkv.shape[3]), by_heads(values, qkv.shape[3])
    _check(qkv, cosine, sine, keys, values, lengths, has_rows=rows is not None)
    chosen = _IMPLEMENTATIONS.select(implementation, lambda module: module.obstacle(qkv.dtype))
    arrays = qkv, cosine, sine, keys, values
    query, keys, values = call_for_rows(chosen, _OP, *arrays, lengths=lengths, rows=rows)
    return query, keys.reshape(given[0]), values.reshape(given[1])


def _check(
    qkv: Array | PartialSums,
    cosine: Array,
    sine: Array,
    keys: Array,
    values: Array,
    lengths: Array,
    *,
    has_rows: bool,
) -> None:
    batch, (_, num_tokens, num_heads, head_dim) = lengths.shape[0], qkv.shape
    if qkv.dtype not in _DTYPES:
        raise ValueError(f"{_OP}: qkv is {qkv.dtype}; use float32, bfloat16 or float16")
    if keys.dtype != qkv.dtype or values.dtype != qkv.dtype:
        raise ValueError(f"{_OP}: keys are {keys.dtype} and values {values.dtype}; use {qkv.dtype}, as qkv has")
    num_rows = keys.shape[0] if has_rows else batch
    if keys.shape != values.shape or (keys.shape[0], keys.shape[3]) != (num_rows, head_dim):
        raise ValueError(
            f"{_OP}: keys are {keys.shape} and values {values.shape}; use [{num_rows}, S, KH, {head_dim}] for both"
        )
    if num_heads <= 2 * keys.shape[2]:
        raise ValueError(f"{_OP}: qkv has {num_heads} heads and the cache KH={keys.shape[2]}; use H + 2 * KH heads")
    if head_dim % 2 or not cosine.shape == sine.shape == (batch, num_tokens, head_dim // 2):
        raise ValueError(
            f"{_OP}: cosine is {cosine.shape} and sine {sine.shape} for HD={head_dim}; use [B, T, HD / 2] for both"
        )
