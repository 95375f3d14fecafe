"""Contracts of pieces of prompts that are read together into a cache of int8: what they leave, and what they see."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import MAX_DECODE_TOKENS, Int8Cache, prefill_int8, prefill_pieces_int8
from pallas_kernels.accuracy import allowed_error, relative_error
from pallas_kernels.arrays.int8_cache import KEY_BLOCK, RING
from pallas_kernels.prefill_attention_int8 import gpu_triton as triton
from pallas_kernels.prefill_attention_int8 import reference
from tests.pallas_kernels.test_int8_cache import assert_same, unturned

PIECE, CAPACITY, BATCH, PADDING = 32, 600, 4, 99
SHAPES = [(4, 2, 16), (3, 1, 24)]  # heads, key/value heads, head dimension
# Prompts by row, of pieces that stand in any order of rows; those of a row are all there is of its prompt, or go on
# after a block that is there.
LENGTHS = {2: 300, 0: 71, 3: 128}

shapes_and_windows = pytest.mark.parametrize(("shape", "window"), [(SHAPES[0], None), (SHAPES[1], 100)], ids=str)
read_pieces = jax.jit(prefill_pieces_int8, static_argnames=("window", "implementation"))
read_alone = jax.jit(prefill_int8, static_argnames="window")


def empty(shape, batch=BATCH, dtype=jnp.float32):
    _, num_kv_heads, head_dim = shape
    return Int8Cache.zeros(batch=batch, capacity=CAPACITY, num_kv_heads=num_kv_heads, head_dim=head_dim, dtype=dtype)


def prompts(shape, lengths, dtype=jnp.float32):
    """Queries, keys and values of prompts, one after the other; a channel of keys is louder than the others."""
    heads, kv_heads, head_dim = shape
    rng, made = np.random.default_rng(0), {}
    for row, length in lengths.items():
        qkv = rng.standard_normal((length, heads + 2 * kv_heads, head_dim)).astype(np.float32)
        qkv[:, heads, 3] *= 20
        made[row] = np.asarray(jnp.asarray(qkv, dtype))
    return made


def packed(texts, starts=None, extra=1):
    """Pieces of prompts, and some of nothing behind; padding is loud."""
    tokens, rows, begins = [], [], []
    for row, text in texts.items():
        for begin in range(0, len(text), PIECE):
            some = text[begin : begin + PIECE]
            tokens.append(np.concatenate([some, np.full_like(text[:1], PADDING).repeat(PIECE - len(some), 0)]))
            rows.append(row)
            begins.append(begin + (starts or {}).get(row, 0))
    for _ in range(extra):
        tokens.append(np.full_like(tokens[0], 77))
        rows.append(-1), begins.append(0)
    return jnp.asarray(np.stack(tokens)), *(jnp.asarray(one, jnp.int32) for one in (rows, begins))


def by_rows(out, texts):
    """The results of pieces, by row, without padding."""
    found, place = {}, 0
    for row, text in texts.items():
        count = -(-len(text) // PIECE)
        found[row] = np.asarray(out[place : place + count]).reshape(-1, *out.shape[2:])[: len(text)]
        place += count
    return found


def run_pieces(texts, cache, *, starts=None, window=None, implementation="reference"):
    qkv, rows, begins = packed(texts, starts)
    turn = unturned(PIECE, len(rows), qkv.shape[-1])
    options = {"window": window, "implementation": implementation}
    out, cache = read_pieces(qkv, *turn, cache, rows, begins, **options)
    assert not np.asarray(out[-1]).any(), "a piece of nothing is zero"
    return by_rows(out, texts), cache


def run_alone(text, start, cache, *, window=None):
    """The same of one row, a chunk at a time as it would be without pieces."""
    turn = unturned(len(text), 1, text.shape[-1])
    out, cache = read_alone(jnp.asarray(text[None]), *turn, cache, jnp.asarray([start], jnp.int32), window=window)
    return np.asarray(out[0]), cache


@shapes_and_windows
def test_pieces_of_several_prompts_leave_and_see_what_each_does_alone(shape, window):
    texts, cache = prompts(shape, LENGTHS), empty(shape)
    seen, cache = run_pieces(texts, cache, window=window)
    for row, text in texts.items():
        expected, alone = run_alone(text, 0, empty(shape, 1), window=window)
        np.testing.assert_allclose(seen[row], expected, atol=1e-5)
        assert_same(jax.tree.map(lambda array, row=row: array[row : row + 1], cache), alone, len(text))
    jax.tree.map(lambda array: np.testing.assert_array_equal(array[1], 0), cache)  # a row of nobody


def test_a_prompt_goes_on_after_the_blocks_that_are_there():
    """In several passes, as chunks do, beside another prompt, and two chunks of it in one pass in any places."""
    shape = SHAPES[0]
    text, other = prompts(shape, {0: 500, 1: 90}).values()
    expected, alone = run_alone(text, 0, empty(shape, 1))
    first, cache = run_pieces({3: text[:256]}, empty(shape))
    second, cache = run_pieces({1: other, 3: text[256:]}, cache, starts={3: 256})
    np.testing.assert_allclose(np.concatenate([first[3], second[3]]), expected, atol=1e-5)
    assert_same(jax.tree.map(lambda array: array[3:], cache), alone, 500)
    qkv, rows, begins = packed({0: text[256:], 1: other, 2: text[:256]}, {0: 256}, extra=0)
    rows = jnp.where(rows == 2, 0, rows)
    out, cache = read_pieces(qkv, *unturned(PIECE, len(rows), 16), empty(shape), rows, begins)
    np.testing.assert_allclose(np.asarray(out[-8:]).reshape(256, 4, 16), expected[:256], atol=1e-5)
    np.testing.assert_allclose(np.asarray(out[:8]).reshape(256, 4, 16)[:244], expected[256:], atol=1e-5)
    assert_same(jax.tree.map(lambda array: array[:1], cache), alone, 500)


@pytest.mark.parametrize("last", [1, 32])
def test_the_ring_has_the_block_that_goes_on_whatever_padding_is_there(last):
    """Of the last block or this one, all that decoding goes on with."""
    shape = SHAPES[0]
    texts = prompts(shape, {2: 3 * KEY_BLOCK + 96 + last})
    _, cache = run_pieces(texts, empty(shape))
    end = len(texts[2])
    for position in range(end - KEY_BLOCK - MAX_DECODE_TOKENS, end):
        keys = texts[2][position, 4:6].reshape(-1)
        np.testing.assert_array_equal(cache.recent_keys[2, position % RING], keys)


@shapes_and_windows
def test_the_triton_kernel_sees_what_the_reference_does(shape, window):
    query, new_keys, cache, rows, starts = written(shape, jnp.float32)
    arrays = query, new_keys, cache, rows, starts
    expected = jax.jit(reference.prefill_attention_int8, static_argnames="window")(*arrays, window=window)
    out = triton.prefill_attention_int8(*arrays, window=window, interpret=True)
    is_text = np.asarray(query[..., 0, 0]) != PADDING
    np.testing.assert_allclose(out[is_text], expected[is_text], atol=1e-5)
    assert np.isfinite(out).all()


@functools.cache
def written(shape, dtype, size=1.0):
    """What attention reads of three prompts, and a cache with their entries, after a pass of one of them."""
    heads, kv_heads, _ = shape
    texts = prompts(shape, {**LENGTHS, 1: 500}, dtype)
    _, cache = run_pieces({1: (texts[1][:256] * size).astype(texts[1].dtype)}, empty(shape, dtype=dtype))
    texts[1] = texts[1][256:]
    texts = {row: (text * size).astype(text.dtype) for row, text in texts.items()}
    qkv, rows, begins = packed(texts, {1: 256})
    _, cache = run_pieces(texts, cache, starts={1: 256})
    query, keys, _ = jnp.split(qkv, (heads, heads + kv_heads), axis=2)
    return query, keys.reshape(*keys.shape[:2], -1), cache, rows, begins


def test_a_token_has_the_same_bits_whatever_is_read_beside_it():
    """Prompts in another order, and alone."""
    query, new_keys, cache, rows, starts = written(SHAPES[0], jnp.float32)
    attend = functools.partial(triton.prefill_attention_int8, window=None, interpret=True)
    out = attend(query, new_keys, cache, rows, starts)
    for row in (0, 1, 2, 3):
        (mine,) = np.nonzero(np.asarray(rows) == row)
        alone = attend(query[mine], new_keys[mine], cache, rows[mine], starts[mine])
        np.testing.assert_array_equal(alone, out[mine])
    order = np.concatenate([np.nonzero(np.asarray(rows) == row)[0] for row in (1, -1, 3, 0, 2)])
    turned = attend(query[order], new_keys[order], cache, rows[order], starts[order])
    np.testing.assert_array_equal(turned, out[order])


@pytest.mark.parametrize("size", [1e-3, 1.0, 30.0])
def test_float16_holds_what_the_triton_kernel_multiplies_in_16_bits(size):
    arrays = written(SHAPES[0], jnp.bfloat16, size)
    out = triton.prefill_attention_int8(*arrays, window=None, interpret=True)
    wide = jax.tree.map(lambda a: a.astype(jnp.float32) if a.dtype == jnp.bfloat16 else a, arrays)
    expected = jax.jit(reference.prefill_attention_int8, static_argnames="window")(*wide, window=None)
    limit = allowed_error("decode_attention_int8", jnp.bfloat16, num_inputs=16, implementation="triton")
    assert relative_error(out.astype(jnp.float32), expected) <= limit


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"size": 48}, "pieces have 48 tokens; use a divisor of 128"),
        ({"window": 0}, "window=0"),
        ({"dtype": jnp.bfloat16}, "recent keys are float32"),
        ({"heads": 7}, "H=3 is not a multiple of KH=2"),
    ],
    ids=str,
)
def test_arguments_that_do_not_fit_are_named(change, message):
    size, heads = change.get("size", PIECE), change.get("heads", 8)
    qkv, none = jnp.zeros((2, size, heads, 16), change.get("dtype", jnp.float32)), jnp.zeros(2, jnp.int32)
    with pytest.raises(ValueError, match=message):
        prefill_pieces_int8(qkv, *unturned(size, 2), empty(SHAPES[0]), none, none, window=change.get("window"))
