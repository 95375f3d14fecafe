"""Contracts of rms_norm, and of the sum before it, for the reference and the interpreted Triton kernel alike."""

from __future__ import annotations

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import PartialSums, quantize_activations, rms_norm, rms_norm_quantize
from pallas_kernels.rms_norm import gpu_triton as triton
from pallas_kernels.rms_norm import reference
from pallas_kernels.rms_norm_quantize import gpu_triton as quantize_triton
from pallas_kernels.rms_norm_quantize import reference as quantize_reference
from tests.pallas_kernels.kernel_cases import (
    assert_nearly_the_same,
    assert_the_same,
    in_one_program,
    newest_jax_by_feature,
    random_rows,
    relative_error,
    rms_norm_in_float64,
)

EPSILON = 1e-5
NORM = {"reference": in_one_program(reference.rms_norm), "triton": functools.partial(triton.rms_norm, interpret=True)}
ADD_NORM = {
    "reference": in_one_program(reference.add_rms_norm),
    "triton": functools.partial(triton.add_rms_norm, interpret=True),
}
ADD_NORM_QUANTIZE = {
    "reference": in_one_program(quantize_reference.add_rms_norm_quantize),
    "triton": functools.partial(quantize_triton.add_rms_norm_quantize, interpret=True),
}
QUANTIZE = in_one_program(functools.partial(quantize_activations, implementation="reference"))
# A hidden size, one token a program; and heads, of which a program takes 8 and 32.
SHAPES = [(2, 576), (1, 9, 128), (2, 21, 24)]

shapes = pytest.mark.parametrize("shape", SHAPES, ids=str)
dtypes = pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16], ids=["f32", "bf16", "f16"])
implementations = pytest.mark.parametrize("implementation", NORM)


def operands(shape, dtype):
    """``x``, ``update`` and ``gain``."""
    x, update = random_rows(*shape, dtype=dtype), random_rows(*shape, dtype=dtype, seed=3)
    return x, update, random_rows(shape[-1], dtype=dtype, seed=2)


def assert_within_a_rounding(out, expected):
    """Another order of the sum of squares moves a value that was nearly a tie by one, and its product by one more.

    In float32 the sum itself differs: by the root of its length, in roundings, and the norm by half of it.
    Each CPU has vectors of its own, and so an order of its own.
    """
    assert out.dtype == expected.dtype
    limits = jnp.finfo(out.dtype)
    a, b = (np.asarray(array, np.float32) for array in (out, expected))
    roundings = 2 + out.shape[-1] ** 0.5 / 2 if out.dtype == jnp.float32 else 2
    # The interpreter's rounding to 16 bits takes subnormal numbers to zero.
    np.testing.assert_allclose(a, b, rtol=roundings * float(limits.eps), atol=float(limits.tiny))
    if out.dtype != jnp.float32:
        assert np.mean(np.asarray(out) == np.asarray(expected)) > 0.99


@shapes
@implementations
def test_it_equals_the_definition_in_float64(implementation, shape):
    x, update, gain = operands(shape, jnp.float32)
    norm = NORM[implementation](x, gain, epsilon=EPSILON)
    assert relative_error(norm, rms_norm_in_float64(x, gain, EPSILON)) < 3e-7
    total, norm = ADD_NORM[implementation](x, update, gain, epsilon=EPSILON)
    np.testing.assert_array_equal(total, np.asarray(x) + np.asarray(update))
    assert relative_error(norm, rms_norm_in_float64(total, gain, EPSILON)) < 3e-7


@pytest.mark.parametrize(
    ("shape", "dtype"),
    newest_jax_by_feature(itertools.product(SHAPES, ("float32", "bfloat16", "float16"))),
    ids=str,
)
def test_interpreted_norm_rounds_where_the_reference_does(shape, dtype):
    x, _, gain = operands(shape, jnp.dtype(dtype))
    out, expected = (NORM[name](x, gain, epsilon=EPSILON) for name in ("triton", "reference"))
    assert_within_a_rounding(out, expected)


@dtypes
@shapes
@implementations
def test_the_sum_is_rounded_before_it_is_normalised(implementation, shape, dtype):
    """An update changes nothing but what is normalised: bit for bit the norm of the sum that a caller would write."""
    x, update, gain = operands(shape, dtype)
    total, norm = ADD_NORM[implementation](x, update, gain, epsilon=EPSILON)
    rounded = jax.device_put(np.asarray(x) + np.asarray(update))
    assert total.dtype == dtype
    np.testing.assert_array_equal(np.asarray(total), np.asarray(rounded))
    np.testing.assert_array_equal(np.asarray(norm), np.asarray(NORM[implementation](rounded, gain, epsilon=EPSILON)))


@pytest.mark.parametrize(("bits", "symmetric"), [(4, False), (8, True)])
@pytest.mark.parametrize("shape", [(1, 576, 32, 2), (2, 3, 192, 192, 0)], ids=str)
def test_the_quantised_norm_of_a_sum_has_the_codes_of_its_parts(shape, bits, symmetric):
    *shape, group_size, outlier_groups = shape
    settings = {"bits": bits, "group_size": group_size, "symmetric": symmetric, "clip_ratio": 1.0}
    settings["outlier_groups"] = outlier_groups
    x, update, gain = operands(shape, jnp.bfloat16)
    total, norm = ADD_NORM["reference"](x, update, gain, epsilon=EPSILON)
    expected = QUANTIZE(norm, **settings)
    outputs = {name: add(x, update, gain, epsilon=EPSILON, **settings) for name, add in ADD_NORM_QUANTIZE.items()}
    for sum_of_both, _ in outputs.values():
        np.testing.assert_array_equal(np.asarray(sum_of_both), np.asarray(total))
    assert_the_same(outputs["reference"][1], expected)
    assert_nearly_the_same(outputs["triton"][1], expected, jnp.bfloat16, equal_codes=0.999)


