"""Rotary embedding of new queries and keys, and their entry into a key/value cache of int8, in one operation."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int32

from pallas_kernels.arrays.arguments import checked
from pallas_kernels.arrays.further_sequences import call_for_rows
from pallas_kernels.arrays.int8_cache import RING, Int8Cache
from pallas_kernels.arrays.partial_sums import PartialSums
from pallas_kernels.decode_attention.reference import MAX_DECODE_TOKENS
from pallas_kernels.dispatch import TPU, TRITON, Implementations

_OP = "rotate_and_write_int8"
# A file has rotate_and_write_int8 and obstacle(dtype); FURTHER_SEQUENCES, if it takes queries of some.
_IMPLEMENTATIONS = Implementations(__name__, {TRITON: "gpu_triton", TPU: "tpu"})
_DTYPES = (jnp.float32, jnp.bfloat16, jnp.float16)


@checked
def rotate_and_write_int8(
    qkv: Float[Array, "B_all T heads HD"] | PartialSums,
    cosine: Float32[Array, "B T half_HD"],
    sine: Float32[Array, "B T half_HD"],
    cache: Int8Cache,
    lengths: Int32[Array, " B"],
    *,
    implementation: str | None = None,
) -> tuple[Float[Array, "B_all T H HD"], Int8Cache]:
    """Rotates queries and keys, and writes keys and values into the cache; the equations stand in the reference.

    Of up to ``MAX_DECODE_TOKENS`` tokens: :func:`prefill_int8` is for more.

    Args:
        qkv, cosine, sine, lengths: as in :func:`rotate_and_write`.
        cache: whose ``recent_keys`` have the dtype of ``qkv``.
        implementation: a name of ``IMPLEMENTATIONS``, or None for the reference, or on a TPU for its kernels.

    Returns:
        The rotated queries ``[B_all, T, H, HD]``, as there, and the cache with the new entries.

    Raises:
        ValueError: shapes or dtypes do not fit together, there are too many tokens, or the name of the implementation
            is unknown.
        NotImplementedError: the named implementation cannot serve this call.
    """
    check_written(_OP, qkv, cosine, sine, cache, batch=lengths.shape[0])
    if qkv.shape[1] > MAX_DECODE_TOKENS:
        raise ValueError(f"{_OP}: there are {qkv.shape[1]} tokens; use at most {MAX_DECODE_TOKENS}, or prefill_int8")
    chosen = _IMPLEMENTATIONS.select(implementation, lambda module: module.obstacle(qkv.dtype))
    return call_for_rows(chosen, _OP, qkv, cosine, sine, cache, lengths=lengths)


def check_written(
    op: str,
    qkv: Array | PartialSums,
    cosine: Array,
    sine: Array,
    cache: Int8Cache,
    *,
    batch: int,
    rows: int | None = None,
) -> None:
    """Raises ValueError, in the name of an operation, for arguments of ``batch`` sequences that do not fit together.

    The cache has as many rows, unless told.
    """
    rows = batch if rows is None else rows
    _, num_tokens, num_heads, head_dim = qkv.shape
    num_kv_heads, recent = cache.num_kv_heads, cache.recent_keys
    if qkv.dtype not in _DTYPES:
        raise ValueError(f"{op}: qkv is {qkv.dtype}; use float32, bfloat16 or float16")
    if recent.dtype != qkv.dtype or recent.shape != (rows, RING, num_kv_heads * head_dim):
        raise ValueError(
            f"{op}: recent keys are {recent.dtype}{list(recent.shape)}; use {qkv.dtype}, as qkv has, and "
            f"[{rows}, {RING}, KH * {head_dim}]"
        )
    if num_heads <= 2 * num_kv_heads:
        raise ValueError(f"{op}: qkv has {num_heads} heads and the cache KH={num_kv_heads}; use H + 2 * KH heads")
    if head_dim % 2 or not cosine.shape == sine.shape == (batch, num_tokens, head_dim // 2):
        raise ValueError(
            f"{op}: cosine is {cosine.shape} and sine {sine.shape} for HD={head_dim}; use [B, T, HD / 2] for both"
        )
