"""The cache of int8 on an NVIDIA GPU at the shapes of real models."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import (
    EVERYTHING,
    Int8Cache,
    block_attention_int8,
    choose_blocks,
    decode_attention_int8,
    decode_attention_int8_with_masses,
    prefill_int8,
    prefill_pieces_int8,
    rotate_and_write_int8,
)
from pallas_kernels.accuracy import allowed_error, relative_error

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs an NVIDIA GPU"),
]

# Tokens, heads, key/value heads, head dimension, slots, window and dtype.
CASES = {
    "llama_3_8b": (8, 32, 8, 128, 2056, None, jnp.bfloat16),
    "smollm2_135m": (5, 9, 3, 64, 2056, None, jnp.float16),
    "mistral_window": (8, 32, 8, 128, 2056, 700, jnp.bfloat16),
    "wide_heads": (17, 8, 1, 256, 712, None, jnp.bfloat16),
    "float32": (6, 4, 2, 96, 712, None, jnp.float32),
}
# Around the ends of blocks, tiles and chunks.
LENGTHS = (0, 1, 63, 64, 120, 127, 128, 250, 255, 256, 600, 1023, 1024, 1290, 2047, 2048)
TOKENS = (1, 2, 4, 6, 8)

cases = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def arrays_of(case):
    """New tokens ``[B, T, heads, HD]``, angles, a cache that is filled up to the lengths, and these."""
    tokens, heads, kv_heads, head_dim, slots, _, dtype = case
    lengths = jnp.asarray([min(length, slots - tokens) for length in LENGTHS], jnp.int32)
    batch = len(LENGTHS)
    keys = jax.random.split(jax.random.key(tokens), 3)
    shape = heads + 2 * kv_heads, head_dim
    old = jax.random.normal(keys[0], (batch, slots, *shape), jnp.float32).astype(dtype)
    new = jax.random.normal(keys[1], (batch, tokens, *shape), jnp.float32).astype(dtype)
    sizes = {"num_kv_heads": kv_heads, "head_dim": head_dim, "dtype": dtype}
    empty = Int8Cache.zeros(batch=batch, capacity=slots, **sizes)
    ones = jnp.ones((batch, slots, head_dim // 2), jnp.float32)
    filled = jax.jit(prefill_int8)(old, ones, 0 * ones, empty, 0 * lengths, num_tokens=jnp.maximum(lengths, 1))[1]
    angles = jax.random.normal(keys[2], (batch, tokens, head_dim // 2), jnp.float32)
    return new, jnp.cos(angles), jnp.sin(angles), filled, lengths


def jitted(function, **options):
    return jax.jit(functools.partial(function, **options))


def widened(tree):
    return jax.tree.map(lambda a: a.astype(jnp.float32) if jnp.issubdtype(a.dtype, jnp.floating) else a, tree)


@cases
def test_the_kernels_are_the_reference(case):
    window, dtype = case[5:]
    *arrays, lengths = arrays_of(case)
    limits = {"num_inputs": case[3], "implementation": "triton"}
    query, cache = jitted(rotate_and_write_int8, implementation="triton")(*arrays, lengths)
    expected = jitted(rotate_and_write_int8, implementation="reference")(*arrays, lengths)
    for ours, theirs in zip(jax.tree.leaves((query, cache)), jax.tree.leaves(expected), strict=True):
        error = relative_error(ours.astype(jnp.float32), theirs.astype(jnp.float32))
        assert error <= allowed_error("rotate_and_write_int8", dtype, **limits)
    weigh = functools.partial(decode_attention_int8_with_masses, block_size=16, window=window)
    out, masses = jitted(weigh, implementation="triton")(query, cache, lengths)
    plain = jitted(decode_attention_int8, window=window, implementation="triton")(query, cache, lengths)
    np.testing.assert_array_equal(out, plain)
    with jax.default_matmul_precision("highest"):
        wide, expected_masses = jitted(weigh, implementation="reference")(widened(query), widened(cache), lengths)
    assert relative_error(out.astype(jnp.float32), wide) <= allowed_error("decode_attention_int8", dtype, **limits)
    np.testing.assert_allclose(masses, expected_masses, atol=2e-3 if dtype == jnp.bfloat16 else 2e-4)


@cases
def test_listed_blocks_are_the_reference(case):
    """The last sequence reads everything."""
    _, heads, kv_heads, head_dim, slots, window, dtype = case
    *_, cache, lengths = arrays_of(case)
    query = jax.random.normal(jax.random.key(1), (len(LENGTHS), 1, heads, head_dim), jnp.float32).astype(dtype)
    masses = jax.random.uniform(jax.random.key(0), (len(LENGTHS), 3, kv_heads, -(-slots // 16)))
    table = choose_blocks(masses, lengths, num_blocks=20, block_size=16, recent=64, ahead=17)
    table = table.at[-1].set(EVERYTHING)
    attend = functools.partial(block_attention_int8, block_size=16, window=window)
    out = jitted(attend, implementation="triton")(query, cache, lengths, table, jnp.int32(2))
    with jax.default_matmul_precision("highest"):
        arrays = widened(query), widened(cache), lengths, table, jnp.int32(2)
        expected = jitted(attend, implementation="reference")(*arrays)
    limits = {"num_inputs": head_dim, "implementation": "triton"}
    assert relative_error(out.astype(jnp.float32), expected) <= allowed_error("decode_attention_int8", dtype, **limits)


@cases
def test_a_token_has_the_same_bits_whatever_is_computed_beside_it(case):
    attend = jitted(decode_attention_int8, window=case[5], implementation="triton")
    *arrays, lengths = arrays_of(case)
    query, cache = jitted(rotate_and_write_int8, implementation="triton")(*arrays, lengths)
    widest = np.asarray(attend(query, cache, lengths))
    for count in (count for count in TOKENS if count < case[0]):
        for start in range(0, case[0] - count + 1, count):
            here = slice(start, start + count)
            np.testing.assert_array_equal(attend(query[:, here], cache, lengths + start), widest[:, here])
    rows = jnp.asarray([3, 5, 2])
    some = jax.tree.map(lambda a: a[rows], cache)
    np.testing.assert_array_equal(attend(query[rows], some, lengths[rows]), widest[rows])


@cases
def test_entries_have_the_same_bits_however_many_are_written_at_a_time(case):
    """Blocks included, which some passes finish and others begin with."""
    qkv, cosine, sine, cache, lengths = arrays_of(case)
    write = jitted(rotate_and_write_int8, implementation="triton")
    _, together = write(qkv, cosine, sine, cache, lengths)
    for token in range(case[0]):
        here = slice(token, token + 1)
        _, cache = write(qkv[:, here], cosine[:, here], sine[:, here], cache, lengths + token)
    jax.tree.map(np.testing.assert_array_equal, cache, together)


@cases
def test_pieces_of_prompts_are_the_reference_with_bits_of_their_own(case):
    """Of several prompts, one of which goes on; together, in another order, and each alone."""
    _, heads, kv_heads, head_dim, slots, window, dtype = case
    begins, lengths = {3: 0, 1: 512, 0: 0, 2: 0}, {3: 512, 1: 90, 0: 33, 2: 128}
    keys = jax.random.split(jax.random.key(0), 3)
    shape = heads + 2 * kv_heads, head_dim
    sizes = {"num_kv_heads": kv_heads, "head_dim": head_dim, "dtype": dtype}
    cache = Int8Cache.zeros(batch=4, capacity=slots, **sizes)
    old = jax.random.normal(keys[0], (4, 512, *shape), jnp.float32).astype(dtype)
    ones = jnp.ones((4, 512, head_dim // 2), jnp.float32)
    cache = jax.jit(prefill_int8)(old, ones, 0 * ones, cache, jnp.zeros(4, jnp.int32))[1]
    places = [(row, begins[row] + 32 * piece) for row, count in lengths.items() for piece in range(-(-count // 32))]
    rows, starts = (jnp.asarray(one, jnp.int32) for one in zip(*places, (-1, 0), strict=True))
    new = jax.random.normal(keys[1], (len(rows), 32, *shape), jnp.float32).astype(dtype)
    angles = jax.random.normal(keys[2], (len(rows), 32, head_dim // 2), jnp.float32)
    arrays = new, jnp.cos(angles), jnp.sin(angles)
    read = jitted(prefill_pieces_int8, window=window, implementation="triton")
    out, left = read(*arrays, cache, rows, starts)
    assert not np.asarray(out[-1]).any()
    limits = {"num_inputs": head_dim, "implementation": "triton"}
    with jax.default_matmul_precision("highest"):
        wide = jitted(prefill_pieces_int8, window=window, implementation="reference")
        expected, entries = wide(*widened(arrays), widened(cache), rows, starts)
    limit = allowed_error("prefill_attention_int8", dtype, **limits)
    assert relative_error(out[:-1].astype(jnp.float32), expected[:-1]) <= limit
    for ours, theirs in zip(jax.tree.leaves(left), jax.tree.leaves(entries), strict=True):
        assert relative_error(ours.astype(jnp.float32), theirs.astype(jnp.float32)) <= 2 * limit
    held = np.asarray(rows)
    for row in lengths:
        mine = np.flatnonzero(held == row)
        alone, its = read(*(array[mine] for array in arrays), cache, rows[mine], starts[mine])
        np.testing.assert_array_equal(alone, out[mine])
        jax.tree.map(lambda one, all_rows, row=row: np.testing.assert_array_equal(one[row], all_rows[row]), its, left)
    order = np.concatenate([np.flatnonzero(held == row) for row in (2, -1, 0, 1, 3)])
    turned, same = read(*(array[order] for array in arrays), cache, rows[order], starts[order])
    np.testing.assert_array_equal(turned, out[order])
    jax.tree.map(np.testing.assert_array_equal, same, left)
