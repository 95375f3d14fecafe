"""Contracts of w4a16_matmul and w4a4_matmul, for the reference and the interpreted Triton kernel alike."""

from __future__ import annotations

import dataclasses
import functools
import importlib
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import quantize_activations as quantize
from pallas_kernels import (
    rows_alike,
    upper_nibbles,
    value_of,
    w4a4_matmul,
    w4a16_matmul,
    w4a16_partial_sums,
    with_group_sums,
)
from pallas_kernels.backends.triton import tiles
from pallas_kernels.backends.triton.matmul import loop_with_loads_ahead
from pallas_kernels.backends.triton.tuning import takes_wgmma
from pallas_kernels.w4a4_matmul import gpu_triton as w4a4_triton
from pallas_kernels.w4a4_matmul import reference as w4a4_reference
from pallas_kernels.w4a16_matmul import gpu_triton as w4a16_triton
from pallas_kernels.w4a16_matmul import reference as w4a16_reference
from tests.pallas_kernels.kernel_cases import (
    activation_in_float64,
    in_one_program,
    random_nested_weight,
    random_rows,
    random_weight,
    relative_error,
    weight_in_float64,
)


def triton(module, *arguments, **options):
    """What the interpreted kernel of an operation yields."""
    return value_of(getattr(module, module.__name__.split(".")[-2])(*arguments, interpret=True, **options))


W4A16 = {
    "reference": jax.jit(w4a16_reference.w4a16_matmul),
    "triton": in_one_program(functools.partial(triton, w4a16_triton)),
}
W4A4 = {
    "reference": jax.jit(w4a4_reference.w4a4_matmul, static_argnames="dtype"),
    "triton": in_one_program(functools.partial(triton, w4a4_triton)),
}
IMPLEMENTATIONS = ("reference", "triton")
# One program, not one for each of its operations.
quantize_activations = jax.jit(quantize, static_argnames=("bits", "group_size", "symmetric"))
# (N, K, group size); 576 splits into planes of 288 = 9 * 32, and with groups of 64 one group spans both planes.
WEIGHTS = ((48, 256, 32), (16, 512, 128), (32, 256, 256), (32, 576, 64), (16, 576, 576))


@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("shape", WEIGHTS, ids=str)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_w4a16_equals_the_definition_in_float64(implementation, shape, symmetric):
    weight = random_weight(*shape, symmetric=symmetric)
    x = random_rows(5, shape[1])
    expected = np.asarray(x, np.float64) @ weight_in_float64(weight).T
    assert relative_error(W4A16[implementation](x, weight), expected) < 1e-6


@pytest.mark.parametrize("num_rows", [1, 16, 33])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_w4a16_serves_any_number_of_rows(implementation, num_rows):
    weight = random_weight(32, 576, 32, symmetric=False)
    x = random_rows(num_rows, 576)
    expected = np.asarray(x, np.float64) @ weight_in_float64(weight).T
    assert relative_error(W4A16[implementation](x, weight), expected) < 1e-6


@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_nested_weight_and_its_upper_nibbles_equal_the_definition_in_float64(implementation, symmetric):
    weight = random_nested_weight(32, 576, 64, symmetric=symmetric)
    x = random_rows(5, 576)
    for one in (weight, upper_nibbles(weight)):
        expected = np.asarray(x, np.float64) @ weight_in_float64(one).T
        assert relative_error(W4A16[implementation](x, one), expected) < 1e-6


