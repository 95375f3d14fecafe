"""GPU kernels at the shapes of real models, against the float32 reference."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import (
    Layout,
    best_layout,
    quantize_activations,
    rms_norm_quantize,
    swiglu_quantize,
    upper_nibbles,
    value_of,
    w4a4_matmul,
    w4a16_matmul,
    with_layout,
)
from pallas_kernels.accuracy import INTEGER_MATMUL, W4A16, W4A16_ROUNDED_WEIGHTS, allowed_error, relative_error
from pallas_kernels.arrays.weight import order_activation_codes
from pallas_kernels.backends.mosaic import matmul as hopper
from pallas_kernels.backends.mosaic import pairs
from pallas_kernels.backends.triton import tiles
from pallas_kernels.w4a4_matmul import gpu_mosaic as w4a4_mosaic
from pallas_kernels.w4a16_matmul import gpu_mosaic as w4a16_mosaic
from pallas_kernels.w4a16_matmul import gpu_triton as w4a16_triton
from qspec_jax.bench.kernels.operands import cancelling
from tests.pallas_kernels.kernel_cases import (
    DEMO_MODEL,
    LLAMA_3_8B,
    random_nested_weight,
    random_rows,
    random_weight,
    weight_in_float64,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs an NVIDIA GPU"),
]

ROWS = (1, 3, 8, 12, 33, 64, 100, 128, 256)  # each is compiled anew, which is what these tests take time for
IMPLEMENTATIONS = ("triton", "mosaic")
INVARIANT_ROWS = {"triton": tiles.ROW_INVARIANT_ROWS, "mosaic": 256}
SHAPES = [(k, n, 32, False) for k, n in DEMO_MODEL]
SHAPES += [(k, n, group_size or k, True) for k, n in LLAMA_3_8B for group_size in (128, 32, None)]
SHAPES += [(4096, 4096, 128, False), (4096, 4096, 4096, False)]  # AWQ and GPTQ
SHAPES += [(11008, 4096, 64, False)]  # an odd number of tiles along K


def assert_right_and_rows_agree(call, x, expected: jax.Array, bound: float, invariant_rows: int) -> None:
    """Every M is right, and each row has the bits it has in the largest row-invariant batch, wherever it stands."""
    take = lambda rows: call(jax.tree.map(lambda a: a[rows], x))  # noqa: E731
    widest = np.asarray(take(slice(invariant_rows)))
    for num_rows in ROWS:
        out = take(slice(num_rows))
        assert relative_error(out.astype(jnp.float32), expected[:num_rows]) < bound, f"M={num_rows}"
        if num_rows <= invariant_rows:
            np.testing.assert_array_equal(np.asarray(out), widest[:num_rows], err_msg=f"M={num_rows}")
    elsewhere = np.asarray([7, 90, 3, 3, 127])
    np.testing.assert_array_equal(np.asarray(take(elsewhere)), widest[elsewhere])


def laid_out(weight, implementation: str, dtype=jnp.bfloat16):
    """The weight as the implementation reads it beside rows of a dtype."""
    return with_layout(weight, best_layout(weight, dtype, implementation=implementation))


def mosaic_obstacle(dtype, weight) -> str | None:
    """Of the Mosaic kernel to a weight in the layout that it reads."""
    return w4a16_mosaic.obstacle(jnp.dtype(dtype), dataclasses.replace(weight, layout=w4a16_mosaic.LAYOUT))


def skip_unless_served(implementation: str, obstacle) -> None:
    """Skips what the Mosaic kernels do not serve: that they say so is tested without a GPU."""
    if implementation == "mosaic" and (told := obstacle()):
        pytest.skip(f"mosaic {told}")


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32], ids=["bf16", "f16", "f32"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_w4a16_is_right_and_each_row_stands_alone(implementation, shape, dtype):
    k, n, group_size, symmetric = shape
    if dtype != jnp.bfloat16 and n > 6144:
        pytest.skip("one dtype is enough at the largest shape")
    weight = laid_out(random_weight(n, k, group_size, symmetric=symmetric), implementation, dtype)
    skip_unless_served(implementation, lambda: mosaic_obstacle(dtype, weight))
    x = random_rows(max(ROWS), k, dtype=dtype)
    expected = w4a16_matmul(x.astype(jnp.float32), weight, implementation="reference")
    bound = allowed_error("w4a16_matmul", dtype, num_inputs=k, implementation=implementation, weight=weight)
    multiply = jax.jit(functools.partial(w4a16_matmul, implementation=implementation))
    call = lambda x: multiply(x, weight)  # noqa: E731 - as an argument, not a constant of each program
    assert_right_and_rows_agree(call, x, expected, bound, INVARIANT_ROWS[implementation])
    # Where large products cancel it shows in 16 bits how sums were rounded.
    x = cancelling(x)
    widest = np.asarray(call(x[: INVARIANT_ROWS[implementation]]))
    for num_rows in (rows for rows in ROWS if rows <= len(widest)):
        np.testing.assert_array_equal(np.asarray(call(x[:num_rows])), widest[:num_rows], err_msg=f"M={num_rows}")


PAIRED_ROWS = (96, 100, 128, 192, 200, 256)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16], ids=["bf16", "f16"])
@pytest.mark.parametrize(("k", "n"), [(4096, 28672), (14336, 4096), (4096, 6144)], ids=str)
def test_pairs_of_programs_give_each_row_the_bits_of_programs_that_share_nothing(k, n, dtype):
    """Many times over: programs of a pair write to each other's memory, and a race need not show at once."""
    weight = laid_out(random_weight(n, k, 128, symmetric=True), "mosaic", dtype)
    x = random_rows(max(PAIRED_ROWS), k, dtype=dtype)
    bound = allowed_error("w4a16_matmul", dtype, num_inputs=k, implementation="mosaic")
    true = w4a16_matmul(x.astype(jnp.float32), weight, implementation="reference")

    def multiply(choose, x, weight):
        return value_of(w4a16_mosaic.w4a16_matmul(x, weight, config=choose(len(x), n, k)))

    apart = jax.jit(functools.partial(multiply, w4a16_mosaic.default_config))
    paired = jax.jit(functools.partial(multiply, pairs.default_config))

    for rows in (x, cancelling(x)):
        expected = apart(rows, weight)
        for num_rows in PAIRED_ROWS:
            for _ in range(10):
                out = paired(rows[:num_rows], weight)
                assert bool(jnp.array_equal(out, expected[:num_rows])), num_rows
            if rows is x:
                assert relative_error(out.astype(jnp.float32), true[:num_rows]) < bound, num_rows
    elsewhere = np.arange(128)[::-1]
    np.testing.assert_array_equal(paired(x[elsewhere], weight), apart(x, weight)[elsewhere])


