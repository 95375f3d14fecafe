"""``block_attention_int8`` as a Pallas Triton kernel: that of ``block_attention`` with another way to load a tile.

A tile has slots of several blocks of keys, so that their scales multiply the keys, in registers, and not the queries.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, Int32

from pallas_kernels.arrays.int8_cache import KEY_BLOCK, RING, Int8Cache
from pallas_kernels.block_attention import gpu_triton as blockwise
from pallas_kernels.decode_attention import gpu_triton as whole
from pallas_kernels.decode_attention_int8.triton_arrays import arrays_read, by_heads, values_as_floats


@functools.partial(jax.jit, static_argnames=("block_size", "window", "interpret"))
def block_attention_int8(
    query: Float[Array, "B T H HD"],
    cache: Int8Cache,
    lengths: Int32[Array, " B"],
    blocks: Int32[Array, "B L KH N"],
    layer: Int32[Array, ""],
    *,
    block_size: int,
    window: int | None,
    interpret: bool = False,
) -> Float[Array, "B T H HD"]:
    """See the public function."""
    sizes = {"slots": cache.keys.shape[1], "num_kv_heads": cache.num_kv_heads}
    problem = blockwise.problem_of(query, blocks, **sizes, block_size=block_size, window=window)
    batch, row_blocks, layer = query.shape[0], problem.row_blocks, layer.reshape(1)
    out_specs, out_shape = whole.parts_of(problem, batch, problem.shares)
    shares = pl.pallas_call(
        functools.partial(_share_kernel, problem=problem),
        grid=(problem.num_kv_heads * row_blocks, problem.shares, batch),
        in_specs=[
            pl.BlockSpec((None,), lambda program, share, sequence: (sequence,)),
            blockwise.table_spec(
                problem, lambda program, share, sequence: (sequence, 0, lax.div(program, row_blocks), 0)
            ),
            pl.BlockSpec((None,), lambda program, share, sequence: (0,)),
            *arrays_read(problem),
        ],
        out_specs=out_specs,
        out_shape=out_shape,
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=2),
        interpret=interpret,
        name="block_attention_int8_shares",
    )(lengths, blocks, layer, query, *by_heads(cache))
    joined = {"problem": problem, "dtype": query.dtype, "interpret": interpret}
    return blockwise.join_shares(lengths, blocks, layer, *shares, **joined)


def _share_kernel(
    length_ref,  # [] int32
    table_ref,  # [L, N] int32
    layer_ref,  # [] int32
    query_ref,  # [T, H, HD]
    keys_ref,  # [S, block_dim] int8
    scales_ref,  # [NB, block_dim] f32
    recent_ref,  # [RING, block_dim]
    values_ref,  # [S, block_dim] int8
    value_scales_ref,  # [S] f32
    *result_refs,  # largest logits and sums [16], weighted values [16, block_dim], f32
    problem: blockwise.BlockProblem,
):
    length, dtype = length_ref[...], query_ref.dtype
    begin = lax.div(length, KEY_BLOCK) * KEY_BLOCK  # of the block of the only token

    def load(slots: Array, end: Array) -> tuple[Array, Array, Array]:
        exist, is_int8 = (slots >= 0) & (slots < end), (slots >= 0) & (slots < begin)
        there = jnp.maximum(slots, 0)
        rows = functools.partial(blockwise.load_slots, problem=problem)
        scales = rows(scales_ref, lax.div(there, KEY_BLOCK), is_int8)
        scaled = rows(keys_ref, there, is_int8).astype(jnp.float32) * scales
        newest = rows(recent_ref, lax.rem(there, RING), exist & ~is_int8)
        # Of the two, one is zero.
        keys = scaled.astype(dtype) + newest
        values = values_as_floats(rows(values_ref, there, exist), dtype, always=end > 0)
        return keys, values, plgpu.load(value_scales_ref.at[there], mask=exist, other=0.0)

    arrays = length, table_ref, layer_ref[...], query_ref, result_refs
    blockwise.attend_to_share(*arrays, load=load, problem=problem)
