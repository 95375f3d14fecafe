"""Attention of a few new tokens per sequence over the key/value cache."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from pallas_kernels.dispatch import TRITON, Implementations

_OP = "decode_attention"
# A file has decode_attention and obstacle(num_tokens, head_dim).
_IMPLEMENTATIONS = Implementations(__name__, {TRITON: "gpu_triton"})
_DTYPES = (jnp.float32, jnp.bfloat16, jnp.float16)


def decode_attention(
    query: Float[Array, "B T H HD"],
    keys: Float[Array, "B S KH HD"],
    values: Float[Array, "B S KH HD"],
    lengths: Int32[Array, " B"],
    *,
    window: int | None = None,
    implementation: str | None = None,
) -> Float[Array, "B T H HD"]:
    """Attends from ``T`` new tokens to the slots up to their own; the equations stand in the reference.

    The Triton kernel serves up to ``MAX_DECODE_TOKENS`` tokens, and reads the slots that are seen and no others. There,
    the bits of a token's result depend on nothing but its query and the keys and values it sees: not on ``T``, on the
    other sequences, or on ``S``.

    Args:
        query: ``[B, T, H, HD]`` float32, bfloat16 or float16, rotated.
        keys, values: ``[B, S, KH, HD]`` in the dtype of ``query``; the entries of the new tokens are there already.
        lengths: ``[B]`` int32, tokens of each sequence before this call: token ``t`` sees slots up to
            ``lengths + t``, or the last one.
        window: slots a token sees, its own included; None for all.
        implementation: a name of ``IMPLEMENTATIONS``, or None for the best that works.

    Returns:
        ``[B, T, H, HD]`` in the dtype of ``query``. Softmax and sums are float32.

    Raises:
        ValueError: shapes or dtypes do not fit together, ``window`` is not positive, or the name of the
            implementation is unknown.
        NotImplementedError: the named implementation cannot serve this call.
    """
    _check(query, keys, values, window)
    _, num_tokens, _, head_dim = query.shape
    chosen = _IMPLEMENTATIONS.select(implementation, lambda module: module.obstacle(num_tokens, head_dim))
    return chosen.decode_attention(query, keys, values, lengths, window=window)


def _check(query: Array, keys: Array, values: Array, window: int | None) -> None:
    batch, _, num_heads, head_dim = query.shape
    if query.dtype not in _DTYPES:
        raise ValueError(f"{_OP}: query is {query.dtype}; use float32, bfloat16 or float16")
    if keys.dtype != query.dtype or values.dtype != query.dtype:
        raise ValueError(f"{_OP}: keys are {keys.dtype} and values {values.dtype}; use {query.dtype}, as query has")
    if keys.shape != values.shape or (keys.shape[0], keys.shape[3]) != (batch, head_dim):
        raise ValueError(
            f"{_OP}: keys are {keys.shape} and values {values.shape}; use [{batch}, S, KH, {head_dim}] for both"
        )
    if num_heads % keys.shape[2]:
        raise ValueError(f"{_OP}: H={num_heads} is not a multiple of KH={keys.shape[2]}; use whole groups of queries")
    if window is not None and window < 1:
        raise ValueError(f"{_OP}: window={window}; use a positive number, or None to see all slots")
