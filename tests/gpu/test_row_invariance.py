"""What a decode step computes beside its 4-bit matmuls, on an NVIDIA GPU at the shapes of real models.

Each result is right, and a token has the same bits whatever tokens are computed beside it: with the matmuls' own
tests, this is what makes the tokens of QSpec those of plain decoding.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import (
    Layout,
    float_matmul,
    quantize_activations,
    rms_norm,
    rms_norm_quantize,
    swiglu,
    swiglu_quantize,
    upper_nibbles,
    value_of,
    w4a4_matmul,
    w4a4_partial_sums,
    w4a16_matmul,
    w4a16_partial_sums,
    with_layout,
)
from pallas_kernels.backends.early_launch import early_launch, is_supported
from pallas_kernels.float_matmul import gpu_triton as float_triton
from tests.pallas_kernels.kernel_cases import (
    random_nested_weight,
    random_rows,
    relative_error,
    rms_norm_in_float64,
    tensor_core_error,
)
from tests.pallas_kernels.kernel_cases import random_weight as packed_weight

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs an NVIDIA GPU"),
]

ROWS = (1, 3, 4, 16, 33, 64, 100, 128, 256)
ELSEWHERE = np.asarray([7, 90, 3, 3, 255])
EPSILON = 1e-5
# (N, K) of heads: Llama 3 8B, SmolLM2 135M, Qwen3 8B, a vocabulary that no block divides, K that no step divides.
# Then the linears of Llama 3 8B, most of whose sums programs share.
HEADS = [
    *[(128256, 4096), (49152, 576), (151936, 4096), (50257, 768), (32000, 1000)],
    *[(6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336)],
]
# Hidden sizes of SmolLM2 135M, Llama 3 8B and 70B, Qwen2.5 7B; Qwen3's heads.
NORMS = [(576,), (4096,), (8192,), (3584,), (32, 128), (8, 128)]

dtypes = pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16], ids=["bf16", "f16"])
norms = pytest.mark.parametrize("shape", NORMS, ids=str)


def assert_each_row_stands_alone(call, *rows):
    """Rows have the bits they have among the most rows, in their place and in another."""
    widest = call(*rows)
    for chosen in [*(np.arange(num_rows) for num_rows in ROWS), ELSEWHERE]:
        out = call(*(array[chosen] for array in rows))
        # On the device, since the logits of a large vocabulary take long to copy.
        equal = jax.tree.map(lambda a, b, c=chosen: bool(jnp.array_equal(a, b[c])), out, widest)
        assert jax.tree.all(equal), f"rows {chosen} differ"
    return jax.tree.map(np.asarray, widest)


def random_weight(n, k, dtype):
    return (jax.random.normal(jax.random.key(2), (n, k)) / k**0.5).astype(dtype)


@dtypes
@pytest.mark.parametrize("shape", HEADS, ids=str)
def test_lm_head_is_right_and_each_row_stands_alone(shape, dtype):
    n, k = shape
    if dtype == jnp.float16 and n > 100_000:
        pytest.skip("one dtype is enough at the largest shapes")
    x, weight = random_rows(max(ROWS), k, dtype=dtype), random_weight(n, k, dtype)
    multiply = jax.jit(functools.partial(float_matmul, implementation="triton"))
    call = lambda x: multiply(x, weight)  # noqa: E731 - as an argument: it would be a constant of each program
    out = assert_each_row_stands_alone(call, x)
    expected = np.asarray(float_matmul(x.astype(jnp.float32), weight.astype(jnp.float32), implementation="reference"))
    assert np.abs(out - expected).max() < 1e-4 * np.abs(out).max()  # no tile is missing or misplaced
    few, last = slice(8), slice(-512, None)  # since float64 is slow
    expected = np.asarray(x[few], np.float64) @ np.asarray(weight[last], np.float64).T
    assert relative_error(out[few, last], expected) < tensor_core_error(k)


@pytest.mark.parametrize("num_rows", [1, 33, 256])
def test_every_choice_of_tiles_gives_a_row_the_same_bits(num_rows):
    """Rows per program, outputs per program, warps and stages are free; the step over K and the split are not."""
    x, weight = random_rows(num_rows, 576, dtype=jnp.bfloat16), random_weight(49152, 576, jnp.bfloat16)
    expected = np.asarray(float_triton.float_matmul(x, weight))
    for block_m, num_warps in ((16, 4), (32, 4), (64, 2), (16, 2), (32, 2)):
        for block_n, num_stages in ((128, 3), (64, 4), (32, 2)):
            config = float_triton.TileConfig(block_m, block_n, 64, 1, num_warps, num_stages)
            out = float_triton.float_matmul(x, weight, config=config)
            np.testing.assert_array_equal(np.asarray(out), expected, err_msg=str(config))


@pytest.mark.parametrize("num_rows", [1, 33, 96, 256])
def test_every_choice_of_tiles_gives_a_row_of_a_linear_the_same_bits(num_rows):
    x, weight = random_rows(num_rows, 4096, dtype=jnp.bfloat16), random_weight(4096, 4096, jnp.bfloat16)
    default = float_triton.tile_config(num_rows, 4096, 4096)
    expected = np.asarray(value_of(float_triton.float_matmul(x, weight)))
    for block_m, block_n, num_stages in ((16, 64, 4), (32, 128, 3), (64, 64, 3), (64, 128, 2), (128, 64, 2)):
        tiles = {"block_m": block_m, "block_n": block_n, "num_stages": num_stages}
        out = value_of(float_triton.float_matmul(x, weight, config=dataclasses.replace(default, **tiles)))
        np.testing.assert_array_equal(np.asarray(out), expected, err_msg=str(tiles))


@pytest.mark.parametrize(
    ("num_rows", "dtype", "num_kernels"), [(4, "bfloat16", 1), (257, "bfloat16", 0), (4, "float32", 0)]
)
def test_none_takes_triton_for_few_rows_of_16_bits(num_rows, dtype, num_kernels):
    x, weight = random_rows(num_rows, 576, dtype=jnp.dtype(dtype)), random_weight(960, 576, dtype)
    assert jax.jit(float_matmul).lower(x, weight).as_text().count("__gpu$xla.gpu.triton") == num_kernels


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32], ids=["bf16", "f16", "f32"])
@norms
def test_norms_and_sums_are_right_and_each_token_stands_alone(shape, dtype):
    x, update = (random_rows(max(ROWS), *shape, dtype=dtype, seed=seed) for seed in (1, 3))
    gain = random_rows(shape[-1], dtype=dtype, seed=2)
    plain = jax.jit(lambda x: rms_norm(x, gain, epsilon=EPSILON, implementation="triton"))
    added = jax.jit(lambda x, u: rms_norm(x, gain, epsilon=EPSILON, update=u, implementation="triton"))
    norm = assert_each_row_stands_alone(plain, x)
    total, norm_of_total = assert_each_row_stands_alone(added, x, update)
    np.testing.assert_array_equal(total, np.asarray(x) + np.asarray(update))  # numpy rounds each sum once
    np.testing.assert_array_equal(norm_of_total, np.asarray(plain(jnp.asarray(total))))
    bound = max(4e-7, 0.6 * float(jnp.finfo(dtype).eps))  # two roundings of half a unit in the last place
    assert relative_error(norm, rms_norm_in_float64(x, gain, EPSILON)) < bound
    assert relative_error(norm_of_total, rms_norm_in_float64(total, gain, EPSILON)) < bound


@pytest.mark.parametrize(("bits", "symmetric", "group_size"), [(8, True, None), (4, False, 32)], ids=["w4a8", "w4a4"])
@pytest.mark.parametrize("k", [576, 4096])
def test_quantised_norm_of_a_sum_has_the_codes_of_that_of_the_sum(k, bits, symmetric, group_size):
    settings = {"bits": bits, "symmetric": symmetric, "group_size": group_size, "implementation": "triton"}
    x, update = (random_rows(max(ROWS), k, dtype=jnp.bfloat16, seed=seed) for seed in (1, 3))
    gain = random_rows(k, dtype=jnp.bfloat16, seed=2)
    call = jax.jit(lambda x, u: rms_norm_quantize(x, gain, epsilon=EPSILON, update=u, **settings))
    total, codes = assert_each_row_stands_alone(call, x, update)
    np.testing.assert_array_equal(total, np.asarray(x) + np.asarray(update))
    expected = rms_norm_quantize(jnp.asarray(total), gain, epsilon=EPSILON, **settings)
    jax.tree.map(np.testing.assert_array_equal, codes, expected)


@pytest.mark.parametrize("bits", [16, 8], ids=["w4a16", "w4a8"])
@pytest.mark.parametrize(("k", "n"), [(4096, 4096), (14336, 4096), (4096, 6144)], ids=str)
def test_partial_sums_that_the_norm_adds_give_the_bits_of_the_whole_matmul(k, n, bits):
    """Also where fewer rows leave fewer parts, or none: a token decoded alone is that of a verification of many."""
    weight = with_layout(packed_weight(n, k, 128, symmetric=True), Layout.WGMMA)
    x, rows = random_rows(max(ROWS), n, dtype=jnp.bfloat16), random_rows(max(ROWS), k, dtype=jnp.bfloat16, seed=5)
    gain = random_rows(n, dtype=jnp.bfloat16, seed=2)

    def multiply(rows, weight):
        if bits == 16:
            return w4a16_partial_sums(rows, weight, implementation="mosaic")
        codes = quantize_activations(rows, bits=8, layout=weight.layout, implementation="triton")
        return w4a4_partial_sums(codes, weight, dtype=rows.dtype, implementation="mosaic")

    @functools.partial(jax.jit, static_argnames="summed")
    def added(x, rows, weight, *, summed):
        update = multiply(rows, weight)
        update = value_of(update) if summed else update
        norm = rms_norm(x, gain, epsilon=EPSILON, update=update, implementation="triton")
        codes = rms_norm_quantize(x, gain, epsilon=EPSILON, update=update, bits=8, implementation="triton")
        return norm, codes

    assert jax.eval_shape(multiply, rows, weight).parts.shape[0] > 1
    in_parts = assert_each_row_stands_alone(lambda x, rows: added(x, rows, weight, summed=False), x, rows)
    jax.tree.map(np.testing.assert_array_equal, in_parts, added(x, rows, weight, summed=True))


EARLY_SHAPES = [(4096, 4096), (14336, 4096), (4096, 6144), (4096, 28672), (11008, 4096), (1536, 576)]
# Bits of a weight and of activations, symmetric or not.
EARLY_KINDS = {
    "w4a16": (4, 16, True),
    "w4a8": (4, 8, True),
    "w4a16 asymmetric": (4, 16, False),
    "w4a8 asymmetric": (4, 8, False),
    "w8a16": (8, 16, True),
    "w4a8 of nested": (8, 8, True),
}
EARLY_CASES = [(kind, *shape) for kind in ("w4a16", "w4a8") for shape in EARLY_SHAPES]
EARLY_CASES += [(kind, 14336, 4096) for kind in list(EARLY_KINDS)[2:]]


@pytest.mark.parametrize(("kind", "k", "n"), EARLY_CASES, ids=str)
def test_a_weight_read_before_the_kernel_before_has_ended_gives_the_same_bits(kind, k, n):
    """In a chain of kernels that signal, many times over: a race need not show at once."""
    if not is_supported() or jax.__version_info__ < (0, 12):
        pytest.skip("no Mosaic kernel starts early before jax 0.12, or on another GPU")
    bits, activation_bits, symmetric = EARLY_KINDS[kind]
    make = functools.partial(random_nested_weight if bits == 8 else packed_weight, n, k, 128, symmetric=symmetric)
    weights = [with_layout(make(seed=seed), Layout.WGMMA) for seed in range(3)]
    gain = random_rows(k, dtype=jnp.bfloat16, seed=2)
    settings = {"epsilon": EPSILON, "implementation": "triton"}

    def chain(x, weights):
        results = []
        for weight in weights * 4:
            if activation_bits == 16:
                y = w4a16_matmul(rms_norm(x, gain, **settings), weight, implementation="mosaic")
            else:
                codes = rms_norm_quantize(x, gain, bits=8, layout=weight.layout, **settings)
                y = w4a4_matmul(codes, upper_nibbles(weight), dtype=x.dtype, implementation="mosaic")
            results.append(y)
            x = x + jnp.tile(y, -(-k // n))[:, :k]  # XLA may read it: Mosaic kernels do not signal
        return results

    for num_rows in (1, 4, 12, 16, 64, 256):
        assert_the_bits_of_kernels_one_after_the_other(chain, random_rows(num_rows, k, dtype=jnp.bfloat16), weights)


@pytest.mark.parametrize("kind", ["w4a16", "w4a8", "float"])
def test_a_chain_of_triton_kernels_that_signal_gives_the_same_bits(kind):
    """Norm, matmul, SwiGLU, matmul, at the shapes of the demo model: XLA reads none of their results."""
    if not is_supported():
        pytest.skip("no kernel signals before jax 0.11, or on another GPU")
    shapes = [(3072, 576), (576, 1536)] * 3
    if kind == "float":
        weights = [random_weight(n, k, jnp.bfloat16) * (1 + place) for place, (n, k) in enumerate(shapes)]
    else:
        weights = [packed_weight(n, k, 32, symmetric=False, seed=seed) for seed, (n, k) in enumerate(shapes)]
    gain, options = random_rows(576, dtype=jnp.bfloat16, seed=2), {"implementation": "triton"}

    def multiply(x, weight):
        if kind == "float":
            return float_triton.float_matmul(x, weight, dtype=jnp.bfloat16)
        if kind == "w4a8":
            return w4a4_partial_sums(x, weight, dtype=jnp.bfloat16, **options)
        return w4a16_partial_sums(x, weight, **options)

    def chain(x, update, weights):
        normalise, gate = (rms_norm_quantize, swiglu_quantize) if kind == "w4a8" else (rms_norm, swiglu)
        settings = {**options, "bits": 8} if kind == "w4a8" else options
        for up, down in zip(weights[::2] * 4, weights[1::2] * 4, strict=True):
            x, normed = normalise(x, gain, epsilon=EPSILON, update=update, **settings)
            update = multiply(gate(multiply(normed, up), **settings), down)
        return rms_norm(x, gain, epsilon=EPSILON, update=update, **options)

    for num_rows in (1, 4, 16, 64, 256):
        x, update = (random_rows(num_rows, 576, dtype=jnp.bfloat16, seed=seed) for seed in (1, 3))
        assert_the_bits_of_kernels_one_after_the_other(chain, x, update, weights)


def assert_the_bits_of_kernels_one_after_the_other(chain, *arguments):
    expected = jax.jit(chain)(*arguments)
    with early_launch():
        early = jax.jit(chain).lower(*arguments).compile()
    for _ in range(20):
        equal = jax.tree.map(jnp.array_equal, early(*arguments), expected)
        assert all(map(bool, jax.tree.leaves(equal))), arguments[0].shape
