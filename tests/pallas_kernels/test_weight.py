"""Invariants of the packed weight."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import (
    Layout,
    check_group_size,
    dequantize,
    pack_codes,
    quantize_activations,
    unpack_codes,
    upper_nibbles,
    w4a4_matmul,
    w4a16_matmul,
    with_group_sums,
    with_layout,
)
from pallas_kernels.arrays.weight import dequantize_planes, order_activation_codes, order_bytes
from pallas_kernels.w4a4_matmul import gpu_triton as w4a4_triton
from pallas_kernels.w4a16_matmul import gpu_triton as w4a16_triton
from tests.pallas_kernels.kernel_cases import (
    newest_jax_by_feature,
    random_nested_weight,
    random_rows,
    random_weight,
    weight_in_float64,
)


@pytest.mark.parametrize("shape", [(4, 64), (3, 4, 96), (1, 2)], ids=str)
def test_unpacking_inverts_packing(shape):
    codes = np.random.default_rng(0).integers(0, 16, shape, dtype=np.uint8)
    packed = pack_codes(jnp.asarray(codes))
    assert packed.shape == (*shape[:-1], shape[-1] // 2)
    np.testing.assert_array_equal(unpack_codes(packed), codes)


def test_a_byte_holds_input_j_and_input_j_plus_half():
    codes = jnp.arange(8, dtype=jnp.uint8)[None]
    np.testing.assert_array_equal(pack_codes(codes), [[0x40, 0x51, 0x62, 0x73]])


@pytest.mark.parametrize(
    ("shape", "symmetric"),
    newest_jax_by_feature(
        itertools.product([(8, 128, 32), (8, 192, 64), (8, 576, 64), (8, 128, 128)], [True, False]),
        lambda shape, symmetric: (shape[1] // 2 % shape[2] == 0, symmetric),  # whether a group is of one plane
    ),
    ids=str,
)
def test_dequantize_is_the_definition(shape, symmetric):
    weight = random_weight(*shape, symmetric=symmetric)
    out = jax.jit(dequantize)(weight)
    np.testing.assert_allclose(out, weight_in_float64(weight), rtol=1e-5, atol=1e-7)
    planes = jax.jit(dequantize_planes, static_argnums=1)(weight, jnp.float32)
    np.testing.assert_array_equal(out, np.concatenate(planes, axis=-1))


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


@pytest.mark.parametrize("symmetric", [True, False])
def test_group_sums_of_a_nested_weight_are_those_of_the_nibbles_that_meet_integers(symmetric):
    weight = random_nested_weight(8, 128, 32, symmetric=symmetric, scale_dtype=jnp.float32)
    groups = dequantize(upper_nibbles(weight)).reshape(8, 4, 32).sum(-1).T
    np.testing.assert_allclose(weight.group_sum, groups, rtol=1e-4, atol=1e-5)


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


def test_wgmma_order_gives_each_thread_its_operands_of_each_instruction():
    """PTX, "Register Fragments for wgmma.m64nNk16" and k32: A has K across the four threads that share a row."""
    inputs = np.asarray(order_bytes(np.arange(128, dtype=np.uint8)[None], Layout.WGMMA))[0].reshape(4, 8, 4)
    codes = np.asarray(order_activation_codes(jnp.arange(128), Layout.WGMMA)).reshape(4, 2, 4, 4)
    for thread in range(4):
        for instruction in range(8):  # of 16 inputs; a word holds bytes 0, 2 (a register) and 1, 3 (the other)
            first = 16 * instruction + 2 * thread
            assert inputs[thread, instruction].tolist() == [first, first + 8, first + 1, first + 9]
        for instruction in range(4):  # of 32 inputs, two words
            words = inputs[thread, 2 * instruction : 2 * instruction + 2]
            np.testing.assert_array_equal(words, codes[instruction, :, thread])


@pytest.mark.parametrize("in_host_memory", [True, False])
@pytest.mark.parametrize("layers", [(), (3,)], ids=str)
def test_layouts_hold_the_same_weight(layers, in_host_memory):
    weights = [random_weight(8, 512, 128, symmetric=False, seed=seed) for seed in range(3)]
    weight = jax.tree.map(lambda *arrays: jnp.stack(arrays), *weights) if layers else weights[0]
    given = jax.tree.map(np.asarray, weight) if in_host_memory else weight
    laid_out = with_layout(given, Layout.WGMMA)
    assert isinstance(laid_out.packed, np.ndarray) == in_host_memory
    assert not np.array_equal(laid_out.packed, weight.packed)
    np.testing.assert_array_equal(with_layout(laid_out, Layout.PLANES).packed, weight.packed)
    np.testing.assert_array_equal(with_layout(laid_out, Layout.WGMMA).packed, laid_out.packed)
    np.testing.assert_array_equal(dequantize(jax.tree.map(jnp.asarray, laid_out)), dequantize(weight))


def test_the_reference_multiplies_any_layout_and_the_other_kernels_name_the_one_they_read():
    weight, x = random_weight(64, 512, 128, symmetric=False), random_rows(3, 512)
    laid_out = with_layout(weight, Layout.WGMMA)
    np.testing.assert_array_equal(
        w4a16_matmul(x, laid_out, implementation="reference"), w4a16_matmul(x, weight, implementation="reference")
    )
    codes = {layout: quantize_activations(x, bits=8, layout=layout, implementation="reference") for layout in Layout}
    products = [
        w4a4_matmul(x, w, dtype=jnp.float32, implementation="reference")
        for x in codes.values()
        for w in (weight, laid_out)
    ]
    for product in products[1:]:
        np.testing.assert_array_equal(product, products[0])
    assert "needs a weight in layout 'planes', not 'wgmma'" in w4a16_triton.obstacle(x.dtype, laid_out)
    assert "needs a weight in layout 'planes', not 'wgmma'" in w4a4_triton.obstacle(codes[Layout.PLANES], laid_out)
    assert "needs activations in layout 'planes', not" in w4a4_triton.obstacle(codes[Layout.WGMMA], weight)


def test_an_input_count_that_the_layout_cannot_order_is_named():
    with pytest.raises(ValueError, match="layout wgmma: K=576 is not a multiple of 256; use planes"):
        with_layout(random_weight(8, 576, 64, symmetric=True), Layout.WGMMA)
