"""Contracts of rotate_and_write, for the reference and the interpreted Triton kernel alike."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import PartialSums, rotate_and_write
from pallas_kernels.rotate_and_write import gpu_triton, reference
from tests.pallas_kernels.kernel_cases import random_rows

SLOTS = 9
# A jit of both, since XLA contracts products and sums differently where it compiles one by one.
IMPLEMENTATIONS = {
    "reference": jax.jit(reference.rotate_and_write),
    "triton": functools.partial(gpu_triton.rotate_and_write, interpret=True),
}
implementations = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)


def operands(num_tokens, num_heads, num_kv_heads, head_dim, dtype):
    """All but the lengths, for three sequences."""
    angles = 9 * random_rows(3, num_tokens, head_dim // 2)
    qkv = random_rows(3, num_tokens, num_heads + 2 * num_kv_heads, head_dim, dtype=dtype)
    keys, values = (random_rows(3, SLOTS, num_kv_heads, head_dim, dtype=dtype, seed=seed) for seed in (2, 3))
    return qkv, jnp.cos(angles), jnp.sin(angles), keys, values


LENGTHS = jnp.asarray([0, 4, SLOTS - 1], jnp.int32)  # the last sequence has room for one token


@implementations
def test_pairs_turn_by_their_angle_and_land_in_their_slots(implementation):
    qkv, cosine, sine, keys, values = operands(3, 2, 1, 16, jnp.float32)
    query, new_keys, new_values = IMPLEMENTATIONS[implementation](qkv, cosine, sine, keys, values, LENGTHS)
    pairs = np.asarray(qkv[..., :8]) + 1j * np.asarray(qkv[..., 8:])
    turned = pairs * (np.asarray(cosine) + 1j * np.asarray(sine))[:, :, None]
    turned = np.concatenate([turned.real, turned.imag], axis=-1)
    np.testing.assert_allclose(query, turned[:, :, :2], atol=1e-6)
    expected_keys, expected_values = np.array(keys), np.array(values)
    for sequence, length in enumerate(LENGTHS.tolist()):
        for token in range(min(3, SLOTS - length)):
            expected_keys[sequence, length + token] = turned[sequence, token, 2:3]
            expected_values[sequence, length + token] = qkv[sequence, token, 3:]
    np.testing.assert_allclose(new_keys, expected_keys, atol=1e-6)
    np.testing.assert_array_equal(new_values, expected_values)


@pytest.mark.newest_jax
@pytest.mark.parametrize("sizes", [(4, 6, 2, 96, jnp.bfloat16), (2, 3, 3, 64, jnp.float32)], ids=str)
def test_interpreted_triton_has_the_bits_of_the_reference(sizes):
    """Also in the slots that are not written, and where the last tokens are dropped."""
    results = [run(*operands(*sizes), LENGTHS) for run in IMPLEMENTATIONS.values()]
    jax.tree.map(np.testing.assert_array_equal, *results)


@implementations
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32], ids=["bf16", "f32"])
@pytest.mark.parametrize("num_parts", [2, 4])
def test_partial_sums_give_the_bits_of_their_value(implementation, dtype, num_parts):
    _, *others = operands(4, 6, 2, 96, dtype)
    qkv = PartialSums(random_rows(num_parts, 3, 4, 10, 96, seed=5), jnp.dtype(dtype))
    run = IMPLEMENTATIONS[implementation]
    results = [run(each, *others, LENGTHS) for each in (qkv, qkv.value())]
    jax.tree.map(np.testing.assert_array_equal, *results)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"qkv": random_rows(3, 2, 2, 16)}, "qkv has 2 heads and the cache KH=1; use H"),
        (
            {"keys": random_rows(3, SLOTS, 1, 16, dtype=jnp.bfloat16)},
            "keys are bfloat16 and values float32; use float32",
        ),
    ],
    ids=["heads", "dtype"],
)
def test_arguments_that_do_not_fit_are_named(change, message):
    names = ("qkv", "cosine", "sine", "keys", "values")
    arguments = dict(zip(names, operands(2, 2, 1, 16, jnp.float32), strict=True)) | change
    with pytest.raises(ValueError, match=f"rotate_and_write: {message}"):
        rotate_and_write(**arguments, lengths=LENGTHS)


@implementations
def test_sequences_may_be_pieces_of_some_rows(implementation):
    """Two pieces of a row, one of another, and one of none: as the rows would be written one by one."""
    qkv, cosine, sine, keys, values = operands(3, 2, 1, 16, jnp.float32)
    rows, lengths = jnp.asarray([1, -1, 1], jnp.int32), jnp.asarray([4, 0, 1], jnp.int32)
    run = IMPLEMENTATIONS[implementation]
    query, new_keys, new_values = run(qkv, cosine, sine, keys[:2], values[:2], lengths, rows=rows)
    one_by_one, expected = [], (keys[:2], values[:2])
    for piece in (0, 2):
        mine = slice(piece, piece + 1)
        arrays = (array[1:] for array in expected)
        one, *written = run(qkv[mine], cosine[mine], sine[mine], *arrays, lengths[mine])
        one_by_one.append(one[0])
        expected = tuple(jnp.concatenate([old[:1], new]) for old, new in zip(expected, written, strict=True))
    np.testing.assert_array_equal(query[::2], jnp.stack(one_by_one))
    np.testing.assert_array_equal(new_keys, expected[0])
    np.testing.assert_array_equal(new_values, expected[1])
