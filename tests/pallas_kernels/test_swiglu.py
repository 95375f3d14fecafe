"""Contracts of swiglu, for the reference and the interpreted Triton kernel alike."""

from __future__ import annotations

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import Layout, PartialSums, quantize_activations, swiglu
from pallas_kernels.swiglu import gpu_triton as triton
from pallas_kernels.swiglu import reference
from pallas_kernels.swiglu_quantize import gpu_triton as quantize_triton
from tests.pallas_kernels.kernel_cases import (
    assert_rounded_once,
    assert_the_same,
    in_one_program,
    newest_jax_by_feature,
    random_rows,
    relative_error,
    swiglu_in_float64,
)

SWIGLU = {"reference": in_one_program(reference.swiglu), "triton": functools.partial(triton.swiglu, interpret=True)}
QUANTIZE = in_one_program(functools.partial(quantize_activations, implementation="reference"))
# Axes of the product: part of a piece, an odd one, pieces that fill, a prefill's two axes and a piece of one value.
SHAPES = [(1, 576), (3, 99), (2, 2048), (2, 3, 1025)]

dtypes = pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16], ids=["f32", "bf16", "f16"])
shapes = pytest.mark.parametrize("shape", SHAPES, ids=str)
implementations = pytest.mark.parametrize("implementation", SWIGLU)


def gate_and_up(shape, dtype):
    return random_rows(*shape[:-1], 2 * shape[-1], dtype=dtype)


@pytest.mark.parametrize(
    ("implementation", "shape", "dtype"),
    newest_jax_by_feature(itertools.product(("triton", "reference"), SHAPES, ("float32", "bfloat16", "float16"))),
    ids=str,
)
def test_it_is_the_definition_in_the_dtype_of_its_input(implementation, shape, dtype):
    dtype = jnp.dtype(dtype)
    gate_up = gate_and_up(shape, dtype)
    out = SWIGLU[implementation](gate_up)
    assert (out.shape, out.dtype) == (shape, dtype)
    assert relative_error(out, swiglu_in_float64(gate_up)) < max(float(jnp.finfo(dtype).eps), 4e-7)


@dtypes
@shapes
def test_the_interpreted_kernel_rounds_once(shape, dtype):
    gate_up = gate_and_up(shape, dtype)
    assert_rounded_once(SWIGLU["triton"](gate_up), swiglu_in_float64(gate_up))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16], ids=["bf16", "f16"])
@pytest.mark.parametrize(
    ("k", "group_size", "num_parts"), [(1025, None, 9), (576, 576, 12), (576, 32, 2), (5008, 5008, 3)]
)
def test_partial_sums_are_added_as_they_are_loaded(k, group_size, num_parts, dtype):
    """Bit for bit as their value: by the kernel that writes the product, and by those that write codes."""
    sums = PartialSums(random_rows(num_parts, 2, 2 * k), dtype)
    settings = {"bits": 8, "group_size": group_size, "symmetric": True, "clip_ratio": 1.0, "outlier_groups": 0}
    quantize = functools.partial(quantize_triton.swiglu_quantize, interpret=True, layout=Layout.PLANES, **settings)
    compute = SWIGLU["triton"] if group_size is None else quantize
    jax.tree.map(np.testing.assert_array_equal, compute(sums), compute(sums.value()))


@dtypes
@pytest.mark.parametrize(("k", "group_size"), [(576, 576), (576, 32), (5008, 5008)])
def test_drafts_quantise_the_product_that_it_writes(k, group_size, dtype):
    """Bit for bit, also where they take a token in pieces: the two kernels share the arithmetic."""
    gate_up = random_rows(3, 2 * k, dtype=dtype)
    settings = {"bits": 8, "group_size": group_size, "symmetric": True, "clip_ratio": 1.0, "outlier_groups": 0}
    codes = quantize_triton.swiglu_quantize(gate_up, **settings, interpret=True)
    assert_the_same(codes, QUANTIZE(SWIGLU["triton"](gate_up), **settings))


@dtypes
@implementations
def test_tokens_do_not_depend_on_the_tokens_beside_them(implementation, dtype):
    gate_up = random_rows(20, 2 * 1100, dtype=dtype)
    widest = np.asarray(SWIGLU[implementation](gate_up))
    for num_tokens in (1, 9):
        np.testing.assert_array_equal(np.asarray(SWIGLU[implementation](gate_up[:num_tokens])), widest[:num_tokens])


@implementations
def test_a_gate_far_from_zero_is_open_or_closed(implementation):
    gate_up = jnp.asarray([[-1e4, 0.0, 1e4, 3.0, 5.0, 7.0]], jnp.float32)
    np.testing.assert_array_equal(SWIGLU[implementation](gate_up), [[0.0, 0.0, 7e4]])


def test_a_token_is_spread_over_pieces():
    program = str(jax.make_jaxpr(SWIGLU["triton"])(jax.ShapeDtypeStruct((2, 2 * 14336), jnp.bfloat16)))
    assert program.count("pallas_call[") == 1
    assert "grid=(2, 14)" in program


def test_arguments_that_do_not_fit_are_named():
    x = random_rows(2, 96)
    with pytest.raises(ValueError, match="swiglu: gate_up has a last axis of 95; use 2 \\* K"):
        swiglu(x[:, :95])
    with pytest.raises(ValueError, match="swiglu: gate_up is float8_e4m3fn; use float32, bfloat16 or float16"):
        swiglu(x.astype(jnp.float8_e4m3fn))
