"""Contracts of the kernels for TPUs over a cache of int8, interpreted against the reference; races raise."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import Int8Cache
from pallas_kernels.arrays.int8_cache import RING
from pallas_kernels.decode_attention_int8 import reference
from pallas_kernels.decode_attention_int8 import tpu as attention_tpu
from pallas_kernels.rotate_and_write_int8 import reference as writing_reference
from pallas_kernels.rotate_and_write_int8 import tpu as write_tpu
from tests.pallas_kernels.test_int8_cache import interpreted_case, jitted
from tests.pallas_kernels.tpu_cases import MODES, races_raise


@pytest.fixture(autouse=True)
def no_races():
    with races_raise():
        yield


def written(shape):
    """Queries, and a cache with the entries of their tokens, by the reference."""
    *arrays, lengths = interpreted_case(*shape, jnp.float32)
    query, cache = jitted(writing_reference.rotate_and_write_int8)(*arrays, lengths)
    return query, cache, lengths


# Tokens, heads, key/value heads, head dimension, slots, window: a group of 3, and heads that share lanes; two steps of
# blocks, and a window that begins in the second; a last block of keys that is not whole; a head of two tiles of lanes.
@pytest.mark.parametrize(
    ("shape", "window", "mode"),
    [
        ((2, 3, 1, 24, 640), 300, "simulated"),
        ((17, 3, 3, 64, 330), None, "quick"),
        ((4, 2, 1, 192, 640), 90, "quick"),
    ],
    ids=str,
)
def test_attention_and_masses_are_those_of_the_reference(shape, window, mode):
    """Of sequences whose tokens begin in a block, end it, straddle two, and reach the last slot."""
    query, cache, lengths = written(shape)
    options = {"block_size": 16, "window": window}
    out = attention_tpu.decode_attention_int8_with_masses(query, cache, lengths, **options, interpret=MODES[mode])
    expected = jitted(reference.decode_attention_int8_with_masses)(query, cache, lengths, **options)
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=3e-6), out, expected)


def test_a_row_has_the_same_bits_alone_and_beside_others():
    """Also where others complete the block before its own; as far as products of the same sizes add in one order."""
    query, cache, lengths = written((4, 2, 1, 32, 384))
    query, ring = (array.astype(jnp.bfloat16) for array in (query, cache.recent_keys))
    cache = dataclasses.replace(cache, recent_keys=ring)
    attend = functools.partial(attention_tpu.decode_attention_int8, cache=cache, window=None, interpret=True)
    out = attend(query, lengths=lengths)
    for token in range(4):
        alone = attend(query[:, token : token + 1], lengths=lengths + token)
        np.testing.assert_array_equal(alone[:, 0], out[:, token])


def test_listed_blocks_are_all_that_weighs():
    query, cache, lengths = written((1, 6, 3, 64, 330))
    table = np.asarray([[0, 1, 2, 19], [-1, 0, 0, 0], [1, 7, 15, 16], [3, 3, 3, 3]], np.int32)[:, None, None]
    table = np.concatenate([table, table[::-1], table], axis=2)  # heads of a sequence list others
    table = np.stack([0 * table, table], axis=1)[:, :, 0]
    arrays, options = (query, cache, lengths, jnp.asarray(table), jnp.int32(1)), {"block_size": 16, "window": None}
    out = attention_tpu.block_attention_int8(*arrays, **options, interpret=True)
    expected = jitted(reference.block_attention_int8)(*arrays, **options)
    out, expected = (np.array(array).reshape(4, 3, 2, 64) for array in (out, expected))
    assert not out[0, 1].any()  # of a head that lists nothing that is seen
    out[0, 1] = expected[0, 1] = 0
    np.testing.assert_allclose(out, expected, atol=3e-6)


# The simulation refuses an aliased array that is no whole number of blocks.
@pytest.mark.parametrize(
    ("shape", "dtype", "mode"),
    [
        ((1, 3, 1, 24, 384), "float32", "simulated"),
        ((4, 4, 2, 64, 384), "bfloat16", "quick"),
        ((17, 6, 3, 64, 330), "float32", "quick"),
    ],
    ids=str,
)
def test_what_is_written_is_that_of_the_reference(shape, dtype, mode):
    """Blocks that become whole, tokens on both sides of a boundary, and past the last slot, where they are dropped."""
    *arrays, cache, lengths = interpreted_case(*shape, jnp.dtype(dtype))
    lengths = lengths.at[3].add(shape[0] // 2)
    out = write_tpu.rotate_and_write_int8(*arrays, cache, lengths, interpret=MODES[mode])
    expected = jitted(writing_reference.rotate_and_write_int8)(*arrays, cache, lengths)
    for one, other in zip(jax.tree.leaves(out), jax.tree.leaves(expected), strict=True):
        if one.dtype == jnp.int8:
            differ = np.abs(np.asarray(one, np.int32) - np.asarray(other, np.int32))
            assert differ.max() <= 1  # a product is rounded twice, or once
            assert (differ > 0).mean() < 1e-3
        else:
            wide = np.asarray(one, np.float64), np.asarray(other, np.float64)
            np.testing.assert_allclose(*wide, rtol=1e-6 if one.dtype == jnp.float32 else 0.01, atol=1e-6)


@pytest.mark.parametrize(("dtype", "told"), [("float16", True), ("bfloat16", False)])
def test_float16_is_left_to_xla(dtype, told):
    cache = Int8Cache.zeros(batch=1, capacity=16, num_kv_heads=1, head_dim=16, dtype=jnp.dtype(dtype))
    for obstacle in (attention_tpu.cache_obstacle(cache), write_tpu.obstacle(jnp.dtype(dtype))):
        assert obstacle == ("needs float32 or bfloat16: a TPU does not load float16" if told else None)


@pytest.mark.parametrize(("heads", "itemsize", "slots"), [(8, 2, 512), (32, 2, 512), (32, 4, 256), (64, 2, 128)])
def test_a_step_and_rings_fit_the_memory_of_a_kernel(heads, itemsize, slots):
    sizes = attention_tpu._Sizes(1, 1, 128, heads, 8192, None, itemsize=1, ring_bytes=RING * heads * 128 * itemsize)
    assert sizes.block == slots
    assert 2 * sizes.ring_bytes + 4 * slots * heads * 128 <= 12 * 2**20
