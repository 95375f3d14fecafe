"""Attention of chunks of prompts, or of pieces of several at once, over the rows of one key/value cache."""

from __future__ import annotations

from jaxtyping import Array, Float, Int32

from pallas_kernels.arrays.arguments import checked
from pallas_kernels.decode_attention import by_heads, check_arrays
from pallas_kernels.dispatch import TRITON, Implementations

_OP = "prefill_attention"
# A file has prefill_attention, obstacle(head_dim), and ALIKE, whether the bits of a token depend on nothing else read.
_IMPLEMENTATIONS = Implementations(__name__, {TRITON: "gpu_triton"})


@checked
def prefill_attention(
    query: Float[Array, "N T H HD"],
    keys: Float[Array, "B S *heads"],
    values: Float[Array, "B S *heads"],
    rows: Int32[Array, " N"] | None,
    starts: Int32[Array, " N"],
    *,
    window: int | None = None,
    implementation: str | None = None,
) -> Float[Array, "N T H HD"]:
    """Attends from ``N`` pieces of ``T`` tokens, each of one prompt, to the slots of the row that holds it.

    A long prompt is several pieces, which one call may have side by side: the entries of all of them are in the cache
    already, and a token sees those up to its own. The equations stand in the reference.

    The Triton kernel reads the rows where they lie, and of them the slots that are seen and no others. There, the bits
    of a token's result depend on nothing but its query and the keys and values that it sees: not on ``N``, on its place
    in a piece or that of the piece, on the other pieces, or on ``S``.

    Args:
        query: ``[N, T, H, HD]`` float32, bfloat16 or float16, rotated. Tokens past the end of a prompt may be anything.
        keys, values: ``[B, S, KH * HD]`` in the dtype of ``query``, or ``[B, S, KH, HD]``.
        rows: ``[N]`` int32, the row of each piece; negative for a piece of nothing, whose result is zero. None where
            each row has one piece, in order, of whatever length.
        starts: ``[N]`` int32, the slot of the first token of each piece: token ``t`` sees slots up to ``starts + t``,
            or the last one.
        window: slots a token sees, its own included; None for all.
        implementation: a name of ``IMPLEMENTATIONS``, or None for the best that works.

    Returns:
        ``[N, T, H, HD]`` in the dtype of ``query``. Softmax and sums are float32.

    Raises:
        ValueError: shapes or dtypes do not fit together, ``window`` is not positive, or the name of the
            implementation is unknown.
        NotImplementedError: the named implementation cannot serve this call.
    """
    keys, values = by_heads(keys, query.shape[3]), by_heads(values, query.shape[3])
    check_arrays(_OP, query, keys, values, window, rows=query.shape[0] if rows is None else keys.shape[0])
    chosen = _IMPLEMENTATIONS.select(implementation, lambda module: module.obstacle(query.shape[3]))
    return chosen.prefill_attention(query, keys, values, rows, starts, window=window)


def prefill_is_alike(head_dim: int) -> bool:
    """Whether :func:`prefill_attention` gives a token the same bits whatever else is read, for heads of a size."""
    return _IMPLEMENTATIONS.select(None, lambda module: module.obstacle(head_dim)).ALIKE
