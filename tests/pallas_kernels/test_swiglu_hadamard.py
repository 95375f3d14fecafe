"""Contracts of swiglu_hadamard and swiglu_hadamard_quantize, for the references and the interpreted Triton kernels."""

from __future__ import annotations

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import Layout, hadamard, quantize_activations, swiglu, swiglu_hadamard, swiglu_hadamard_quantize
from pallas_kernels.arrays.weight import order_activation_codes
from pallas_kernels.hadamard.gpu_triton import Cut
from pallas_kernels.hadamard.matrices import hadamard_matrix
from pallas_kernels.swiglu_hadamard import gpu_triton as float_triton
from pallas_kernels.swiglu_hadamard import reference as float_reference
from pallas_kernels.swiglu_hadamard_quantize import gpu_triton as quantize_triton
from pallas_kernels.swiglu_hadamard_quantize import reference as quantize_reference
from tests.pallas_kernels.kernel_cases import (
    assert_nearly_the_same,
    assert_the_same,
    in_one_program,
    random_rows,
    relative_error,
    swiglu_in_float64,
)

FLOAT = {
    "reference": in_one_program(float_reference.swiglu_hadamard),
    "triton": functools.partial(float_triton.swiglu_hadamard, interpret=True),
}
QUANTIZE = {
    "reference": in_one_program(quantize_reference.swiglu_hadamard_quantize),
    "triton": functools.partial(quantize_triton.swiglu_hadamard_quantize, interpret=True),
}
QUANTIZE_ROTATED = in_one_program(functools.partial(quantize_activations, implementation="reference"))
# K, the values of a transform, and a dtype: one tile; several small transforms under one matrix, in one section and in
# two; two tiles, padded; several transforms with a core; many chunks and tiles.
SIZES = [
    (1536, 1536, jnp.bfloat16),
    (1536, 32, jnp.bfloat16),
    (4608, 512, jnp.bfloat16),
    (576, 576, jnp.float32),
    (1536, 768, jnp.float16),
    (2752, 2752, jnp.bfloat16),
]
GATE = ["swiglu"]
ALL = ["swiglu_hadamard_quantize"]
PIECES = ["swiglu_hadamard", "quantize_pieces"]
GROUPS = ["swiglu_hadamard", "quantize_activations"]
# K, values of a transform, group size, outlier groups, bits, symmetric, and the kernels: the gated unit in one of its
# own where sections have several tiles, the quantiser where groups do not lie in tiles.
WAYS = [
    (1536, 1536, 32, 1, 4, False, ALL),
    (1536, 32, 1536, 0, 8, True, ALL),
    (4608, 512, 128, 0, 4, True, ALL),
    (4096, 4096, 128, 0, 8, True, ALL),
    (8192, 8192, 128, 0, 8, True, GATE + ALL),
    (4608, 512, 4608, 0, 8, True, PIECES),
    (4608, 512, 4608, 1, 4, True, PIECES),
    (4608, 512, 4608, 0, 8, False, GROUPS),
    (4608, 512, 128, 2, 4, False, GROUPS),
    (576, 576, 576, 0, 8, True, GATE + PIECES),
    (576, 576, 96, 2, 4, False, GATE + GROUPS),
    (1536, 768, 32, 0, 8, False, GROUPS),
    (6720, 320, 6720, 0, 8, True, PIECES),
]

implementations = pytest.mark.parametrize("implementation", ["reference", "triton"])
ways = pytest.mark.parametrize(("k", "block", "group_size", "outlier_groups", "bits", "symmetric", "kernels"), WAYS)


def settings_of(group_size, outlier_groups=0, bits=8, symmetric=True):
    shape = {"group_size": group_size, "outlier_groups": outlier_groups}
    return {"bits": bits, "symmetric": symmetric, "clip_ratio": 0.95, **shape}


def transformed_in_float64(x, block):
    blocks = np.asarray(x, np.float64).reshape(*x.shape[:-1], -1, block)
    return (blocks @ hadamard_matrix(block).T.astype(np.float64) / np.sqrt(block)).reshape(x.shape)


def test_the_references_have_the_bits_of_the_separate_operations():
    gate_up = random_rows(2, 3, 3072, dtype=jnp.bfloat16)
    rotated = hadamard(swiglu(gate_up).reshape(2, 3, 48, 32), implementation="reference").reshape(2, 3, 1536)
    np.testing.assert_array_equal(swiglu_hadamard(gate_up, block=32, implementation="reference"), rotated)
    settings = settings_of(32, 2, bits=4, symmetric=False)
    expected = quantize_activations(rotated, **settings, implementation="reference")
    assert_the_same(swiglu_hadamard_quantize(gate_up, block=32, **settings, implementation="reference"), expected)


@pytest.mark.newest_jax
@pytest.mark.parametrize(("k", "block", "dtype"), SIZES)
def test_interpreted_triton_transforms_the_product_rounded_once(k, block, dtype):
    gate_up = random_rows(2, 2 * k, dtype=dtype)
    product = jnp.asarray(swiglu_in_float64(gate_up), jnp.float32).astype(dtype)
    out = FLOAT["triton"](gate_up, block=block)
    assert out.dtype == dtype
    bound = 4e-7 if dtype == jnp.float32 else 0.6 * float(jnp.finfo(dtype).eps)
    assert relative_error(out, transformed_in_float64(product, block)) < bound