@pytest.mark.parametrize(("symmetric", "x_symmetric"), [(True, True), (False, False)])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_the_upper_nibbles_of_a_nested_weight_meet_integers(implementation, symmetric, x_symmetric):
    weight = random_nested_weight(32, 256, 64, symmetric=symmetric, scale_dtype=jnp.float32)
    x = quantize_activations(random_rows(5, 256), bits=8, symmetric=x_symmetric)
    expected = activation_in_float64(x) @ weight_in_float64(upper_nibbles(weight)).T
    out = W4A4[implementation](x, upper_nibbles(weight), dtype=jnp.float32)
    assert relative_error(out, expected) < 2e-6
    with pytest.raises(ValueError, match=r"integers meet 4-bit codes; give upper_nibbles\(weight\)"):
        w4a4_matmul(x, weight, dtype=jnp.float32)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16], ids=["bf16", "f16"])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_w4a16_rounds_once_to_the_dtype_of_x(implementation, dtype):
    weight = random_weight(32, 256, 64, symmetric=False)
    x = random_rows(5, 256, dtype=dtype)
    out = W4A16[implementation](x, weight)
    expected = np.asarray(x, np.float64) @ weight_in_float64(weight).T
    assert out.dtype == dtype
    assert relative_error(out, expected) < 0.4 * float(jnp.finfo(dtype).eps)  # half an ulp at most, less on average


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16], ids=["bf16", "f16"])
def test_a_prefill_multiplies_the_weight_rounded_to_the_dtype_of_x(dtype):
    weight = random_weight(32, 256, 64, symmetric=False)
    x = random_rows(257, 256, dtype=dtype)
    rounded = jnp.asarray(weight_in_float64(weight), dtype)
    expected = np.asarray(x, np.float64) @ np.asarray(rounded, np.float64).T
    out = w4a16_triton.w4a16_matmul(x, weight)
    assert out.dtype == dtype
    assert relative_error(out, expected) < 0.4 * float(jnp.finfo(dtype).eps)


@pytest.mark.newest_jax
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_leading_axes_are_kept(implementation):
    weight = random_weight(32, 256, 64, symmetric=False)
    x = random_rows(2, 3, 256)
    out = W4A16[implementation](x, weight)
    assert out.shape == (2, 3, 32)
    np.testing.assert_array_equal(out.reshape(6, 32), W4A16[implementation](x.reshape(6, 256), weight))
    codes = quantize_activations(x, bits=8)
    assert W4A4[implementation](codes, weight, dtype=jnp.bfloat16).shape == (2, 3, 32)


@pytest.mark.parametrize(
    ("shape", "symmetric", "bits", "x_symmetric"),
    [  # each kind of activations with each shape and with each kind of weights
        ((32, 256, 64), True, 4, True),
        ((32, 256, 64), False, 8, False),
        ((32, 576, 64), True, 8, False),
        ((32, 576, 64), False, 4, True),
        ((16, 576, 576), True, 4, True),
        ((16, 576, 576), False, 8, False),
    ],
    ids=str,
)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_w4a4_equals_the_definition_in_float64(implementation, shape, symmetric, x_symmetric, bits):
    weight = random_weight(*shape, symmetric=symmetric, scale_dtype=jnp.float32)
    x = quantize_activations(random_rows(5, shape[1]), bits=bits, symmetric=x_symmetric)
    expected = activation_in_float64(x) @ weight_in_float64(weight).T
    assert relative_error(W4A4[implementation](x, weight, dtype=jnp.float32), expected) < 2e-6


@pytest.mark.parametrize(
    ("group_size", "x_group_size", "x_symmetric"),
    [
        (64, 32, True),
        (64, 64, True),
        (64, 128, True),
        (64, 64, False),
        (64, 32, False),
        (256, 32, False),
        (64, 128, False),
        (256, 64, True),
        (32, 256, False),
    ],
    ids=str,
)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_w4a4_accepts_finer_equal_and_coarser_activation_groups(implementation, group_size, x_group_size, x_symmetric):
    weight = random_weight(32, 256, group_size, symmetric=False, scale_dtype=jnp.float32)
    weight = jax.jit(with_group_sums, static_argnums=1)(weight, min(x_group_size, group_size))
    x = quantize_activations(random_rows(5, 256), bits=8, group_size=x_group_size, symmetric=x_symmetric)
    expected = activation_in_float64(x) @ weight_in_float64(weight).T
    assert relative_error(W4A4[implementation](x, weight, dtype=jnp.float32), expected) < 2e-6


@pytest.mark.parametrize("num_rows", [1, 16, 33])
def test_w4a4_triton_serves_any_number_of_rows(num_rows):
    weight = random_weight(32, 576, 32, symmetric=False, scale_dtype=jnp.float32)
    x = quantize_activations(random_rows(num_rows, 576), bits=4, symmetric=False)
    expected = activation_in_float64(x) @ weight_in_float64(weight).T
    assert relative_error(W4A4["triton"](x, weight, dtype=jnp.float32), expected) < 2e-6


