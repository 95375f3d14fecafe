"""The Triton kernels around attention lower for CUDA at real model shapes, on a machine that needs no GPU."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import Int8Cache, PartialSums
from pallas_kernels.backends.early_launch import SIGNAL, early_launch
from pallas_kernels.block_attention import gpu_triton as block_triton
from pallas_kernels.decode_attention import gpu_triton as attention_triton
from pallas_kernels.decode_attention_int8 import gpu_triton as int8_triton
from pallas_kernels.prefill_attention import gpu_triton as prefill_triton
from pallas_kernels.prefill_attention_int8 import gpu_triton as int8_prefill_triton
from pallas_kernels.rotate_and_write import gpu_triton as rotate_triton
from pallas_kernels.rotate_and_write_int8 import gpu_triton as write_int8_triton
from tests.pallas_kernels.test_cuda_lowering import KERNEL_CALL, array, cuda_program

# Tokens, heads, key/value heads, head dimension, slots: the demo model, Llama-3-8B, and what pads or fills most.
ATTENTION_SHAPES = [(1, 9, 3, 64, 640), (4, 9, 3, 64, 640), (1, 32, 8, 128, 1024), (17, 32, 8, 128, 8192)]
ATTENTION_SHAPES += [(4, 8, 2, 96, 1000), (2, 8, 1, 256, 64)]


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32], ids=["bf16", "f32"])
@pytest.mark.parametrize("shape", ATTENTION_SHAPES, ids=str)
def test_decode_attention_lowers_to_two_kernels(shape, dtype):
    tokens, heads, kv_heads, head_dim, slots = shape
    query, cache = array(2, tokens, heads, head_dim, dtype=dtype), array(2, slots, kv_heads, head_dim, dtype=dtype)
    assert attention_triton.obstacle(tokens, head_dim) is None
    for groups in (1, 2):
        attend = functools.partial(attention_triton.decode_attention, window=500, most_groups=groups)
        assert cuda_program(attend, query, cache, cache, array(2, dtype=jnp.int32)).count(KERNEL_CALL) == 2


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32], ids=["bf16", "f32"])
@pytest.mark.parametrize("shape", ATTENTION_SHAPES, ids=str)
def test_prefill_attention_lowers_to_one_kernel(shape, dtype):
    _, heads, kv_heads, head_dim, slots = shape
    query, cache = array(16, 32, heads, head_dim, dtype=dtype), array(4, slots, kv_heads, head_dim, dtype=dtype)
    attend = functools.partial(prefill_triton.prefill_attention, window=500)
    table = array(16, dtype=jnp.int32)
    assert cuda_program(attend, query, cache, cache, table, table).count(KERNEL_CALL) == 1
    query, starts = array(4, 512, heads, head_dim, dtype=dtype), array(4, dtype=jnp.int32)
    chunks = lambda query, keys, values, starts: attend(query, keys, values, None, starts)  # noqa: E731
    assert cuda_program(chunks, query, cache, cache, starts).count(KERNEL_CALL) == 1


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32], ids=["bf16", "f32"])
@pytest.mark.parametrize("shape", ATTENTION_SHAPES, ids=str)
def test_pieces_attend_to_a_cache_of_int8_in_one_kernel(shape, dtype):
    _, heads, kv_heads, head_dim, slots = shape
    sizes = {"num_kv_heads": kv_heads, "head_dim": head_dim, "dtype": dtype}
    cache = jax.eval_shape(functools.partial(Int8Cache.zeros, batch=4, capacity=slots, **sizes))
    query, keys = array(16, 32, heads, head_dim, dtype=dtype), array(16, 32, kv_heads * head_dim, dtype=dtype)
    if head_dim == 256 and dtype == jnp.float32:
        assert "at most 128 in float32" in str(int8_prefill_triton.obstacle(head_dim, dtype))
        return
    assert int8_prefill_triton.obstacle(head_dim, dtype) is None
    for window in (None, 500):
        attend = functools.partial(int8_prefill_triton.prefill_attention_int8, window=window)
        table = array(16, dtype=jnp.int32)
        assert cuda_program(attend, query, keys, cache, table, table).count(KERNEL_CALL) == 1


@pytest.mark.parametrize("shape", ATTENTION_SHAPES[1:5], ids=str)
def test_weighing_choosing_and_reading_blocks_lower(shape):
    tokens, heads, kv_heads, head_dim, slots = shape
    query, cache = (
        array(2, tokens, heads, head_dim, dtype=jnp.bfloat16),
        array(2, slots, kv_heads, head_dim, dtype=jnp.bfloat16),
    )
    lengths, layer = array(2, dtype=jnp.int32), array(dtype=jnp.int32)
    sizes = {"block_size": 16, "recent": 64, "ahead": 17}
    choose = functools.partial(block_triton.choose_blocks, num_blocks=8, **sizes)
    # Of a size that no other case has: JAX remembers traces, in which nobody silences its notice of the Triton backend.
    masses, table = (
        array(2, 3, kv_heads, 100 + tokens, dtype=jnp.float32),
        array(2, 3, kv_heads, 8, dtype=jnp.int32),
    )
    # First, while no other kernel has silenced it.
    assert cuda_program(choose, masses, lengths).count(KERNEL_CALL) == 1
    weigh = functools.partial(attention_triton.decode_attention_with_masses, block_size=16, window=None)
    assert cuda_program(weigh, query, cache, cache, lengths).count(KERNEL_CALL) == 3
    weigh = functools.partial(weigh, most_groups=2)
    assert cuda_program(weigh, query, cache, cache, lengths).count(KERNEL_CALL) == 3
    attend = functools.partial(block_triton.block_attention, block_size=16, window=500)
    assert block_triton.obstacle(1, head_dim) is None
    assert tokens == 1 or "needs one token per sequence" in str(block_triton.obstacle(tokens, head_dim))
    query = array(2, 1, heads, head_dim, dtype=jnp.bfloat16)
    assert cuda_program(attend, query, cache, cache, lengths, table, layer).count(KERNEL_CALL) == 2


@pytest.mark.parametrize("num_parts", [0, 4], ids=["qkv", "partial sums"])
@pytest.mark.parametrize("shape", ATTENTION_SHAPES, ids=str)
def test_rotate_and_write_lowers_to_one_kernel_in_place(shape, num_parts):
    """The results that are caches have the memory of the arguments that are caches, also as the carry of a loop."""
    tokens, heads, kv_heads, head_dim, slots = shape
    qkv_shape = (2, tokens, heads + 2 * kv_heads, head_dim)
    qkv = array(*qkv_shape, dtype=jnp.bfloat16)
    if num_parts:
        qkv = PartialSums(array(num_parts, *qkv_shape, dtype=jnp.float32), jnp.dtype(jnp.bfloat16))
    angles = array(2, tokens, head_dim // 2, dtype=jnp.float32)
    cache = array(2, slots, kv_heads, head_dim, dtype=jnp.bfloat16)

    def loop(qkv, angles, keys, values, lengths):
        def step(_, caches):
            return rotate_triton.rotate_and_write(qkv, angles, angles, *caches, lengths)[1:]

        return jax.lax.fori_loop(0, 3, step, (keys, values))

    program = cuda_program(loop, qkv, angles, cache, cache, array(2, dtype=jnp.int32))
    assert program.count(KERNEL_CALL) == 1
    assert "stablehlo.convert" not in program
    for result, argument in ((1, 3), (2, 4)):
        assert f"output_tuple_indices = [{result}], operand_index = {argument}" in program


@pytest.mark.parametrize(
    ("shape", "dtype"), [(ATTENTION_SHAPES[3], jnp.bfloat16), ((5, 8, 2, 96, 1000), jnp.float32)], ids=["bf16", "f32"]
)
def test_the_kernels_of_a_cache_of_int8_lower_and_write_in_place(shape, dtype):
    tokens, heads, kv_heads, head_dim, slots = shape
    sizes = {"capacity": slots, "num_kv_heads": kv_heads, "head_dim": head_dim, "dtype": dtype}
    cache = jax.eval_shape(lambda: Int8Cache.zeros(batch=2, **sizes))
    lengths, angles = array(2, dtype=jnp.int32), array(2, tokens, head_dim // 2, dtype=jnp.float32)
    qkv = array(2, tokens, heads + 2 * kv_heads, head_dim, dtype=dtype)
    with early_launch():
        program = cuda_program(write_int8_triton.rotate_and_write_int8, qkv, angles, angles, cache, lengths)
    assert program.count(KERNEL_CALL) == program.count(SIGNAL) == 1
    for array_of_cache in range(5):
        assert f"output_tuple_indices = [{array_of_cache + 1}], operand_index = {array_of_cache + 3}" in program
    query = array(2, tokens, heads, head_dim, dtype=dtype)
    weigh = functools.partial(int8_triton.decode_attention_int8_with_masses, block_size=16, window=500)
    with early_launch():
        program = cuda_program(weigh, query, cache, lengths)
    assert program.count(KERNEL_CALL) == 3
    assert program.count(SIGNAL) == 2  # XLA reads the masses
    attend = functools.partial(int8_triton.decode_attention_int8, window=None)
    assert cuda_program(attend, query, cache, lengths).count(KERNEL_CALL) == 2
    table, layer = array(2, 3, kv_heads, 8, dtype=jnp.int32), array(dtype=jnp.int32)
    attend = functools.partial(int8_triton.block_attention_int8, block_size=16, window=None)
    assert cuda_program(attend, query, cache, lengths, table, layer).count(KERNEL_CALL) == 2


def test_pieces_of_prompts_are_written_by_one_kernel_in_place():
    qkv, angles = array(64, 32, 48, 128, dtype=jnp.bfloat16), array(64, 32, 64, dtype=jnp.float32)
    cache, table = array(4, 1024, 8, 128, dtype=jnp.bfloat16), array(64, dtype=jnp.int32)

    def write(qkv, angles, keys, values, lengths, rows):
        return rotate_triton.rotate_and_write(qkv, angles, angles, keys, values, lengths, rows=rows)

    program = cuda_program(write, qkv, angles, cache, cache, table, table)
    assert program.count(KERNEL_CALL) == 1
    for result, argument in ((1, 4), (2, 5)):
        assert f"output_tuple_indices = [{result}], operand_index = {argument}" in program
