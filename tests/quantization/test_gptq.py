"""GPTQ on arrays: what it promises beside rounding to nearest."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import unpack_codes, upper_nibbles
from qspec_jax.quantization.gptq import gptq
from qspec_jax.quantization.rtn import quantize_rtn
from tests.tiny import dequantize

RANDOM = np.random.default_rng(0)
N, K = 48, 192  # two blocks of inputs
WEIGHT = jnp.asarray(RANDOM.standard_normal((N, K)) * 0.05, jnp.float32)
INPUTS = RANDOM.standard_normal((1000, K)) @ RANDOM.standard_normal((K, K)) * np.exp(RANDOM.standard_normal(K))
HESSIAN = jnp.asarray(INPUTS.T @ INPUTS / len(INPUTS), jnp.float32)
GRIDS = pytest.mark.parametrize(("group_size", "symmetric"), [(32, False), (None, True)])


def output_error(quantized):
    """Mean square of what changes in the outputs on ``INPUTS``."""
    change = np.asarray(dequantize(quantized), np.float64) - np.asarray(WEIGHT, np.float64)
    return np.square(INPUTS @ change.T).mean()


@GRIDS
def test_outputs_on_correlated_inputs_change_far_less_than_by_rounding_to_nearest(group_size, symmetric):
    compensated = gptq(WEIGHT, HESSIAN, group_size=group_size, symmetric=symmetric)
    nearest = quantize_rtn(WEIGHT, group_size=group_size, symmetric=symmetric)
    assert output_error(compensated) < 0.4 * output_error(nearest)
    assert jax.tree.map(lambda a: (a.shape, a.dtype), compensated) == jax.tree.map(
        lambda a: (a.shape, a.dtype), nearest
    )


@GRIDS
def test_weights_on_the_grid_are_returned_exactly(group_size, symmetric):
    on_grid = quantize_rtn(WEIGHT, group_size=group_size, symmetric=symmetric)
    again = gptq(dequantize(on_grid), HESSIAN, group_size=group_size, symmetric=symmetric)
    np.testing.assert_array_equal(dequantize(again), dequantize(on_grid))


@GRIDS
def test_inputs_that_have_nothing_in_common_are_rounded_to_nearest(group_size, symmetric):
    grid = {"group_size": group_size, "symmetric": symmetric}
    found = gptq(WEIGHT, 3 * jnp.eye(K), **grid, clip_ratios=(1.0,))
    jax.tree.map(np.testing.assert_array_equal, found, quantize_rtn(WEIGHT, **grid))


def test_the_loudest_input_is_rounded_first_and_others_make_up_for_it():
    loudest = int(np.argmax(np.diagonal(HESSIAN)))
    assert loudest > 0
    grid = {"group_size": 32, "symmetric": False}
    codes, nearest = (
        np.asarray(unpack_codes(weight.packed))
        for weight in (gptq(WEIGHT, HESSIAN, **grid, clip_ratios=(1.0,)), quantize_rtn(WEIGHT, **grid))
    )
    same = (codes == nearest).mean(0)
    assert same[loudest] == 1
    assert (np.delete(same, loudest) < 1).all()


def test_a_silent_calibration_text_leaves_rounding_to_nearest():
    grid = {"group_size": 32, "symmetric": False}
    found = gptq(WEIGHT, jnp.zeros((K, K)), **grid, clip_ratios=(1.0,))
    jax.tree.map(np.testing.assert_array_equal, found, quantize_rtn(WEIGHT, **grid))


def test_clipping_lowers_the_error_of_a_group_with_an_outlier():
    weight = WEIGHT.at[:, 0].set(0.35)
    quiet = jnp.eye(K).at[0, 0].set(1e-3)  # the outlier hardly matters to the outputs
    clipped, spanning = (
        gptq(weight, quiet, group_size=None, symmetric=True, clip_ratios=ratios) for ratios in ((1.0, 0.7), (1.0,))
    )

    def error(quantized):
        return float(np.square(np.asarray(dequantize(quantized) - weight)[:, 1:]).mean())

    assert error(clipped) < 0.8 * error(spanning)


def test_a_group_size_that_does_not_divide_names_those_that_do():
    with pytest.raises(ValueError, match=r"K=192 is not a multiple of group_size=128; use 32 or 64"):
        gptq(WEIGHT, HESSIAN, group_size=128)


def test_both_readers_of_a_nested_weight_are_served_better_than_by_rounding_to_nearest():
    grid = {"group_size": 32, "symmetric": True, "bits": 8}
    found, nearest = gptq(WEIGHT, HESSIAN, **grid), quantize_rtn(WEIGHT, **grid)
    verifying_alone = gptq(WEIGHT, HESSIAN, **grid, upper_share=0.0)
    assert output_error(verifying_alone) < output_error(found) < output_error(nearest)
    assert output_error(upper_nibbles(found)) < 0.99 * output_error(upper_nibbles(nearest))
