"""Attention over a key/value cache of int8: of a few new tokens per sequence, or of a chunk of a prompt."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int32

from pallas_kernels.arrays.arguments import checked
from pallas_kernels.arrays.further_sequences import call_for_rows
from pallas_kernels.arrays.int8_cache import Int8Cache
from pallas_kernels.arrays.partial_sums import PartialSums
from pallas_kernels.decode_attention import check_block_size
from pallas_kernels.decode_attention.reference import MAX_DECODE_TOKENS
from pallas_kernels.decode_attention_int8 import reference
from pallas_kernels.dispatch import TPU, TRITON, Implementations
from pallas_kernels.rotate_and_write_int8 import check_written
from pallas_kernels.rotate_and_write_int8 import reference as writing

_OP = "decode_attention_int8"
# A file has decode_attention_int8, decode_attention_int8_with_masses, block_attention_int8 and
# obstacle(num_tokens, head_dim, blocks); cache_obstacle(cache), if it does not read all; and FURTHER_SEQUENCES, if it
# takes queries of some.
_IMPLEMENTATIONS = Implementations(__name__, {TRITON: "gpu_triton", TPU: "tpu"})
_DTYPES = (jnp.float32, jnp.bfloat16, jnp.float16)


@checked
def decode_attention_int8(
    query: Float[Array, "B_all T H HD"],
    cache: Int8Cache,
    lengths: Int32[Array, " B"],
    *,
    window: int | None = None,
    implementation: str | None = None,
) -> Float[Array, "B_all T H HD"]:
    """Attends from a few new tokens to the positions up to their own; the equations stand in the reference.

    What is said of the bits of :func:`decode_attention` holds here as well.

    Args:
        query, lengths, window: as there; at most ``MAX_DECODE_TOKENS`` tokens.
        cache: the entries of the new tokens are there already.
        implementation: a name of ``IMPLEMENTATIONS``, or None for the reference, or on a TPU for its kernels.

    Returns:
        ``[B_all, T, H, HD]``, as there. Softmax and sums are float32.

    Raises:
        ValueError: shapes or dtypes do not fit together, ``window`` is not positive, there are too many tokens, or the
            name of the implementation is unknown.
        NotImplementedError: the named implementation cannot serve this call.
    """
    chosen = _selected(query, cache, lengths, window, implementation)
    return call_for_rows(chosen, _OP, query, cache, lengths=lengths, window=window)


@checked
def decode_attention_int8_with_masses(
    query: Float[Array, "B_all T H HD"],
    cache: Int8Cache,
    lengths: Int32[Array, " B"],
    *,
    block_size: int,
    window: int | None = None,
    implementation: str | None = None,
) -> tuple[Float[Array, "B_all T H HD"], Float32[Array, "B KH blocks"]]:
    """As :func:`decode_attention_int8`, bit for bit, and the share of the attention that each block of slots gets.

    Args:
        query, cache, lengths, window, implementation: as there.
        block_size: as in :func:`decode_attention_with_masses`, whose masses these are.

    Raises:
        ValueError: as there, or ``block_size`` is no multiple of 16.
        NotImplementedError: the named implementation cannot serve this call.
    """
    check_block_size(_OP, block_size)
    chosen = _selected(query, cache, lengths, window, implementation)
    options = {"lengths": lengths, "block_size": block_size, "window": window}
    return call_for_rows(chosen, f"{_OP}_with_masses", query, cache, **options)


@checked
def block_attention_int8(
    query: Float[Array, "B_all T H HD"],
    cache: Int8Cache,
    lengths: Int32[Array, " B"],
    blocks: Int32[Array, "B L KH N"],
    layer: Int32[Array, ""],
    *,
    block_size: int,
    window: int | None = None,
    implementation: str | None = None,
) -> Float[Array, "B_all T H HD"]:
    """As :func:`block_attention`, over a cache of int8.

    Raises:
        ValueError: as :func:`decode_attention_int8`, or the table or ``block_size`` does not fit.
        NotImplementedError: the named implementation cannot serve this call.
    """
    check_block_size(_OP, block_size)
    if blocks.ndim != 4 or (blocks.shape[0], blocks.shape[2]) != (lengths.shape[0], cache.num_kv_heads):
        raise ValueError(f"{_OP}: blocks are {blocks.shape}; use [{lengths.shape[0]}, L, {cache.num_kv_heads}, N]")
    chosen = _selected(query, cache, lengths, window, implementation, blocks=True)
    options = {"lengths": lengths, "blocks": blocks, "layer": layer, "block_size": block_size, "window": window}
    return call_for_rows(chosen, "block_attention_int8", query, cache, **options)


@checked
def prefill_int8(
    qkv: Float[Array, "B T heads HD"] | PartialSums,
    cosine: Float32[Array, "B T half_HD"],
    sine: Float32[Array, "B T half_HD"],
    cache: Int8Cache,
    lengths: Int32[Array, " B"],
    *,
    num_tokens: Int32[Array, " B"] | None = None,
    window: int | None = None,
) -> tuple[Float[Array, "B T H HD"], Int8Cache]:
    """Rotates, writes and attends, for any number of new tokens; XLA does it, as it is a large matrix product.

    Args:
        qkv, cosine, sine, cache, lengths: as in :func:`rotate_and_write_int8`.
        num_tokens: ``[B]`` int32, how many of the new tokens are more than padding; None for all.
        window: as in :func:`decode_attention_int8`.

    Returns:
        The attention ``[B, T, H, HD]``, and the cache with the new entries.

    Raises:
        ValueError: shapes or dtypes do not fit together.
    """
    check_written("prefill_int8", qkv, cosine, sine, cache, batch=qkv.shape[0])
    with jax.named_scope("cache_write"):
        query, keys, values = writing.rotated(qkv, cosine, sine, num_kv_heads=cache.num_kv_heads)
        newest = writing.newest_keys(cache, keys, lengths)
        cache = writing.write(cache, newest, values, lengths, num_tokens=num_tokens)
    with jax.named_scope("attention"):
        return reference.attend(query, cache, newest, lengths, window=window), cache


def _selected(
    query: Array,
    cache: Int8Cache,
    lengths: Array,
    window: int | None,
    implementation: str | None,
    *,
    blocks: bool = False,
) -> Any:
    batch, (_, num_tokens, num_heads, head_dim) = lengths.shape[0], query.shape
    if query.dtype not in _DTYPES:
        raise ValueError(f"{_OP}: query is {query.dtype}; use float32, bfloat16 or float16")
    if cache.recent_keys.dtype != query.dtype:
        raise ValueError(f"{_OP}: recent keys are {cache.recent_keys.dtype}; use {query.dtype}, as query has")
    if (cache.keys.shape[0], cache.head_dim) != (batch, head_dim):
        raise ValueError(f"{_OP}: keys are {cache.keys.shape}; use [{batch}, S, KH * {head_dim}]")
    if num_heads % cache.num_kv_heads:
        raise ValueError(f"{_OP}: H={num_heads} is not a multiple of KH={cache.num_kv_heads}; use whole groups")
    if window is not None and window < 1:
        raise ValueError(f"{_OP}: window={window}; use a positive number, or None to see all slots")
    if num_tokens > MAX_DECODE_TOKENS:
        raise ValueError(f"{_OP}: there are {num_tokens} tokens; use at most {MAX_DECODE_TOKENS}, or prefill_int8")

    def obstacle(module: Any) -> str | None:
        told = module.obstacle(num_tokens, head_dim, blocks=blocks)
        of_cache = getattr(module, "cache_obstacle", None)
        return of_cache(cache) if told is None and of_cache is not None else told

    return _IMPLEMENTATIONS.select(implementation, obstacle)
