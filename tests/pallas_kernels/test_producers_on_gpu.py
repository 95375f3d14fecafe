"""The fused producers on an NVIDIA GPU at the shapes of real models, against what they specify."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import quantize_activations, rms_norm_quantize, swiglu_quantize
from tests.pallas_kernels.kernel_cases import assert_nearly_the_same, random_rows, swiglu_in_float64

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs an NVIDIA GPU"),
]

ROWS = (1, 5, 128)
EPSILON = 1e-5
EQUAL_CODES = 0.995
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


@pytest.mark.parametrize(("implementation", "num_kernels"), [(None, 2), ("triton", 2), ("reference", 0)])
def test_none_takes_triton(implementation, num_kernels):
    x, gain, gate_up = random_rows(3, 576), random_rows(576, seed=2), random_rows(3, 1152)

    def both():
        settings = {"bits": 8, "implementation": implementation}
        return rms_norm_quantize(x, gain, epsilon=EPSILON, **settings), swiglu_quantize(gate_up, **settings)

    assert jax.jit(both).lower().as_text().count("__gpu$xla.gpu.triton") == num_kernels
