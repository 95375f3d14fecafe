"""``prefill_attention`` as a Pallas Triton kernel for NVIDIA GPUs (compute capability 8.0 and newer).

A program attends from up to 64 rows, the queries of one key/value head in neighbouring tokens of a piece, to all slots
that they see (FlashAttention-2: Dao, 2023). It finds the row of the cache by a table, so that nothing is gathered.

Arithmetic bounds it, and of that what surrounds the products: so a weight is one multiplication, one addition and the
power of two that the hardware has. Blocks that all rows of a tile see whole come first, and are not masked.

Row invariance: slots are read in blocks from multiples of their size on, in order; a block that a row does not see
leaves what it has summed as it is, bit for bit; and a tile has as many rows whatever there is to do.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, Int32

from pallas_kernels.backends.triton import registers
from pallas_kernels.decode_attention import gpu_triton as decode
from pallas_kernels.decode_attention.gpu_triton_tiles import load_rows, load_slots, raise_maximum, store_rows

ALIKE = True
_ROWS = 64  # of a tile
_WARPS = 4
_MAX_HEAD_DIM = 256
_SLOTS = 64  # of a block
_TILE_BYTES = 16384  # of keys, and of values, that a program holds


def obstacle(head_dim: int) -> str | None:
    """Why this kernel cannot serve a call, as the end of a sentence; None if it can."""
    if head_dim > _MAX_HEAD_DIM:
        return f"needs a head dimension of at most {_MAX_HEAD_DIM}; this is {head_dim}"
    return None


def prefill_attention(
    query: Float[Array, "N T H HD"],
    keys: Float[Array, "B S KH HD"],
    values: Float[Array, "B S KH HD"],
    rows: Int32[Array, " N"] | None,
    starts: Int32[Array, " N"],
    *,
    window: int | None,
    interpret: bool = False,
) -> Float[Array, "N T H HD"]:
    """See the public function."""
    registers.ignore_triton_deprecation()
    rows = jnp.arange(query.shape[0], dtype=jnp.int32) if rows is None else rows
    return _attend(query, keys, values, rows, starts, window=window, interpret=interpret)


# A jit of its own, so that a program with many layers lowers the kernel once per shape.
@functools.partial(jax.jit, static_argnames=("window", "interpret"))
def _attend(
    query: Array, keys: Array, values: Array, rows: Array, starts: Array, *, window: int | None, interpret: bool
) -> Array:
    pieces, num_tokens, num_heads, head_dim = query.shape
    batch, slots, num_kv_heads, _ = keys.shape
    problem = decode.Problem(num_tokens, num_heads, num_kv_heads, head_dim, slots, window)
    # Where the last tile of a piece is not full, two pieces that follow each other have tiles together.
    side_by_side = 2 if problem.num_rows % _ROWS and pieces % 2 == 0 else 1
    num_tiles = side_by_side * pl.cdiv(problem.num_rows, _ROWS)
    dim_bytes = problem.block_dim * keys.dtype.itemsize
    # Three tiles of small heads were fastest on an H200; queries of the largest leave no room for two (99 KB on Ada).
    num_stages = 3 if dim_bytes <= 128 else 2 if dim_bytes < 1024 else 1
    shape = pieces // side_by_side, side_by_side * num_tokens, num_heads
    piece = pl.BlockSpec((None, *shape[1:], problem.block_dim), lambda program, piece: (piece, 0, 0, 0))
    cache = pl.BlockSpec(
        (batch, slots, None, problem.block_dim), lambda program, piece: (0, 0, lax.div(program, num_tiles), 0)
    )
    numbers = pl.BlockSpec((None, side_by_side), lambda program, piece: (piece, 0))
    out = pl.pallas_call(
        functools.partial(_kernel, problem=problem, side_by_side=side_by_side, interpret=interpret),
        # Programs that read the same slots stand next to each other.
        grid=(num_kv_heads * num_tiles, shape[0]),
        in_specs=[numbers, numbers, piece, cache, cache],
        out_specs=piece,
        out_shape=jax.ShapeDtypeStruct((*shape, head_dim), query.dtype),
        compiler_params=plgpu.CompilerParams(num_warps=_WARPS, num_stages=num_stages),
        interpret=interpret,
        name="prefill_attention",
    )(*(one.reshape(shape[0], -1) for one in (rows, starts)), query.reshape(*shape, head_dim), keys, values)
    return out.reshape(query.shape)


def _kernel(
    row_ref,  # [pieces] int32
    start_ref,  # [pieces] int32
    query_ref,  # [tokens, H, block_dim], of these pieces one after the other
    keys_ref,  # [B, S, block_dim]
    values_ref,  # [B, S, block_dim]
    out_ref,  # [tokens, H, block_dim]
    *,
    problem: decode.Problem,
    side_by_side: int,
    interpret: bool,
):
    group, tiles_of_piece = problem.group, pl.cdiv(problem.num_rows, _ROWS)
    kv_head, tile = (part(pl.program_id(0), side_by_side * tiles_of_piece) for part in (lax.div, lax.rem))
    row, start = row_ref[0], start_ref[0]  # of the first token of these pieces
    first_row, end_row = tile * _ROWS, jnp.int32(problem.num_rows)
    if side_by_side == 2:
        together = (row_ref[1] == row) & (start_ref[1] == start + problem.num_tokens)
        is_second = ~together & (tile >= tiles_of_piece)
        row = jnp.where(is_second, row_ref[1], row)
        start = jnp.where(is_second, start_ref[1] - problem.num_tokens, start)
        first_row += is_second.astype(jnp.int32) * (problem.num_rows - tiles_of_piece * _ROWS)
        end_row *= 1 + (together | is_second).astype(jnp.int32)
    rows = first_row + lax.broadcasted_iota(jnp.int32, (_ROWS,), 0)
    exist = rows < end_row
    query = load_rows(query_ref, rows, exist, kv_head, problem)

    block_slots = min(_SLOTS, _TILE_BYTES // (problem.block_dim * keys_ref.dtype.itemsize))
    positions = start + lax.div(rows, group)
    last_token = lax.div(jnp.minimum(first_row + _ROWS, end_row) - 1, group)
    first_position = start + lax.div(first_row, group)
    first = lax.div(problem.first_seen(first_position), block_slots)
    is_nothing = (row < 0) | (first_row >= end_row)
    end = jnp.where(is_nothing, 0, problem.end_of_seen(start + last_token))
    attend = functools.partial(
        _attend_to_block,
        query=query,
        positions=jnp.broadcast_to(positions[:, None], (_ROWS, block_slots)),
        cache_refs=(keys_ref, values_ref),
        row=jnp.maximum(row, 0),
        end=end,
        problem=problem,
        interpret=interpret,
    )
    blocks = lax.div(end + (block_slots - 1), block_slots)
    carry = decode.nothing((_ROWS,), problem)
    if problem.window is None:
        whole = jnp.minimum(lax.div(problem.end_of_seen(first_position), block_slots), blocks)
        carry = lax.fori_loop(first, whole, functools.partial(attend, masked=False), carry)
        first = whole
    _, total, mixed = lax.fori_loop(first, blocks, attend, carry)
    out = mixed / jnp.where(total > 0, total, 1.0)[:, None]
    store_rows(out_ref, rows, exist, kv_head, problem, out)


def _attend_to_block(
    block: Array,
    carry: tuple[Array, Array, Array],  # maximum [rows], total [rows], mixed [rows, block_dim] of the blocks before
    *,
    query: Array,  # [rows, block_dim]
    positions: Array,  # [rows, block_slots]
    cache_refs: tuple[registers.Ref, registers.Ref],
    row: Array,
    end: Array,
    problem: decode.Problem,
    interpret: bool,
    masked: bool = True,
) -> tuple[Array, Array, Array]:
    maximum, total, mixed = carry
    start, block_slots = block * positions.shape[1], positions.shape[1]
    limit = end if masked else None
    keys, values = (load_slots(ref, start, limit, block_slots, problem, row) for ref in cache_refs)
    products = decode.dot(query, keys, contract=(1, 1))
    if masked:
        slots = start + lax.broadcasted_iota(jnp.int32, positions.shape, 1)
        seen = (slots >= problem.first_seen(positions)) & (slots <= positions) & (slots < end)
        products = jnp.where(seen, products, -jnp.inf)
    scale = problem.head_dim**-0.5
    maximum, kept, weights = raise_maximum(maximum, products, scale=scale, interpret=interpret)
    total = total * kept + jnp.sum(weights, axis=1)
    return maximum, total, mixed * kept[:, None] + decode.dot(weights.astype(values.dtype), values, contract=(1, 0))
