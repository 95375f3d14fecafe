"""Contracts of prefill_attention, for the reference and the interpreted Triton kernel alike."""

from __future__ import annotations

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import prefill_attention
from pallas_kernels.prefill_attention import gpu_triton, reference
from tests.pallas_kernels.kernel_cases import (
    AttentionCase,
    attention_in_float64,
    newest_jax_by_feature,
    relative_error,
)

IMPLEMENTATIONS = {
    "reference": jax.jit(reference.prefill_attention, static_argnames="window"),
    "triton": functools.partial(gpu_triton.prefill_attention, interpret=True),
}
# Groups of 1, 3 and 4 queries, which fill less than a tile, end within one, or fill several; slots that fill no block;
# windows that begin in a first and in a later block; head dimensions that are no power of two.
CASES = [
    AttentionCase(32, 2, 2, 64, 70),
    AttentionCase(32, 3, 1, 64, 330),
    AttentionCase(32, 8, 2, 128, 200, window=70),
    AttentionCase(5, 3, 1, 96, 300, window=100),
    AttentionCase(64, 2, 2, 16, 150),
]
PIECES = AttentionCase(32, 8, 2, 64, 192, window=85)
NOBODY = -1

implementations = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)


def int32(*numbers: int) -> jax.Array:
    return jnp.asarray(numbers, jnp.int32)


def pieces_and_rows(case: AttentionCase, pieces: int, rows: int, dtype: jnp.dtype) -> tuple[jax.Array, ...]:
    """Queries of some pieces, and a cache of some rows."""
    query, keys, values = case.arrays(max(pieces, rows), dtype)
    return query[:pieces], keys[:rows], values[:rows]


def expected(arrays, rows, starts, window):
    """Of pieces that have a row."""
    query, keys, values = arrays
    held = np.asarray(rows)
    return attention_in_float64(query, keys[held], values[held], starts, window)


