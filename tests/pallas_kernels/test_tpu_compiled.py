"""The TPU's own compiler takes every kernel for three generations, and puts nothing around it; no TPU is needed.

Lowering accepts much that the compiler does not: element types, blocks that do not fit, layouts that it has to copy.
``QSPEC_JAX_THOROUGH=1`` compiles all shapes and numbers of rows; otherwise each generation gets some.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import (
    Int8Cache,
    QuantizedActivation,
    float_matmul,
    hadamard,
    upper_nibbles,
    w4a4_matmul,
    w4a16_matmul,
)
from pallas_kernels.block_attention import tpu as block_tpu
from pallas_kernels.decode_attention import tpu as attention_tpu
from pallas_kernels.decode_attention_int8 import tpu as int8_tpu
from pallas_kernels.rotate_and_write import tpu as rotate_tpu
from pallas_kernels.rotate_and_write_int8 import tpu as int8_writing
from tests.conftest import THOROUGH
from tests.pallas_kernels.kernel_cases import AttentionCase
from tests.pallas_kernels.test_cuda_lowering import abstract_nested_weight, abstract_weight, array

pytest.importorskip("libtpu")

from qspec_jax.bench.tpu.compiler import GENERATIONS, compile_for

pytestmark = pytest.mark.contract  # as users compile

# K, N, group size, symmetric.
SHAPES = [(4096, 6144, 128, True), (576, 960, 32, False), (14336, 4096, 14336, True), (28672, 8192, 128, True)]
ROWS = (1, 8, 64, 256)


def some(cases: list, generation: str) -> list:
    """All of them, or those of a generation: each case is compiled for one."""
    place = list(GENERATIONS).index(generation)
    return cases if THOROUGH else cases[place :: len(GENERATIONS)]


def for_each_generation(cases: list):
    pairs = [(generation, case) for generation in GENERATIONS for case in some(cases, generation)]
    return pytest.mark.parametrize(("generation", "case"), pairs, ids=str)


def compile_alone(generation, function, *args, most_bytes=0, **options) -> jax.stages.Compiled:
    """A program that is one kernel, and what never reaches the device's memory but for so many bytes."""
    program = compile_for(generation, function, *args, **options)
    assert "tpu_custom_call" in program.as_text()
    assert program.memory_analysis().temp_size_in_bytes <= most_bytes
    return program


# Tokens, heads, key/value heads, head dimension, slots, window.
ATTENTION = [
    AttentionCase(4, 32, 8, 128, 2048),
    AttentionCase(4, 9, 3, 64, 640),
    AttentionCase(1, 8, 2, 96, 1000, window=500),
    AttentionCase(17, 32, 8, 128, 8192),
    AttentionCase(1, 28, 4, 128, 4096),
    AttentionCase(2, 8, 1, 256, 64),
]


@for_each_generation([(case, dtype) for case in ATTENTION for dtype in ("bfloat16", "float32")])
def test_attention_and_writes_compile_without_a_copy_of_the_cache(generation, case):
    sizes, dtype = case
    width, dtype = sizes.num_kv_heads * sizes.head_dim, jnp.dtype(dtype)
    query = array(4, sizes.num_tokens, sizes.num_heads, sizes.head_dim, dtype=dtype)
    cache, new = array(4, sizes.slots, width, dtype=dtype), array(4, sizes.num_tokens, width, dtype=dtype)
    lengths = array(4, dtype=jnp.int32)
    attend = functools.partial(attention_tpu.attend, window=sizes.window)
    compile_alone(generation, attend, query, cache, cache, lengths)
    write = compile_alone(generation, rotate_tpu.write, cache, cache, new, new, lengths, donate_argnums=(0, 1))
    assert write.memory_analysis().alias_size_in_bytes >= 2 * 4 * sizes.slots * width * dtype.itemsize


INT8 = [(ATTENTION[0], "bfloat16"), (ATTENTION[0], "bfloat16"), (AttentionCase(4, 8, 2, 64, 300), "bfloat16")]
if THOROUGH:
    more = [*ATTENTION, AttentionCase(4, 32, 32, 128, 2048)]
    INT8 += [(case, dtype) for case in more for dtype in ("bfloat16", "float32")]


@for_each_generation(INT8)
def test_a_cache_of_int8_is_read_and_written_without_a_copy(generation, case):
    """With masses of blocks."""
    sizes, dtype = case
    heads = {"num_kv_heads": sizes.num_kv_heads, "head_dim": sizes.head_dim, "dtype": jnp.dtype(dtype)}
    cache = jax.eval_shape(lambda: Int8Cache.zeros(batch=4, capacity=sizes.slots, **heads))
    query = array(4, sizes.num_tokens, sizes.num_heads, sizes.head_dim, dtype=jnp.dtype(dtype))
    new = array(4, sizes.num_tokens, sizes.num_kv_heads, sizes.head_dim, dtype=jnp.dtype(dtype))
    lengths, options = array(4, dtype=jnp.int32), {"block_size": 16, "window": sizes.window}
    weigh = functools.partial(int8_tpu.decode_attention_int8_with_masses, **options)
    compile_alone(generation, weigh, query, cache, lengths)
    write = compile_alone(generation, int8_writing.write, cache, new, new, lengths, donate_argnums=0)
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(cache))
    assert write.memory_analysis().alias_size_in_bytes >= size


