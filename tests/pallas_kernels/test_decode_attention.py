"""Contracts of decode_attention, for the reference and the interpreted Triton kernels alike."""

from __future__ import annotations

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import MAX_DECODE_TOKENS, decode_attention
from pallas_kernels.decode_attention import gpu_triton, reference
from tests.pallas_kernels.kernel_cases import (
    AttentionCase,
    attention_in_float64,
    newest_jax_by_feature,
    random_rows,
    relative_error,
)

IMPLEMENTATIONS = {
    "reference": jax.jit(reference.decode_attention, static_argnames="window"),
    "triton": functools.partial(gpu_triton.decode_attention, interpret=True),
}
# Groups of 1, 3 and 4 queries; one and two blocks of rows; slots that fill no tile; long chunks; windows that begin in
# a first, a later and a long chunk, and the longest ones; head dimensions that are no power of two.
CASES = [
    AttentionCase(1, 2, 2, 64, 70),
    AttentionCase(4, 3, 1, 64, 130),
    AttentionCase(5, 8, 2, 128, 136, window=70),
    AttentionCase(2, 3, 1, 96, 1700, window=600),
    AttentionCase(2, 2, 1, 16, 1350),
    AttentionCase(1, 2, 1, 16, 9300),
]
DRAFTS = AttentionCase(5, 8, 2, 64, 192, window=85)


def lengths_at_edges(case: AttentionCase) -> list[int]:
    """An empty cache, a full one, too full a one, and tokens on both sides of where a chunk begins."""
    edges = [edge - offset for edge in (64, 1024, 1280, 8192, 8704) for offset in (case.num_tokens, 1, 0)]
    full = case.slots - case.num_tokens
    return sorted({0, full, case.slots - 1, *(edge for edge in edges if edge < full)})


def int32(*lengths: int) -> jax.Array:
    return jnp.asarray(lengths, jnp.int32)