@pytest.mark.parametrize(
    ("implementation", "case"), newest_jax_by_feature(itertools.product(("triton", "reference"), CASES)), ids=str
)
def test_float32_is_the_formula(implementation, case):
    """Pieces of one row and of several, in any order, from its first slot on and past its last one."""
    full = case.slots - case.num_tokens
    rows, starts = [1, 0, 1, 2], [full, 0, full // 2, case.slots - 1]
    arrays = pieces_and_rows(case, 4, 3, jnp.float32)
    out = IMPLEMENTATIONS[implementation](*arrays, int32(*rows), int32(*starts), window=case.window)
    np.testing.assert_allclose(out, expected(arrays, rows, starts, case.window), rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize(
    ("implementation", "dtype", "bound"),
    [("reference", jnp.bfloat16, 4e-3), ("triton", jnp.bfloat16, 4e-3), ("triton", jnp.float16, 5e-4)],
    ids=["reference-bf16", "triton-bf16", "triton-f16"],
)
def test_16_bits_round_weights_and_result(implementation, dtype, bound):
    arrays, rows, starts = pieces_and_rows(PIECES, 3, 2, dtype), [0, 1, 1], [3, 152, 61]
    out = IMPLEMENTATIONS[implementation](*arrays, int32(*rows), int32(*starts), window=PIECES.window)
    assert out.dtype == dtype
    assert relative_error(out.astype(jnp.float32), expected(arrays, rows, starts, PIECES.window)) < bound


@implementations
def test_a_piece_of_nothing_is_zero(implementation):
    query, keys, values = pieces_and_rows(PIECES, 3, 2, jnp.float32)
    query = query.at[1].set(jnp.nan)
    out = IMPLEMENTATIONS[implementation](query, keys, values, int32(1, NOBODY, 0), int32(7, 9, 0), window=None)
    np.testing.assert_array_equal(out[1], np.zeros_like(out[1]))
    assert np.isfinite(out).all()


def test_a_token_has_the_same_bits_wherever_it_stands_and_whatever_is_beside_it():
    """In another piece, at another place of it, in another row, with other pieces or none, in a larger cache."""
    attend = functools.partial(IMPLEMENTATIONS["triton"], window=PIECES.window)
    query, keys, values = pieces_and_rows(PIECES, 3, 2, jnp.float32)
    rows, starts = int32(0, 1, 1), int32(3, 110, 78)
    together = attend(query, keys, values, rows, starts)
    for piece in range(3):
        alone = attend(query[piece : piece + 1], keys, values, *(table[piece : piece + 1] for table in (rows, starts)))
        np.testing.assert_array_equal(alone[0], together[piece])
    turned = attend(query[::-1], keys[::-1], values[::-1], 1 - rows[::-1], starts[::-1])
    np.testing.assert_array_equal(turned[::-1], together)
    halves = query.reshape(6, 16, *query.shape[2:])
    as_halves = attend(halves, keys, values, jnp.repeat(rows, 2), (starts[:, None] + int32(0, 16)).reshape(-1))
    np.testing.assert_array_equal(as_halves.reshape(query.shape), together)
    later = attend(query[:1, 5:], keys, values, rows[:1], starts[:1] + 5)
    np.testing.assert_array_equal(later[0], together[0, 5:])
    keys, values = (jnp.pad(array, ((0, 1), (0, 1200), (0, 0), (0, 0))) for array in (keys, values))
    np.testing.assert_array_equal(attend(query, keys, values, rows, starts), together)


@pytest.mark.parametrize("window", [None, 85])
@pytest.mark.parametrize("num_tokens", [18, 70])
@implementations
def test_a_chunk_of_each_row_is_one_piece_of_any_length(implementation, num_tokens, window):
    """With the bits that it has if its row is named, and that its last tokens have in a piece of their own."""
    attend = functools.partial(IMPLEMENTATIONS[implementation], window=window)
    query, keys, values = AttentionCase(num_tokens, 8, 2, 64, 192).arrays(3, jnp.float32)
    starts = [3, 110, 0]
    out = attend(query, keys, values, None, int32(*starts))
    expected = attention_in_float64(query, keys, values, starts, window)
    np.testing.assert_allclose(out, expected, rtol=2e-5, atol=2e-6)
    if implementation == "triton":
        np.testing.assert_array_equal(out, attend(query, keys, values, int32(0, 1, 2), int32(*starts)))
        last = attend(query[:, -9:], keys, values, None, int32(*starts) + (num_tokens - 9))
        np.testing.assert_array_equal(last, out[:, -9:])


def test_slots_that_no_token_sees_and_rows_of_nobody_are_not_read():
    attend = functools.partial(IMPLEMENTATIONS["triton"], window=PIECES.window)
    query, keys, values = pieces_and_rows(PIECES, 2, 3, jnp.float32)
    rows, starts = [0, 2], [3, 120]
    out = attend(query, keys, values, int32(*rows), int32(*starts))
    assert np.isfinite(out).all()
    unseen = np.ones((3, PIECES.slots), bool)
    for row, start in zip(rows, starts, strict=True):
        # Whole blocks are read, from the one in which the window begins.
        unseen[row, max(0, start - PIECES.window + 1) // 64 * 64 : start + PIECES.num_tokens] = False
    keys, values = (array.at[unseen].set(jnp.nan) for array in (keys, values))
    assert np.isnan(keys).any()
    np.testing.assert_array_equal(attend(query, keys, values, int32(*rows), int32(*starts)), out)


def test_heads_may_lie_side_by_side():
    query, keys, values = pieces_and_rows(PIECES, 3, 2, jnp.float32)
    rows, starts = int32(0, 1, 1), int32(3, 110, 78)
    flat = keys.reshape(2, PIECES.slots, -1), values.reshape(2, PIECES.slots, -1)
    np.testing.assert_array_equal(
        prefill_attention(query, *flat, rows, starts), prefill_attention(query, keys, values, rows, starts)
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"query": jnp.zeros((3, 4, 8, 64), jnp.float8_e4m3fn)}, "query is float8_e4m3fn; use float32, bfloat16 or"),
        ({"keys": jnp.zeros((2, 8, 2, 64), jnp.bfloat16)}, "keys are bfloat16 and values float32; use float32"),
        ({"keys": jnp.zeros((2, 8, 4, 32)), "values": jnp.zeros((2, 8, 4, 32))}, r"use \[2, S, KH, 64\] for both"),
        ({"keys": jnp.zeros((2, 8, 3, 64)), "values": jnp.zeros((2, 8, 3, 64))}, "H=8 is not a multiple of KH=3"),
        ({"window": 0}, "window=0; use a positive number"),
        ({"implementation": "cuda"}, "unknown implementation 'cuda'"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(change, message):
    cache = jnp.zeros((2, 8, 2, 64))
    arguments = {"query": jnp.zeros((3, 4, 8, 64)), "keys": cache, "values": cache}
    arguments |= {"rows": int32(0, 1, 1), "starts": int32(0, 0, 4)}
    with pytest.raises(ValueError, match=message):
        prefill_attention(**(arguments | change))


def test_large_heads_are_refused_by_the_kernel():
    assert gpu_triton.obstacle(256) is None
    assert gpu_triton.obstacle(257) == "needs a head dimension of at most 256; this is 257"


@pytest.mark.parametrize("window", [None, 85])
@pytest.mark.parametrize("heads", [3, 5, 7])
def test_pieces_that_follow_each_other_keep_the_bits_that_each_has_alone(heads, window):
    """They have tiles together where those of one are not full. So do not: of other rows, places, or of nobody."""
    attend = functools.partial(IMPLEMENTATIONS["triton"], window=window)
    query, keys, values = pieces_and_rows(AttentionCase(32, heads, 1, 64, 192), 8, 2, jnp.float32)
    rows, starts = int32(0, 0, 1, 0, NOBODY, 1, 1, NOBODY), int32(32, 64, 0, 32, 0, 100, 96, 128)
    together = attend(query, keys, values, rows, starts)
    for piece in range(8):
        alone = attend(query[piece : piece + 1], keys, values, *(table[piece : piece + 1] for table in (rows, starts)))
        np.testing.assert_array_equal(alone[0], together[piece])
    shifted = attend(*(query[1:7], keys, values), rows[1:7], starts[1:7])
    np.testing.assert_array_equal(shifted, together[1:7])