MANY_ROWS = (1, 100, 512, 2048, 2100)
# Groups of a nested weight and of others; symmetric or not; of 11008 inputs slices have different numbers of tiles.
IN_TURN = [("plain", 4096, 4096, 128, True), ("plain", 4096, 6144, 32, False), ("plain", 11008, 4096, 128, False)]
IN_TURN += [("nested", 4096, 4096, 128, True), ("nested", 14336, 4096, 64, False), ("float16", 4096, 4096, 64, True)]


@pytest.mark.parametrize(("kind", "k", "n", "group_size", "symmetric"), IN_TURN, ids=str)
def test_slices_of_a_sum_that_one_warpgroup_computes_give_the_bits_of_slices_that_are_shared(
    kind, k, n, group_size, symmetric
):
    if w4a16_mosaic.in_turn_config(128, n, k) is None:
        pytest.skip("from jax 0.12 on a warpgroup has too few registers for several sums")
    dtype = jnp.float16 if kind == "float16" else jnp.bfloat16
    make = random_nested_weight if kind == "nested" else random_weight
    weight = laid_out(make(n, k, group_size, symmetric=symmetric), "mosaic", dtype)
    x = random_rows(max(MANY_ROWS), k, dtype=dtype)
    slices = hopper.num_slices(n, k)

    def shared(num_rows):
        return hopper.layout_of_warpgroups(n, slices, hopper.block_m(num_rows))

    def in_turn(num_rows):
        return w4a16_mosaic.in_turn_config(num_rows, n, k, nested=kind == "nested")

    def multiply(choose, x, weight):
        return value_of(w4a16_mosaic.w4a16_matmul(x, weight, config=choose(len(x))))

    by_two = lambda num_rows: dataclasses.replace(in_turn(num_rows), split=2, in_turn=slices // 2, programs=0)  # noqa: E731
    each_its_own = lambda num_rows: dataclasses.replace(in_turn(num_rows), programs=0)  # noqa: E731
    others = [jax.jit(functools.partial(multiply, choose)) for choose in (in_turn, by_two, each_its_own)]
    before = jax.jit(functools.partial(multiply, shared))
    for rows in (x, cancelling(x)):
        expected = before(rows, weight)
        for num_rows in MANY_ROWS:
            for call in (before, *others):
                equal = jnp.array_equal(call(rows[:num_rows], weight), expected[:num_rows])
                assert bool(equal), (num_rows, call)
    true = w4a16_matmul(x[-100:].astype(jnp.float32), weight, implementation="reference")
    bound = allowed_error("w4a16_matmul", dtype, num_inputs=k, implementation="mosaic", weight=weight)
    assert relative_error(before(x, weight)[-100:].astype(jnp.float32), true) < bound


@pytest.mark.parametrize("group_size", [128, 4096])
def test_integer_sums_whose_slices_one_warpgroup_computes_have_the_bits_of_those_that_are_shared(group_size):
    weight = laid_out(random_weight(4096, 4096, group_size, symmetric=False), "mosaic")
    x = random_rows(300, 4096, dtype=jnp.bfloat16)
    codes = quantize_activations(x, bits=8, layout=weight.layout, implementation="reference")
    shared = w4a4_mosaic.default_config(300, weight)
    in_turn = dataclasses.replace(shared, warpgroups_k=1, split=1, block_m=64, in_turn=shared.slices)
    multiply = lambda config: value_of(w4a4_mosaic.w4a4_matmul(codes, weight, dtype=x.dtype, config=config))  # noqa: E731
    np.testing.assert_array_equal(*[np.asarray(multiply(config)) for config in (shared, in_turn)])


NESTED = [(4096, 6144, 128, True), (14336, 4096, 64, False), (1536, 576, 32, True), (4096, 28672, 4096, True)]


@pytest.mark.parametrize("result", [None, jnp.float32], ids=["as x", "f32"])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16], ids=["bf16", "f16"])
@pytest.mark.parametrize("shape", NESTED, ids=str)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_nested_weights_and_their_upper_nibbles_are_right_and_each_row_stands_alone(
    implementation, shape, dtype, result
):
    k, n, group_size, symmetric = shape
    nested = laid_out(random_nested_weight(n, k, group_size, symmetric=symmetric), implementation, dtype)
    x = random_rows(max(ROWS), k, dtype=dtype)
    multiply = jax.jit(functools.partial(w4a16_matmul, dtype=result, implementation=implementation))
    for weight in (nested, upper_nibbles(nested)):
        bound = allowed_error("w4a16_matmul", dtype, num_inputs=k, implementation=implementation, weight=weight)
        expected = w4a16_matmul(x.astype(jnp.float32), weight, implementation="reference")
        call = lambda x, weight=weight: multiply(x, weight)  # noqa: E731 - as an argument, not a constant
        assert_right_and_rows_agree(call, x, expected, bound, INVARIANT_ROWS[implementation])