@pytest.mark.newest_jax
@pytest.mark.parametrize("split", [1, 2, 4])
def test_split_sums_over_k_are_complete(split):
    weight = random_weight(32, 512, 64, symmetric=False, scale_dtype=jnp.float32)
    config = dataclasses.replace(tiles.tile_config(5, 32, 512, 64), split=split)
    x = random_rows(5, 512)
    codes = quantize_activations(x, bits=8, symmetric=False)
    wide = weight_in_float64(weight)
    out = W4A16["triton"](x, weight, config=config)
    assert relative_error(out, np.asarray(x, np.float64) @ wide.T) < 1e-6
    out = W4A4["triton"](codes, weight, dtype=jnp.float32, config=config)
    assert relative_error(out, activation_in_float64(codes) @ wide.T) < 2e-6


@pytest.mark.parametrize("num_steps", [1, 4])
def test_each_step_of_a_loop_gets_what_was_loaded_for_it(num_steps):
    loaded = []

    def run(first):
        def load(index):
            loaded.append(index)
            return 100 * index

        def step(index, carry, of_step):
            return carry.at[index - first].set(of_step + index)

        return loop_with_loads_ahead(first, num_steps, step, jnp.zeros(num_steps, jnp.int32), load)

    np.testing.assert_array_equal(jax.jit(run)(jnp.int32(7)), 101 * np.arange(7, 7 + num_steps))
    assert len(loaded) == (1 if num_steps == 1 else 2)  # before the loop, and in a step for the next


def test_nothing_is_loaded_past_the_last_step():
    """A kernel would read memory that is not its own."""
    loaded = []

    def load(index):
        jax.debug.callback(lambda index: loaded.append(int(index)), index)

    jax.jit(lambda first: loop_with_loads_ahead(first, 4, lambda *_: 0, 0, load))(jnp.int32(7))
    jax.effects_barrier()
    assert sorted(loaded) == [7, 8, 9, 10, 10]


KINDS_OF_WEIGHTS = {
    "groups": functools.partial(random_weight, 16, 256, 64),
    "one group": functools.partial(random_weight, 16, 256, 256),
    "nested": functools.partial(random_nested_weight, 16, 256, 64),
    "nested in one group": functools.partial(random_nested_weight, 16, 256, 256),
}


@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("kind", KINDS_OF_WEIGHTS)
def test_a_program_of_several_steps_has_the_scales_of_each(kind, symmetric):
    """Small weights are otherwise split among as many programs as there are steps."""
    weight = KINDS_OF_WEIGHTS[kind](symmetric=symmetric, scale_dtype=jnp.float32)
    config, x = tiles.TileConfig(16, 16, 32, 2, num_warps=4, num_stages=3), random_rows(5, 256)
    out = W4A16["triton"](x, weight, config=config)
    assert relative_error(out, np.asarray(x, np.float64) @ weight_in_float64(weight).T) < 1e-6
    for x_group_size, x_symmetric in ((256, True), (64, False)):
        upper = jax.jit(with_group_sums, static_argnums=1)(upper_nibbles(weight), 64)
        codes = quantize_activations(x, bits=8, group_size=x_group_size, symmetric=x_symmetric)
        out = W4A4["triton"](codes, upper, dtype=jnp.float32, config=config)
        assert relative_error(out, activation_in_float64(codes) @ weight_in_float64(upper).T) < 2e-6


@pytest.mark.parametrize("split", [None, 1, 3])
@pytest.mark.parametrize("kind", ["4 bits", "upper nibbles"])
def test_small_groups_with_offsets_are_rounded_before_they_are_multiplied(kind, split):
    if kind == "4 bits":
        weight = random_weight(32, 576, 32, symmetric=False)
    else:
        weight = upper_nibbles(random_nested_weight(32, 576, 32, symmetric=False))
    x = random_rows(5, 576, dtype=jnp.bfloat16)
    config = None if split is None else tiles.TileConfig(16, 16, 32, split, num_warps=4, num_stages=3)
    rounded = jnp.asarray(weight_in_float64(weight), jnp.bfloat16)
    expected = np.asarray(x, np.float64) @ np.asarray(rounded, np.float64).T
    out = W4A16["triton"](x, weight, dtype=jnp.float32, config=config)
    assert relative_error(out, expected) < 1e-5  # a weight that was nearly a tie may be rounded to its neighbour


