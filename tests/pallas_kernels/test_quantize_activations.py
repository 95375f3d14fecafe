"""Contracts of quantize_activations, for the reference and the interpreted Triton kernel alike."""

from __future__ import annotations

import functools
import itertools

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import Layout, quantize_activations
from pallas_kernels.arrays.weight import order_activation_codes
from pallas_kernels.backends.triton.rows import padded
from pallas_kernels.quantize_activations import gpu_triton, reference
from pallas_kernels.w4a4_matmul.gpu_triton_sums import sums_of_codes
from tests.pallas_kernels.kernel_cases import activation_in_float64, in_one_program, newest_jax_by_feature, random_rows

QUANTIZE = {
    "reference": in_one_program(reference.quantize_activations),
    "triton": functools.partial(gpu_triton.quantize_activations, interpret=True),
}
IMPLEMENTATIONS = ("reference", "triton")
SETTINGS = [(bits, symmetric) for bits in (4, 8) for symmetric in (True, False)]


@pytest.mark.parametrize(("bits", "symmetric"), SETTINGS)
@pytest.mark.parametrize("group_size", [32, 576])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_error_is_at_most_half_a_step(implementation, group_size, bits, symmetric):
    x = random_rows(5, 576)
    out = QUANTIZE[implementation](x, bits=bits, group_size=group_size, symmetric=symmetric, clip_ratio=1.0)
    steps = np.repeat(np.asarray(out.scale, np.float64), group_size, axis=1)
    assert np.all(np.abs(activation_in_float64(out) - np.asarray(x)) <= 0.5001 * steps)


@pytest.mark.parametrize(("bits", "symmetric"), SETTINGS)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_codes_span_exactly_the_range_of_their_bits(implementation, bits, symmetric):
    x = jnp.concatenate([random_rows(3, 192), jnp.full((3, 1), -9.0), jnp.full((3, 63), 9.0)], axis=1)
    codes = QUANTIZE[implementation](x, bits=bits, group_size=256, symmetric=symmetric, clip_ratio=0.5).codes
    assert codes.dtype == jnp.int8
    assert (int(codes.min()), int(codes.max())) == (-(2 ** (bits - 1)) + symmetric, 2 ** (bits - 1) - 1)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_zero_stays_exactly_zero_beside_an_outlier(implementation, bits):
    x = jnp.zeros((1, 64)).at[0, 3].set(17.3).at[0, 9].set(-1.1)
    out = QUANTIZE[implementation](x, bits=bits, group_size=64, symmetric=False, clip_ratio=1.0)
    zeros = np.delete(activation_in_float64(out)[0], [3, 9])
    assert np.abs(zeros).max() < 1e-5


@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("constant", [0.0, 3.0, -1e30])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_row_without_spread_survives(implementation, constant, symmetric):
    x = jnp.full((2, 64), constant)
    out = QUANTIZE[implementation](x, bits=8, group_size=64, symmetric=symmetric, clip_ratio=1.0)
    np.testing.assert_allclose(activation_in_float64(out), np.full((2, 64), constant), rtol=1e-6, atol=1e-20)


@pytest.mark.parametrize(
    ("implementation", "count", "symmetric"),
    newest_jax_by_feature(itertools.product(("triton", "reference"), [1, 2], [True, False])),
    ids=str,
)
def test_the_loudest_groups_of_each_token_take_8_bits(implementation, count, symmetric):
    x = random_rows(7, 3 * 32)  # three groups: in a kernel, a block with a fourth that does not exist
    loudness = jnp.asarray([[1.0, 5.0, 20.0]] * 4 + [[20.0, 1.0, 5.0]] * 3)
    x = x * jnp.repeat(loudness, 32, axis=1)
    settings = {"bits": 4, "group_size": 32, "symmetric": symmetric, "clip_ratio": 1.0}
    out = QUANTIZE[implementation](x, **settings, outlier_groups=count)
    loud = np.argsort(-np.asarray(loudness), axis=1)[:, :count]
    wide = QUANTIZE["reference"](x, **{**settings, "bits": 8})
    narrow = QUANTIZE["reference"](x, **settings)
    for name in ("codes", "scale") if symmetric else ("codes", "scale", "offset"):
        expected = np.array(getattr(narrow, name)).reshape(7, 3, -1)
        for token in range(7):
            expected[token, loud[token]] = np.asarray(getattr(wide, name)).reshape(7, 3, -1)[token, loud[token]]
        np.testing.assert_array_equal(np.asarray(getattr(out, name)).reshape(7, 3, -1), expected)


