"""Contracts of attention to blocks of the cache: what they weigh, which are chosen, and that no others are read."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import EVERYTHING, block_attention, choose_blocks, decode_attention_with_masses, least_blocks
from pallas_kernels.block_attention import gpu_triton as block_triton
from pallas_kernels.block_attention import reference as block_reference
from pallas_kernels.decode_attention import gpu_triton, reference
from tests.pallas_kernels.kernel_cases import AttentionCase, attention_in_float64, random_rows

SIZES = ("block_size", "window")
WEIGH = {
    "reference": jax.jit(reference.decode_attention_with_masses, static_argnames=SIZES),
    "triton": functools.partial(gpu_triton.decode_attention_with_masses, interpret=True),
}
ATTEND = {
    "reference": jax.jit(block_reference.block_attention, static_argnames=SIZES),
    "triton": functools.partial(block_triton.block_attention, interpret=True),
}
CHOOSE = {
    "reference": block_reference.choose_blocks,
    "triton": functools.partial(block_triton.choose_blocks, interpret=True),
}
# Two tiles of rows, of which one weighs; a group of 3 in one tile; long chunks; a last block that is shorter.
CASES = [
    AttentionCase(5, 8, 2, 64, 200),
    AttentionCase(2, 3, 1, 96, 1060, window=300),
    AttentionCase(1, 2, 2, 16, 70),
]
cases = pytest.mark.parametrize("case", CASES, ids=str)
implementations = pytest.mark.parametrize("implementation", WEIGH)


def lengths_of(case: AttentionCase) -> list[int]:
    return [0, case.slots - case.num_tokens, case.slots - 1]


def masses_in_float64(query, keys, lengths, *, window, block_size) -> np.ndarray:
    """``[B, KH, NB]`` from the definition, one token and head at a time."""
    q, k = (np.asarray(array, np.float64) for array in (query, keys))
    (batch, num_tokens, num_heads, head_dim), (_, slots, num_kv_heads, _) = q.shape, k.shape
    group = num_heads // num_kv_heads
    weighing = min(num_tokens, max(1, 16 // group))
    masses = np.zeros((batch, num_kv_heads, -(-slots // block_size)))
    for b, t, h in np.ndindex(batch, weighing, num_heads):
        last = min(lengths[b] + t, slots - 1)
        seen = np.arange(0 if window is None else max(0, lengths[b] + t - window + 1), last + 1)
        logits = k[b, seen, h // group] @ q[b, t, h] / np.sqrt(head_dim)
        weights = np.exp(logits - logits.max())
        np.add.at(masses[b, h // group], seen // block_size, weights / weights.sum() / weighing / group)
    return masses


def test_masses_of_16_bits_are_rounded_as_their_weights_are():
    """Each weight, and their sum: so they are as near as two roundings allow, also where they are small."""
    case = CASES[0]
    query, keys, values = case.arrays(len(lengths_of(case)), jnp.bfloat16)
    sizes = {"block_size": 16, "window": case.window}
    _, masses = WEIGH["triton"](query, keys, values, jnp.asarray(lengths_of(case), jnp.int32), **sizes)
    expected = masses_in_float64(query, keys, lengths_of(case), **sizes)
    np.testing.assert_allclose(masses, expected, rtol=float(jnp.finfo(jnp.bfloat16).eps), atol=1e-5)


@cases
@implementations
def test_masses_are_the_formula_and_the_attention_keeps_its_bits(implementation, case):
    lengths, block_size = lengths_of(case), 48 if case.window else 16
    query, keys, values = case.arrays(len(lengths), jnp.float32)
    out, masses = WEIGH[implementation](
        query, keys, values, jnp.asarray(lengths, jnp.int32), block_size=block_size, window=case.window
    )
    expected = masses_in_float64(query, keys, lengths, window=case.window, block_size=block_size)
    np.testing.assert_allclose(masses, expected, atol=2e-6)
    np.testing.assert_allclose(masses.sum(-1), 1, atol=1e-5)
    plain = {"reference": jax.jit(reference.decode_attention, static_argnames="window"), "triton": None}[implementation]
    plain = plain or functools.partial(gpu_triton.decode_attention, interpret=True)
    np.testing.assert_array_equal(out, plain(query, keys, values, jnp.asarray(lengths, jnp.int32), window=case.window))


@pytest.mark.parametrize("implementation", CHOOSE)
@pytest.mark.parametrize(("there", "num_blocks"), [(22, 8), (64, 9), (64, 63), (22, 30)])
def test_chosen_are_the_first_the_newest_and_the_heaviest_blocks(implementation, there, num_blocks):
    rng = np.random.default_rng(there)
    masses = rng.integers(0, 5, (2, 3, 2, there)).astype(np.float32) / 8  # many are alike, and some are 0
    lengths, sizes = [there * 16 - 40, 90], {"block_size": 16, "recent": 20, "ahead": 6}
    found = np.asarray(
        CHOOSE[implementation](jnp.asarray(masses), jnp.asarray(lengths, jnp.int32), num_blocks=num_blocks, **sizes)
    )
    assert found.shape == (2, 3, 2, num_blocks)
    for row, layer, head in np.ndindex(2, 3, 2):
        weights, length = masses[row, layer, head].copy(), lengths[row]
        weights[[0, *range((length - 20) // 16, min(there - 1, (length + 5) // 16) + 1)]] = np.inf
        heaviest = np.argsort(-weights, kind="stable")[:num_blocks]  # the lower number of equal ones
        expected = [*sorted(heaviest), *[there] * (num_blocks - len(heaviest))]
        assert found[row, layer, head].tolist() == expected


@cases
@pytest.mark.parametrize("implementation", ATTEND)
@pytest.mark.parametrize("block_size", [16, 80])
def test_attention_to_blocks_is_the_formula_over_their_slots(implementation, case, block_size):
    """The last sequence lists everything; blocks past the end, and an order of no kind, make no difference."""
    lengths = lengths_of(case)
    query, keys, values = case.arrays(len(lengths), jnp.float32)
    count, kv_heads = -(-case.slots // block_size), case.num_kv_heads
    rng, layer, tables = np.random.default_rng(1), 1, np.full((len(lengths), 2, kv_heads, 9), count + 3)
    for row, head in np.ndindex(len(lengths), kv_heads):
        newest = (lengths[row] + case.num_tokens - 1) // block_size
        others = rng.permutation(np.arange(1, max(1, newest)))[:5]
        listed = dict.fromkeys([*others, 0, min(newest, count - 1), max(0, newest - 1)])
        tables[row, layer, head, : len(listed)] = list(listed)
    tables[-1] = EVERYTHING
    out = ATTEND[implementation](
        *(query, keys, values, jnp.asarray(lengths, jnp.int32), jnp.asarray(tables, jnp.int32), jnp.int32(layer)),
        block_size=block_size,
        window=case.window,
    )
    # Keys that are not listed are so far away that their weights vanish.
    for head in range(kv_heads):
        group = slice(head * case.num_heads // kv_heads, (head + 1) * case.num_heads // kv_heads)
        one_head = [array[:, :, head : head + 1] for array in (keys, values)]
        for row in range(len(lengths)):
            listed = np.isin(np.arange(case.slots) // block_size, tables[row, layer, head]) | (tables[row, 0, 0, 0] < 0)
            expected = listed_attention(query[row, :, group], *(a[row] for a in one_head), listed, lengths[row], case)
            np.testing.assert_allclose(out[row, :, group], expected, rtol=2e-5, atol=3e-6)


def listed_attention(query, keys, values, listed, length, case) -> np.ndarray:
    """``[T, group, HD]`` of one sequence and key/value head, over the slots that are listed and seen."""
    q, k, v = (np.asarray(array, np.float64) for array in (query, keys[:, 0], values[:, 0]))
    out = np.zeros(q.shape)
    for t, h in np.ndindex(q.shape[:2]):
        slots = np.arange(case.slots)
        seen = listed & (slots <= length + t) & ((case.window is None) | (slots > length + t - (case.window or 0)))
        logits = k[seen] @ q[t, h] / np.sqrt(q.shape[2])
        weights = np.exp(logits - logits.max())
        out[t, h] = weights @ v[seen] / weights.sum()
    return out


def test_slots_of_other_blocks_are_not_read():
    case = AttentionCase(1, 4, 2, 64, 320)
    (query, keys, values), lengths = case.arrays(1, jnp.float32), jnp.asarray([300], jnp.int32)
    tables = np.asarray([[[[0, 3, 9, 17, 18]], [[0, 5, 6, 17, 18]]]]).transpose(0, 2, 1, 3)  # of a layer and two heads
    attend = functools.partial(ATTEND["triton"], block_size=16, window=None)
    rest = (jnp.asarray(tables, jnp.int32), jnp.int32(0))
    out = attend(query, keys, values, lengths, *rest)
    for head in range(2):
        unseen = ~np.isin(np.arange(320) // 16, tables[0, 0, head])
        keys, values = (array.at[0, unseen, head].set(jnp.nan) for array in (keys, values))
    assert np.isnan(keys).any()
    np.testing.assert_array_equal(attend(query, keys, values, lengths, *rest), out)


def test_everything_is_what_plain_attention_sees():
    case = AttentionCase(1, 8, 2, 64, 700)
    arrays, lengths = case.arrays(3, jnp.float32), [0, 64, 650]
    tables = jnp.full((3, 1, 2, 8), EVERYTHING, jnp.int32)
    for attend in ATTEND.values():
        out = attend(*arrays, jnp.asarray(lengths, jnp.int32), tables, jnp.int32(0), block_size=16, window=None)
        np.testing.assert_allclose(out, attention_in_float64(*arrays, lengths, None), rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda *a: decode_attention_with_masses(*a, block_size=24), "block_size=24; use a multiple of 16"),
        (
            lambda *a: block_attention(*a, jnp.zeros((2, 1, 2, 8), jnp.int32), jnp.int32(0), block_size=8),
            "block_size=8; use a multiple of 16",
        ),
        (
            lambda *a: choose_blocks(jnp.zeros((2, 1, 2, 9)), a[3], num_blocks=4, block_size=16, recent=64, ahead=5),
            "num_blocks=4 cannot hold the first block, the 64 newest tokens and 5 more; use at least 7",
        ),
    ],
    ids=["masses", "blocks", "num_blocks"],
)
def test_arguments_that_do_not_fit_are_named(call, message):
    keys = random_rows(2, 32, 2, 16)
    with pytest.raises(ValueError, match=message):
        call(random_rows(2, 1, 4, 16), keys, keys, jnp.asarray([0, 3], jnp.int32))


@pytest.mark.parametrize(("recent", "ahead"), [(64, 5), (64, 17), (1, 1), (33, 16)])
def test_what_is_chosen_in_any_case_fits_the_least_number(recent, ahead):
    least = least_blocks(block_size=16, recent=recent, ahead=ahead)
    index = jnp.arange(200, dtype=jnp.int32)
    forced = [
        block_reference.forced_blocks(index, jnp.int32(n), block_size=16, recent=recent, ahead=ahead).sum()
        for n in range(500, 540)
    ]
    assert max(map(int, forced)) == least
