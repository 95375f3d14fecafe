"""Contracts of the kernels for TPUs, interpreted against independent formulas and the reference; races raise."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import quantize_activations, with_group_sums
from pallas_kernels.backends.tpu import matmul, words
from pallas_kernels.w4a4_matmul import tpu as w4a4_tpu
from pallas_kernels.w4a16_matmul import tpu as w4a16_tpu
from tests.pallas_kernels.kernel_cases import (
    activation_in_float64,
    random_rows,
    random_weight,
    relative_error,
    weight_in_float64,
)
from tests.pallas_kernels.tpu_cases import MODES, modes, races_raise

pytestmark = pytest.mark.newest_jax


@pytest.fixture(autouse=True)
def no_races():
    with races_raise():
        yield


# N, K, group size, symmetric: several runs in a chunk of lanes; planes that are no whole chunks, and a run that both of
# them share; one scale for all; a group of several chunks, and outputs that fill no block.
@modes
@pytest.mark.parametrize(
    "shape", [(48, 256, 32, True), (32, 576, 64, False), (16, 576, 576, False), (520, 512, 256, True)], ids=str
)
def test_w4a16_equals_the_definition_in_float64(shape, interpret):
    *sizes, symmetric = shape
    weight, x = random_weight(*sizes, symmetric=symmetric), random_rows(5, shape[1])
    expected = np.asarray(x, np.float64) @ weight_in_float64(weight).T
    assert relative_error(w4a16_tpu.w4a16_matmul(x, weight, interpret=interpret), expected) < 3e-7


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16], ids=["bf16", "f16"])
@pytest.mark.parametrize("num_rows", [33, 257])
def test_w4a16_rounds_once_to_the_dtype_of_x(num_rows, dtype):
    """Also a prefill, for which the weight itself is rounded."""
    weight, x = random_weight(32, 256, 64, symmetric=False), random_rows(num_rows, 256, dtype=dtype)
    out = w4a16_tpu.w4a16_matmul(x, weight, interpret=True)
    wide = weight_in_float64(weight)
    expected = np.asarray(x, np.float64) @ np.asarray(wide if num_rows < 257 else jnp.asarray(wide, dtype)).T
    assert out.dtype == dtype
    assert relative_error(out, expected) < 0.4 * float(jnp.finfo(dtype).eps)


# N, K, group size, symmetric; group size of the activations, symmetric, and whether the unit has integers.
@modes
@pytest.mark.parametrize(
    "case",
    [
        (48, 256, 64, True, 256, True, True),
        (32, 256, 64, False, 32, False, True),
        (32, 576, 64, False, 576, False, True),
        (16, 576, 576, False, 576, True, True),
        (32, 256, 64, False, 128, True, False),
    ],
    ids=str,
)
def test_w4a8_equals_the_definition_in_float64(case, interpret):
    n, k, group_size, symmetric, x_group, x_symmetric, integers = case
    weight = random_weight(n, k, group_size, symmetric=symmetric, scale_dtype=jnp.float32)
    weight = with_group_sums(weight, min(group_size, x_group))
    x = quantize_activations(random_rows(5, k), bits=8, group_size=x_group, symmetric=x_symmetric)
    out = w4a4_tpu.w4a4_matmul(x, weight, dtype=jnp.float32, integers=integers, interpret=interpret)
    assert relative_error(out, activation_in_float64(x) @ weight_in_float64(weight).T) < 2e-6


def test_w4a4_takes_codes_of_four_bits_and_leading_axes():
    weight = random_weight(16, 256, 64, symmetric=True, scale_dtype=jnp.float32)
    x = quantize_activations(random_rows(2, 3, 256), bits=4)
    out = w4a4_tpu.w4a4_matmul(x, weight, dtype=jnp.float32, integers=True, interpret=True)
    exact = activation_in_float64(quantize_activations(random_rows(2, 3, 256).reshape(6, 256), bits=4))
    assert relative_error(out.reshape(6, 16), exact @ weight_in_float64(weight).T) < 2e-6


def test_every_float16_scale_is_decoded_exactly():
    bits = np.arange(2**16, dtype=np.uint16)
    values = jnp.asarray(bits.view(np.float16))
    decoded = np.asarray(words.as_float32(words.half_bits(values)))
    finite = np.isfinite(np.asarray(values, np.float32))
    np.testing.assert_array_equal(decoded[finite], np.asarray(values, np.float32)[finite])


def test_what_the_matmuls_do_not_serve_is_said():
    assert matmul.obstacle(576, 64) is matmul.obstacle(14336, 128) is matmul.obstacle(1152, 1152) is None
    assert matmul.obstacle(1152, 96) == (
        "needs groups that are whole rows, or runs of 2^n or 128 n inputs; K=1152 gives runs of 96"
    )


def test_all_numbers_of_rows_add_in_one_order():
    """The chunks, and how many are unrolled, depend on the weight alone; a block of outputs is a multiple of tiles."""
    assert {name: type(mode).__name__ for name, mode in MODES.items()}["simulated"] == "InterpretParams"
    for k in (576, 4096, 14336, 28672):
        packed = jnp.zeros((1, k // 2), jnp.uint8)
        width = matmul.block_n(packed)
        assert width % 256 == 0
        assert 2 * width * k // 2 <= 8 * 2**20
