"""Contracts of float_matmul, for the reference and the interpreted Triton kernel alike."""

from __future__ import annotations

import dataclasses
import functools
import types

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import float_matmul, float_partial_sums, float_prefill_is_alike, value_of
from pallas_kernels.float_matmul import gpu_triton as triton
from pallas_kernels.float_matmul import reference
from tests.pallas_kernels.kernel_cases import random_rows, relative_error

IMPLEMENTATIONS = {
    "reference": reference.float_matmul,
    "triton": lambda x, weight: value_of(triton.float_matmul(x, weight, interpret=True)),
}
# (N, K), of all of which programs share the sums: N not a multiple of a block, K = 64 * 9, K not a multiple of a step,
# both.
SHAPES = [(200, 128), (96, 576), (64, 96), (33, 40)]
VOCABULARIES = [(128256, 4096), (49152, 576), (151936, 2560), (152064, 8192), (32000, 4096), (50257, 768)]

# Linears of Llama 3 8B and of one of its halves, of SmolLM2 and of Qwen2.5 0.5B.
LINEARS = [(6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336), (4096, 7168), (960, 576), (896, 4864)]

shapes = pytest.mark.parametrize("shape", SHAPES, ids=str)
dtypes = pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16], ids=["bf16", "f16"])
implementations = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)


def operands(num_rows, n, k, dtype):
    return random_rows(num_rows, k, dtype=dtype), random_rows(n, k, dtype=dtype, seed=2)


def product_in_float64(x, weight):
    return np.asarray(x, np.float64) @ np.asarray(weight, np.float64).T


@dtypes
@shapes
@implementations
def test_it_equals_the_definition_in_float64_to_float32_rounding(implementation, shape, dtype):
    x, weight = operands(5, *shape, dtype)
    out = IMPLEMENTATIONS[implementation](x, weight)
    assert (out.dtype, out.shape) == (jnp.float32, (5, shape[0]))
    assert relative_error(out, product_in_float64(x, weight)) < 1e-6


def test_the_reference_serves_float32():
    x, weight = operands(5, 200, 128, jnp.float32)
    assert relative_error(float_matmul(x, weight), product_in_float64(x, weight)) < 1e-6


@pytest.mark.newest_jax
@pytest.mark.parametrize("num_rows", [1, 17, 100])
def test_triton_serves_any_number_of_rows(num_rows):
    x, weight = operands(num_rows, 96, 576, jnp.bfloat16)
    assert relative_error(IMPLEMENTATIONS["triton"](x, weight), product_in_float64(x, weight)) < 1e-6


def test_interpreted_rows_do_not_depend_on_the_rows_beside_them():
    """Of one block: the CPU's own dot takes another order of the sum for a block of another height."""
    x, weight = operands(64, 96, 576, jnp.bfloat16)
    widest = IMPLEMENTATIONS["triton"](x, weight)
    for num_rows in (33, 50):
        np.testing.assert_array_equal(IMPLEMENTATIONS["triton"](x[:num_rows], weight), widest[:num_rows])


def test_rows_of_prompts_have_tiles_of_their_own(monkeypatch):
    x, weight = operands(300, 144, 192, jnp.bfloat16)
    monkeypatch.setattr(reference, "PREFILL_ALIKE", True)
    monkeypatch.setattr(reference, "obstacle", triton.obstacle, raising=False)
    monkeypatch.setattr(reference, "float_matmul", functools.partial(triton.float_matmul, interpret=True))
    multiply = functools.partial(float_partial_sums, weight=weight, dtype=jnp.bfloat16, prefill=True)
    together = multiply(x)
    assert relative_error(together, product_in_float64(x, weight)) < 3e-3
    for some in (slice(40, 296), slice(299, 300)):
        np.testing.assert_array_equal(np.asarray(together)[some], multiply(x[some]))


def test_many_rows_are_for_those_who_have_tiles_for_prompts():
    assert triton.obstacle(None, jnp.dtype(jnp.bfloat16)) is None
    assert "needs 1 to 256 rows" in triton.obstacle(300, jnp.dtype(jnp.bfloat16))
    assert "needs bfloat16 or float16" in triton.obstacle(None, jnp.dtype(jnp.float32))
    assert not float_prefill_is_alike(jnp.bfloat16), "a library multiplies on a CPU"
    assert not float_prefill_is_alike(jnp.bfloat16, implementation="reference")
    with pytest.raises(ValueError, match="unknown"):
        float_prefill_is_alike(jnp.bfloat16, implementation="unknown")


