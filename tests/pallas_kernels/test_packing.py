"""Invariants of the packed weight."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import check_group_size, dequantize, pack_codes, unpack_codes, with_group_sums
from pallas_kernels.packing import dequantize_planes
from tests.pallas_kernels.kernel_cases import random_weight, weight_in_float64


@pytest.mark.parametrize("shape", [(4, 64), (3, 4, 96), (1, 2)], ids=str)
def test_unpacking_inverts_packing(shape):
    codes = np.random.default_rng(0).integers(0, 16, shape, dtype=np.uint8)
    packed = pack_codes(jnp.asarray(codes))
    assert packed.shape == (*shape[:-1], shape[-1] // 2)
    np.testing.assert_array_equal(unpack_codes(packed), codes)


def test_a_byte_holds_input_j_and_input_j_plus_half():
    codes = jnp.arange(8, dtype=jnp.uint8)[None]
    np.testing.assert_array_equal(pack_codes(codes), [[0x40, 0x51, 0x62, 0x73]])


@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("shape", [(8, 128, 32), (8, 192, 64), (8, 576, 64), (8, 128, 128)], ids=str)
def test_dequantize_is_the_definition(shape, symmetric):
    weight = random_weight(*shape, symmetric=symmetric)
    np.testing.assert_allclose(dequantize(weight), weight_in_float64(weight), rtol=1e-5, atol=1e-7)
    np.testing.assert_array_equal(dequantize(weight), jnp.concatenate(dequantize_planes(weight, jnp.float32), axis=-1))


def test_shape_properties_and_bytes():
    weight = random_weight(8, 128, 32, symmetric=False)
    assert (weight.num_outputs, weight.num_inputs, weight.num_groups, weight.group_size) == (8, 128, 4, 32)
    assert not weight.symmetric
    assert weight.nbytes == 8 * 64 + 3 * 4 * 8 * 2


@pytest.mark.parametrize("shape", [(8, 128, 32), (8, 192, 64)], ids=str)
def test_group_sums_are_sums_of_weights(shape):
    weight = random_weight(*shape, symmetric=False, scale_dtype=jnp.float32)
    groups = weight_in_float64(weight).reshape(8, weight.num_groups, weight.group_size).sum(-1).T
    np.testing.assert_allclose(weight.group_sum, groups, rtol=1e-4, atol=1e-5)
    finer = with_group_sums(weight, weight.group_size // 2).group_sum
    np.testing.assert_allclose(finer[0::2] + finer[1::2], groups, rtol=1e-4, atol=1e-5)


def test_stacked_layers_dequantize_like_each_layer():
    layers = [random_weight(8, 128, 32, symmetric=False, seed=seed) for seed in range(3)]
    stack = jax.tree.map(lambda *arrays: jnp.stack(arrays), *layers)
    np.testing.assert_array_equal(dequantize(stack), jnp.stack([dequantize(layer) for layer in layers]))


def test_group_sizes_that_do_not_fit_are_named_with_those_that_do():
    check_group_size(576, 64)
    with pytest.raises(ValueError, match=r"linear: K=576 is not a multiple of group_size=128; use 32 or 64 or the wh"):
        check_group_size(576, 128, what="linear")
    with pytest.raises(ValueError, match="K=7 is odd"):
        check_group_size(7, 7)
