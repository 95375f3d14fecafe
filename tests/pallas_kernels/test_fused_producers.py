"""Contracts of rms_norm_quantize and swiglu_quantize, for the references and the interpreted Triton kernels alike."""

from __future__ import annotations

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import Layout, rms_norm_quantize, swiglu_quantize
from pallas_kernels.arrays.weight import order_activation_codes
from pallas_kernels.quantize_activations import reference
from pallas_kernels.rms_norm_quantize import gpu_triton as norm_triton
from pallas_kernels.rms_norm_quantize import reference as norm_reference
from pallas_kernels.swiglu_quantize import gpu_triton as swiglu_triton
from pallas_kernels.swiglu_quantize import reference as swiglu_reference
from tests.pallas_kernels.kernel_cases import (
    activation_in_float64,
    assert_nearly_the_same,
    assert_the_same,
    in_one_program,
    newest_jax_by_feature,
    random_rows,
    rms_norm_in_float64,
    swiglu_in_float64,
)

EPSILON = 1e-5
NORM = {
    "reference": in_one_program(norm_reference.rms_norm_quantize),
    "triton": functools.partial(norm_triton.rms_norm_quantize, interpret=True),
}
SWIGLU = {
    "reference": in_one_program(swiglu_reference.swiglu_quantize),
    "triton": functools.partial(swiglu_triton.swiglu_quantize, interpret=True),
}
QUANTIZE = in_one_program(reference.quantize_activations)
IMPLEMENTATIONS = ("reference", "triton")
SETTINGS = [(4, False), (8, True)]  # each bit width and each kind; the quantiser has tests of its own
DTYPES = [jnp.float32, jnp.bfloat16, jnp.float16]
# Axes, group size and outlier groups: one group, 18 of 32, 6 of 96, a prefill's two axes, several blocks.
SHAPES = [(1, 576, 576, 0), (33, 576, 32, 2), (5, 576, 96, 0), (2, 3, 128, 64, 1), (3, 1536, 32, 0)]

# Every shape in every dtype, and both settings with each shape and with each dtype.
CASES = [
    pytest.param(shape, dtype, *SETTINGS[(row + column) % 2], id=f"{shape}-{jnp.dtype(dtype)}")
    for row, shape in enumerate(SHAPES)
    for column, dtype in enumerate(DTYPES)
]

# Every shape, and every dtype and setting with one or two of them.
DIAGONAL = [CASES[len(DTYPES) * row + row % len(DTYPES)] for row in range(len(SHAPES))]

of_all_kinds = pytest.mark.parametrize(("shape", "dtype", "bits", "symmetric"), CASES)
shapes = pytest.mark.parametrize("shape", SHAPES, ids=str)
settings_of_all_kinds = pytest.mark.parametrize(("bits", "symmetric"), SETTINGS)
implementations = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)


def cases(shape, dtype, bits, symmetric):
    """``x``, ``gain``, ``gate_up``, and the settings."""
    *shape, group_size, outlier_groups = shape
    settings = {"bits": bits, "group_size": group_size, "symmetric": symmetric, "clip_ratio": 1.0}
    settings["outlier_groups"] = outlier_groups
    x, gain = random_rows(*shape, dtype=dtype), random_rows(shape[-1], dtype=dtype, seed=2)
    return x, gain, random_rows(*shape[:-1], 2 * shape[-1], dtype=dtype, seed=3), settings


@pytest.mark.parametrize(("shape", "dtype", "bits", "symmetric"), DIAGONAL)
def test_the_references_have_the_bits_of_the_separate_operations(shape, dtype, bits, symmetric):
    x, gain, gate_up, settings = cases(shape, dtype, bits, symmetric)
    settings["clip_ratio"] = 0.95
    wide = x.astype(jnp.float32)
    norm = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + EPSILON)
    norm = norm.astype(dtype) * gain
    expected = QUANTIZE(norm, **settings)
    assert_the_same(rms_norm_quantize(x, gain, epsilon=EPSILON, **settings, implementation="reference"), expected)
    gate, up = jnp.split(gate_up, 2, axis=-1)
    expected = QUANTIZE(jax.nn.silu(gate) * up, **settings)
    assert_the_same(swiglu_quantize(gate_up, **settings, implementation="reference"), expected)


