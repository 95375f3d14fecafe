"""What quantises its own result, and the gated unit in float, on an NVIDIA GPU at the shapes of real models."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import (
    PartialSums,
    quantize_activations,
    rms_norm_quantize,
    swiglu,
    swiglu_quantize,
    value_of,
)
from pallas_kernels.accuracy import EQUAL_CODES
from tests.pallas_kernels.kernel_cases import (
    assert_nearly_the_same,
    assert_rounded_once,
    assert_the_same,
    random_rows,
    swiglu_in_float64,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs an NVIDIA GPU"),
]

ROWS = (1, 5, 128)
FLOAT_ROWS = (1, 6, 257)  # the last of a prefill
EPSILON = 1e-5
# Inputs, group size and outlier groups.
NORM_SHAPES = [(576, None, 0), (576, 32, 0), (576, 32, 1), (4096, None, 0), (4096, 128, 0), (4096, 32, 2)]
SWIGLU_SHAPES = [(1536, None, 0), (1536, 32, 0), (1536, 32, 2), (14336, None, 0), (14336, 128, 0), (14336, 128, 3)]

dtypes = pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32], ids=["bf16", "f16", "f32"])
settings_of_all_kinds = pytest.mark.parametrize(("bits", "symmetric"), [(4, False), (8, True)])


def on_cpu(*arrays):
    return [jax.device_put(array, jax.devices("cpu")[0]) for array in arrays]


def assert_rows_agree(outputs, widest):
    """A token has the bits it has among the most tokens."""
    for num_rows, out in outputs.items():
        first = jax.tree.map(lambda a, n=num_rows: a[:n], widest)
        jax.tree.map(np.testing.assert_array_equal, out, first)


@settings_of_all_kinds
@dtypes
@pytest.mark.parametrize("shape", NORM_SHAPES, ids=str)
def test_norm_has_the_codes_of_the_reference_and_each_token_stands_alone(shape, dtype, bits, symmetric):
    k, group_size, outlier_groups = shape
    settings = {"bits": bits, "group_size": group_size, "symmetric": symmetric, "outlier_groups": outlier_groups}
    x, gain = random_rows(max(ROWS), k, dtype=dtype), random_rows(k, dtype=dtype, seed=2)
    outputs = {m: rms_norm_quantize(x[:m], gain, epsilon=EPSILON, **settings, implementation="triton") for m in ROWS}
    expected = rms_norm_quantize(*on_cpu(x, gain), epsilon=EPSILON, **settings, implementation="reference")
    assert_nearly_the_same(outputs[max(ROWS)], expected, dtype, equal_codes=EQUAL_CODES)
    assert_rows_agree(outputs, outputs[max(ROWS)])


@settings_of_all_kinds
@dtypes
@pytest.mark.parametrize("shape", SWIGLU_SHAPES, ids=str)
def test_swiglu_rounds_once_and_each_token_stands_alone(shape, dtype, bits, symmetric):
    k, group_size, outlier_groups = shape
    settings = {"bits": bits, "group_size": group_size, "symmetric": symmetric, "outlier_groups": outlier_groups}
    gate_up = random_rows(max(ROWS), 2 * k, dtype=dtype)
    outputs = {m: swiglu_quantize(gate_up[:m], **settings, implementation="triton") for m in ROWS}
    [rounded_once] = on_cpu(swiglu_in_float64(gate_up).astype(np.float32).astype(dtype))
    expected = quantize_activations(rounded_once, **settings, implementation="reference")
    assert_nearly_the_same(outputs[max(ROWS)], expected, dtype, equal_codes=EQUAL_CODES)
    assert_rows_agree(outputs, outputs[max(ROWS)])


# SmolLM2, Llama-3-8B, Qwen2.5-7B, Llama-3-70B; a last piece that is masked, and rows that are not aligned.
@dtypes
@pytest.mark.parametrize("k", [1536, 14336, 18944, 28672, 1000, 1025])
def test_float_swiglu_rounds_once_and_each_token_stands_alone(k, dtype):
    gate_up = random_rows(max(FLOAT_ROWS), 2 * k, dtype=dtype)
    outputs = {m: swiglu(gate_up[:m], implementation="triton") for m in FLOAT_ROWS}
    assert outputs[1].dtype == dtype
    assert_rows_agree(outputs, outputs[max(FLOAT_ROWS)])
    out = outputs[max(FLOAT_ROWS)]
    assert_rounded_once(out, swiglu_in_float64(gate_up))
    # XLA may round to 16 bits after each operation of silu, too.
    expected = np.asarray(swiglu(gate_up, implementation="reference"), np.float64)
    bound = 2 * float(jnp.finfo(dtype).eps) + 2e-6
    np.testing.assert_allclose(np.asarray(out, np.float64), expected, rtol=bound, atol=1e-6)


@dtypes
@pytest.mark.parametrize(("k", "group_size"), [(1536, 1536), (1536, 32), (14336, 14336), (14336, 128)])
def test_drafts_quantise_the_product_that_float_swiglu_writes(k, group_size, dtype):
    gate_up = random_rows(65, 2 * k, dtype=dtype)
    for num_rows in (5, 65):  # some tokens are taken in pieces, more of them whole
        settings = {"bits": 8, "group_size": group_size, "implementation": "triton"}
        product = swiglu(gate_up[:num_rows], implementation="triton")
        assert_the_same(swiglu_quantize(gate_up[:num_rows], **settings), quantize_activations(product, **settings))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16], ids=["bf16", "f16"])
@pytest.mark.parametrize(("k", "num_parts"), [(1536, 9), (1536, 12), (14336, 2)])
def test_swiglu_adds_partial_sums_to_the_bits_of_their_value(k, num_parts, dtype):
    sums = PartialSums(random_rows(num_parts, 65, 2 * k), dtype)
    for compute in (swiglu, functools.partial(swiglu_quantize, bits=8), functools.partial(swiglu_quantize, bits=4)):
        found, expected = (compute(gate_up, implementation="triton") for gate_up in (sums, jax.jit(value_of)(sums)))
        jax.tree.map(np.testing.assert_array_equal, found, expected)


@pytest.mark.parametrize(("implementation", "num_kernels"), [(None, 3), ("triton", 3), ("reference", 0)])
def test_none_takes_triton(implementation, num_kernels):
    x, gain, gate_up = random_rows(3, 576), random_rows(576, seed=2), random_rows(3, 1152)

    def all_of_them():
        settings = {"bits": 8, "implementation": implementation}
        norm, product = rms_norm_quantize(x, gain, epsilon=EPSILON, **settings), swiglu_quantize(gate_up, **settings)
        return norm, product, swiglu(gate_up, implementation=implementation)

    assert jax.jit(all_of_them).lower().as_text().count("__gpu$xla.gpu.triton") == num_kernels