def test_interpreted_rows_do_not_depend_on_the_rows_beside_them():
    weight = random_weight(32, 576, 32, symmetric=False)
    x = random_rows(33, 576, dtype=jnp.bfloat16)
    alone = W4A16["triton"](x[:5], weight)
    np.testing.assert_array_equal(alone, W4A16["triton"](x, weight)[:5])


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32], ids=["bf16", "f32"])
def test_rows_beyond_a_decode_are_alike_where_they_are_asked_to_be(dtype):
    weight = random_weight(32, 128, 32, symmetric=False)
    x = random_rows(300, 128, dtype=dtype)
    together = W4A16["triton"](x, weight, alike=True)
    for some in (slice(40, 296), slice(299, 300)):
        np.testing.assert_array_equal(np.asarray(together)[some], W4A16["triton"](x[some], weight))


WEIGHTS_OF_PROMPTS = {
    "symmetric": functools.partial(random_weight, 32, 128, 32, symmetric=True),
    "asymmetric": functools.partial(random_weight, 32, 128, 32, symmetric=False),
    "one group": functools.partial(random_weight, 32, 128, 128, symmetric=False),
    "nested": functools.partial(random_nested_weight, 32, 128, 64, symmetric=False),
}


@pytest.mark.parametrize("kind", WEIGHTS_OF_PROMPTS)
@pytest.mark.parametrize(
    ("dtype", "few"),
    [(jnp.bfloat16, 4_000_000), (jnp.bfloat16, 0), (jnp.float32, 4_000_000)],
    ids=["bf16", "bf16 rounded once", "f32"],
)
def test_rows_of_prompts_have_tiles_of_their_own(dtype, few, kind, monkeypatch):
    """Whose programs share no sum, and which any number of rows take."""
    monkeypatch.setattr(w4a16_triton, "_FEW_WEIGHTS", few)
    w4a16_triton._float_product.clear_cache()
    weight, x = WEIGHTS_OF_PROMPTS[kind](), random_rows(300, 128, dtype=dtype)
    multiply = functools.partial(w4a16_triton.w4a16_matmul, weight=weight, prefill=True, interpret=True)
    together = multiply(x)
    assert isinstance(together, jax.Array)
    expected = np.asarray(x, np.float64) @ weight_in_float64(weight).T
    assert relative_error(together.astype(jnp.float32), expected) < (1e-6 if dtype == jnp.float32 else 4e-3)
    for some in (slice(40, 296), slice(299, 300)):
        np.testing.assert_array_equal(np.asarray(together)[some], multiply(x[some]))


def test_an_implementation_is_asked_for_what_it_grants(monkeypatch):
    weight, calls = random_weight(32, 128, 32, symmetric=False), []

    def multiply_rows(x, weight, *, dtype, alike=False, prefill=False):
        calls.append("prefill" if prefill else alike)
        return jnp.zeros((len(x), weight.num_outputs), dtype)

    monkeypatch.setattr(w4a16_triton, "w4a16_matmul", multiply_rows)
    operation = importlib.import_module("pallas_kernels.w4a16_matmul")
    monkeypatch.setattr(operation, "_IMPLEMENTATIONS", SimpleNamespace(select=lambda *_, **__: w4a16_triton))
    multiply = functools.partial(w4a16_partial_sums, random_rows(1, 128), weight, implementation="triton")
    alike = functools.partial(rows_alike, weight, jnp.float32, implementation="triton")
    for granted in (256, None):
        monkeypatch.setattr(w4a16_triton, "ROWS_ALIKE_IF_ASKED", granted)
        assert (alike(), alike(asked=True)) == (256, granted)
        for asked in (False, True):
            multiply(alike=asked)
    multiply(prefill=True)
    assert calls == [False, False, False, True, "prefill"]
    assert alike(prefill=True) is None


