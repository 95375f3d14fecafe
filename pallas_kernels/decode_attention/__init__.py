"""Attention of a few new tokens per sequence over the key/value cache."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int32

from pallas_kernels.arrays.arguments import checked
from pallas_kernels.arrays.further_sequences import call_for_rows
from pallas_kernels.decode_attention.reference import BLOCK
from pallas_kernels.dispatch import TPU, TRITON, Implementations

_OP = "decode_attention"
# A file has decode_attention, decode_attention_with_masses and obstacle(num_tokens, head_dim, dtype);
# FURTHER_SEQUENCES, if it takes queries of some.
_IMPLEMENTATIONS = Implementations(__name__, {TRITON: "gpu_triton", TPU: "tpu"})
_DTYPES = (jnp.float32, jnp.bfloat16, jnp.float16)


@checked
def decode_attention(
    query: Float[Array, "B_all T H HD"],
    keys: Float[Array, "B S *heads"],
    values: Float[Array, "B S *heads"],
    lengths: Int32[Array, " B"],
    *,
    window: int | None = None,
    implementation: str | None = None,
) -> Float[Array, "B_all T H HD"]:
    """Attends from ``T`` new tokens to the slots up to their own; the equations stand in the reference.

    The Triton kernel serves up to ``MAX_DECODE_TOKENS`` tokens, and reads the slots that are seen and no others. There,
    the bits of a token's result depend on nothing but its query and the keys and values it sees: not on ``T``, on the
    other sequences, or on ``S``.

    Args:
        query: ``[B_all, T, H, HD]`` float32, bfloat16 or float16, rotated. Sequences after the first ``B``, if there
            are any, see nothing.
        keys, values: ``[B, S, KH * HD]`` in the dtype of ``query``, or ``[B, S, KH, HD]``; the entries of the new
            tokens are there already.
        lengths: ``[B]`` int32, tokens of each sequence before this call: token ``t`` sees slots up to
            ``lengths + t``, or the last one.
        window: slots a token sees, its own included; None for all.
        implementation: a name of ``IMPLEMENTATIONS``, or None for the best that works.

    Returns:
        ``[B_all, T, H, HD]`` in the dtype of ``query``, unspecified for sequences after the first ``B``. Softmax and
        sums are float32.

    Raises:
        ValueError: shapes or dtypes do not fit together, ``window`` is not positive, or the name of the
            implementation is unknown.
        NotImplementedError: the named implementation cannot serve this call.
    """
    keys, values = by_heads(keys, query.shape[3]), by_heads(values, query.shape[3])
    check_arrays(_OP, query, keys, values, window, rows=lengths.shape[0])
    _, num_tokens, _, head_dim = query.shape
    chosen = _IMPLEMENTATIONS.select(implementation, lambda module: module.obstacle(num_tokens, head_dim, query.dtype))
    return call_for_rows(chosen, _OP, query, keys, values, lengths=lengths, window=window)


@checked
def decode_attention_with_masses(
    query: Float[Array, "B_all T H HD"],
    keys: Float[Array, "B S *heads"],
    values: Float[Array, "B S *heads"],
    lengths: Int32[Array, " B"],
    *,
    block_size: int,
    window: int | None = None,
    implementation: str | None = None,
) -> tuple[Float[Array, "B_all T H HD"], Float32[Array, "B KH NB"]]:
    """As :func:`decode_attention`, bit for bit, and the share of the attention that each block of slots gets.

    Kernels sum the exponentials of a block while they have them: no key is read twice. That for TPUs does so where
    blocks divide its steps, of 512 slots for 8 heads of 128.

    Args:
        query, keys, values, lengths, window, implementation: as there.
        block_size: slots of a block, a multiple of 16. The last one may be shorter.

    Returns:
        the attention, and masses ``[B, KH, NB]`` float32 with ``NB = ceil(S / block_size)``: the mean over the heads
        of a group and the first tokens, as many of them as have 16 queries together; they add up to 1.

    Raises:
        ValueError: as there, or ``block_size`` is no multiple of 16.
        NotImplementedError: the named implementation cannot serve this call.
    """
    keys, values = by_heads(keys, query.shape[3]), by_heads(values, query.shape[3])
    check_arrays(_OP, query, keys, values, window, rows=lengths.shape[0])
    check_block_size(_OP, block_size)
    _, num_tokens, _, head_dim = query.shape
    chosen = _IMPLEMENTATIONS.select(implementation, lambda module: module.obstacle(num_tokens, head_dim, query.dtype))
    options = {"lengths": lengths, "block_size": block_size, "window": window}
    return call_for_rows(chosen, f"{_OP}_with_masses", query, keys, values, **options)


def by_heads(cache: Float[Array, "B S *heads"], head_dim: int) -> Float[Array, "B S KH HD"]:
    """Keys or values as implementations take them, of an array whose heads may lie side by side; nothing is copied.

    An array that is no whole number of heads stays as it is, for the check of arguments to name.
    """
    if cache.ndim != 3:
        return cache
    whole = cache.shape[2] % head_dim == 0
    return cache.reshape(*cache.shape[:2], -1, head_dim) if whole else cache[:, :, None]


def check_block_size(op: str, block_size: int) -> None:
    """Raises ValueError, in the name of an operation, for a block that is not made of the smallest ones."""
    if block_size < 1 or block_size % BLOCK:
        raise ValueError(f"{op}: block_size={block_size}; use a multiple of {BLOCK}")


def check_arrays(op: str, query: Array, keys: Array, values: Array, window: int | None, *, rows: int) -> None:
    """Raises ValueError, in the name of an operation, for arguments that do not fit together.

    The cache has ``rows``.
    """
    _, _, num_heads, head_dim = query.shape
    if query.dtype not in _DTYPES:
        raise ValueError(f"{op}: query is {query.dtype}; use float32, bfloat16 or float16")
    if keys.dtype != query.dtype or values.dtype != query.dtype:
        raise ValueError(f"{op}: keys are {keys.dtype} and values {values.dtype}; use {query.dtype}, as query has")
    if keys.shape != values.shape or (keys.shape[0], keys.shape[3]) != (rows, head_dim):
        raise ValueError(
            f"{op}: keys are {keys.shape} and values {values.shape}; use [{rows}, S, KH, {head_dim}] for both"
        )
    if num_heads % keys.shape[2]:
        raise ValueError(f"{op}: H={num_heads} is not a multiple of KH={keys.shape[2]}; use whole groups of queries")
    if window is not None and window < 1:
        raise ValueError(f"{op}: window={window}; use a positive number, or None to see all slots")