@pytest.mark.parametrize(("n", "k"), [*VOCABULARIES, *LINEARS], ids=str)
def test_the_sum_over_k_does_not_depend_on_the_number_of_rows(n, k):
    configs = [triton.tile_config(m, n, k) for m in range(1, triton.MAX_ROWS + 1)]
    assert len({(config.block_k, config.split) for config in configs}) == 1
    assert -(-k // configs[0].block_k) % configs[0].split == 0
    assert len({config.weight_first for config in configs}) == 1
    for config in configs:  # else Triton takes wgmma on Hopper for some of them, and not for others
        if config.weight_first:
            assert (config.block_n % 64, config.num_warps % 4, n % config.block_n, k % config.block_k) == (0, 0, 0, 0)
        else:
            assert config.block_m < 64 or config.num_warps % 4


@pytest.mark.parametrize(("n", "k"), VOCABULARIES, ids=str)
def test_a_vocabulary_fills_the_device_and_its_tiles_fit_an_sm(n, k):
    for m in (1, 16, 17, 64, 256):
        config = triton.tile_config(m, n, k)
        assert config.split == 1
        bytes_per_stage = 2 * config.block_k * (config.block_m + config.block_n)
        assert -(-n // config.block_n) >= 2 * 132
        assert config.num_stages * bytes_per_stage <= 99 * 1024  # what a program may have on Ada


@pytest.mark.parametrize(("n", "k"), LINEARS, ids=str)
@pytest.mark.parametrize(("capability", "kilobytes"), [("8.9", 99), ("9.0", 227), ("10.0", 227), ("12.0", 99)])
def test_tiles_of_linears_fit_an_sm(n, k, capability, kilobytes, monkeypatch):
    device = types.SimpleNamespace(compute_capability=capability)
    monkeypatch.setattr("jax.local_devices", lambda: [device])
    for m in (1, 16, 17, 64, 96, 256):
        config = triton.tile_config(m, n, k)
        assert config.num_stages * 2 * config.block_k * (config.block_m + config.block_n) <= kilobytes * 1024


@pytest.mark.parametrize(("split", "dtype"), [(1, jnp.bfloat16), (3, jnp.float32)])
def test_either_operand_may_be_the_left_one(split, dtype):
    x, weight = operands(20, 128, 576, jnp.bfloat16)
    config = triton.TileConfig(16, 64, 64, split, num_warps=4, num_stages=2)
    call = functools.partial(triton.float_matmul, x, weight, dtype=dtype, interpret=True)
    left, right = (value_of(call(config=one)) for one in (config, dataclasses.replace(config, weight_first=True)))
    assert left.dtype == right.dtype == dtype
    assert relative_error(right, product_in_float64(x, weight)) < (1e-6 if dtype == jnp.float32 else 4e-3)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["f32", "bf16"])
def test_parts_of_a_sum_are_left_to_who_reads_it_and_rounded_once(dtype, monkeypatch):
    x, weight = operands(5, 96, 576, jnp.bfloat16)
    config = triton.TileConfig(16, 32, 64, split=3, num_warps=4, num_stages=2)
    call = functools.partial(triton.float_matmul, config=config, interpret=True)
    monkeypatch.setattr(reference, "float_matmul", call)
    out = float_partial_sums(x, weight, dtype=dtype)
    assert (out.parts.shape, out.dtype) == ((3, 5, 96), dtype)
    np.testing.assert_array_equal(out.value(), call(x, weight).value().astype(dtype))
    assert relative_error(out.value(), product_in_float64(x, weight)) < (1e-6 if dtype == jnp.float32 else 4e-3)


@implementations
def test_leading_axes_are_kept(implementation):
    x, weight = operands(6, 96, 128, jnp.bfloat16)
    out = IMPLEMENTATIONS[implementation](x.reshape(2, 3, 128), weight)
    np.testing.assert_array_equal(out.reshape(6, 96), IMPLEMENTATIONS[implementation](x, weight))


def test_triton_says_what_it_does_not_serve():
    assert triton.obstacle(256, jnp.dtype(jnp.bfloat16)) is None
    assert triton.obstacle(257, jnp.dtype(jnp.float16)) == "needs 1 to 256 rows; x has 257"
    assert triton.obstacle(1, jnp.dtype(jnp.float32)) == "needs bfloat16 or float16; x is float32"


def test_operands_that_do_not_fit_are_named():
    x = random_rows(2, 64, dtype=jnp.bfloat16)
    with pytest.raises(ValueError, match=r"weight is float32 \(8, 64\); use bfloat16 \[N, 64\]"):
        float_matmul(x, random_rows(8, 64))
    with pytest.raises(ValueError, match=r"float_matmul: x is float8_e4m3fn; use float32, bfloat16 or float16"):
        float_matmul(*(jnp.ones((2, 64), jnp.float8_e4m3fn),) * 2)