@pytest.mark.parametrize("k", [128, 576])
@implementations
def test_rows_do_not_depend_on_the_rows_beside_them(implementation, k):
    x, update, gain = operands((20, k), jnp.bfloat16)
    widest = ADD_NORM[implementation](x, update, gain, epsilon=EPSILON)
    for num_rows in (1, 9):
        alone = ADD_NORM[implementation](x[:num_rows], update[:num_rows], gain, epsilon=EPSILON)
        for out, expected in zip(alone, widest, strict=True):
            np.testing.assert_array_equal(np.asarray(out), np.asarray(expected)[:num_rows])


PARTS = [(jnp.bfloat16, jnp.float32), (jnp.float32, jnp.float32), (jnp.bfloat16, jnp.bfloat16)]


@pytest.mark.parametrize(("dtype", "of_parts"), PARTS, ids=["bf16", "f32", "bf16 of devices"])
@pytest.mark.parametrize("num_parts", [2, 4])
def test_partial_sums_of_an_update_give_the_bits_of_their_value(num_parts, dtype, of_parts):
    """Adding them in any other order, or rounding them later, moves bits."""
    x, gain = random_rows(2, 3, 576, dtype=dtype), random_rows(576, dtype=dtype, seed=2)
    update = PartialSums(random_rows(num_parts, 2, 3, 576, dtype=of_parts, seed=3), jnp.dtype(dtype))
    total, norm = ADD_NORM["triton"](x, update, gain, epsilon=EPSILON)
    expected = ADD_NORM["triton"](x, update.value(), gain, epsilon=EPSILON)
    jax.tree.map(np.testing.assert_array_equal, (total, norm), expected)
    settings = {"bits": 8, "group_size": 192, "symmetric": True, "clip_ratio": 1.0, "outlier_groups": 0}
    quantized = ADD_NORM_QUANTIZE["triton"](x, update, gain, epsilon=EPSILON, **settings)
    expected = ADD_NORM_QUANTIZE["triton"](x, update.value(), gain, epsilon=EPSILON, **settings)
    jax.tree.map(np.testing.assert_array_equal, quantized, expected)
    by_reference = rms_norm(x, gain, epsilon=EPSILON, update=update, implementation="reference")
    np.testing.assert_array_equal(by_reference[0], total)


def test_partial_sums_are_added_as_a_tree_and_rounded_once():
    def sums(small, dtype):
        return PartialSums(jnp.asarray([1, 0, small, small], jnp.float32).reshape(4, 1, 1), jnp.dtype(dtype))

    assert float(sums(2.0**-24, "float32").value()[0, 0]) == 1 + 2.0**-23  # from left to right it would be 1
    assert float(sums(2.0**-8, "bfloat16").value()[0, 0]) == 1 + 2.0**-7  # rounded each time it would be 1
    assert sums(0, "float32").reshape(1, 1, 1).value().shape == sums(0, "float32").reshape(1, 1, 1).shape == (1, 1, 1)


def test_a_token_of_zeros_survives():
    for norm in NORM.values():
        np.testing.assert_array_equal(norm(jnp.zeros((2, 96)), jnp.ones(96), epsilon=EPSILON), np.zeros((2, 96)))


def test_an_update_makes_it_a_pair():
    x, update, gain = operands((2, 3, 64), jnp.bfloat16)
    total, norm = rms_norm(x, gain, epsilon=EPSILON, update=update)
    np.testing.assert_array_equal(np.asarray(norm), np.asarray(rms_norm(total, gain, epsilon=EPSILON)))
    again, codes = rms_norm_quantize(x, gain, epsilon=EPSILON, update=update, bits=8)
    np.testing.assert_array_equal(np.asarray(again), np.asarray(total))
    assert_the_same(codes, rms_norm_quantize(total, gain, epsilon=EPSILON, bits=8))


def test_triton_says_which_tokens_are_too_long():
    assert triton.obstacle(65536) is None
    assert triton.obstacle(65537) == "needs tokens of at most 65536 inputs; this is 65537"


@pytest.mark.parametrize(
    "operation", [rms_norm, functools.partial(rms_norm_quantize, bits=8)], ids=["norm", "quantize"]
)
def test_operands_that_do_not_fit_are_named(operation):
    x, update, gain = operands((2, 96), jnp.float32)
    with pytest.raises(
        ValueError, match=r"gain is bfloat16 \(96,\); use float32 \(96,\), the dtype and last axis of x"
    ):
        operation(x, gain.astype(jnp.bfloat16), epsilon=EPSILON)
    with pytest.raises(ValueError, match=r"update is float16 \(2, 96\); use float32 \(2, 96\), as x is"):
        operation(x, gain, epsilon=EPSILON, update=update.astype(jnp.float16))
    with pytest.raises(ValueError, match=r"epsilon=0\.0; use a positive number"):
        operation(x, gain, epsilon=0.0)
    with pytest.raises(ValueError, match="x is float8_e4m3fn; use float32, bfloat16 or float16"):
        operation(jnp.ones((2, 96), jnp.float8_e4m3fn), jnp.ones(96, jnp.float8_e4m3fn), epsilon=EPSILON)
