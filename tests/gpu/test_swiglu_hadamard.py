"""The gated unit with its Hadamard transform and quantiser on an NVIDIA GPU, at the MLP sizes of real models."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import Layout, hadamard, quantize_activations, swiglu_hadamard, swiglu_hadamard_quantize
from pallas_kernels.accuracy import allowed_error
from pallas_kernels.hadamard.matrices import hadamard_matrix
from tests.pallas_kernels.kernel_cases import random_rows, relative_error, swiglu_in_float64

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs an NVIDIA GPU"),
]

ROWS = (1, 5, 64, 257)
OPEN = 32.0  # a gate whose silu is the gate itself, and which scales by a power of two
# K and the values of a transform: SmolLM2, Llama-3-8B; Llama-2-7B, -13B, Qwen2.5-7B, -32B, Llama-3-70B, Qwen2.5-72B.
SIZES = [(1536, 1536), (1536, 32), (14336, 14336), (14336, 32), (14336, 512), (3072, 1536)]
SIZES += [(k, k) for k in (11008, 13824, 18944, 27648, 28672, 29568)]
# K, values of a transform, group size and outlier groups: in one kernel, and with gated unit, quantiser or both apart.
QUANTIZED = [(1536, 1536, None, 0), (1536, 1536, 32, 1), (1536, 32, 32, 10), (3072, 1536, 32, 0)]
QUANTIZED += [(14336, 14336, None, 0), (14336, 14336, 128, 0), (14336, 14336, 32, 1), (14336, 32, 32, 10)]
QUANTIZED += [(14336, 32, None, 0), (14336, 32, 32, 0), (11008, 11008, None, 0), (18944, 18944, None, 0)]
QUANTIZED += [(27648, 27648, 96, 0), (28672, 28672, None, 0), (29568, 29568, None, 0)]

dtypes = pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32], ids=["bf16", "f16", "f32"])


def rotate(gate_up, block):
    return swiglu_hadamard(gate_up, block=block, implementation="triton")


def assert_each_token_stands_alone(outputs):
    """It has the bits it has among the most tokens."""
    for num_rows, out in outputs.items():
        first = jax.tree.map(lambda a, n=num_rows: a[:n], outputs[max(ROWS)])
        jax.tree.map(np.testing.assert_array_equal, out, first)


@dtypes
@pytest.mark.parametrize(("k", "block"), SIZES)
def test_an_open_gate_leaves_the_bits_of_the_transform(k, block, dtype):
    up = random_rows(max(ROWS), k, dtype=dtype)
    gate_up, x = jnp.concatenate([jnp.full_like(up, OPEN), up], axis=1), up * OPEN
    outputs = {m: np.asarray(rotate(gate_up[:m], block)) for m in ROWS}
    assert_each_token_stands_alone(outputs)
    expected = hadamard(x.reshape(len(x), -1, block), implementation="triton").reshape(x.shape)
    np.testing.assert_array_equal(outputs[max(ROWS)], np.asarray(expected))


@dtypes
@pytest.mark.parametrize(("k", "block"), SIZES)
def test_it_is_the_definition_and_each_token_stands_alone(k, block, dtype):
    gate_up = random_rows(max(ROWS), 2 * k, dtype=dtype)
    outputs = {m: np.asarray(rotate(gate_up[:m], block)) for m in ROWS}
    assert_each_token_stands_alone(outputs)
    few = 8  # rows, since float64 is slow
    product = swiglu_in_float64(gate_up[:few]).astype(np.float32).astype(dtype)
    blocks = np.asarray(product, np.float64).reshape(few, -1, block)
    expected = (blocks @ hadamard_matrix(block).T.astype(np.float64) / np.sqrt(block)).reshape(few, k)
    bound = allowed_error("swiglu_hadamard", dtype, num_inputs=k, implementation="triton")
    assert relative_error(outputs[max(ROWS)][:few], expected) < bound


@pytest.mark.parametrize(("bits", "symmetric"), [(4, False), (8, True)])
@dtypes
@pytest.mark.parametrize("shape", QUANTIZED, ids=str)
def test_codes_are_those_of_the_separate_kernels_and_each_token_stands_alone(shape, dtype, bits, symmetric):
    k, block, group_size, outlier_groups = shape
    settings = {"bits": bits, "symmetric": symmetric, "group_size": group_size, "outlier_groups": outlier_groups}
    gate_up = random_rows(max(ROWS), 2 * k, dtype=dtype)
    quantize = functools.partial(swiglu_hadamard_quantize, block=block, implementation="triton", **settings)
    outputs = {m: quantize(gate_up[:m]) for m in ROWS}
    assert_each_token_stands_alone(outputs)
    expected = quantize_activations(rotate(gate_up, block), implementation="triton", **settings)
    jax.tree.map(np.testing.assert_array_equal, outputs[max(ROWS)], expected)


@pytest.mark.parametrize(("k", "block", "group_size"), [(14336, 14336, None), (14336, 14336, 128), (14336, 32, 64)])
def test_codes_come_in_the_order_of_the_layout(k, block, group_size):
    gate_up = random_rows(5, 2 * k, dtype=jnp.bfloat16)
    settings = {"bits": 8, "group_size": group_size, "layout": Layout.WGMMA, "implementation": "triton"}
    out = swiglu_hadamard_quantize(gate_up, block=block, **settings)
    expected = quantize_activations(rotate(gate_up, block), **settings)
    jax.tree.map(np.testing.assert_array_equal, out, expected)


@pytest.mark.parametrize(("implementation", "num_kernels"), [(None, 2), ("triton", 2), ("reference", 0)])
def test_none_takes_triton(implementation, num_kernels):
    gate_up = random_rows(3, 3072, dtype=jnp.bfloat16)

    def both():
        settings = {"block": 32, "implementation": implementation}
        return swiglu_hadamard(gate_up, **settings), swiglu_hadamard_quantize(gate_up, bits=8, **settings)

    assert jax.jit(both).lower().as_text().count("__gpu$xla.gpu.triton") == num_kernels