@pytest.mark.parametrize("integer", [False, True])
@pytest.mark.parametrize("asymmetric", [False, True])
def test_the_reduction_over_k_does_not_depend_on_the_number_of_rows(asymmetric, integer):
    for n, k, run in ((6144, 4096, 128), (28672, 4096, 32), (576, 1536, 32), (960, 576, 32)):
        configs = [
            tiles.tile_config(m, n, k, run, integer=integer, asymmetric=asymmetric)
            for m in (1, 4, 16, 17, 64, tiles.ROW_INVARIANT_ROWS)
        ]
        assert len({(config.block_k, config.split) for config in configs}) == 1
        assert all(k // 2 % (config.block_k * config.split) == 0 for config in configs)
        assert integer or not any(takes_wgmma(config.block_m, config.num_warps) for config in configs)


def test_tiles_of_a_rounded_weight_sum_in_one_order_by_the_same_instructions():
    for n, k, run in ((6144, 4096, 128), (28672, 4096, 32), (576, 1536, 32), (960, 576, 32), (48, 1536, 32)):
        configs = [tiles.rounding_config(m, n, k, run) for m in (1, 4, 16, 17, 64, tiles.ROW_INVARIANT_ROWS)]
        assert len({(config.block_k, config.split, config.block_n, config.num_warps) for config in configs}) == 1
        assert takes_wgmma(configs[0].block_n, configs[0].num_warps) == (n % 64 == 0)
        assert k // 2 % (configs[0].block_k * configs[0].split) == n % configs[0].block_n == 0


def test_one_layer_of_a_stack_works_inside_a_scan():
    layers = [random_weight(64, 64, 32, symmetric=False, seed=seed) for seed in range(3)]
    stack = jax.tree.map(lambda *arrays: jnp.stack(arrays), *layers)
    x = random_rows(2, 64)
    scanned, _ = jax.lax.scan(lambda rows, layer: (w4a16_matmul(rows, layer), None), x, stack)
    expected = np.asarray(x, np.float64)
    for layer in layers:
        expected = expected @ weight_in_float64(layer).T
    assert relative_error(scanned, expected) < 1e-6


def test_shapes_that_do_not_fit_are_named():
    weight = random_weight(32, 256, 64, symmetric=True)
    with pytest.raises(ValueError, match=r"K=128 inputs but weight.packed \(32, 128\) holds 256"):
        w4a16_matmul(random_rows(2, 128), weight)
    with pytest.raises(ValueError, match="float32, bfloat16 or float16"):
        w4a16_matmul(jnp.ones((2, 256), jnp.float8_e4m3fn), weight)
    with pytest.raises(ValueError, match=r"take one layer of a stack"):
        w4a16_matmul(random_rows(2, 256), jax.tree.map(lambda a: a[None], weight))
    with pytest.raises(ValueError, match=r"weight.scale has shape \(32, 4\)|expected \[G, N\]"):
        w4a16_matmul(random_rows(2, 256), dataclasses.replace(weight, scale=weight.scale[:, :16]))


def test_groupings_that_do_not_nest_are_named():
    weight = random_weight(32, 384, 128, symmetric=True)
    x = quantize_activations(random_rows(2, 384), bits=8, group_size=96)
    with pytest.raises(ValueError, match="groups of 96 and weight groups of 128 do not nest"):
        w4a4_matmul(x, weight, dtype=jnp.float32)


def test_asymmetric_activations_need_group_sums_at_least_as_fine_as_they_are():
    weight = random_weight(32, 256, 64, symmetric=True)
    x = quantize_activations(random_rows(2, 256), bits=8, symmetric=False)
    with pytest.raises(ValueError, match=r"with_group_sums\(weight, 256\)"):
        w4a4_matmul(x, dataclasses.replace(weight, group_sum=None), dtype=jnp.float32)
    finer = quantize_activations(random_rows(2, 256), bits=8, symmetric=False, group_size=32)
    with pytest.raises(ValueError, match=r"weight.group_sum has 4: call with_group_sums\(weight, 32\)"):
        w4a4_matmul(finer, weight, dtype=jnp.float32)
