"""decode_attention and rotate_and_write on an NVIDIA GPU at the shapes of real models."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import (
    EVERYTHING,
    PartialSums,
    block_attention,
    choose_blocks,
    decode_attention,
    decode_attention_with_masses,
    prefill_attention,
    rotate_and_write,
)
from pallas_kernels.accuracy import ATTENTION, relative_error
from pallas_kernels.block_attention import reference as block_reference
from pallas_kernels.decode_attention import gpu_triton as attention_triton
from pallas_kernels.decode_attention import reference as attention_reference
from pallas_kernels.rotate_and_write import reference as rotate_reference
from tests.pallas_kernels.kernel_cases import AttentionCase, attention_in_float64, random_rows

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs an NVIDIA GPU"),
]

MODELS = {
    "llama_3_8b": AttentionCase(8, 32, 8, 128, 2056),
    "smollm2_135m": AttentionCase(8, 9, 3, 64, 2056),
    "mistral_window": AttentionCase(8, 32, 8, 128, 2056, window=700),
    "one_head_each": AttentionCase(17, 8, 8, 96, 1100),
    "wide_heads": AttentionCase(17, 8, 1, 256, 700),
    "longest_chunks": AttentionCase(4, 9, 3, 64, 9300),
}
# The slots seen by the first token are one more; 19 sequences, on both sides of the edges of tiles and chunks.
LENGTHS = (0, 1, 15, 62, 63, 64, 65, 127, 128, 511, 512, 600, 1023, 1024, 1290, 2048, 8190, 8192, 9000)
BOUNDS = {dtype: ATTENTION[jnp.dtype(dtype).name] for dtype in (jnp.bfloat16, jnp.float16, jnp.float32)}
TOKENS = (1, 2, 4, 5, 8, 17)

models = pytest.mark.parametrize("case", MODELS.values(), ids=MODELS)
dtypes = pytest.mark.parametrize("dtype", BOUNDS, ids=["bf16", "f16", "f32"])


def fitting_lengths(case: AttentionCase) -> list[int]:
    return [min(length, case.slots - case.num_tokens) for length in LENGTHS]


def int32(lengths) -> jax.Array:
    return jnp.asarray(lengths, jnp.int32)


def triton(case: AttentionCase):
    return jax.jit(functools.partial(decode_attention, window=case.window, implementation="triton"))


@dtypes
@models
def test_attention_is_the_formula(case, dtype):
    lengths = fitting_lengths(case)
    arrays = case.arrays(len(lengths), dtype)
    out = triton(case)(*arrays, int32(lengths)).astype(jnp.float32)
    expected = attention_in_float64(*arrays, lengths, case.window)
    for sequence, length in enumerate(lengths):
        assert relative_error(out[sequence], expected[sequence]) < BOUNDS[dtype], f"length {length}"


@dtypes
@models
def test_blocks_are_weighed_beside_an_attention_that_keeps_its_bits(case, dtype):
    lengths = int32(fitting_lengths(case))
    arrays = case.arrays(len(lengths), dtype)
    weigh = functools.partial(decode_attention_with_masses, block_size=16, window=case.window)
    out, masses = jax.jit(functools.partial(weigh, implementation="triton"))(*arrays, lengths)
    np.testing.assert_array_equal(out, triton(case)(*arrays, lengths))
    with jax.default_matmul_precision("highest"):
        reference = functools.partial(attention_reference.decode_attention_with_masses, window=case.window)
        _, expected = jax.jit(functools.partial(reference, block_size=16))(*arrays, lengths)
    # Weights are rounded to the dtype, each and in their sum.
    rounding = 0 if dtype == jnp.float32 else float(jnp.finfo(dtype).eps)
    np.testing.assert_allclose(masses, expected, rtol=rounding, atol=1e-5)


@dtypes
@models
def test_rows_that_share_what_a_program_loads_have_the_same_bits(case, dtype):
    lengths = int32(fitting_lengths(case))
    arrays = case.arrays(len(lengths), dtype)

    def results(most_groups):
        options = {"window": case.window, "most_groups": most_groups}
        attend = functools.partial(attention_triton.decode_attention, **options)
        weigh = functools.partial(attention_triton.decode_attention_with_masses, block_size=16, **options)
        return jax.jit(attend)(*arrays, lengths), *jax.jit(weigh)(*arrays, lengths)

    jax.tree.map(np.testing.assert_array_equal, results(2), results(1))


@dtypes
@models
@pytest.mark.parametrize("num_blocks", [20, 32])
def test_attention_to_chosen_blocks_is_the_reference(case, dtype, num_blocks):
    """Of one token; the last sequence reads everything."""
    lengths = int32(fitting_lengths(case))
    query, keys, values = case.arrays(len(lengths), dtype)
    masses = jax.random.uniform(jax.random.key(0), (len(lengths), 3, case.num_kv_heads, -(-case.slots // 16)))
    sizes = {"num_blocks": num_blocks, "block_size": 16, "recent": 64, "ahead": 17}
    blocks = jax.jit(functools.partial(choose_blocks, **sizes, implementation="triton"))(masses, lengths)
    np.testing.assert_array_equal(blocks, block_reference.choose_blocks(masses, lengths, **sizes))
    blocks = blocks.at[-1].set(EVERYTHING)
    options = {"block_size": 16, "window": case.window}
    arrays = query[:, :1], keys, values, lengths, blocks, jnp.int32(2)
    out = jax.jit(functools.partial(block_attention, **options, implementation="triton"))(*arrays)
    arrays = [array.astype(jnp.float32) if array.dtype == dtype else array for array in arrays]
    with jax.default_matmul_precision("highest"):
        expected = jax.jit(functools.partial(block_reference.block_attention, **options))(*arrays)
    assert relative_error(out.astype(jnp.float32), expected.astype(jnp.float32)) < 2 * BOUNDS[dtype]


@dtypes
@models
def test_a_token_has_the_same_bits_whatever_is_computed_beside_it(case, dtype):
    """For every number of tokens, of sequences, and of slots, and wherever it stands among them."""
    attend, lengths = triton(case), int32(fitting_lengths(case))
    query, keys, values = case.arrays(len(lengths), dtype)
    widest = np.asarray(attend(query, keys, values, lengths))
    for num_tokens in (count for count in TOKENS if count < case.num_tokens):
        for start in range(0, case.num_tokens - num_tokens + 1, num_tokens):
            here = slice(start, start + num_tokens)
            out = attend(query[:, here], keys, values, lengths + start)
            np.testing.assert_array_equal(out, widest[:, here], err_msg=f"T={num_tokens} from {start}")
    for order in ([0], [9], [15], [3, 12], [7, 7, 1, 14, 10, 0, 2, 5], [*reversed(range(16))]):
        rows = jnp.asarray(order)
        out = attend(query[rows], keys[rows], values[rows], lengths[rows])
        np.testing.assert_array_equal(out, widest[rows], err_msg=f"sequences {order}")
    short = [row for row, length in enumerate(lengths.tolist()) if length + case.num_tokens <= 640]
    rows = jnp.asarray(short)
    for slots in (640, 648, 1088):
        out = attend(query[rows], keys[rows, :slots], values[rows, :slots], lengths[rows])
        np.testing.assert_array_equal(out, widest[rows], err_msg=f"{slots} slots")


@models
def test_what_stands_in_unseen_slots_does_not_matter(case):
    lengths = fitting_lengths(case)
    query, keys, values = case.arrays(len(lengths), jnp.bfloat16)
    out = triton(case)(query, keys, values, int32(lengths))
    assert np.isfinite(np.asarray(out, np.float32)).all()
    filled = jnp.arange(case.slots) < int32(lengths)[:, None] + case.num_tokens
    keys, values = (jnp.where(filled[..., None, None], array, jnp.nan) for array in (keys, values))
    np.testing.assert_array_equal(triton(case)(query, keys, values, int32(lengths)), out)


def rotate_operands(case: AttentionCase, dtype):
    lengths = int32([0, 5, case.slots - case.num_tokens, case.slots - 1])
    qkv = random_rows(4, case.num_tokens, case.num_heads + 2 * case.num_kv_heads, case.head_dim, dtype=dtype)
    angles = 9 * random_rows(4, case.num_tokens, case.head_dim // 2)
    _, keys, values = case.arrays(4, dtype)
    return qkv, jnp.cos(angles), jnp.sin(angles), keys, values, lengths


@dtypes
@models
def test_rotation_is_the_reference_and_slots_keep_what_they_hold(case, dtype):
    """A product may or may not be rounded before it is added: the sum moves by a step of its largest term."""
    operands = rotate_operands(case, dtype)
    query, keys, values = jax.jit(functools.partial(rotate_and_write, implementation="triton"))(*operands)
    on_cpu = [jax.device_put(array, jax.devices("cpu")[0]) for array in operands]
    expected_query, expected_keys, expected_values = rotate_reference.rotate_and_write(*on_cpu)
    step = float(jnp.finfo(dtype).eps)
    for out, expected in ((query, expected_query), (keys, expected_keys)):
        out, expected = np.asarray(out, np.float32), np.asarray(expected, np.float32)
        np.testing.assert_allclose(out, expected, rtol=step, atol=2e-6)
    np.testing.assert_array_equal(values, expected_values)
    untouched = np.asarray(expected_keys == on_cpu[3])
    np.testing.assert_array_equal(np.asarray(keys)[untouched], np.asarray(on_cpu[3])[untouched])


@models
def test_a_token_is_rotated_to_the_same_bits_alone_and_among_others(case):
    run = jax.jit(functools.partial(rotate_and_write, implementation="triton"))
    qkv, cosine, sine, keys, values, lengths = rotate_operands(case, jnp.bfloat16)
    together = run(qkv, cosine, sine, keys, values, lengths)
    queries = []
    for token in range(case.num_tokens):
        here = slice(token, token + 1)
        query, keys, values = run(qkv[:, here], cosine[:, here], sine[:, here], keys, values, lengths + token)
        queries.append(query)
    jax.tree.map(np.testing.assert_array_equal, (jnp.concatenate(queries, axis=1), keys, values), together)


@models
def test_partial_sums_are_rotated_to_the_bits_of_their_value(case):
    qkv, *others = rotate_operands(case, jnp.bfloat16)
    parts = PartialSums(random_rows(4, *qkv.shape, seed=7), jnp.dtype(jnp.bfloat16))
    run = jax.jit(functools.partial(rotate_and_write, implementation="triton"))
    results = [run(each, *others) for each in (parts, jax.jit(PartialSums.value)(parts))]
    jax.tree.map(np.testing.assert_array_equal, *results)


def test_caches_that_are_given_up_are_written_in_place():
    qkv, cosine, sine, keys, values, lengths = rotate_operands(MODELS["llama_3_8b"], jnp.bfloat16)
    before = keys.unsafe_buffer_pointer(), values.unsafe_buffer_pointer()
    write = functools.partial(rotate_and_write, implementation="triton")
    program = jax.jit(write, donate_argnums=(3, 4)).lower(qkv, cosine, sine, keys, values, lengths).compile()
    assert " copy(" not in program.as_text()
    _, keys, values = program(qkv, cosine, sine, keys, values, lengths)
    assert (keys.unsafe_buffer_pointer(), values.unsafe_buffer_pointer()) == before


@pytest.mark.parametrize(("implementation", "num_kernels"), [(None, 3), ("triton", 3), ("reference", 0)])
def test_none_takes_triton(implementation, num_kernels):
    qkv, cosine, sine, keys, values, lengths = rotate_operands(MODELS["smollm2_135m"], jnp.bfloat16)

    def both(keys, values):
        query, keys, values = rotate_and_write(qkv, cosine, sine, keys, values, lengths, implementation=implementation)
        return decode_attention(query, keys, values, lengths, implementation=implementation)

    assert jax.jit(both).lower(keys, values).as_text().count("__gpu$xla.gpu.triton") == num_kernels


@dtypes
@models
def test_pieces_attend_to_their_rows_with_bits_of_their_own(case, dtype):
    """Of several prompts, in halves, alone, and begun elsewhere; the last one is of nobody."""
    query, keys, values = dataclasses.replace(case, num_tokens=32).arrays(6, dtype)
    rows, starts = [0, 1, 3, 3, 2, -1], [0, case.slots - 40, 96, 64, 200, 7]
    attend = jax.jit(functools.partial(prefill_attention, window=case.window, implementation="triton"))
    out = attend(query, keys, values, int32(rows), int32(starts))
    held = np.asarray(rows[:5])
    expected = attention_in_float64(query[:5], keys[held], values[held], starts[:5], case.window)
    assert relative_error(out[:5].astype(jnp.float32), expected) < BOUNDS[dtype]
    assert not np.asarray(out[5]).any()
    halves = query.reshape(12, 16, *query.shape[2:])
    begins = (int32(starts)[:, None] + int32([0, 16])).reshape(-1)
    as_halves = attend(halves, keys, values, jnp.repeat(int32(rows), 2), begins)
    np.testing.assert_array_equal(as_halves.reshape(out.shape), out)
    np.testing.assert_array_equal(attend(query[:, 5:], keys, values, int32(rows), int32(starts) + 5), out[:, 5:])
    held = slice(held.max() + 1)
    chunk = dataclasses.replace(case, num_tokens=256).arrays(held.stop, dtype)[0]
    alone = attend(chunk, keys[held], values[held], None, jnp.zeros(held.stop, jnp.int32))
    in_pieces = attend(
        chunk.reshape(-1, 32, *chunk.shape[2:]),
        *(keys, values),
        jnp.repeat(jnp.arange(held.stop), 8),
        jnp.tile(jnp.arange(8) * 32, held.stop),
    )
    np.testing.assert_array_equal(in_pieces.reshape(alone.shape), alone)
    for piece in range(6):
        mine = slice(piece, piece + 1)
        np.testing.assert_array_equal(
            attend(query[mine], keys, values, int32(rows[mine]), int32(starts[mine])), out[mine]
        )
