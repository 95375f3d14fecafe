"""Contracts of the Mosaic GPU kernels that need no GPU: the order of inputs, tiles, and lowering for CUDA."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import Layout, PartialSums, QuantizedActivation, upper_nibbles
from pallas_kernels.arrays.partial_sums import tree_sum
from pallas_kernels.backends.early_launch import early_launch
from pallas_kernels.backends.mosaic import epilogue
from pallas_kernels.backends.mosaic import matmul as hopper
from pallas_kernels.backends.mosaic import pipeline as pipelines
from pallas_kernels.w4a4_matmul import gpu_mosaic as w4a4_mosaic
from pallas_kernels.w4a16_matmul import gpu_mosaic as w4a16_mosaic
from tests.conftest import THOROUGH
from tests.pallas_kernels.kernel_cases import LLAMA_3_8B, newest_jax_by_feature
from tests.pallas_kernels.test_cuda_lowering import (
    abstract_nested_weight,
    abstract_weight,
    array,
    cuda_program,
    described_gpu,
)

KERNEL_CALL = "mosaic_gpu"
BFLOAT16 = jnp.dtype(jnp.bfloat16)
SHAPES = [(k, n, group_size or k, True) for k, n in LLAMA_3_8B for group_size in (128, 64, None)]
SHAPES += [(1536, 576, 32, False), (4096, 4096, 128, False), (11008, 4096, 128, True)]


# Every other number of rows with each shape; ``QSPEC_JAX_THOROUGH=1`` takes all where groups are of 128, or of 32.
# float16 takes the tiles of bfloat16, which has as many bytes: each number of rows three times will do.
ROWS = (7, 64, 100, 256, 600)
PAIRS = [
    (shape, num_rows)
    for index, shape in enumerate(SHAPES)
    for place, num_rows in enumerate(ROWS)
    if (THOROUGH and shape[2] in (32, 128)) or (index + place) % 2 == 0
]
CASES = [(*pair, jnp.bfloat16) for pair in PAIRS]
CASES += [(shape, ROWS[index % len(ROWS)], jnp.float16) for index, shape in enumerate(SHAPES)]


def features(shape, num_rows, dtype=jnp.int8):
    """What a kernel is lowered from: warpgroups and pipeline, groups in a tile, zero points, clipped rows, dtype."""
    k, n, group_size, symmetric = shape
    config = w4a16_mosaic.default_config(num_rows, n, k)
    if dtype == jnp.int8:
        config = w4a4_mosaic.default_config(num_rows, abstract_weight(*shape))
    cut = config.warpgroups_n, config.warpgroups_k, config.split > 1, config.x_slots > 0
    return *cut, "whole row" if group_size == k else group_size, symmetric, num_rows % 8 == 0, dtype


@pytest.mark.parametrize("version", [(0, 11, 2), (0, 12, 0)], ids=str)
def test_sums_fit_into_what_registers_a_jax_leaves(monkeypatch, version):
    """And whichever programs have them, the order of each sum stays that of the weight."""
    monkeypatch.setattr(jax, "__version_info__", version)
    weight = abstract_weight(4096, 28672, 128, True)
    for num_rows in (96, 112, 208, 216, 256):
        integers, floats = (
            w4a4_mosaic.default_config(num_rows, weight),
            w4a16_mosaic.default_config(num_rows, 28672, 4096),
        )
        for config, sums in ((integers, 2), (floats, 1)):
            assert config.slices == 1
            in_registers = sums * config.block_m // 2
            assert config.warpgroups_n == (2 if version < (0, 12) or in_registers <= 104 else 1)
    for num_rows in (209, 256):  # of which programs have 224 and 256
        chosen = w4a16_mosaic._chosen_config(num_rows, weight, BFLOAT16, early=False)
        assert isinstance(chosen, hopper.MosaicConfig) is (version >= (0, 12))


@pytest.mark.parametrize(
    ("shape", "num_rows", "dtype"),
    newest_jax_by_feature(CASES, features),
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_w4a16_lowers(shape, num_rows, dtype):
    weight, x = abstract_weight(*shape, Layout.WGMMA), array(num_rows, shape[0], dtype=dtype)
    assert w4a16_mosaic.obstacle(jnp.dtype(dtype), weight) is None
    assert KERNEL_CALL in cuda_program(w4a16_mosaic.w4a16_matmul, x, weight)


@pytest.mark.parametrize(
    ("shape", "num_rows"),
    newest_jax_by_feature([pair for pair in PAIRS if pair[0][2] % 128 == 0 and pair[1] <= 256], features),
    ids=str,
)
def test_w4a8_lowers(shape, num_rows):
    weight = abstract_weight(*shape, Layout.WGMMA)
    codes, scale = array(num_rows, shape[0], dtype=jnp.int8), array(num_rows, 1, dtype=jnp.float32)
    x = QuantizedActivation(codes, scale, None, bits=8)
    assert w4a4_mosaic.obstacle(x, weight) is None
    assert KERNEL_CALL in cuda_program(lambda x, w: w4a4_mosaic.w4a4_matmul(x, w, dtype=jnp.bfloat16), x, weight)


NESTED = [((4096, 28672, 128, True), 16, jnp.bfloat16), ((1536, 576, 32, False), 64, jnp.float16)]


@pytest.mark.newest_jax
@pytest.mark.parametrize(("shape", "num_rows", "dtype"), NESTED, ids=["g128-bf16", "g32-asymmetric-f16"])
def test_nested_weights_and_their_upper_nibbles_lower(shape, num_rows, dtype):
    weight, x = abstract_nested_weight(*shape, Layout.WGMMA), array(num_rows, shape[0], dtype=dtype)
    for one, name in ((weight, "w8a16"), (upper_nibbles(weight), "w4a16")):
        assert w4a16_mosaic.obstacle(jnp.dtype(dtype), one) is None
        assert f"{name}_mosaic_gpu" in cuda_program(w4a16_mosaic.w4a16_matmul, x, one)


@pytest.mark.newest_jax
def test_upper_nibbles_lower_for_integers():
    weight = upper_nibbles(abstract_nested_weight(4096, 4096, 128, True, Layout.WGMMA))
    x = QuantizedActivation(array(4, 4096, dtype=jnp.int8), array(4, 1, dtype=jnp.float32), None, bits=8)
    assert w4a4_mosaic.obstacle(x, weight) is None
    assert KERNEL_CALL in cuda_program(lambda x, w: w4a4_mosaic.w4a4_matmul(x, w, dtype=jnp.bfloat16), x, weight)


@pytest.mark.newest_jax
@pytest.mark.parametrize("bits", [4, 8])
def test_the_name_of_an_integer_kernel_says_the_bits_of_its_activations(bits):
    weight = abstract_weight(*SHAPES[0], Layout.WGMMA)
    codes, scale = array(4, SHAPES[0][0], dtype=jnp.int8), array(4, 1, dtype=jnp.float32)
    x = QuantizedActivation(codes, scale, None, bits=bits)
    program = cuda_program(lambda x, w: w4a4_mosaic.w4a4_matmul(x, w, dtype=jnp.bfloat16), x, weight)
    assert f"w4a{bits}_mosaic_gpu" in program


@pytest.mark.parametrize(
    ("shape", "num_rows"),
    newest_jax_by_feature(
        itertools.product([SHAPES[0], (4096, 4096, 128, False), (1536, 576, 32, False)], [1, 256]),
        lambda shape, num_rows: (shape[3], num_rows),
    ),
    ids=str,
)
def test_a_weight_is_read_before_the_kernel_before_has_ended_only_where_kernels_may_start_early(shape, num_rows):
    weight, x = abstract_weight(*shape, Layout.WGMMA), array(num_rows, shape[0], dtype=jnp.bfloat16)
    with early_launch():
        assert "griddepcontrol.wait" in cuda_program(w4a16_mosaic.w4a16_matmul, x, weight)
        early = jax.make_jaxpr(w4a16_mosaic.w4a16_matmul)(x, weight)
    assert str(early).count("griddepcontrol_wait") == 2  # of the copying and of the computing warpgroups
    assert "griddepcontrol" not in cuda_program(w4a16_mosaic.w4a16_matmul, x, weight)


@pytest.mark.parametrize("num_rows", [1, 16, 64, 256])
@pytest.mark.parametrize("shape", LLAMA_3_8B, ids=str)
def test_an_sm_holds_one_program_of_a_matmul_that_starts_early(shape, num_rows):
    """Two would share one where the kernel before still occupies another, and take twice the time."""
    k, n = shape
    problem = hopper.Problem(num_rows, n, k, k // 128, jnp.bfloat16, jnp.bfloat16)
    config = hopper.with_most_stages(w4a16_mosaic.default_config(num_rows, n, k), problem, num_columns=1)
    scratch = pipelines._scratch(problem, config, [(jnp.float16, True)], alone=True)
    arrays = [one for one in jax.tree.leaves(scratch) if hasattr(one, "dtype")]
    used = sum(math.prod(one.shape) * jnp.dtype(one.dtype).itemsize for one in arrays)
    assert 2 * (used + 1024) > 228 * 1024 >= used + 1024


@pytest.mark.parametrize(
    ("n", "k"), [(28672, 4096), (6144, 4096), (4096, 4096), (4096, 11008), (576, 1536), (192, 256)]
)
def test_the_order_of_the_sum_is_the_same_for_all_row_counts(n, k):
    numbers = itertools.product([*range(1, 600, 7), 1024, 2100, 4096], (False, True))
    configs = [w4a16_mosaic.default_config(m, n, k, nested=nested) for m, nested in numbers]
    assert len({config.slices for config in configs}) == 1
    assert configs[0].slices <= k // 2 // hopper.TILE
    for config in configs:
        assert n % config.block_n == 0
        assert config.block_m % 8 == 0
        assert config.block_m <= 256


@pytest.mark.parametrize("num_tiles", [16, 43])  # of 4096 inputs; of 11008, which do not come out even
def test_a_slice_has_the_same_tiles_in_the_same_order_whoever_computes_it(num_tiles, monkeypatch):
    problem = hopper.Problem(128, 128, 256 * num_tiles, 2 * num_tiles, jnp.bfloat16, jnp.bfloat16)
    for split, warpgroups_k, in_turn in [(4, 1, 1), (2, 2, 1), (1, 4, 1), (2, 1, 2), (1, 1, 4)]:
        config = hopper.MosaicConfig(1, warpgroups_k, split, 128, 4, in_turn=in_turn)
        program = pipelines._Program(None, (), (), 0, (), (), problem, config, False, {})
        slices, copied = [], []
        for place in range(split):
            here = SimpleNamespace(axis_index=lambda _, place=place: jnp.int32(place), div=lambda a, b: a // b)
            monkeypatch.setattr(pipelines, "lax", here)
            for turn, part in itertools.product(range(in_turn), range(warpgroups_k)):
                steps = range(program.num_steps(part, turn))
                slices.append([int(program.tile_of(step, part, turn)) for step in steps])
                assert len(slices[-1]) <= program.num_steps(0, turn)  # which are copied
            copied.append(int(program.steps_before(in_turn)))
        assert slices == [list(range(first, num_tiles, 4)) for first in range(4)]
        assert sum(copied) * warpgroups_k >= num_tiles


def test_slices_that_are_computed_in_turn_are_added_as_parts_are(monkeypatch):
    """And as soon as they can be, so that a warpgroup never holds more than three sums of four."""
    parts, events = list(jnp.float32([[1e8, 1 / 3], [-1e8, 1e-3], [7.7, -0.1], [1e-7, 3e3]])), []
    monkeypatch.setattr(epilogue.lanes, "pinned", lambda total: events.append("add") or total)
    for in_turn in (1, 2, 4):
        sums = [
            epilogue.sum_in_turn(lambda turn, first=first: events.append(turn) or parts[first + turn], in_turn)
            for first in range(0, 4, in_turn)
        ]
        np.testing.assert_array_equal(tree_sum(sums), tree_sum(parts))
    assert events[-7:] == [0, 1, "add", 2, 3, "add", "add"]
    with pytest.raises(ValueError, match=r"in_turn=2 with warpgroups_k=2; use 1 for one of them"):
        hopper.MosaicConfig(1, 2, 1, 128, 4, in_turn=2)


@pytest.mark.parametrize("num_tiles", [16, 43])
@pytest.mark.parametrize("outputs_first", [False, True])
def test_programs_go_through_all_blocks_and_count_their_tiles(outputs_first, num_tiles, monkeypatch):
    problem = hopper.Problem(600, 640, 256 * num_tiles, 2 * num_tiles, jnp.bfloat16, jnp.bfloat16)
    config = hopper.MosaicConfig(2, 1, 1, 128, 4, in_turn=4, outputs_first=outputs_first, programs=7)
    whole, found = pipelines._Program(None, (), (), 0, (), (), problem, config, False, {}), {}

    def loop(start, stop, body, carry):
        for index in range(int(start), int(stop)):
            body(jnp.int32(index), carry)

    for place in range(7):
        steps = []

        def visit(program, place=place, steps=steps):
            block = int(program.first_row), int(program.first_column)
            found[block] = place
            for turn in range(4):
                assert int(program.steps_before(turn)) == len(steps)
                steps.extend(range(int(program.num_steps(0, turn))))

        def here(axis, place=place):
            return jnp.int32({"split": 0, "program": place}[axis])

        arithmetic = {"div": lambda a, b: a // b, "rem": lambda a, b: a % b}
        monkeypatch.setattr(pipelines, "lax", SimpleNamespace(axis_index=here, fori_loop=loop, **arithmetic))
        whole.for_each_block(visit)
        assert len(steps) == num_tiles * list(found.values()).count(place)
    assert sorted(found) == list(itertools.product(range(0, 600, 128), range(0, 640, 128)))
    beside = (0, 128) if outputs_first else (128, 0)  # runs at the same time as the first block
    assert (found[0, 0], found[beside]) == (0, 1)
    with pytest.raises(ValueError, match=r"programs=7 with warpgroups_k=1 and split=2; use 1 for either"):
        dataclasses.replace(config, split=2)


@pytest.mark.newest_jax
@pytest.mark.parametrize(("k", "symmetric"), [(4096, True), (11008, False)], ids=["even", "uneven"])
def test_slices_in_turn_lower_and_leave_no_parts(k, symmetric, monkeypatch):
    monkeypatch.setattr(jax, "__version_info__", (0, 11, 2))  # a later one leaves too few registers
    weight, rows = abstract_weight(k, 4096, 128, symmetric, Layout.WGMMA), w4a16_mosaic.IN_TURN_ROWS
    nested = abstract_nested_weight(k, 4096, 128, symmetric, Layout.WGMMA)
    for num_rows, one in ((rows, weight), (rows + 52, weight), (rows, nested)):
        config = w4a16_mosaic.in_turn_config(num_rows, 4096, k, nested=one is nested)
        multiply = functools.partial(w4a16_mosaic.w4a16_matmul, config=config)
        program = cuda_program(multiply, array(num_rows, k, dtype=jnp.bfloat16), one)
        assert KERNEL_CALL in program
        assert f"tensor<4x{num_rows}" not in program
        chosen = cuda_program(w4a16_mosaic.w4a16_matmul, array(num_rows, k, dtype=jnp.bfloat16), one)
        assert (f"tensor<4x{num_rows}" in chosen) == (one is nested)
    assert f"tensor<4x{rows - 8}" in cuda_program(
        w4a16_mosaic.w4a16_matmul, array(rows - 8, k, dtype=jnp.bfloat16), weight
    )
    each_its_own = dataclasses.replace(w4a16_mosaic.in_turn_config(rows, 4096, k), programs=0)
    multiply = functools.partial(w4a16_mosaic.w4a16_matmul, config=each_its_own)
    assert KERNEL_CALL in cuda_program(multiply, array(rows + 52, k, dtype=jnp.bfloat16), weight)
    codes, scale = array(rows, k, dtype=jnp.int8), array(rows, 1, dtype=jnp.float32)
    x = QuantizedActivation(codes, scale, None, bits=8, layout=Layout.WGMMA)
    config = hopper.MosaicConfig(2, 1, 1, 64, 4, registers=(24, 240), in_turn=4)  # also of sums with a factor
    multiply = lambda x, w: w4a4_mosaic.w4a4_matmul(x, w, dtype=jnp.bfloat16, config=config)  # noqa: E731
    assert KERNEL_CALL in cuda_program(multiply, x, weight)


def test_who_shares_no_sums_has_registers_for_them(monkeypatch):
    for version in ((0, 11, 2), (0, 12, 0)):
        monkeypatch.setattr(jax, "__version_info__", version)
        chosen = functools.partial(w4a16_mosaic.default_config, w4a16_mosaic.IN_TURN_ROWS, k=4096)
        of_four, of_two, of_one = map(chosen, (4096, 6144, 28672))
        in_turn = (4, 2, 1) if version < (0, 12) else (1, 1, 1)
        assert (of_four.in_turn, of_two.in_turn, of_one.in_turn) == in_turn
        for config, sums in ((of_four, 3), (of_two, 2)):
            assert config.in_turn == 1 or sums * config.block_m // 2 <= 192  # of 240, as ptxas spills none in a loop
        for unmeasured in ({"nested": True}, {"group_size": 64}, {"group_size": 4096}):
            assert chosen(4096, **unmeasured).in_turn == 1


@pytest.mark.parametrize("group_size", [128, 4096])
@pytest.mark.parametrize("symmetric", [True, False])
def test_integer_instructions_exist_for_every_block_of_rows(group_size, symmetric):
    weight = abstract_weight(4096, 6144, group_size, symmetric)
    for m in range(1, 600):
        block_m = w4a4_mosaic.default_config(m, weight).block_m
        assert block_m in (8, 16, 24, 32) or (block_m % 16 == 0 and block_m <= 256)


@pytest.mark.parametrize(("k", "n"), LLAMA_3_8B, ids=str)
def test_three_tiles_with_their_rows_are_in_flight_or_rows_come_in_pieces(k, n):
    """With two, reading waits: 128 rows of 8-bit weights took 81 us on an H200, and 65 with pieces."""
    kinds = itertools.product(range(65, 129), (False, True), (32, 64, 128), (False, True))
    for num_rows, nested, group_size, symmetric in kinds:
        kind = {"nested": nested, "group_size": group_size, "symmetric": symmetric}
        config = w4a16_mosaic.default_config(num_rows, n, k, **kind)
        problem = hopper.Problem(num_rows, n, k, k // group_size, jnp.bfloat16, jnp.bfloat16, num_packed=1 + nested)
        num_stages = hopper.with_most_stages(config, problem, 1 if symmetric else 2).num_stages
        assert config.x_slots or num_stages >= 3
        assert (config.x_slots > 0) >= (nested and num_rows > 80)


def test_blocks_of_rows_are_as_low_as_programs_allow():
    assert [hopper.block_m(m) for m in (1, 8, 9, 256, 257, 600)] == [8, 8, 16, 256, 136, 200]


@pytest.mark.parametrize(
    ("num_rows", "padded"),
    newest_jax_by_feature(
        [(7, False), (1, False), (8, False), (24, False), (264, False), (9, True)],
        lambda num_rows, padded: (num_rows % 8 == 0, num_rows > 256, padded),
    ),
)
def test_nothing_surrounds_the_kernel_where_a_copy_can_clip_the_rows(num_rows, padded):
    """Rows and activation codes are read as they lie: a step launches the kernel and nothing to prepare for it."""
    weight = abstract_weight(4096, 28672, 128, True, Layout.WGMMA)
    codes, scale = array(num_rows, 4096, dtype=jnp.int8), array(num_rows, 1, dtype=jnp.float32)
    x = QuantizedActivation(codes, scale, None, bits=8, layout=Layout.WGMMA)
    rows = array(num_rows, 4096, dtype=jnp.bfloat16)
    programs = (
        cuda_program(w4a16_mosaic.w4a16_matmul, rows, weight),
        cuda_program(lambda x, w: w4a4_mosaic.w4a4_matmul(x, w, dtype=jnp.bfloat16), x, weight),
    )
    for program in programs:
        assert ("stablehlo.pad" in program) == padded
        assert not any(f"stablehlo.{op}" in program for op in ("transpose", "gather", "slice", "add"))
    with early_launch():  # behind a kernel that signals none of XLA's may pad
        assert "stablehlo.pad" not in cuda_program(w4a16_mosaic.w4a16_matmul, rows, weight)


@pytest.mark.newest_jax
def test_programs_that_share_a_sum_leave_the_addition_to_its_reader():
    weight = abstract_weight(14336, 4096, 128, True, Layout.WGMMA)
    codes, scale = array(2, 1, 14336, dtype=jnp.int8), array(2, 1, 1, dtype=jnp.float32)
    x = QuantizedActivation(codes, scale, None, bits=8, layout=Layout.WGMMA)
    calls = (
        (w4a16_mosaic.w4a16_matmul, array(2, 1, 14336, dtype=jnp.bfloat16)),
        (lambda x, w: w4a4_mosaic.w4a4_matmul(x, w, dtype=jnp.bfloat16), x),
    )
    for matmul, rows in calls:
        with described_gpu():
            sums = jax.eval_shape(matmul, rows, weight)
        assert (type(sums), sums.shape, sums.dtype) == (PartialSums, (2, 1, 4096), jnp.bfloat16)
        assert sums.parts.shape == (2, 2, 1, 4096)
        program = cuda_program(matmul, rows, weight)
        assert not any(f"stablehlo.{op}" in program for op in ("add", "multiply", "convert", "slice"))


def test_what_the_kernels_cannot_serve_is_said():
    weight = abstract_weight(4096, 6144, 32, False, Layout.WGMMA)
    assert w4a16_mosaic.obstacle(BFLOAT16, weight) is None
    assert "needs a weight in layout 'wgmma', not 'planes'" in w4a16_mosaic.obstacle(
        BFLOAT16, abstract_weight(4096, 6144, 32, False)
    )
    assert "needs bfloat16 or float16" in w4a16_mosaic.obstacle(jnp.dtype(jnp.float32), weight)
    assert "needs K to be a multiple of 256" in w4a16_mosaic.obstacle(BFLOAT16, abstract_weight(576, 960, 32, True))
    assert "needs N to be a multiple of 64" in w4a16_mosaic.obstacle(BFLOAT16, abstract_weight(256, 96, 32, True))
    scale = array(4, 1, dtype=jnp.float32)
    x = QuantizedActivation(array(4, 4096, dtype=jnp.int8), scale, None, bits=8)
    assert "needs groups of a multiple of 128" in w4a4_mosaic.obstacle(x, weight)
    asymmetric = QuantizedActivation(x.codes, scale, scale, bits=8)
    assert "symmetric activations with one scale" in w4a4_mosaic.obstacle(asymmetric, weight)


def test_shared_memory_bounds_the_tiles_in_flight():
    problem = hopper.Problem(64, 28672, 4096, 32, jnp.bfloat16, jnp.bfloat16)
    config = hopper.MosaicConfig(4, 1, 1, 64, num_stages=9)
    stages = hopper.with_most_stages(config, problem, num_columns=1).num_stages
    assert stages == 3  # 64 KiB of weight and rows each
    assert hopper.with_most_stages(config, problem, num_columns=1) == hopper.with_most_stages(
        hopper.MosaicConfig(4, 1, 1, 64, num_stages=3), problem, num_columns=1
    )
