"""Contracts of operations on a cache for queries of more sequences than it has rows, whoever implements them."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels
from pallas_kernels import Int8Cache, PartialSums
from pallas_kernels.dispatch import interpreted
from tests.pallas_kernels.kernel_cases import random_rows

ROWS, FURTHER, TOKENS, HEADS, KV_HEADS, HEAD_DIM, SLOTS = 2, 3, 1, 4, 2, 16, 128
LENGTHS = jnp.asarray([3, 70], jnp.int32)
TABLE = {"blocks": jnp.asarray(np.arange(4)[None, None, None].repeat(2, 0).repeat(2, 2), jnp.int32)}
TABLE |= {"layer": jnp.int32(0), "block_size": 16}


def caches():
    """Keys and values, and a cache of int8."""
    keys, values = (random_rows(ROWS, SLOTS, KV_HEADS * HEAD_DIM, seed=seed) for seed in (2, 3))
    sizes = {"num_kv_heads": KV_HEADS, "head_dim": HEAD_DIM}
    return (keys, values), (Int8Cache.zeros(batch=ROWS, capacity=SLOTS, **sizes, dtype=jnp.float32),)


def call(op, count, implementation):
    """The result for queries of so many sequences, which begin alike; and what is of the rows of the cache."""
    held = caches()["int8" in op]
    if op.startswith("rotate"):
        angles = random_rows(ROWS, TOKENS, HEAD_DIM // 2)
        qkv = random_rows(2, ROWS + FURTHER, TOKENS, HEADS + 2 * KV_HEADS, HEAD_DIM)[:, :count]
        arrays, options = (PartialSums(qkv, jnp.float32), jnp.cos(angles), jnp.sin(angles), *held), {}
    else:
        query = random_rows(ROWS + FURTHER, TOKENS, HEADS, HEAD_DIM)[:count]
        options = {"block_size": 16} if "masses" in op else TABLE if "block" in op else {}
        arrays = query, *held
    run = functools.partial(getattr(pallas_kernels, op), **options, implementation=implementation)
    with interpreted():
        out = jax.jit(lambda *arrays: run(*arrays, lengths=LENGTHS))(*arrays)
    return (out[0], out[1:]) if isinstance(out, tuple) else (out, ())


@pytest.mark.parametrize("implementation", ["reference", "triton", "tpu"])
@pytest.mark.parametrize(
    "op",
    [
        "rotate_and_write",
        "rotate_and_write_int8",
        "decode_attention",
        "decode_attention_with_masses",
        "block_attention",
        "decode_attention_int8",
        "decode_attention_int8_with_masses",
        "block_attention_int8",
    ],
)
def test_sequences_without_a_row_of_the_cache_change_nothing(op, implementation):
    alone, of_rows = call(op, ROWS, implementation)
    among, same = call(op, ROWS + FURTHER, implementation)
    assert among.shape == (ROWS + FURTHER, *alone.shape[1:])
    np.testing.assert_array_equal(among[:ROWS], alone)
    jax.tree.map(np.testing.assert_array_equal, same, of_rows)
    if implementation == "reference":
        assert not np.any(among[ROWS:])


def test_a_length_without_a_sequence_is_an_error():
    (keys, values), _ = caches()
    with pytest.raises(ValueError, match="decode_attention: there are 1 sequences and 2 lengths; use at least as many"):
        pallas_kernels.decode_attention(random_rows(1, 1, HEADS, HEAD_DIM), keys, values, LENGTHS)
