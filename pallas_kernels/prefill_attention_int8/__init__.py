"""Pieces of prompts that one pass reads into the rows of a key/value cache of int8: their entries, and attention."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32, Int32

from pallas_kernels.arrays.arguments import checked
from pallas_kernels.arrays.int8_cache import KEY_BLOCK, Int8Cache
from pallas_kernels.arrays.partial_sums import PartialSums
from pallas_kernels.dispatch import TRITON, Implementations
from pallas_kernels.prefill_attention_int8 import reference
from pallas_kernels.rotate_and_write import rotate_and_write
from pallas_kernels.rotate_and_write_int8 import check_written

_OP = "prefill_pieces_int8"
# A file has prefill_attention_int8, obstacle(head_dim, dtype), and ALIKE, whether the bits of a token depend on nothing
# else read.
_IMPLEMENTATIONS = Implementations(__name__, {TRITON: "gpu_triton"})


@checked
def prefill_pieces_int8(
    qkv: Float[Array, "N T heads HD"] | PartialSums,
    cosine: Float32[Array, "N T half_HD"],
    sine: Float32[Array, "N T half_HD"],
    cache: Int8Cache,
    rows: Int32[Array, " N"],
    starts: Int32[Array, " N"],
    *,
    window: int | None = None,
    implementation: str | None = None,
) -> tuple[Float[Array, "N T H HD"], Int8Cache]:
    """Rotates, writes and attends, for ``N`` pieces of ``T`` tokens, each of one prompt.

    What a token sees is that of ``arrays/int8_cache.py``: the keys of its own block unrounded, which are new here. So
    blocks begin with a piece, and the pieces of one stand side by side, in order. They may be of several rows, and a
    long prompt is many of them.

    With the Triton kernel the bits of a token's result depend on nothing but its query and what it sees: not on ``N``,
    nor on the other pieces.

    Args:
        qkv, cosine, sine: as in :func:`rotate_and_write`, of each piece.
        cache: of all rows; its ``recent_keys`` have the dtype of ``qkv``.
        rows: ``[N]`` int32, the row of each piece; negative for a piece of nothing, which writes nothing and whose
            result is zero.
        starts: ``[N]`` int32, the position of the first token of each piece, a multiple of ``T``. Tokens past the end
            of a prompt may be anything: nobody sees them before their positions are written again.
        window: positions a token sees, its own included; None for all.
        implementation: a name of ``IMPLEMENTATIONS``, or None for the best that works.

    Returns:
        The attention ``[N, T, H, HD]``, and the cache with the new entries.

    Raises:
        ValueError: shapes or dtypes do not fit together, ``T`` does not divide ``KEY_BLOCK``, ``window`` is not
            positive, or the name of the implementation is unknown.
        NotImplementedError: the named implementation cannot serve this call.
    """
    pieces, size, num_heads, head_dim = qkv.shape
    num_kv_heads = cache.num_kv_heads
    check_written(_OP, qkv, cosine, sine, cache, batch=pieces, rows=cache.keys.shape[0])
    if KEY_BLOCK % size:
        raise ValueError(f"{_OP}: pieces have {size} tokens; use a divisor of {KEY_BLOCK}")
    if window is not None and window < 1:
        raise ValueError(f"{_OP}: window={window}; use a positive number, or None to see all slots")
    if (num_heads - 2 * num_kv_heads) % num_kv_heads:
        raise ValueError(
            f"{_OP}: H={num_heads - 2 * num_kv_heads} is not a multiple of KH={num_kv_heads}; use whole groups"
        )
    chosen = _IMPLEMENTATIONS.select(implementation, lambda module: module.obstacle(head_dim, qkv.dtype))
    with jax.named_scope("cache_write"):
        empty = jnp.zeros((pieces, size, num_kv_heads * head_dim), qkv.dtype)
        each = jnp.arange(pieces, dtype=jnp.int32)
        # Kernels rotate a token to the same bits whatever is beside it, and round keys and values to their dtype.
        query, keys, values = rotate_and_write(
            qkv, cosine, sine, empty, empty, jnp.zeros_like(starts), rows=each, implementation=implementation
        )
        cache = reference.write_pieces(cache, keys, values, rows, starts)
    with jax.named_scope("attention"):
        return chosen.prefill_attention_int8(query, keys, cache, rows, starts, window=window), cache


def prefill_int8_is_alike(head_dim: int, dtype: DTypeLike) -> bool:
    """Whether :func:`prefill_pieces_int8` gives a token the same bits whatever else is read."""
    return _IMPLEMENTATIONS.select(None, lambda module: module.obstacle(head_dim, dtype)).ALIKE