@pytest.mark.parametrize(
    ("implementation", "group_size", "setting"),
    newest_jax_by_feature(itertools.product(("triton", "reference"), [32, 576], SETTINGS)),
    ids=str,
)
def test_error_is_at_most_half_a_step_of_the_true_result(implementation, group_size, setting):
    x, gain, gate_up, settings = cases((5, 576, group_size, 0), jnp.float32, *setting)
    for out, expected in (
        (NORM[implementation](x, gain, epsilon=EPSILON, **settings), rms_norm_in_float64(x, gain, EPSILON)),
        (SWIGLU[implementation](gate_up, **settings), swiglu_in_float64(gate_up)),
    ):
        steps = np.repeat(np.asarray(out.scale, np.float64), group_size, axis=1)
        assert np.all(np.abs(activation_in_float64(out) - expected) <= 0.5002 * steps)


@of_all_kinds
def test_interpreted_norm_rounds_where_the_reference_does(shape, dtype, bits, symmetric):
    """In 16 bits before the gain and after it; only the order of the sum of squares is the kernel's own."""
    x, gain, _, settings = cases(shape, dtype, bits, symmetric)
    out, expected = (NORM[name](x, gain, epsilon=EPSILON, **settings) for name in ("triton", "reference"))
    assert_nearly_the_same(out, expected, dtype, equal_codes=0.999)


@settings_of_all_kinds
@shapes
def test_interpreted_swiglu_gives_the_codes_of_the_reference_in_float32(shape, bits, symmetric):
    _, _, gate_up, settings = cases(shape, jnp.float32, bits, symmetric)
    out, expected = (SWIGLU[name](gate_up, **settings) for name in ("triton", "reference"))
    assert_nearly_the_same(out, expected, jnp.float32, equal_codes=0.999)


@pytest.mark.parametrize(
    ("shape", "dtype", "bits", "symmetric"), [case for case in CASES if case.values[1] != jnp.float32]
)
def test_interpreted_swiglu_rounds_once_to_16_bits(shape, dtype, bits, symmetric):
    """Where XLA also rounds inside silu, as suits the platform."""
    _, _, gate_up, settings = cases(shape, dtype, bits, symmetric)
    rounded_once = jnp.asarray(swiglu_in_float64(gate_up), jnp.float32).astype(dtype)
    expected = QUANTIZE(rounded_once, **settings)
    assert_nearly_the_same(SWIGLU["triton"](gate_up, **settings), expected, dtype, equal_codes=0.999)


@pytest.mark.parametrize("layout", Layout)
@pytest.mark.parametrize(("k", "dtype"), [(4096, jnp.bfloat16), (5008, jnp.float32)], ids=["bf16", "ragged-f32"])
def test_a_token_has_the_same_codes_among_few_which_are_taken_in_pieces_and_among_many(k, dtype, layout):
    gate_up = random_rows(65, 2 * k, dtype=dtype)
    settings = {"bits": 8, "group_size": k, "symmetric": True, "clip_ratio": 0.9, "outlier_groups": 0, "layout": layout}
    few, many = (SWIGLU["triton"](gate_up[:num_tokens], **settings) for num_tokens in (3, 65))
    assert int(jnp.abs(few.codes).max()) == 127
    assert_the_same(few, jax.tree.map(lambda array: array[:3], many))


@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@implementations
def test_a_token_of_zeros_survives(implementation, symmetric):
    settings = {"bits": 8, "group_size": 32, "symmetric": symmetric, "clip_ratio": 1.0, "outlier_groups": 1}
    norm = NORM[implementation](jnp.zeros((2, 96)), jnp.ones(96), epsilon=EPSILON, **settings)
    product = SWIGLU[implementation](jnp.zeros((2, 192)), **settings)
    for out in (norm, product):
        np.testing.assert_allclose(activation_in_float64(out), np.zeros((2, 96)), atol=1e-20)


