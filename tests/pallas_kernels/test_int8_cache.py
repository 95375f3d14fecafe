"""Contracts of a key/value cache of int8: what a query sees, that it depends on its position alone, and its memory."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import Int8Cache, PartialSums, prefill_int8, rotate_and_write_int8
from pallas_kernels.accuracy import allowed_error, relative_error
from pallas_kernels.arrays.int8_cache import KEY_BLOCK, RING, quantize
from pallas_kernels.decode_attention_int8 import gpu_triton as triton
from pallas_kernels.decode_attention_int8 import reference
from pallas_kernels.rotate_and_write_int8 import gpu_triton as write_triton
from pallas_kernels.rotate_and_write_int8 import reference as writing

HEADS, KV_HEADS, HEAD_DIM, TOKENS, CAPACITY = 4, 2, 16, 300, 320
# (tokens before, new ones, how many of them stay) of each pass.
ONE_BY_ONE = [(n, 1, 1) for n in range(TOKENS)]
SEVERAL = [(n, 6, 3) for n in range(0, TOKENS - 6, 3)]
_KEPT = [1 + index * 7 % 17 for index in range(33)]
WIDEST = [(sum(_KEPT[:index]), 17, kept) for index, kept in enumerate(_KEPT)]


@functools.cache
def arrays():
    """Queries, keys and values of all tokens; a channel of keys is louder than the others."""
    rng = np.random.default_rng(0)
    qkv = rng.standard_normal((1, TOKENS + 512, HEADS + 2 * KV_HEADS, HEAD_DIM), np.float32)
    qkv[:, :, HEADS, 3] *= 20
    return qkv


def empty():
    sizes = {"num_kv_heads": KV_HEADS, "head_dim": HEAD_DIM}
    return Int8Cache.zeros(batch=1, capacity=CAPACITY, **sizes, dtype=jnp.float32)


def unturned(num_tokens, batch=1, head_dim=HEAD_DIM):
    ones = np.ones((batch, num_tokens, head_dim // 2), np.float32)
    return jnp.asarray(ones), jnp.asarray(0 * ones)


@functools.cache
def jitted(function):
    options = inspect.signature(function).parameters.keys() & {"window", "block_size"}
    return jax.jit(function, static_argnames=tuple(options))


def a_pass(cache, start, qkv, *, window=None):
    """What new tokens yield, and the cache with them."""
    turn, lengths = unturned(qkv.shape[1]), jnp.asarray([start], jnp.int32)
    query, cache = jitted(writing.rotate_and_write_int8)(jnp.asarray(qkv), *turn, cache, lengths)
    return np.asarray(jitted(reference.decode_attention_int8)(query, cache, lengths, window=window)), cache


@functools.cache
def left_by(num_tokens):
    """The cache that so many tokens leave, whatever a query sees of it."""
    cache = empty()
    for start in range(num_tokens):
        turn, lengths = unturned(1), jnp.asarray([start], jnp.int32)
        qkv = jnp.asarray(arrays()[:, start : start + 1])
        _, cache = jitted(writing.rotate_and_write_int8)(qkv, *turn, cache, lengths)
    return cache


def passes(schedule, *, window=None):
    """The attention of each token in the last pass that has it, and the cache, of passes of which some tokens stay."""
    out, cache = np.zeros((TOKENS, HEADS, HEAD_DIM), np.float32), empty()
    for start, count, kept in schedule:
        qkv = arrays()[:, start : start + count].copy()
        qkv[:, kept:] *= -3  # of tokens that will be rejected
        result, cache = a_pass(cache, start, qkv, window=window)
        out[start : start + kept] = result[0, :kept]
    return out, cache


@functools.cache
def one_by_one(window):
    return passes(ONE_BY_ONE, window=window)


def whole_blocks(cache, end):
    """Everything that queries from a position on read of what was before it."""
    end_of_blocks = end // KEY_BLOCK * KEY_BLOCK
    of_ring = [position % RING for position in range(end_of_blocks, end)]
    return {
        "keys": cache.keys[:, :end_of_blocks],
        "key_scales": cache.key_scales[:, : end_of_blocks // KEY_BLOCK],
        "recent_keys": cache.recent_keys[:, of_ring],
        "values": cache.values[:, :end],
        "value_scales": cache.value_scales[:, :, :end],
    }


def assert_same(one, other, end):
    jax.tree.map(np.testing.assert_array_equal, whole_blocks(one, end), whole_blocks(other, end))


def attention_in_float64(window):
    """From the definition: each token sees its own block's keys as they are, all else rounded to int8."""
    qkv = arrays()[0, :TOKENS].astype(np.float64)
    query, keys, values = np.split(qkv, (HEADS, HEADS + KV_HEADS), axis=1)
    scale = np.abs(values).max(-1, keepdims=True) / 127
    values = np.round(values / scale) * scale
    rounded = keys.copy()
    for begin in range(0, TOKENS - KEY_BLOCK, KEY_BLOCK):
        block = keys[begin : begin + KEY_BLOCK]
        scale = np.abs(block).max(0) / 127
        rounded[begin : begin + KEY_BLOCK] = np.round(block / scale) * scale
    out = np.zeros_like(query)
    for position, head in np.ndindex(TOKENS, HEADS):
        begin, first = position // KEY_BLOCK * KEY_BLOCK, 0 if window is None else max(0, position - window + 1)
        seen = np.concatenate([rounded[:begin], keys[begin : position + 1]])[first:, head // 2]
        weights = np.exp(seen @ query[position, head] / np.sqrt(HEAD_DIM))
        out[position, head] = weights / weights.sum() @ values[first : position + 1, head // 2]
    return out


@pytest.mark.parametrize("window", [None, 100])
def test_a_query_sees_the_keys_of_its_own_block_as_they_are_and_all_else_as_int8(window):
    np.testing.assert_allclose(one_by_one(window)[0], attention_in_float64(window), atol=3e-5)


@pytest.mark.parametrize("schedule", [SEVERAL, WIDEST], ids=["6 tokens", "17 tokens"])
def test_passes_of_several_tokens_of_which_some_are_rejected_leave_and_see_the_same(schedule):
    out, cache = passes(schedule)
    end = schedule[-1][0] + schedule[-1][2]
    assert end > 2 * KEY_BLOCK + 10
    np.testing.assert_allclose(out[:end], one_by_one(None)[0][:end], atol=1e-5)
    assert_same(cache, left_by(end), end)


def test_a_block_that_keeps_what_was_rejected_would_be_noticed(monkeypatch):
    """Without the block being made again with its last position."""
    rotate_and_write, with_whole_blocks = writing.rotate_and_write_int8, writing._with_whole_blocks

    def made_once(cache, *arguments):
        made, there = with_whole_blocks(cache, *arguments), (cache.key_scales != 0).any(-1, keepdims=True)
        of_keys = jnp.repeat(there, KEY_BLOCK, axis=1)[:, :CAPACITY]
        keys, scales = jnp.where(of_keys, cache.keys, made.keys), jnp.where(there, cache.key_scales, made.key_scales)
        return dataclasses.replace(made, keys=keys, key_scales=scales)

    monkeypatch.setattr(writing, "_with_whole_blocks", made_once)
    monkeypatch.setattr(writing, "rotate_and_write_int8", lambda *arguments: rotate_and_write(*arguments))
    out, end = passes(SEVERAL)[0], SEVERAL[-1][0]
    wrong = np.abs(out - one_by_one(None)[0])[:end].max(axis=(1, 2))
    assert wrong[:KEY_BLOCK].max() < 1e-5
    assert wrong[KEY_BLOCK:].max() > 1e-2


@pytest.mark.parametrize("cuts", [[0, 300], [0, 128, 256, 300], [0, 40, 168, 170, 290]], ids=str)
@pytest.mark.parametrize("window", [None, 100])
def test_wherever_a_prompt_is_cut_its_tokens_leave_and_see_the_same(cuts, window):
    out, cache = [], empty()
    for start, end in itertools.pairwise(cuts):
        width = 512 if end - start > 130 else 150  # more padding than the ring has slots
        given = arrays()[:, start : start + width].copy()
        given[:, end - start :] *= 99
        result, cache = jitted(prefill_int8)(
            jnp.asarray(given),
            *unturned(width),
            cache,
            jnp.asarray([start], jnp.int32),
            num_tokens=jnp.asarray([end - start], jnp.int32),
            window=window,
        )
        out.append(np.asarray(result)[0, : end - start])
    np.testing.assert_allclose(np.concatenate(out), one_by_one(window)[0][: cuts[-1]], atol=1e-5)
    assert_same(cache, left_by(cuts[-1]), cuts[-1])


@pytest.mark.parametrize("back_to", [128, 256])
def test_a_text_may_go_on_from_the_end_of_any_block_of_a_longer_one(back_to):
    """Whatever the ring holds by then."""
    result, cache = a_pass(one_by_one(None)[1], back_to, arrays()[:, back_to : back_to + 6])
    np.testing.assert_allclose(result[0], one_by_one(None)[0][back_to : back_to + 6], atol=1e-5)
    assert_same(cache, one_by_one(None)[1], back_to)


@pytest.mark.parametrize("start", [CAPACITY - 3, CAPACITY - 1])
def test_positions_past_the_last_one_are_dropped(start):
    """Of a capacity that is no whole number of blocks."""
    before = one_by_one(None)[1]
    _, cache = a_pass(before, start, arrays()[:, start : start + 17])
    assert_same(cache, before, 2 * KEY_BLOCK)
    assert np.array_equal(cache.values[:, :TOKENS], before.values[:, :TOKENS])


def test_masses_are_the_share_of_each_block_and_blocks_are_all_that_is_read():
    cache, lengths = one_by_one(None)[1], jnp.asarray([290], jnp.int32)
    query = jnp.asarray(arrays()[:, 290:292, :HEADS])
    options = {"block_size": 16, "window": None}
    out, masses = jitted(reference.decode_attention_int8_with_masses)(query, cache, lengths, **options)
    np.testing.assert_allclose(out, one_by_one(None)[0][None, 290:292], atol=1e-5)
    np.testing.assert_allclose(masses.sum(-1), 1, atol=1e-5)
    everything = jnp.full((1, 1, KV_HEADS, 3), -1, jnp.int32)
    listed = jnp.asarray([[0, 17, 18], [7, 8, 18]], jnp.int32)[None, None]
    read = jitted(reference.block_attention_int8)
    here = lengths, everything, jnp.int32(0)
    np.testing.assert_allclose(read(query[:, :1], cache, *here, **options), out[:, :1], atol=1e-5)
    here = lengths, listed, jnp.int32(0)
    some = read(query[:, :1], cache, *here, **options)
    values = np.asarray(cache.values).copy()
    for head, blocks in enumerate(np.asarray(listed)[0, 0]):
        unlisted = ~np.isin(np.arange(CAPACITY) // 16, blocks)
        values.reshape(1, CAPACITY, KV_HEADS, HEAD_DIM)[0, unlisted, head] = 100
    other = dataclasses.replace(cache, values=jnp.asarray(values))
    np.testing.assert_array_equal(some, read(query[:, :1], other, *here, **options))


def test_codes_are_of_the_largest_value_and_an_empty_channel_stays_empty():
    codes, scales = quantize(jnp.asarray([[3.0, -12.7, 0.05], [0.0, 0.0, 0.0]], jnp.float32), axis=1)
    np.testing.assert_array_equal(codes, [[30, -127, 0], [0, 0, 0]])
    np.testing.assert_allclose(scales[0], 0.1, rtol=1e-6)


def test_it_takes_half_of_the_memory_and_a_ring():
    wide = jax.eval_shape(
        lambda: Int8Cache.zeros(batch=1, capacity=4096, num_kv_heads=8, head_dim=128, dtype=jnp.bfloat16)
    )
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(wide))
    assert size < 0.55 * (2 * 4096 * 1024 * 2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": jnp.bfloat16}, "recent keys are float32"),
        ({"tokens": 18}, "at most 17, or prefill_int8"),
        ({"heads": 4}, "use H \\+ 2 \\* KH heads"),
    ],
    ids=str,
)
def test_arguments_that_do_not_fit_are_named(change, message):
    tokens, heads = change.get("tokens", 1), change.get("heads", 8)
    qkv = jnp.zeros((1, tokens, heads, HEAD_DIM), change.get("dtype", jnp.float32))
    with pytest.raises(ValueError, match=message):
        rotate_and_write_int8(qkv, *unturned(tokens), empty(), jnp.zeros(1, jnp.int32))


def test_partial_sums_are_added_up():
    qkv = jnp.asarray(arrays()[:, :2])
    parts = PartialSums(jnp.stack([qkv, 0 * qkv]), jnp.dtype("float32"))
    given = *unturned(2), empty(), jnp.zeros(1, jnp.int32)
    write = jitted(writing.rotate_and_write_int8)
    jax.tree.map(np.testing.assert_array_equal, write(parts, *given), write(qkv, *given))


def interpreted_case(tokens, heads, kv_heads, head_dim, slots, dtype):
    """New tokens, their angles, and a cache that is filled up to where they come: around the ends of blocks."""
    rng = np.random.default_rng(tokens)
    lengths = np.asarray([0, 127, 256 - tokens + 1, slots - tokens], np.int32)
    sizes = {"num_kv_heads": kv_heads, "head_dim": head_dim, "dtype": dtype}
    qkv, new = (
        jnp.asarray(rng.standard_normal((4, count, heads + 2 * kv_heads, head_dim)).astype(dtype))
        for count in (slots, tokens)
    )
    filled, none = jnp.asarray(np.maximum(lengths, 1)), jnp.asarray(0 * lengths)

    @jax.jit
    def fill(qkv, cosine, sine):
        empty = Int8Cache.zeros(batch=4, capacity=slots, **sizes)
        return prefill_int8(qkv, cosine, sine, empty, none, num_tokens=filled)[1]

    angles = rng.standard_normal((4, tokens, head_dim // 2)).astype(np.float32)
    turn = jnp.asarray(np.cos(angles)), jnp.asarray(np.sin(angles))
    return new, *turn, fill(qkv, *unturned(slots, 4, head_dim)), jnp.asarray(lengths)


# Tokens, heads, key/value heads, head dimension, slots; a group of 3 in one tile, and chunks of both sizes.
@pytest.mark.parametrize(("shape", "window"), [((2, 3, 1, 24, 1100), 300), ((17, 2, 2, 16, 330), None)], ids=str)
def test_the_triton_kernels_leave_and_see_what_the_reference_does(shape, window):
    *arrays, lengths = interpreted_case(*shape, jnp.float32)
    expected = jitted(writing.rotate_and_write_int8)(*arrays, lengths)
    ours = write_triton.rotate_and_write_int8(*arrays, lengths, interpret=True)
    for one, other in zip(jax.tree.leaves(ours), jax.tree.leaves(expected), strict=True):
        differ = np.abs(np.asarray(one, np.float64) - np.asarray(other, np.float64))
        assert differ.max() <= (1 if one.dtype == jnp.int8 else 1e-6)  # a product is rounded twice, or once
        assert (differ > 0).mean() < (1e-3 if one.dtype == jnp.int8 else 1)
    query, cache = expected
    weigh = {"block_size": 16, "window": window}
    out, masses = triton.decode_attention_int8_with_masses(query, cache, lengths, **weigh, interpret=True)
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, atol=3e-6),
        (out, masses),
        jitted(reference.decode_attention_int8_with_masses)(query, cache, lengths, **weigh),
    )
    alone = triton.decode_attention_int8(query[:, -1:], cache, lengths + shape[0] - 1, window=window, interpret=True)
    np.testing.assert_array_equal(alone, out[:, -1:])


def test_the_triton_kernel_reads_listed_blocks_as_the_reference_does():
    *_, cache, lengths = interpreted_case(1, 3, 1, 24, 330, jnp.float32)
    query = jnp.asarray(np.random.default_rng(0).standard_normal((4, 1, 3, 24)).astype(np.float32))
    table = jnp.asarray([[0, 1, 2, 19], [-1, 0, 0, 0], [1, 7, 15, 16], [0, 8, 9, 20]], jnp.int32)[:, None, None]
    arrays, options = (query, cache, lengths, table, jnp.int32(0)), {"block_size": 16, "window": None}
    out = triton.block_attention_int8(*arrays, **options, interpret=True)
    expected = jitted(reference.block_attention_int8)(*arrays, **options)
    np.testing.assert_allclose(out, expected, atol=3e-6)


@pytest.mark.parametrize("size", [1e-3, 1.0, 30.0])
def test_float16_holds_what_the_triton_kernels_multiply_in_16_bits(size):
    """Codes and weights become float16 there, whatever the size of keys and values: they are scaled to fit."""
    new, cosine, sine, cache, lengths = interpreted_case(2, 3, 1, 16, 330, jnp.bfloat16)
    cache = dataclasses.replace(cache, value_scales=cache.value_scales * size)
    query, cache = jitted(writing.rotate_and_write_int8)(new * size, cosine, sine, cache, lengths)
    out = triton.decode_attention_int8(query, cache, lengths, window=None, interpret=True)
    wide = jax.tree.map(lambda a: a.astype(jnp.float32) if a.dtype == jnp.bfloat16 else a, (query, cache))
    expected = jitted(reference.decode_attention_int8)(*wide, lengths, window=None)
    limit = allowed_error("decode_attention_int8", jnp.bfloat16, num_inputs=16, implementation="triton")
    assert relative_error(out.astype(jnp.float32), expected) <= limit