@pytest.mark.parametrize(
    ("implementation", "case"), newest_jax_by_feature(itertools.product(("triton", "reference"), CASES)), ids=str
)
def test_float32_is_the_formula(implementation, case):
    """A token past the last slot sees the slots there are."""
    lengths = lengths_at_edges(case)
    arrays = case.arrays(len(lengths), jnp.float32)
    out = IMPLEMENTATIONS[implementation](*arrays, int32(*lengths), window=case.window)
    np.testing.assert_allclose(out, attention_in_float64(*arrays, lengths, case.window), rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize(
    ("implementation", "dtype", "bound"),
    [("reference", jnp.bfloat16, 4e-3), ("triton", jnp.bfloat16, 4e-3), ("triton", jnp.float16, 5e-4)],
    ids=["reference-bf16", "triton-bf16", "triton-f16"],
)
def test_16_bits_round_weights_and_result(implementation, dtype, bound):
    arrays, lengths = DRAFTS.arrays(3, dtype), [3, 152, 61]
    out = IMPLEMENTATIONS[implementation](*arrays, int32(*lengths), window=DRAFTS.window)
    assert out.dtype == dtype
    assert relative_error(out.astype(jnp.float32), attention_in_float64(*arrays, lengths, DRAFTS.window)) < bound


def test_a_token_has_the_same_bits_alone_and_among_others():
    """Alone or in a verification, whichever sequences stand beside it, wherever it stands, however large the cache."""
    attend = functools.partial(IMPLEMENTATIONS["triton"], window=DRAFTS.window)
    (query, keys, values), lengths = DRAFTS.arrays(3, jnp.float32), int32(3, 152, 61)
    together = attend(query, keys, values, lengths)
    for token in range(DRAFTS.num_tokens):
        np.testing.assert_array_equal(attend(query[:, [token]], keys, values, lengths + token), together[:, [token]])
    order = jnp.asarray([2, 0])
    np.testing.assert_array_equal(attend(query[order], keys[order], values[order], lengths[order]), together[order])
    keys, values = (jnp.pad(array, ((0, 0), (0, 1200), (0, 0), (0, 0))) for array in (keys, values))
    np.testing.assert_array_equal(attend(query, keys, values, lengths), together)


@pytest.mark.parametrize(
    ("case", "shared"),
    [(AttentionCase(6, 8, 2, 32, 1350), (2,)), (AttentionCase(17, 3, 1, 64, 200, window=90), (2, 4))],
    ids=str,
)
def test_rows_that_share_what_a_program_loads_have_the_same_bits(case, shared):
    """24 rows, or 51: groups that fill the programs, and those that do not; and the masses of the blocks."""
    lengths = int32(0, 130, case.slots - case.num_tokens)
    arrays = case.arrays(len(lengths), jnp.bfloat16)

    def results(most_groups):
        options = {"window": case.window, "most_groups": most_groups, "interpret": True}
        attended = gpu_triton.decode_attention(*arrays, lengths, **options)
        return attended, *gpu_triton.decode_attention_with_masses(*arrays, lengths, block_size=16, **options)

    expected = results(1)
    for groups in shared:
        for one, other in zip(results(groups), expected, strict=True):
            np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("sizes", [(64, 256, 512), (128, 256, 256), (256, 256, 256)], ids=str)
def test_each_slot_is_in_the_chunk_that_is_told_of_it(monkeypatch, sizes):
    """Short, long and longest chunks, also those of an int8 cache: or what a chunk left would not be put together."""
    monkeypatch.setattr(gpu_triton.Problem, "chunk_sizes", sizes)
    problem = gpu_triton.Problem(1, 2, 1, 64, slots=40_000, window=None)
    first = np.asarray(problem.first_slot(jnp.arange(problem.num_chunks + 1)))
    assert first[0] == 0
    assert first[-2] < problem.slots <= first[-1]
    assert set(np.diff(first).tolist()) == set(sizes)
    chunks = np.arange(problem.num_chunks)
    for slots in (first[:-1], first[1:] - 1):
        np.testing.assert_array_equal(problem.chunk_of(jnp.asarray(slots)), chunks)


def test_slots_that_no_token_sees_are_not_read():
    attend = functools.partial(IMPLEMENTATIONS["triton"], window=DRAFTS.window)
    (query, keys, values), lengths = DRAFTS.arrays(3, jnp.float32), [3, 152, 61]
    out = attend(query, keys, values, int32(*lengths))
    assert np.isfinite(out).all()
    for sequence, length in enumerate(lengths):
        unseen = np.ones(DRAFTS.slots, bool)
        # Whole tiles are read, from the one in which the window begins.
        unseen[max(0, length - DRAFTS.window + 1) // 64 * 64 : length + DRAFTS.num_tokens] = False
        keys, values = (array.at[sequence, unseen].set(jnp.nan) for array in (keys, values))
    assert np.isnan(keys).any()
    np.testing.assert_array_equal(attend(query, keys, values, int32(*lengths)), out)


def test_a_mask_shows_earlier_slots_within_the_window():
    mask = reference.attention_mask(jnp.asarray([[2, 3]], jnp.int32), slots=5, window=2)
    np.testing.assert_array_equal(mask[0, 0], [[0, 1, 1, 0, 0], [0, 0, 1, 1, 0]])


def test_triton_says_what_it_does_not_serve():
    assert gpu_triton.obstacle(MAX_DECODE_TOKENS, 256) is None
    assert gpu_triton.obstacle(18, 64) == "needs at most 17 tokens per sequence; these are 18"
    assert gpu_triton.obstacle(1, 320) == "needs a head dimension of at most 256; this is 320"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"query": random_rows(2, 1, 3, 16)}, "H=3 is not a multiple of KH=2; use whole groups"),
        ({"query": random_rows(2, 1, 4, 16, dtype=jnp.bfloat16)}, "keys are float32 and values float32; use bfloat16"),
        ({"query": random_rows(2, 1, 4, 16, dtype=jnp.float8_e4m3fn)}, "query is float8_e4m3fn; use float32"),
        ({"window": 0}, "window=0; use a positive number"),
    ],
    ids=["heads", "cache_dtype", "dtype", "window"],
)
def test_arguments_that_do_not_fit_are_named(change, message):
    keys = random_rows(2, 8, 2, 16)
    arguments = {"query": random_rows(2, 1, 4, 16), "keys": keys, "values": keys, "lengths": int32(0, 3)} | change
    with pytest.raises(ValueError, match=f"decode_attention: {message}"):
        decode_attention(**arguments)