@implementations
def test_a_gate_far_below_zero_is_closed(implementation):
    settings = {"bits": 8, "group_size": 32, "symmetric": True, "clip_ratio": 1.0, "outlier_groups": 0}
    gate_up = jnp.concatenate([jnp.full((1, 31), -1e4), jnp.ones((1, 33))], axis=1)
    codes = SWIGLU[implementation](gate_up, **settings).codes
    np.testing.assert_array_equal(codes, [[0] * 31 + [127]])


def test_one_scale_per_token_is_the_default():
    norm = rms_norm_quantize(random_rows(2, 3, 64), jnp.ones(64), epsilon=EPSILON, bits=4)
    product = swiglu_quantize(random_rows(2, 3, 128), bits=4)
    for out in (norm, product):
        assert (out.codes.shape, out.scale.shape) == ((2, 3, 64), (2, 3, 1))
        assert (out.bits, out.symmetric) == (4, True)


def test_triton_says_which_tokens_are_too_long():
    longest = 65536
    assert norm_triton.obstacle(longest, 32) is None
    assert norm_triton.obstacle(longest, longest) is None
    message = f"needs tokens of at most {longest} inputs, padded; this is {longest + 32}"
    assert norm_triton.obstacle(longest + 32, 32) == message
    assert swiglu_triton.obstacle(2 * longest, 32, 0) is None
    assert "needs tokens of at most" in (swiglu_triton.obstacle(2 * longest, 32, 1) or "")
    assert "needs groups of at most" in (swiglu_triton.obstacle(2 * longest, 2 * longest, 0) or "")


@pytest.mark.parametrize(
    ("problem", "message"),
    [
        ({"group_size": 64}, "K=96 is not a multiple of group_size=64; use 32 or"),
        ({"bits": 5}, "bits=5; use 4 or 8"),
        ({"clip_ratio": 0.0}, r"clip_ratio=0\.0; use"),
        ({"group_size": 32, "outlier_groups": 4}, "outlier_groups=4; x has 3 groups, use 0 to 3"),
    ],
    ids=lambda value: str(value),
)
def test_settings_out_of_range_are_named(problem, message):
    settings = {"bits": 8, **problem}
    with pytest.raises(ValueError, match=f"rms_norm_quantize: {message}"):
        rms_norm_quantize(random_rows(2, 96), jnp.ones(96), epsilon=EPSILON, **settings)
    with pytest.raises(ValueError, match=f"swiglu_quantize: {message}"):
        swiglu_quantize(random_rows(2, 192), **settings)


def test_arrays_that_do_not_fit_are_named():
    x = random_rows(2, 96)
    with pytest.raises(ValueError, match=r"gain is bfloat16 \(96,\); use float32 \(96,\)"):
        rms_norm_quantize(x, jnp.ones(96, jnp.bfloat16), epsilon=EPSILON, bits=8)
    with pytest.raises(ValueError, match=r"epsilon=0\.0; use a positive number"):
        rms_norm_quantize(x, jnp.ones(96), epsilon=0.0, bits=8)
    with pytest.raises(ValueError, match="last axis of 95; use 2 \\* K"):
        swiglu_quantize(x[:, :95], bits=8)
    with pytest.raises(ValueError, match="swiglu_quantize: x is float8_e4m3fn"):
        swiglu_quantize(x.astype(jnp.float8_e4m3fn), bits=8)


@pytest.mark.parametrize("shape", [(5, 576, 576, 0), (2, 3, 128, 64, 1), (3, 1536, 32, 0)], ids=str)
@implementations
def test_codes_come_in_the_order_of_the_layout(implementation, shape):
    x, gain, gate_up, settings = cases(shape, jnp.bfloat16, 8, True)
    for produce in (
        functools.partial(NORM[implementation], x, gain, epsilon=EPSILON, **settings),
        functools.partial(SWIGLU[implementation], gate_up, **settings),
    ):
        plain, ordered = produce(), produce(layout=Layout.WGMMA)
        assert ordered.layout is Layout.WGMMA
        np.testing.assert_array_equal(ordered.codes, order_activation_codes(plain.codes, Layout.WGMMA))
        np.testing.assert_array_equal(ordered.scale, plain.scale)