@pytest.mark.parametrize(("bits", "symmetric"), SETTINGS)
@pytest.mark.parametrize(
    "shape", [(1, 576, 576, 0), (33, 576, 32, 2), (5, 96, 96, 1), (3, 576, 96, 0), (2, 3, 128, 64, 2)], ids=str
)
def test_interpreted_triton_gives_the_codes_of_the_reference(shape, bits, symmetric):
    """Axes, group size and outlier groups: one group and several, none of them, some and all in 8 bits."""
    *shape, group_size, outlier_groups = shape
    x = random_rows(*shape, dtype=jnp.bfloat16)
    settings = {"bits": bits, "group_size": group_size, "symmetric": symmetric, "clip_ratio": 1.0}
    settings["outlier_groups"] = outlier_groups
    out, expected = (QUANTIZE[name](x, **settings) for name in ("triton", "reference"))
    np.testing.assert_array_equal(out.codes, expected.codes)
    np.testing.assert_array_equal(out.scale, expected.scale)
    assert out.symmetric == symmetric
    if not symmetric:
        np.testing.assert_array_equal(out.offset, expected.offset)


def test_one_scale_per_token_is_the_default():
    out = quantize_activations(random_rows(2, 3, 64), bits=4)
    assert out.scale.shape == (2, 3, 1)
    assert out.bits == 4
    assert out.symmetric


def test_arguments_out_of_range_are_named():
    x = random_rows(2, 96)
    with pytest.raises(ValueError, match="K=96 is not a multiple of group_size=64; use 32 or"):
        quantize_activations(x, bits=8, group_size=64)
    with pytest.raises(ValueError, match="bits=5; use 4 or 8"):
        quantize_activations(x, bits=5)
    with pytest.raises(ValueError, match=r"clip_ratio=0\.0"):
        quantize_activations(x, bits=8, clip_ratio=0.0)
    with pytest.raises(ValueError, match="outlier_groups=4; x has 3 groups, use 0 to 3"):
        quantize_activations(x, bits=4, group_size=32, outlier_groups=4)
    with pytest.raises(ValueError, match="x is float8_e4m3fn"):
        quantize_activations(jnp.ones((2, 96), jnp.float8_e4m3fn), bits=8)


@pytest.mark.parametrize(("group_size", "outlier_groups"), [(576, 0), (32, 0), (96, 2)])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_codes_come_in_the_order_of_the_layout(implementation, group_size, outlier_groups):
    settings = {"bits": 8, "group_size": group_size, "symmetric": True, "clip_ratio": 1.0}
    quantize = functools.partial(
        QUANTIZE[implementation], random_rows(5, 576), **settings, outlier_groups=outlier_groups
    )
    plain, ordered = quantize(), quantize(layout=Layout.WGMMA)
    assert ordered.layout is Layout.WGMMA
    np.testing.assert_array_equal(ordered.codes, order_activation_codes(plain.codes, Layout.WGMMA))
    np.testing.assert_array_equal(ordered.scale, plain.scale)


def test_groups_that_the_layout_would_mix_are_refused():
    with pytest.raises(ValueError, match="layout wgmma needs groups of a multiple of 16, not 24"):
        quantize_activations(random_rows(2, 48), bits=8, group_size=24, layout=Layout.WGMMA)


@pytest.mark.parametrize("num_groups", [1, 3], ids=["whole row", "groups"])
def test_codes_are_summed_by_groups_with_zeros_for_rows_that_pad(num_groups):
    codes = np.random.default_rng(0).integers(-127, 128, (5, 384), np.int8)
    sums = sums_of_codes(jnp.asarray(codes), num_groups=num_groups, factor=0.25, num_rows=16, interpret=True)
    expected = np.zeros((num_groups, 16), np.float32)
    expected[:, :5] = codes.reshape(5, num_groups, -1).sum(axis=-1, dtype=np.int32).T / 4
    np.testing.assert_array_equal(sums, expected)


@pytest.mark.parametrize("dtype", [jnp.int8, jnp.bfloat16], ids=str)
def test_rows_are_copied_above_rows_of_zeros(dtype):
    rows = jnp.asarray(np.random.default_rng(0).integers(-127, 128, (11, 1280)), dtype)
    np.testing.assert_array_equal(padded(rows, 16, interpret=True), np.pad(rows, ((0, 5), (0, 0))))
