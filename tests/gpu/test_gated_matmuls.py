"""Matmuls that gate their outputs have the bits of the two kernels one after the other, on an NVIDIA Hopper GPU.

Numbers of rows that they do not serve take the two kernels: so a row has the same bits beside any number of rows.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import (
    Layout,
    quantize_activations,
    rms_norm,
    rms_norm_quantize,
    swiglu,
    swiglu_quantize,
    upper_nibbles,
    value_of,
    w4a4_partial_sums,
    w4a4_swiglu_quantize,
    w4a4_swiglu_quantize_is_fused,
    w4a16_partial_sums,
    w4a16_swiglu,
    w4a16_swiglu_is_fused,
    with_layout,
)
from pallas_kernels.accuracy import allowed_error, relative_error
from pallas_kernels.backends.early_launch import early_launch, is_supported
from tests.pallas_kernels.kernel_cases import random_nested_weight, random_rows, random_weight

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs an NVIDIA GPU"),
]

ROWS = (1, 3, 8, 12, 33, 48, 64)
ELSEWHERE = np.asarray([7, 60, 3, 3, 63])
# K, N, group size, symmetric, bits, dtype: of Llama 3 8B, Llama 2 7B and Llama 3.2 1B.
FORMATS = [
    (4096, 28672, 128, True, 4, jnp.bfloat16),
    (4096, 28672, 128, False, 4, jnp.float16),
    (4096, 28672, 128, True, 8, jnp.bfloat16),
    (4096, 22016, 4096, True, 4, jnp.bfloat16),
    (2048, 16384, 32, False, 4, jnp.bfloat16),
]
formats = pytest.mark.parametrize("stored", FORMATS, ids=str)
CODES = {"bits": 8, "layout": Layout.WGMMA}


def weight_of(k, n, group_size, symmetric, bits, _, seed=0):
    if bits == 8:
        weight = random_nested_weight(n, k, group_size, symmetric=symmetric)
    else:
        weight = random_weight(n, k, group_size, symmetric=symmetric, seed=seed)
    return with_layout(weight, Layout.WGMMA)


def rows_of(k, dtype):
    """Gates from tiny ones to those far beyond where the unit is linear or zero."""
    sizes = 2.0 ** (np.arange(64) % 7 - 2)
    return (random_rows(64, k) * jnp.asarray(sizes, jnp.float32)[:, None]).astype(dtype)


def two_kernels(x, weight):
    return swiglu(w4a16_partial_sums(x, weight, implementation="mosaic"), implementation="triton")


def two_kernels_of_a_draft(x, weight, dtype):
    product = w4a4_partial_sums(x, weight, dtype=dtype, implementation="mosaic")
    return swiglu_quantize(product, **CODES, implementation="triton")


def assert_equal(out, expected, what):
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b), err_msg=what), out, expected)


def assert_bits_of_both_kernels(at_once, apart, x, weight):
    at_once, apart = jax.jit(at_once), jax.jit(apart)
    widest = at_once(x, weight)
    for num_rows in ROWS:
        rows = jax.tree.map(lambda a, m=num_rows: a[:m], x)
        out = at_once(rows, weight)
        assert_equal(out, apart(rows, weight), f"{num_rows} rows by two kernels")
        assert_equal(out, jax.tree.map(lambda a, m=num_rows: a[:m], widest), f"{num_rows} rows among 64")
    moved = at_once(jax.tree.map(lambda a: a[ELSEWHERE], x), weight)
    assert_equal(moved, jax.tree.map(lambda a: a[ELSEWHERE], widest), "rows in other places")
    return widest


@formats
def test_w4a16_swiglu_has_the_bits_of_both_kernels(stored):
    weight, x = weight_of(*stored), rows_of(stored[0], stored[-1])
    assert w4a16_swiglu_is_fused(x, weight)
    assert not w4a16_swiglu_is_fused(jnp.concatenate([x, x]), weight)
    out = assert_bits_of_both_kernels(functools.partial(w4a16_swiglu, implementation="mosaic"), two_kernels, x, weight)
    expected = w4a16_swiglu(x[:5].astype(jnp.float32), weight, implementation="reference")
    bound = allowed_error("w4a16_swiglu", stored[-1], num_inputs=stored[0], implementation="mosaic")
    assert relative_error(out[:5].astype(jnp.float32), expected) < bound


@pytest.mark.parametrize("stored", [one for one in FORMATS if one[2] % 128 == 0], ids=str)
@pytest.mark.parametrize("bits", [4, 8])
def test_drafts_have_the_codes_of_the_kernels_one_after_the_other(stored, bits):
    weight, dtype = upper_nibbles(weight_of(*stored)), stored[-1]
    quantize = functools.partial(quantize_activations, bits=bits, layout=Layout.WGMMA, implementation="triton")
    x = quantize(rows_of(stored[0], dtype))
    assert w4a4_swiglu_quantize_is_fused(x, weight, dtype=dtype)
    at_once = functools.partial(w4a4_swiglu_quantize, dtype=dtype, **CODES, implementation="mosaic")
    assert_bits_of_both_kernels(at_once, functools.partial(two_kernels_of_a_draft, dtype=dtype), x, weight)


@pytest.mark.parametrize("is_draft", [False, True], ids=["w4a16", "w4a8"])
def test_kernels_that_start_early_around_them_read_what_they_have_written(is_draft):
    """Norm, gate and up, down, again and again: a race need not show at once."""
    if not is_supported() or jax.__version_info__ < (0, 12):
        pytest.skip("no Mosaic kernel starts early before jax 0.12, or on another GPU")
    layers = [
        (weight_of(*FORMATS[0], seed=seed), weight_of(14336, 4096, *FORMATS[0][2:], seed=seed)) for seed in range(3)
    ]
    gain, settings = random_rows(4096, dtype=jnp.bfloat16, seed=2), {"epsilon": 1e-5, "implementation": "triton"}

    def chain(x, layers, at_once):
        update = jnp.zeros_like(x)
        for gate_up, down in layers * 4:
            if is_draft:
                x, codes = rms_norm_quantize(x, gain, update=update, **CODES, **settings)
                compute = functools.partial(w4a4_swiglu_quantize, **CODES, implementation="mosaic")
                y = (compute if at_once else two_kernels_of_a_draft)(codes, gate_up, dtype=x.dtype)
                update = w4a4_partial_sums(y, down, dtype=x.dtype, implementation="mosaic")
            else:
                x, normed = rms_norm(x, gain, update=update, **settings)
                y = (w4a16_swiglu if at_once else two_kernels)(normed, gate_up)
                update = w4a16_partial_sums(y, down, implementation="mosaic")
        return x + value_of(update)

    for num_rows in (1, 4, 16, 64):
        x = random_rows(num_rows, 4096, dtype=jnp.bfloat16)
        expected = np.asarray(jax.jit(functools.partial(chain, at_once=False))(x, layers))
        with early_launch():
            early = jax.jit(functools.partial(chain, at_once=True)).lower(x, layers).compile()
        for _ in range(20):
            np.testing.assert_array_equal(np.asarray(early(x, layers)), expected, err_msg=str(num_rows))
