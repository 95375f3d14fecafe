"""Contracts of the kernels for TPUs, interpreted against independent formulas and the reference; races raise."""

from __future__ import annotations

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import quantize_activations as quantize
from pallas_kernels import upper_nibbles, with_group_sums
from pallas_kernels.backends.tpu import matmul, words
from pallas_kernels.block_attention import tpu as block_tpu
from pallas_kernels.block_attention.reference import EVERYTHING
from pallas_kernels.decode_attention import reference as attention_reference
from pallas_kernels.decode_attention import tpu as attention_tpu
from pallas_kernels.float_matmul import tpu as float_tpu
from pallas_kernels.hadamard import tpu as hadamard_tpu
from pallas_kernels.hadamard.matrices import hadamard_matrix
from pallas_kernels.rotate_and_write import reference as rotate_reference
from pallas_kernels.rotate_and_write import tpu as rotate_tpu
from pallas_kernels.swiglu_hadamard_quantize import reference as producer_reference
from pallas_kernels.swiglu_hadamard_quantize import tpu as producer_tpu
from pallas_kernels.w4a4_matmul import tpu as w4a4_tpu
from pallas_kernels.w4a16_matmul import tpu as w4a16_tpu
from tests.conftest import THOROUGH
from tests.pallas_kernels.kernel_cases import (
    AttentionCase,
    activation_in_float64,
    assert_nearly_the_same,
    attention_in_float64,
    in_one_program,
    newest_jax_by_feature,
    random_nested_weight,
    random_rows,
    random_weight,
    relative_error,
    weight_in_float64,
)
from tests.pallas_kernels.test_block_attention import listed_attention
from tests.pallas_kernels.tpu_cases import MODES, modes, races_raise

w4a16_matmul, w4a4_matmul = in_one_program(w4a16_tpu.w4a16_matmul), in_one_program(w4a4_tpu.w4a4_matmul)
quantize_activations = in_one_program(functools.partial(quantize, implementation="reference"))


@pytest.fixture(autouse=True)
def no_races():
    with races_raise():
        yield


def alternating(cases: list) -> list:
    """Each case in one of the modes, the first in both; ``QSPEC_JAX_THOROUGH=1`` takes all in both."""
    pairs = [pytest.param(case, mode, id=f"{case}-{name}") for case in cases for name, mode in MODES.items()]
    return pairs if THOROUGH else [pairs[0], *pairs[1::4], *pairs[2::4]]


# N, K, group size, symmetric: several runs in a chunk of lanes; planes that are no whole chunks, and a run that both of
# them share; one scale for all; a group of several chunks, and outputs that fill no block.
@pytest.mark.parametrize(
    ("shape", "interpret"),
    alternating([(48, 256, 32, True), (32, 576, 64, False), (16, 576, 576, False), (520, 512, 256, True)]),
)
def test_w4a16_equals_the_definition_in_float64(shape, interpret):
    *sizes, symmetric = shape
    weight, x = random_weight(*sizes, symmetric=symmetric), random_rows(5, shape[1])
    expected = np.asarray(x, np.float64) @ weight_in_float64(weight).T
    assert relative_error(w4a16_matmul(x, weight, interpret=interpret), expected) < 3e-7


@pytest.mark.parametrize(
    ("shape", "mode"),
    [
        ((48, 256, 32, True), "simulated"),
        ((32, 576, 64, False), "quick"),
        ((16, 576, 576, True), "quick"),
    ],
    ids=str,
)
def test_nested_weights_and_their_upper_nibbles_equal_the_definition_in_float64(shape, mode):
    """Verification reads both planes, drafts the upper one, with floats or integers."""
    *sizes, symmetric = shape
    weight, x = random_nested_weight(*sizes, symmetric=symmetric, scale_dtype=jnp.float32), random_rows(5, shape[1])
    codes = quantize_activations(x, bits=8, group_size=shape[2], symmetric=symmetric)
    for one in (weight, upper_nibbles(weight)):
        expected = np.asarray(x, np.float64) @ weight_in_float64(one).T
        out = w4a16_matmul(x, one, interpret=MODES[mode])
        assert relative_error(out, expected) < 3e-7
    out = w4a4_matmul(codes, one, dtype=jnp.float32, integers=True, interpret=MODES[mode])
    assert relative_error(out, activation_in_float64(codes) @ weight_in_float64(one).T) < 2e-6