@ways
def test_interpreted_codes_are_those_of_the_separate_kernels(
    k, block, group_size, outlier_groups, bits, symmetric, kernels
):
    gate_up = random_rows(2, 2 * k, dtype=jnp.bfloat16)
    settings = settings_of(group_size, outlier_groups, bits, symmetric)
    out = QUANTIZE["triton"](gate_up, block=block, **settings)
    rotated = FLOAT["triton"](gate_up, block=block)
    expected = QUANTIZE_ROTATED(rotated, **settings)
    assert_nearly_the_same(out, expected, jnp.float32, equal_codes=0.9999)


@ways
def test_sizes_and_settings_decide_which_kernels_there_are(
    k, block, group_size, outlier_groups, bits, symmetric, kernels
):
    settings = settings_of(group_size, outlier_groups, bits, symmetric)
    traced = jax.make_jaxpr(functools.partial(QUANTIZE["triton"], block=block, **settings))
    program = str(traced(jax.ShapeDtypeStruct((2, 2 * k), jnp.bfloat16)))
    assert program.count("pallas_call[") == len(kernels)
    assert re.findall(r"name=(swiglu\w*|quantize\w*)", program) == kernels


@implementations
@pytest.mark.parametrize("group_size", [32, 576])
def test_rows_do_not_depend_on_the_rows_beside_them(group_size, implementation):
    """Nor on an infinity among them."""
    gate_up = random_rows(5, 2 * 576, dtype=jnp.bfloat16)
    settings = settings_of(group_size)
    many = FLOAT[implementation](gate_up, block=576)
    codes = QUANTIZE[implementation](gate_up, block=576, **settings)
    few = gate_up[:3].at[2].set(jnp.inf)
    np.testing.assert_array_equal(FLOAT[implementation](few, block=576)[:2], many[:2])
    alone = QUANTIZE[implementation](few, block=576, **settings)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a[:2], b[:2]), alone, codes)


@implementations
@pytest.mark.parametrize(
    ("k", "block", "group_size", "symmetric"),
    [(1536, 1536, 128, True), (4608, 512, 4608, True), (4608, 512, 4608, False)],
    ids=["all", "pieces", "groups"],
)
def test_codes_come_in_the_order_of_the_layout(k, block, group_size, symmetric, implementation):
    gate_up = random_rows(2, 2 * k, dtype=jnp.bfloat16)
    settings = settings_of(group_size, symmetric=symmetric)
    produce = functools.partial(QUANTIZE[implementation], gate_up, block=block, **settings)
    plain, ordered = produce(), produce(layout=Layout.WGMMA)
    assert ordered.layout is Layout.WGMMA
    np.testing.assert_array_equal(ordered.codes, order_activation_codes(plain.codes, Layout.WGMMA))
    np.testing.assert_array_equal(ordered.scale, plain.scale)


@pytest.mark.parametrize(
    ("k", "block", "rows", "width", "section", "tile"),
    [
        (14336, 14336, 112, 128, 112, 32),
        (14336, 512, 112, 128, 32, 32),
        (14336, 32, 112, 128, 32, 32),
        (1536, 32, 12, 128, 16, 16),
        (11008, 11008, 172, 64, 172, 32),
        (18944, 18944, 148, 128, 148, 32),
    ],
)
def test_tokens_are_cut_into_tiles(k, block, rows, width, section, tile):
    cut = Cut.of(k, block)
    assert (cut.rows, cut.width, cut.section, cut.tile) == (rows, width, section, tile)


@pytest.mark.parametrize(("k", "block"), [(1536, 32), (1536, 1536), (4608, 512)])
def test_the_matrices_of_a_cut_are_the_transform(k, block):
    cut = Cut.of(k, block)
    left, right = (np.asarray(matrix, np.float32) for matrix in cut.matrices())
    section = np.kron(left[: cut.section, : cut.section], right)
    transform = np.kron(np.eye(section.shape[0] // block, dtype=np.float32), hadamard_matrix(block))
    np.testing.assert_array_equal(section, transform)


def test_one_transform_and_one_scale_of_all_values_are_the_default():
    gate_up = random_rows(2, 3, 1152)
    np.testing.assert_array_equal(swiglu_hadamard(gate_up), swiglu_hadamard(gate_up, block=576))
    out = swiglu_hadamard_quantize(gate_up, bits=4)
    assert (out.codes.shape, out.scale.shape, out.bits, out.symmetric) == ((2, 3, 576), (2, 3, 1), 4, True)


@pytest.mark.parametrize("operation", [swiglu_hadamard, functools.partial(swiglu_hadamard_quantize, bits=8)])
def test_arguments_that_do_not_fit_are_named(operation):
    x = random_rows(2, 192)
    with pytest.raises(ValueError, match="last axis of 191; use 2 \\* K"):
        operation(x[:, :191])
    with pytest.raises(ValueError, match="block=36 does not divide K=96; use a divisor, or None for all of them"):
        operation(x, block=36)
    with pytest.raises(ValueError, match=r"no Hadamard matrix for K=6 can be constructed here; .* use 12"):
        operation(x, block=6)
    with pytest.raises(ValueError, match="is float8_e4m3fn; use float32, bfloat16 or float16"):
        operation(x.astype(jnp.float8_e4m3fn))


def test_triton_says_which_sizes_it_cannot_serve():
    assert float_triton.obstacle(14336, 32) is None
    assert float_triton.obstacle(24, 8) == "needs K to be a multiple of 16; this is 24"
    assert float_triton.obstacle(96, 96) == "needs transforms of a multiple of 16 times 12 values; this is 96"
    assert quantize_triton.obstacle(14336, 32, 32, 2) is None
    assert "needs groups of at most" in (quantize_triton.obstacle(131072, 32, 131072, 0) or "")