# Of scales of four bits, which with their terms are exact: from float16's smallest numbers to large ones.
SIZES = {jnp.bfloat16: range(-21, 12), jnp.float16: range(-10, 3)}


@pytest.mark.parametrize("num_rows", [8, 72, 256])
@pytest.mark.parametrize("dtype", SIZES, ids=["bf16", "f16"])
@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("kind", ["4 bits", "nested", "upper nibbles"])
def test_rows_that_pick_an_input_read_its_weights_rounded_once(kind, symmetric, dtype, num_rows):
    n, k, group_size = 128, 1024, 32
    weight = random_nested_weight(n, k, group_size, symmetric=symmetric)
    weight = dataclasses.replace(weight, low=None) if kind == "4 bits" else weight
    rng = np.random.default_rng(0)
    scale = np.ldexp(rng.integers(8, 16, (k // group_size, n)), rng.choice(SIZES[dtype], (k // group_size, n)) - 3)
    scale *= rng.choice([-1, 1], scale.shape)
    offset = None if symmetric else jnp.float16(scale * rng.integers(4, 12, scale.shape))
    weight = dataclasses.replace(weight, scale=jnp.float16(scale), offset=offset, group_sum=None)
    weight = upper_nibbles(weight) if kind == "upper nibbles" else weight
    exact = weight_in_float64(weight)
    read = laid_out(weight, "mosaic", dtype)
    multiply = jax.jit(functools.partial(w4a16_matmul, implementation="mosaic"))
    for first in range(0, k, num_rows):
        picked = np.arange(first, min(first + num_rows, k))
        out = multiply(jax.nn.one_hot(picked, k, dtype=dtype), read)
        expected = exact[:, picked].T.astype(np.float32).astype(dtype)
        np.testing.assert_array_equal(np.asarray(out, np.float32), expected.astype(np.float32), err_msg=f"from {first}")


@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_upper_nibbles_of_nested_weights_meet_integers(implementation, symmetric):
    weight = upper_nibbles(laid_out(random_nested_weight(6144, 4096, 128, symmetric=symmetric), implementation))
    x = random_rows(max(ROWS), 4096, dtype=jnp.bfloat16)
    codes = quantize_activations(x, bits=8, layout=weight.layout, implementation="reference")
    expected = w4a4_matmul(codes, weight, dtype=jnp.float32, implementation="reference")
    multiply = jax.jit(functools.partial(w4a4_matmul, dtype=jnp.float32, implementation=implementation))
    call = lambda x: multiply(x, weight)  # noqa: E731
    assert_right_and_rows_agree(call, codes, expected, INTEGER_MATMUL, INVARIANT_ROWS[implementation])


@pytest.mark.parametrize(("bits", "x_symmetric", "grouped"), [(4, True, False), (8, True, True), (8, False, False)])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_w4a4_is_right_and_each_row_stands_alone(implementation, shape, bits, x_symmetric, grouped):
    k, n, group_size, symmetric = shape
    scale_dtype = jnp.float16 if implementation == "mosaic" else jnp.float32
    weight = random_weight(n, k, group_size, symmetric=symmetric, scale_dtype=scale_dtype)
    weight = laid_out(weight, implementation)
    x = random_rows(max(ROWS), k, dtype=jnp.bfloat16)
    settings = {"bits": bits, "symmetric": x_symmetric, "group_size": group_size if grouped else None}
    quantized = quantize_activations(x, **settings, layout=weight.layout, implementation="reference")
    skip_unless_served(implementation, lambda: w4a4_mosaic.obstacle(quantized, weight))
    expected = w4a4_matmul(quantized, weight, dtype=jnp.float32, implementation="reference")
    multiply = jax.jit(functools.partial(w4a4_matmul, dtype=jnp.float32, implementation=implementation))
    call = lambda x: multiply(x, weight)  # noqa: E731
    assert_right_and_rows_agree(call, quantized, expected, INTEGER_MATMUL, INVARIANT_ROWS[implementation])


@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(
    ("k", "group_size", "outlier_groups"),
    [
        (576, None, 0),
        (576, 32, 0),
        (576, 32, 1),
        (1536, None, 0),
        (1536, 32, 2),
        (4096, None, 0),
        (14336, 128, 0),
        (14336, 128, 3),
    ],
    ids=str,
)
def test_quantize_activations_gives_the_codes_of_the_reference(k, group_size, outlier_groups, bits, symmetric):
    settings = {"bits": bits, "group_size": group_size, "symmetric": symmetric, "outlier_groups": outlier_groups}
    for num_rows in ROWS:
        x = random_rows(num_rows, k, dtype=jnp.bfloat16)
        out = quantize_activations(x, **settings, implementation="triton")
        x_on_cpu = jax.device_put(x, jax.devices("cpu")[0])
        expected = quantize_activations(x_on_cpu, **settings, implementation="reference")
        np.testing.assert_array_equal(out.codes, expected.codes)
        np.testing.assert_array_equal(out.scale, expected.scale)
        if not symmetric:
            np.testing.assert_array_equal(out.offset, expected.offset)


@pytest.mark.parametrize("shape", [SHAPES[0], SHAPES[4], SHAPES[5], SHAPES[6]], ids=str)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_prefill_of_more_rows_is_right(implementation, shape):
    k, n, group_size, symmetric = shape
    weight = laid_out(random_weight(n, k, group_size, symmetric=symmetric), implementation)
    x = random_rows(517, k, dtype=jnp.bfloat16)
    skip_unless_served(implementation, lambda: mosaic_obstacle(x.dtype, weight))
    expected = w4a16_matmul(x.astype(jnp.float32), weight, implementation="reference")
    out = w4a16_matmul(x, weight, implementation=implementation)
    assert relative_error(out.astype(jnp.float32), expected) < W4A16_ROUNDED_WEIGHTS
    quantized = quantize_activations(x, bits=8, implementation="reference")
    if implementation == "mosaic" and w4a4_mosaic.obstacle(quantized, weight):
        return
    expected = w4a4_matmul(quantized, weight, dtype=jnp.float32, implementation="reference")
    out = w4a4_matmul(quantized, weight, dtype=jnp.float32, implementation=implementation)
    assert relative_error(out, expected) < INTEGER_MATMUL


def test_a_float32_prefill_is_right():
    weight, wide = random_weight(960, 576, 32, symmetric=False), random_rows(517, 576)
    expected = w4a16_matmul(wide, weight, implementation="reference")
    assert relative_error(w4a16_matmul(wide, weight, implementation="triton"), expected) < W4A16["float32"]


def test_none_takes_triton_where_mosaic_fits_too():
    weight, x = random_weight(128, 512, 128, symmetric=True), random_rows(4, 512, dtype=jnp.bfloat16)
    assert mosaic_obstacle(x.dtype, weight) is None
    assert best_layout(weight, x.dtype) is Layout.PLANES
    assert best_layout(weight, x.dtype, implementation="mosaic") is Layout.WGMMA
    np.testing.assert_array_equal(w4a16_matmul(x, weight), w4a16_matmul(x, weight, implementation="triton"))


def test_none_takes_triton_where_it_fits_and_the_reference_where_it_does_not():
    fitting, odd = random_weight(64, 256, 64, symmetric=True), random_weight(24, 256, 64, symmetric=True)
    x = random_rows(4, 256)
    np.testing.assert_array_equal(w4a16_matmul(x, fitting), w4a16_matmul(x, fitting, implementation="triton"))
    np.testing.assert_array_equal(w4a16_matmul(x, odd), w4a16_matmul(x, odd, implementation="reference"))
    with pytest.raises(NotImplementedError, match="needs N to be a multiple of 16; this is 24"):
        w4a16_matmul(x, odd, implementation="triton")


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32], ids=["bf16", "f16", "f32"])
@pytest.mark.parametrize("shape", [(576, 960, 32), (576, 576, 32), (576, 3072, 32), (1536, 576, 32), (4096, 6144, 128)])
@pytest.mark.parametrize("symmetric", [False, True], ids=["asymmetric", "symmetric"])
def test_rows_have_their_bits_in_one_launch_of_any_number(shape, dtype, symmetric):
    """Those of a decode, also where there are more, and those of prompts, which have their own tiles."""
    k, n, group_size = shape
    weight = random_weight(n, k, group_size, symmetric=symmetric)
    x = random_rows(2048, k, dtype=dtype)

    def multiplied(**options):
        return jax.jit(lambda x, weight: value_of(w4a16_triton.w4a16_matmul(x, weight, **options)))

    of_a_decode, of_prompts = multiplied(alike=True)(x, weight), multiplied(prefill=True)(x, weight)
    expected = w4a16_matmul(x, weight, implementation="reference")
    assert relative_error(of_prompts, expected) < W4A16[jnp.dtype(dtype).name]
    for some in (slice(0, 256), slice(1000, 1256), slice(5, 6), slice(2040, 2048)):
        np.testing.assert_array_equal(of_a_decode[some], multiplied()(x[some], weight))
        np.testing.assert_array_equal(of_prompts[some], multiplied(prefill=True)(x[some], weight))


@pytest.mark.parametrize("group_size", [None, 128])
@pytest.mark.parametrize("k", [4096, 14336])
def test_producers_write_the_order_of_a_wgmma_weight(k, group_size):
    x, update = (random_rows(33, k, dtype=jnp.bfloat16, seed=seed) for seed in (1, 3))
    gain, gate_up = random_rows(k, dtype=jnp.bfloat16, seed=2), random_rows(33, 2 * k, dtype=jnp.bfloat16)
    settings = {"bits": 8, "group_size": group_size, "implementation": "triton"}

    def produce(layout):
        return (
            quantize_activations(x, layout=layout, **settings),
            rms_norm_quantize(x, gain, epsilon=1e-5, layout=layout, **settings),
            rms_norm_quantize(x, gain, epsilon=1e-5, update=update, layout=layout, **settings)[1],
            swiglu_quantize(gate_up, layout=layout, **settings),
        )

    for plain, ordered in zip(produce(Layout.PLANES), produce(Layout.WGMMA), strict=True):
        np.testing.assert_array_equal(ordered.codes, order_activation_codes(plain.codes, Layout.WGMMA))
        np.testing.assert_array_equal(ordered.scale, plain.scale)


@pytest.mark.parametrize("num_rows", [1, 5, 8, 12, 40])
def test_activations_in_their_own_order_are_brought_into_that_of_the_weight(num_rows):
    weight = laid_out(random_weight(6144, 4096, 128, symmetric=True), "mosaic")
    x = random_rows(num_rows, 4096, dtype=jnp.bfloat16)
    products = [
        w4a4_matmul(quantize_activations(x, bits=8, layout=layout), weight, dtype=x.dtype, implementation="mosaic")
        for layout in Layout
    ]
    np.testing.assert_array_equal(*map(np.asarray, products))