@pytest.mark.parametrize(("num_rows", "dtype"), [(33, jnp.float16), (33, jnp.bfloat16), (257, jnp.bfloat16)])
def test_w4a16_rounds_once_to_the_dtype_of_x(num_rows, dtype):
    """Also a prefill, for which the weight itself is rounded."""
    weight, x = random_weight(32, 256, 64, symmetric=False), random_rows(num_rows, 256, dtype=dtype)
    out = w4a16_matmul(x, weight, interpret=True)
    wide = weight_in_float64(weight)
    expected = np.asarray(x, np.float64) @ np.asarray(wide if num_rows < 257 else jnp.asarray(wide, dtype)).T
    assert out.dtype == dtype
    assert relative_error(out, expected) < 0.4 * float(jnp.finfo(dtype).eps)


# N, K, group size, symmetric; group size of the activations, symmetric, and whether the unit has integers.
@pytest.mark.parametrize(
    ("case", "interpret"),
    alternating(
        [
            (48, 256, 64, True, 256, True, True),
            (32, 256, 64, False, 32, False, True),
            (32, 576, 64, False, 576, False, True),
            (16, 576, 576, False, 576, True, True),
            (32, 256, 64, False, 128, True, False),
        ]
    ),
)
def test_w4a8_equals_the_definition_in_float64(case, interpret):
    n, k, group_size, symmetric, x_group, x_symmetric, integers = case
    weight = random_weight(n, k, group_size, symmetric=symmetric, scale_dtype=jnp.float32)
    weight = jax.jit(with_group_sums, static_argnums=1)(weight, min(group_size, x_group))
    x = quantize_activations(random_rows(5, k), bits=8, group_size=x_group, symmetric=x_symmetric)
    out = w4a4_matmul(x, weight, dtype=jnp.float32, integers=integers, interpret=interpret)
    assert relative_error(out, activation_in_float64(x) @ weight_in_float64(weight).T) < 2e-6


@pytest.mark.newest_jax
def test_w4a4_takes_codes_of_four_bits_and_leading_axes():
    weight = random_weight(16, 256, 64, symmetric=True, scale_dtype=jnp.float32)
    x = quantize_activations(random_rows(2, 3, 256), bits=4)
    out = w4a4_matmul(x, weight, dtype=jnp.float32, integers=True, interpret=True)
    exact = activation_in_float64(jax.tree.map(lambda array: np.reshape(array, (6, -1)), x))
    assert relative_error(np.reshape(out, (6, 16)), exact @ weight_in_float64(weight).T) < 2e-6


# Tokens, heads, key/value heads, head dimension, slots, window: groups of 1, 3 and 4 queries; heads that share lanes,
# all of them or some; two blocks of slots; a window that begins in the second; a head of more than 128 lanes.
ATTENTION = [
    AttentionCase(4, 6, 2, 64, 130),
    AttentionCase(2, 9, 3, 32, 600),
    AttentionCase(3, 4, 2, 128, 1500, window=600),
    AttentionCase(1, 2, 2, 192, 64),
]


