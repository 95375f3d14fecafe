"""Contracts of hadamard for the reference and the interpreted Triton kernel alike, and of the matrices under both."""

from __future__ import annotations

import functools

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import hadamard
from pallas_kernels.hadamard import gpu_triton as triton
from pallas_kernels.hadamard import reference
from pallas_kernels.hadamard.matrices import MAX_CORE_ORDER, core_order, hadamard_matrix, kronecker_factors
from tests.pallas_kernels.kernel_cases import in_one_program, newest_jax_by_feature, random_rows, relative_error

# Orders of the cores of the MLPs of SmolLM2, Llama-3-8B, Llama-2-7B (and Qwen2.5-3B), Llama-2-13B (and Qwen2.5-14B),
# Qwen2.5-7B, -0.5B, -1.5B, -32B, -72B, Qwen3-4B, -8B, -14B, -32B, TinyLlama and Llama-3.1-405B.
MLP_SIZES = {
    1536: 12,
    14336: 28,
    11008: 172,
    13824: 108,
    18944: 148,
    4864: 76,
    8960: 140,
    27648: 108,
    29568: 924,
    9728: 76,
    12288: 12,
    17408: 68,
    25600: 200,
    5632: 44,
    53248: 104,
}
HADAMARD = {
    "reference": in_one_program(reference.hadamard),
    "triton": functools.partial(triton.hadamard, interpret=True),
}

implementations = pytest.mark.parametrize("implementation", HADAMARD)


def in_float64(x):
    return np.asarray(x, np.float64) @ hadamard_matrix(x.shape[-1]).T.astype(np.float64) / np.sqrt(x.shape[-1])


@pytest.mark.parametrize(("size", "core"), MLP_SIZES.items(), ids=str)
def test_the_mlp_sizes_of_real_models_are_covered(size, core):
    assert core_order(size) == core
    sides = [len(factor) for factor in kronecker_factors(size)]
    assert sides[0] == core
    assert np.prod(sides) == size


def test_every_core_and_every_power_of_two_is_a_hadamard_matrix():
    """All cores that a size can have, of up to a few hundred rows, and one that is Williamson's."""
    orders = set()
    for odd in range(1, 100, 2):
        for power in range(2, 11):
            try:
                orders.add(core_order(odd << power))
            except ValueError:
                continue
    assert {12, 20, 28, 36, 60, 104, 108, 140, 148, 172} <= orders
    assert max(orders) <= MAX_CORE_ORDER
    for order in sorted({order for order in orders if order <= 400} | {1, 2, 8, 32, 128, 924}):
        matrix = hadamard_matrix(order)
        assert matrix.shape == (order, order)
        assert np.abs(matrix).min() == 1, order
        wide = matrix.astype(np.float32)  # whole numbers, which float32 adds exactly
        np.testing.assert_array_equal(wide @ wide.T, order * np.eye(order), err_msg=str(order))


@pytest.mark.parametrize("size", [1, 2, 12, 96, 576, 1536, 2752])
def test_reference_equals_the_dense_product_in_float64(size):
    x = random_rows(2, 3, size)
    assert relative_error(HADAMARD["reference"](x), in_float64(x)) < 3e-7


# One block of H_A and several, whole and padded.
@pytest.mark.parametrize(
    ("size", "dtype"),
    newest_jax_by_feature(
        [
            (16, "float32"),
            (576, "bfloat16"),
            (576, "float16"),
            (2752, "bfloat16"),
            (4096, "bfloat16"),
            (576, "float32"),
            (32, "bfloat16"),
        ],
        lambda size, dtype: (triton.Cut.of(size, size).tiles_per_section, dtype),
    ),
    ids=str,
)
def test_interpreted_triton_equals_the_dense_product_in_float64(size, dtype):
    dtype = jnp.dtype(dtype)
    x = random_rows(2, size, dtype=dtype)
    out = triton.hadamard(x, interpret=True)
    assert out.dtype == dtype
    bound = 3e-7 if dtype == jnp.float32 else 0.6 * float(jnp.finfo(dtype).eps)
    assert relative_error(out, in_float64(x)) < bound
    if dtype != jnp.float32:
        assert np.mean(np.asarray(out) == np.asarray(HADAMARD["reference"](x))) > 0.95


@implementations
def test_rows_do_not_depend_on_the_rows_beside_them(implementation):
    x = random_rows(5, 576, dtype=jnp.bfloat16)
    widest = np.asarray(HADAMARD[implementation](x))
    for num_rows in (1, 3):
        np.testing.assert_array_equal(np.asarray(HADAMARD[implementation](x[:num_rows])), widest[:num_rows])


def test_a_transformed_weight_undoes_the_transform():
    x, weight = random_rows(3, 336), random_rows(5, 336, seed=2)
    product = np.asarray(hadamard(x), np.float64) @ np.asarray(hadamard(weight), np.float64).T
    np.testing.assert_allclose(product, np.asarray(x, np.float64) @ np.asarray(weight, np.float64).T, atol=2e-5)


def test_an_outlier_is_spread_over_the_token():
    x = jnp.zeros((1, 576)).at[0, 7].set(24.0)
    np.testing.assert_allclose(np.abs(hadamard(x)), np.ones((1, 576)), rtol=1e-6)


@pytest.mark.parametrize(
    ("size", "message"),
    [
        (46, "no Hadamard matrix for K=46 can be constructed here; with its odd part 23 use 368 or its product with"),
        (59 * 64, "no Hadamard matrix for K=3776, whose odd part is 59, can be constructed here; use a power of two"),
        (6, "K=6 can be constructed here; with its odd part 3 use 12 or its product with a power of two"),
    ],
)
def test_a_size_without_a_matrix_is_refused_with_sizes_that_have_one(size, message):
    with pytest.raises(ValueError, match=message):
        hadamard(jnp.ones((1, size)))


def test_other_dtypes_are_refused():
    with pytest.raises(ValueError, match="x is float8_e4m3fn; use float32, bfloat16 or float16"):
        hadamard(jnp.ones((2, 64), jnp.float8_e4m3fn))


def test_triton_says_which_sizes_it_cannot_serve():
    assert all(triton.obstacle(size) is None for size in MLP_SIZES)
    assert triton.obstacle(96) == "needs transforms of a multiple of 16 times 12 values; this is 96"