# The first of them has so many heads that 512 slots do not fit the memory of v5e.
@for_each_generation([(AttentionCase(4, 32, 32, 128, 2048), 16), (ATTENTION[1], 32), (ATTENTION[3], 64)])
def test_attention_with_masses_compiles_without_a_copy_of_the_cache(generation, case):
    sizes, block_size = case
    cache = array(4, sizes.slots, sizes.num_kv_heads * sizes.head_dim, dtype=jnp.bfloat16)
    query = array(4, sizes.num_tokens, sizes.num_heads, sizes.head_dim, dtype=jnp.bfloat16)
    weigh = functools.partial(attention_tpu.attend_and_weigh, block_size=block_size, window=sizes.window)
    compile_alone(generation, weigh, query, cache, cache, array(4, dtype=jnp.int32))


# As above, for one token: entries of a table, slots of a block.
BLOCKS = [
    (AttentionCase(1, 32, 8, 128, 8192), 32, 16, "bfloat16"),
    (AttentionCase(1, 9, 3, 64, 640, window=500), 12, 16, "float32"),
    (AttentionCase(1, 8, 2, 96, 1040), 40, 48, "bfloat16"),
    (AttentionCase(1, 8, 1, 256, 64), 5, 128, "float32"),
    (AttentionCase(1, 32, 8, 64, 4096), 16, 64, "bfloat16"),
]


@for_each_generation(BLOCKS)
def test_attention_to_blocks_compiles_without_a_copy_of_cache_or_tables(generation, case):
    sizes, entries, block_size, dtype = case
    width, dtype = sizes.num_kv_heads * sizes.head_dim, jnp.dtype(dtype)
    query, cache = array(4, 1, sizes.num_heads, sizes.head_dim, dtype=dtype), array(4, sizes.slots, width, dtype=dtype)
    tables = array(4, 32, sizes.num_kv_heads, entries, dtype=jnp.int32), array(dtype=jnp.int32)
    attend = functools.partial(block_tpu.attend, block_size=block_size, window=sizes.window)
    compile_alone(generation, attend, query, cache, cache, array(4, dtype=jnp.int32), *tables)


@for_each_generation([(k, dtype) for k in (4096, 14336, 1536) for dtype in ("bfloat16", "float32", "float16")])
def test_hadamard_compiles_without_temporaries(generation, case):
    k, dtype = case
    compile_alone(generation, hadamard, array(5, k, dtype=jnp.dtype(dtype)))


@for_each_generation([(n, k, rows) for n, k in ((128256, 4096), (152064, 8192)) for rows in (1, 64, 256)])
def test_float_matmul_compiles_without_temporaries(generation, case):
    n, k, rows = case
    x, weight = array(rows, k, dtype=jnp.bfloat16), array(n, k, dtype=jnp.bfloat16)
    compile_alone(generation, float_matmul, x, weight)


W4A16 = [(shape, rows, "bfloat16") for shape in SHAPES for rows in (ROWS if THOROUGH else (8,))]
W4A16 += [(SHAPES[0], 8, "float32"), (SHAPES[1], 8, "float16")]


@for_each_generation(W4A16)
def test_w4a16_compiles_without_temporaries(generation, case):
    shape, num_rows, dtype = case
    x = array(num_rows, shape[0], dtype=jnp.dtype(dtype))
    # 64 rows of 28672 are cut into two planes in memory on 7x, which is 3.7 MB; a weight would be 117.
    rows_alone = 1.02 * x.size * x.dtype.itemsize if (generation, *x.shape) == ("7x", 64, 28672) else 0
    compile_alone(generation, w4a16_matmul, x, abstract_weight(*shape), most_bytes=rows_alone)


# The last one is for v6e.
@for_each_generation([*((shape, rows) for shape in SHAPES for rows in (ROWS if THOROUGH else (8,))), (SHAPES[0], 8)])
def test_both_planes_of_a_nested_weight_are_read_without_temporaries(generation, case):
    shape, num_rows = case
    x = array(num_rows, shape[0], dtype=jnp.bfloat16)
    rows_alone = 1.02 * x.size * x.dtype.itemsize if (generation, *x.shape) == ("7x", 64, 28672) else 0
    compile_alone(generation, w4a16_matmul, x, abstract_nested_weight(*shape), most_bytes=rows_alone)


@for_each_generation([(SHAPES[0], True), (SHAPES[1], False), (SHAPES[1], True)])
def test_drafts_read_the_upper_plane_of_a_nested_weight_without_temporaries(generation, case):
    """With floats, and with integers, of which those of 4 bits are asymmetric."""
    shape, floats = case
    (k, _, group_size, _), weight = shape, upper_nibbles(abstract_nested_weight(*shape))
    if floats:
        compile_alone(generation, w4a16_matmul, array(8, k, dtype=jnp.bfloat16), weight)
        return
    per_group = array(8, k // group_size, dtype=jnp.float32)
    x = QuantizedActivation(array(8, k, dtype=jnp.int8), per_group, per_group, bits=4)
    compile_alone(generation, lambda x, w: w4a4_matmul(x, w, dtype=jnp.bfloat16), x, weight)


# One scale per token, or asymmetric groups.
W4A8 = [(shape, rows, grouped) for shape in SHAPES[:3] for rows in (ROWS if THOROUGH else (8,)) for grouped in (0, 1)]


@for_each_generation(W4A8)
def test_w4a8_compiles_without_temporaries(generation, case):
    shape, num_rows, grouped = case
    k, _, group_size, _ = shape
    per_group = array(num_rows, k // group_size if grouped else 1, dtype=jnp.float32)
    x = QuantizedActivation(array(num_rows, k, dtype=jnp.int8), per_group, per_group if grouped else None, bits=8)
    compile_alone(generation, lambda x, w: w4a4_matmul(x, w, dtype=jnp.bfloat16), x, abstract_weight(*shape))
