"""Every kernel for TPUs lowers to Mosaic at real model shapes; neither a TPU nor libtpu is needed."""

from __future__ import annotations

import functools
import itertools

import jax.numpy as jnp
import pytest

from pallas_kernels import (
    QuantizedActivation,
    block_attention,
    choose_blocks,
    decode_attention,
    float_matmul,
    hadamard,
    swiglu_hadamard,
    swiglu_hadamard_quantize,
    upper_nibbles,
    w4a4_matmul,
    w4a16_matmul,
)
from pallas_kernels.decode_attention import tpu as attention_tpu
from pallas_kernels.rotate_and_write import tpu as rotate_tpu
from tests.pallas_kernels.kernel_cases import newest_jax_by_feature
from tests.pallas_kernels.test_cuda_lowering import abstract_nested_weight, abstract_weight, array
from tests.pallas_kernels.tpu_cases import DEVICE_KINDS, tpu_program

KERNEL_CALL = "tpu_custom_call"
# K, N, group size, symmetric: of the demo model and of Llama-3-8B.
SHAPES = [(576, 960, 32, False), (4096, 6144, 128, True), (14336, 4096, 14336, True)]


@pytest.mark.parametrize(
    ("shape", "rows"),
    newest_jax_by_feature(itertools.product(SHAPES, [(1, "bfloat16"), (40, "float16"), (300, "float32")])),
    ids=str,
)
def test_w4a16_is_one_kernel_wherever_a_tpu_is_described(shape, rows):
    num_rows, dtype = rows
    x = array(num_rows, shape[0], dtype=jnp.dtype(dtype))
    assert tpu_program(w4a16_matmul, x, abstract_weight(*shape)).count(KERNEL_CALL) == 1


@pytest.mark.newest_jax
def test_a_nested_weight_and_its_upper_nibbles_are_one_kernel_each():
    weight, x = abstract_nested_weight(*SHAPES[0]), array(8, SHAPES[0][0], dtype=jnp.bfloat16)
    for one in (weight, upper_nibbles(weight)):
        assert tpu_program(w4a16_matmul, x, one).count(KERNEL_CALL) == 1


@pytest.mark.newest_jax
def test_xla_multiplies_a_w4a16_prefill_of_16_bits():
    program = tpu_program(w4a16_matmul, array(257, 4096, dtype=jnp.bfloat16), abstract_weight(*SHAPES[1]))
    assert KERNEL_CALL not in program


@pytest.mark.parametrize(
    ("shape", "dtype"),
    newest_jax_by_feature(
        itertools.product([(1, 32, 8, 128, 2048), (17, 9, 3, 64, 640), (4, 8, 2, 96, 1000)], ["bfloat16", "float32"])
    ),
    ids=str,
)
def test_attention_and_writes_are_one_kernel_each(shape, dtype):
    (num_tokens, heads, kv_heads, head_dim, slots), dtype = shape, jnp.dtype(dtype)
    query, cache = array(2, num_tokens, heads, head_dim, dtype=dtype), array(2, slots, kv_heads * head_dim, dtype=dtype)
    new, lengths = array(2, num_tokens, kv_heads * head_dim, dtype=dtype), array(2, dtype=jnp.int32)
    attend = functools.partial(attention_tpu.attend, window=500)
    assert tpu_program(attend, query, cache, cache, lengths).count(KERNEL_CALL) == 1
    assert tpu_program(rotate_tpu.write, cache, cache, new, new, lengths).count(KERNEL_CALL) == 1


@pytest.mark.newest_jax
@pytest.mark.parametrize(("dtype", "num_calls"), [(jnp.bfloat16, 1), (jnp.float16, 0)], ids=["bf16", "f16"])
def test_float16_is_left_to_xla(dtype, num_calls):
    query, cache = array(2, 1, 8, 64, dtype=dtype), array(2, 512, 128, dtype=dtype)
    program = tpu_program(decode_attention, query, cache, cache, array(2, dtype=jnp.int32))
    assert program.count(KERNEL_CALL) == num_calls


@pytest.mark.newest_jax
@pytest.mark.parametrize(("num_tokens", "slots", "num_calls"), [(1, 640, 1), (2, 640, 0), (1, 1000, 0)])
def test_attention_to_blocks_is_one_kernel_for_a_token_and_whole_tiles(num_tokens, slots, num_calls):
    query, cache = array(2, num_tokens, 9, 64, dtype=jnp.bfloat16), array(2, slots, 192, dtype=jnp.bfloat16)
    tables = array(2, 4, 3, 40, dtype=jnp.int32), array(dtype=jnp.int32)
    attend = functools.partial(block_attention, block_size=16, window=500)
    program = tpu_program(attend, query, cache, cache, array(2, dtype=jnp.int32), *tables)
    assert program.count(KERNEL_CALL) == num_calls


@pytest.mark.newest_jax
def test_xla_chooses_blocks():
    choose = functools.partial(choose_blocks, num_blocks=8, block_size=16, recent=20, ahead=6)
    masses, lengths = array(2, 4, 3, 40, dtype=jnp.float32), array(2, dtype=jnp.int32)
    assert KERNEL_CALL not in tpu_program(choose, masses, lengths)


@pytest.mark.newest_jax
def test_hadamard_and_float_matmul_are_one_kernel_each():
    x = array(5, 14336, dtype=jnp.bfloat16)
    assert tpu_program(hadamard, x).count(KERNEL_CALL) == 1
    for producer in (swiglu_hadamard, functools.partial(swiglu_hadamard_quantize, bits=8)):
        gate_up = array(5, 2 * 1536, dtype=jnp.bfloat16)
        assert tpu_program(functools.partial(producer, block=1536), gate_up).count(KERNEL_CALL) == 1
    assert KERNEL_CALL not in tpu_program(hadamard, array(5, 11008, dtype=jnp.bfloat16))
    assert tpu_program(float_matmul, x, array(2048, 14336, dtype=jnp.bfloat16)).count(KERNEL_CALL) == 1


@pytest.mark.parametrize(
    ("shape", "x_symmetric", "generation"),
    newest_jax_by_feature(itertools.product(SHAPES[:2], [True, False], DEVICE_KINDS)),
    ids=str,
)
def test_w4a8_multiplies_integers_where_the_unit_has_them(shape, x_symmetric, generation):
    k, _, group_size, _ = shape
    per_group = array(4, k // group_size, dtype=jnp.float32)
    x = QuantizedActivation(array(4, k, dtype=jnp.int8), per_group, None if x_symmetric else per_group, bits=8)
    program = tpu_program(
        lambda x, w: w4a4_matmul(x, w, dtype=jnp.bfloat16), x, abstract_weight(*shape), generation=generation
    )
    assert program.count(KERNEL_CALL) == 1
    assert (f"tensor<16x{k}xbf16>" in program) == (generation == "7x")
