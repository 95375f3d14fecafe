"""Attention over the blocks of the key/value cache that matter, and the choice of them.

A verification reads the whole cache, and can tell what each block of it weighs (``decode_attention_with_masses``).
``choose_blocks`` keeps the heaviest, and the drafts that follow read no others.
"""

from __future__ import annotations

from jaxtyping import Array, Float, Float32, Int32

from pallas_kernels.arrays.arguments import checked
from pallas_kernels.arrays.further_sequences import call_for_rows
from pallas_kernels.decode_attention import by_heads, check_arrays, check_block_size
from pallas_kernels.dispatch import TPU, TRITON, Implementations

_OP = "block_attention"
# A file has block_attention, choose_blocks and obstacle(num_tokens, head_dim, dtype, slots); FURTHER_SEQUENCES, if it
# takes queries of some.
_IMPLEMENTATIONS = Implementations(__name__, {TRITON: "gpu_triton", TPU: "tpu"})


@checked
def block_attention(
    query: Float[Array, "B_all T H HD"],
    keys: Float[Array, "B S *heads"],
    values: Float[Array, "B S *heads"],
    lengths: Int32[Array, " B"],
    blocks: Int32[Array, "B L KH N"],
    layer: Int32[Array, ""],
    *,
    block_size: int,
    window: int | None = None,
    implementation: str | None = None,
) -> Float[Array, "B_all T H HD"]:
    """Attends from ``T`` new tokens to the slots of some blocks that they see; the equations stand in the reference.

    The kernels read the slots of these blocks and no others, from the cache as it is: nothing is copied.

    Args:
        query, keys, values, lengths, window, implementation: as in :func:`decode_attention`.
        blocks: for each layer and key/value head the numbers of the blocks, each of which is listed once, as
            :func:`choose_blocks` leaves them; slots of blocks beyond the cache or beyond a token are not seen. A
            first entry of ``EVERYTHING`` lists all blocks.
        layer: int32 scalar, which of the tables to read.
        block_size: slots of a block, a multiple of 16.

    Returns:
        ``[B_all, T, H, HD]``, as there. A token that sees nothing gets zeros from the kernel.

    Raises:
        ValueError: shapes or dtypes do not fit together, or the name of the implementation is unknown.
        NotImplementedError: the named implementation cannot serve this call.
    """
    keys, values = by_heads(keys, query.shape[3]), by_heads(values, query.shape[3])
    batch = lengths.shape[0]
    check_arrays(_OP, query, keys, values, window, rows=batch)
    check_block_size(_OP, block_size)
    (_, num_tokens, _, head_dim), slots = query.shape, keys.shape[1]
    if blocks.ndim != 4 or (blocks.shape[0], blocks.shape[2]) != (batch, keys.shape[2]):
        raise ValueError(f"block_attention: blocks are {blocks.shape}; use [{batch}, L, {keys.shape[2]}, N]")
    about = num_tokens, head_dim, query.dtype, slots
    chosen = _IMPLEMENTATIONS.select(implementation, lambda module: module.obstacle(*about))
    options = {"lengths": lengths, "blocks": blocks, "layer": layer, "block_size": block_size, "window": window}
    return call_for_rows(chosen, _OP, query, keys, values, **options)


@checked
def choose_blocks(
    masses: Float32[Array, "B L KH NB"],
    lengths: Int32[Array, " B"],
    *,
    num_blocks: int,
    block_size: int,
    recent: int,
    ahead: int,
    implementation: str | None = None,
) -> Int32[Array, "B L KH N"]:
    """The blocks that drafts should read: the first one, the newest tokens, and of the others the heaviest.

    Args:
        masses: of the blocks of each layer and key/value head.
        lengths: ``[B]`` int32, tokens in the cache when the drafts begin.
        num_blocks: N, how many to choose.
        block_size: slots of a block.
        recent: newest tokens that are read whatever they weigh.
        ahead: positions after ``lengths`` that the drafts will write and read.
        implementation: a name of ``IMPLEMENTATIONS``, or None for the best that works.

    Returns:
        ``[B, L, KH, N]`` int32, different numbers of blocks from the lowest to the highest. Of equal masses the lower
        number is chosen. Where there are not N blocks, numbers of ``NB`` fill the table up.

    Raises:
        ValueError: the first block and the newest tokens do not fit ``num_blocks``, or an unknown implementation.
        NotImplementedError: the named implementation cannot serve this call.
    """
    least = least_blocks(block_size=block_size, recent=recent, ahead=ahead)
    if num_blocks < least:
        raise ValueError(
            f"choose_blocks: num_blocks={num_blocks} cannot hold the first block, the {recent} newest tokens and "
            f"{ahead} more; use at least {least}"
        )
    chosen = _IMPLEMENTATIONS.select(implementation, lambda module: None)
    return chosen.choose_blocks(
        masses, lengths, num_blocks=num_blocks, block_size=block_size, recent=recent, ahead=ahead
    )


def least_blocks(*, block_size: int, recent: int, ahead: int) -> int:
    """Blocks that are chosen whatever they weigh, at most; see :func:`choose_blocks`."""
    return 2 + -(-(recent + ahead - 1) // block_size)