@pytest.mark.parametrize(("case", "mode"), newest_jax_by_feature(itertools.product(ATTENTION, MODES)), ids=str)
def test_attention_is_the_formula(case, mode):
    """An empty cache, a full one, and a token past the last slot, which sees the slots there are."""
    lengths = [0, case.slots // 2, case.slots - 1]
    arrays = case.arrays(3, jnp.float32)
    given = jnp.asarray(lengths, jnp.int32)
    out = attention_tpu.decode_attention(*arrays, given, window=case.window, interpret=MODES[mode])
    np.testing.assert_allclose(out, attention_in_float64(*arrays, lengths, case.window), rtol=2e-5, atol=2e-6)


def poisoned(array: jax.Array, places: np.ndarray) -> jax.Array:
    """The array with NaN where nothing may be read."""
    return jnp.asarray(np.where(places, array.dtype.type(np.nan), array))


def test_attention_in_bfloat16_reads_no_block_that_nobody_sees():
    case, lengths = AttentionCase(2, 4, 2, 64, 1600, window=85), [700]
    query, keys, values = case.arrays(1, jnp.bfloat16)
    seen = np.zeros(case.slots, bool)
    seen[512:1024] = True
    keys, values = (poisoned(array, ~seen[:, None, None]) for array in (keys, values))
    out = attention_tpu.decode_attention(
        query, keys, values, jnp.asarray(lengths, jnp.int32), window=case.window, interpret=True
    )
    expected = attention_in_float64(*case.arrays(1, jnp.bfloat16), lengths, case.window)
    assert relative_error(np.asarray(out, np.float32), expected) < 4e-3


@pytest.mark.parametrize(
    ("case", "lengths", "mode"),
    [
        (AttentionCase(2, 4, 2, 64, 96), [40, 95], "simulated"),
        # A token that does not weigh, two steps and groups of 128 blocks, and a window that begins in the first.
        (AttentionCase(5, 8, 2, 32, 2090, window=1800), [1900, 2085], "quick"),
    ],
    ids=str,
)
def test_attention_with_masses_is_attention_and_the_masses_of_the_reference(case, lengths, mode):
    arrays, lengths = case.arrays(2, jnp.float32), jnp.asarray(lengths, jnp.int32)
    options = {"window": case.window, "interpret": MODES[mode]}
    out, masses = attention_tpu.decode_attention_with_masses(*arrays, lengths, block_size=16, **options)
    np.testing.assert_array_equal(out, attention_tpu.decode_attention(*arrays, lengths, **options))
    weigh = in_one_program(attention_reference.decode_attention_with_masses)
    _, expected = weigh(*arrays, lengths, block_size=16, window=case.window)
    np.testing.assert_allclose(masses, expected, atol=2e-6)


@pytest.mark.parametrize(
    ("slots", "block_size", "is_served"), [(2048, 16, True), (2048, 48, False), (400, 48, True), (2**20, 16, False)]
)
def test_blocks_are_weighed_where_they_fit_a_step_and_the_memory(slots, block_size, is_served):
    assert attention_tpu.Sizes(4, 4, 128, 8, slots, None).weighing(block_size).is_served == is_served


# Slots of a block: heads that fill no tile of lanes, so that all of them are copied; heads that share one, and a last
# block that is shorter; two chunks of a table, and a window that begins within a block.
@pytest.mark.parametrize(
    ("case", "block_size", "dtype", "mode"),
    [
        (AttentionCase(1, 3, 3, 64, 160), 16, "float32", "simulated"),
        (AttentionCase(1, 8, 4, 64, 160), 48, "bfloat16", "quick"),
        (AttentionCase(1, 4, 2, 128, 1040, window=700), 128, "float32", "simulated"),
    ],
    ids=str,
)
def test_attention_to_blocks_is_the_formula_whatever_else_there_is(case, block_size, dtype, mode):
    """Rows: an empty cache, a stale table in no order, everything, past the last slot, and a token that sees nothing.

    What no head lists is NaN.
    """
    lengths, count = [0, case.slots // 2, case.slots - 1, case.slots + 5, 20], -(-case.slots // block_size)
    tables = np.full((5, 2, case.num_kv_heads, 6), count + 3, np.int32)
    tables[:, 0] = 0  # of another layer
    tables[0, 1, :, :2] = [count - 1, 0]
    tables[1, 1] = [lengths[1] // block_size, 2**30, count - 1, 0, -7, count]
    tables[1, 1, 0, 5] = 2
    tables[2, 1] = EVERYTHING
    tables[3, 1, :, 2:] = [0, count - 1, 1, count - 2]
    block_of_slot = np.arange(case.slots) // block_size
    listed = (tables[:, 1, :, :, None] == block_of_slot).any(2) | (tables[:, 1, :, :1] == EVERYTHING)  # [B, KH, S]
    query, *cache = case.arrays(5, jnp.dtype(dtype))
    unlisted = ~listed.any(1)[..., None, None]
    out = block_tpu.block_attention(
        *(query, *(poisoned(array, unlisted) for array in cache)),
        *(jnp.asarray(lengths, jnp.int32), jnp.asarray(tables), jnp.int32(1)),
        block_size=block_size,
        window=case.window,
        interpret=MODES[mode],
    )
    query, out, *cache = (np.asarray(array, np.float32) for array in (query, out, *cache))
    assert not out[4].any()
    group = case.num_heads // case.num_kv_heads
    for row, head in np.ndindex(4, case.num_kv_heads):
        own = slice(head * group, (head + 1) * group)
        one = query[row, :, own], *(array[row, :, head : head + 1] for array in cache)
        expected = listed_attention(*one, listed[row, head], lengths[row], case)
        assert relative_error(out[row, :, own], expected) < (1e-5 if dtype == "float32" else 6e-3)


# Slots of tiles that both modes take: the simulation refuses an aliased array that is no whole number of blocks.
@modes
@pytest.mark.parametrize(("num_tokens", "dtype"), [(1, jnp.float32), (4, jnp.bfloat16), (17, jnp.bfloat16)])
def test_new_slots_are_written_where_they_belong_and_nothing_else_is(num_tokens, dtype, interpret):
    """Within a tile, across two or three of them, and past the last slot, where they are dropped."""
    lengths = jnp.asarray([0, 14, 33, 46], jnp.int32)
    angles = 9 * np.asarray(random_rows(4, num_tokens, 32))
    qkv = random_rows(4, num_tokens, 8, 64, dtype=dtype)
    keys, values = (random_rows(4, 48, 2, 64, dtype=dtype, seed=seed) for seed in (2, 3))
    arguments = (qkv, jnp.asarray(np.cos(angles)), jnp.asarray(np.sin(angles)), keys, values, lengths)
    out = rotate_tpu.rotate_and_write(*arguments, interpret=interpret)
    expected = jax.jit(rotate_reference.rotate_and_write)(*arguments)
    jax.tree.map(np.testing.assert_array_equal, out, expected)


# A power of two alone; cores of 12 and 28 rows, of which a part may be in the tiles of lanes.
@pytest.mark.parametrize(
    ("num_inputs", "dtype", "interpret"),
    [
        (128, "float32", MODES["quick"]),
        (1024, "bfloat16", MODES["simulated"]),
        (1536, "float32", MODES["simulated"]),
        (3584, "float16", MODES["quick"]),
    ],
    ids=str,
)
def test_hadamard_equals_the_dense_product_in_float64(num_inputs, dtype, interpret):
    x = random_rows(2, 3, num_inputs, dtype=jnp.dtype(dtype))
    out = hadamard_tpu.hadamard(x, interpret=interpret)
    exact = np.asarray(x, np.float64) @ hadamard_matrix(num_inputs).T.astype(np.float64) / np.sqrt(num_inputs)
    assert out.dtype == x.dtype
    assert relative_error(out, exact) < (3e-7 if dtype == "float32" else 0.6 * float(jnp.finfo(out.dtype).eps))


def test_what_is_gated_transformed_and_quantised_is_nearly_that_of_the_reference():
    gate_up, settings = random_rows(3, 512), {"bits": 8, "group_size": 64, "symmetric": True, "clip_ratio": 0.9}
    ours, reference = (in_one_program(module.swiglu_hadamard_quantize) for module in (producer_tpu, producer_reference))
    out = ours(gate_up, block=128, outlier_groups=0, interpret=True, **settings)
    expected = reference(gate_up, block=128, outlier_groups=0, **settings)
    assert_nearly_the_same(out, expected, jnp.dtype("float32"), equal_codes=0.99)


@modes
@pytest.mark.parametrize("shape", [(200, 128, 5), (520, 256, 17)], ids=str)
def test_float_matmul_equals_the_definition_in_float64(shape, interpret):
    n, k, num_rows = shape
    x, weight = (random_rows(rows, k, dtype=jnp.bfloat16, seed=rows) for rows in (num_rows, n))
    out = float_tpu.float_matmul(x, weight, interpret=interpret)
    assert (out.dtype, out.shape) == (jnp.float32, (num_rows, n))
    assert relative_error(out, np.asarray(x, np.float64) @ np.asarray(weight, np.float64).T) < 1e-6


@pytest.mark.parametrize(
    ("told", "end"),
    [
        (hadamard_tpu.obstacle(11008), "needs a core of at most 64 rows; that of K=11008 has 172"),
        (hadamard_tpu.obstacle(576), "needs 128 values for each row of the core; K=576 has 16"),
        (hadamard_tpu.obstacle(14336), None),
        (float_tpu.obstacle(1, jnp.dtype("float32")), "needs bfloat16; x is float32"),
        (float_tpu.obstacle(257, jnp.dtype("bfloat16")), "needs 1 to 256 rows; x has 257"),
        (attention_tpu.obstacle(18, 64), "needs at most 17 tokens per sequence; these are 18"),
        (attention_tpu.obstacle(1, 320), "needs a head dimension of at most 256; this is 320"),
        (
            attention_tpu.obstacle(1, 64, jnp.dtype("float16")),
            "needs float32 or bfloat16: a TPU does not load float16",
        ),
        (block_tpu.obstacle(2, 64), "needs one token per sequence, as drafts have; these are 2"),
        (block_tpu.obstacle(1, 64, slots=200), "needs whole tiles of 16 slots; these are 200"),
        (block_tpu.obstacle(1, 320, slots=64), "needs a head dimension of at most 256; this is 320"),
        (
            rotate_tpu.obstacle(jnp.dtype("float16")),
            "needs float32 or bfloat16: a TPU does not load float16",
        ),
        (rotate_tpu.obstacle(jnp.dtype("bfloat16")), None),
    ],
)
def test_what_a_kernel_does_not_serve_is_said(told, end):
    assert told == end


def test_every_float16_scale_is_decoded_exactly():
    bits = np.arange(2**16, dtype=np.uint16)
    values = jnp.asarray(bits.view(np.float16))
    decoded = np.asarray(words.as_float32(words.half_bits(values)))
    finite = np.isfinite(np.asarray(values, np.float32))
    np.testing.assert_array_equal(decoded[finite], np.asarray(values, np.float32)[finite])


def test_what_the_matmuls_do_not_serve_is_said():
    assert matmul.obstacle(576, 64) is matmul.obstacle(14336, 128) is matmul.obstacle(1152, 1152) is None
    assert matmul.obstacle(1152, 96) == (
        "needs groups that are whole rows, or runs of 2^n or 128 n inputs; K=1152 gives runs of 96"
    )


def test_all_numbers_of_rows_add_in_one_order():
    """The chunks, and how many are unrolled, depend on the weight alone; a block of outputs is a multiple of tiles."""
    assert {name: type(mode).__name__ for name, mode in MODES.items()}["simulated"] == "InterpretParams"
    for k in (576, 4096, 14336, 28672):
        for row_bytes, most in ((k // 2, 8), (k, 15)):  # of a nested weight twice as many; long rows ask for more
            width = matmul.block_n(row_bytes)
            assert width % 256 == 0
            assert 2 * width * row_bytes <= most * 2**20


@pytest.mark.newest_jax
@pytest.mark.parametrize("waits", [True, False])
def test_a_copy_that_nobody_waits_for_is_noticed(waits):
    """Of the simulation itself: the kernels above leave their copies to Pallas, which waits."""

    def kernel(x_ref, out_ref, block_ref, arrived):
        copy = pltpu.make_async_copy(x_ref, block_ref, arrived)
        copy.start()
        if waits:
            copy.wait()
        out_ref[...] = block_ref[...] + 1

    x = random_rows(8, 128)
    call = pl.pallas_call(
        kernel,
        in_specs=[pl.BlockSpec(memory_space=pl.ANY)],
        out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype),
        scratch_shapes=[pltpu.VMEM(x.shape, x.dtype), pltpu.SemaphoreType.DMA],
        interpret=MODES["simulated"],
    )
    if waits:
        np.testing.assert_array_equal(call(x), x + 1)
        return
    with pytest.raises(Exception, match=r"(?i)race|assert|nan|semaphore") as failure, races_raise():
        assert np.isfinite(call(x)).all()
    assert failure.type is not TypeError
