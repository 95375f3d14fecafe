"""Round-to-nearest weights."""

from __future__ import annotations

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import check_group_size, unpack_codes
from qspec_jax.errors import UsageError
from qspec_jax.quantization.rtn import quantize_rtn
from tests.tiny import dequantize

WEIGHT = np.random.default_rng(0).standard_normal((48, 384)).astype(np.float32) * 0.05


@pytest.mark.parametrize("group_size", [32, 64, 128, None])
@pytest.mark.parametrize("symmetric", [True, False])
def test_every_weight_is_within_half_a_step_of_its_code(group_size, symmetric):
    quantized = quantize_rtn(jnp.asarray(WEIGHT), group_size=group_size, symmetric=symmetric)
    step = np.repeat(np.abs(np.asarray(quantized.scale, np.float32)).T, group_size or 384, axis=1)
    error = np.abs(np.asarray(dequantize(quantized)) - WEIGHT)
    # Beyond half a step, only what rounding the ends of the grid to float16 adds.
    assert (error <= 0.5 * step + 1e-3 * np.abs(WEIGHT).max() + 15 * step * 2**-11).all()
    assert quantized.symmetric == symmetric
    assert quantized.scale.dtype == jnp.float16


def test_asymmetric_groups_use_the_whole_grid():
    codes = np.asarray(unpack_codes(quantize_rtn(jnp.asarray(WEIGHT + 0.3), group_size=32).packed))
    groups = codes.reshape(48, 12, 32)
    assert (groups.min(-1) == 0).all()
    assert (groups.max(-1) == 15).all()


def test_symmetric_groups_use_the_whole_grid():
    """16 values, not the 15 that lie on both sides of zero: steps are a tenth smaller, and the error by a fifth."""
    quantized = quantize_rtn(jnp.asarray(WEIGHT), group_size=64, symmetric=True)
    groups = WEIGHT.reshape(48, 6, 64).astype(np.float64)
    least, largest = groups.min(-1), groups.max(-1)
    upright, upside_down = np.maximum(-least / 8, largest / 7), np.maximum(largest / 8, -least / 7)
    expected = np.where(upright <= upside_down, upright, -upside_down)
    np.testing.assert_allclose(np.asarray(quantized.scale, np.float64).T, expected, rtol=1e-3)
    codes = np.asarray(unpack_codes(quantized.packed)).reshape(48, 6, 64)
    assert ((codes.min(-1) == 0) | (codes.max(-1) == 15)).all()
    step = np.abs(groups).max(-1, keepdims=True) / 7
    error = np.square(np.asarray(dequantize(quantized)).reshape(groups.shape) - groups).mean()
    assert error < 0.85 * np.square(step * np.round(groups / step) - groups).mean()


@pytest.mark.parametrize("scale", [0.02, -0.02])
def test_weights_on_a_symmetric_grid_are_returned_exactly(scale):
    """As those of Q4_0, which uses all 16 values too, and models trained for it."""
    codes = np.random.default_rng(0).integers(0, 16, (8, 64))
    codes[:, ::32] = 0  # the end that groups reach
    scale = np.float16(scale) * np.linspace(1, 2, 8).astype(np.float16)[:, None]
    weight = scale.astype(np.float32) * (codes - 8)
    quantized = quantize_rtn(jnp.asarray(weight), group_size=32, symmetric=True)
    np.testing.assert_array_equal(dequantize(quantized), weight)
    np.testing.assert_array_equal(unpack_codes(quantized.packed), codes)


def test_smaller_groups_and_offsets_lower_the_error():
    def error(**options):
        return float(np.square(np.asarray(dequantize(quantize_rtn(jnp.asarray(WEIGHT), **options))) - WEIGHT).mean())

    assert error(group_size=32) < error(group_size=128) < error(group_size=None)
    assert error(group_size=32, symmetric=False) < error(group_size=32, symmetric=True)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("value", [0.0, 0.25])
def test_a_constant_group_is_finite_and_close(symmetric, value):
    quantized = quantize_rtn(jnp.full((2, 64), value), group_size=32, symmetric=symmetric)
    np.testing.assert_allclose(np.asarray(dequantize(quantized)), value, atol=1e-3)


def test_a_group_size_that_does_not_divide_names_those_that_do():
    message = r"K=576 is not a multiple of group_size=128; use 32 or 64 or the whole row \(576\)"
    with pytest.raises(ValueError, match=message):
        quantize_rtn(jnp.zeros((4, 576)), group_size=128)


@pytest.mark.parametrize("group_size", [0, True, 32.0, "32"])
def test_what_is_no_number_of_inputs_is_no_group_size(group_size):
    with pytest.raises(ValueError, match=f"K=64 is not a multiple of group_size={group_size!r}; use 32 or 64"):
        check_group_size(64, group_size)


@pytest.mark.parametrize("weight", [jnp.ones(64), jnp.ones((2, 8, 64)), [[1.0] * 64]], ids=lambda given: type(given))
def test_what_is_no_matrix_is_refused(weight):
    with pytest.raises(ValueError, match=r"use an array \[N, K\]"):
        inspect.unwrap(quantize_rtn)(weight, group_size=32)


def test_other_bits_are_refused():
    with pytest.raises(ValueError, match="bits=3 is not supported; use 4 or 8"):
        quantize_rtn(jnp.zeros((4, 64)), group_size=32, bits=3)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("value", "bits"), [(np.nan, 4), (np.inf, 8), (-np.inf, 4), (-1e6, 4), (1e30, 8)])
def test_what_no_grid_spans_is_refused(value, bits, symmetric):
    weight = jnp.asarray(WEIGHT).at[1, 5].set(value)
    with pytest.raises(UsageError, match=r"not all finite numbers, or too large: .* float16, which ends at 65504"):
        quantize_rtn(weight, group_size=32, symmetric=symmetric, bits=bits)


def test_a_stack_is_rounded_as_its_weights_are():
    stack = jnp.asarray([WEIGHT, WEIGHT + 1])
    found = jax.vmap(lambda weight: quantize_rtn(weight, group_size=32))(stack)
    expected = [quantize_rtn(weight, group_size=32) for weight in stack]
    np.testing.assert_array_equal(found.packed, jnp.stack([one.packed for one in expected]))
