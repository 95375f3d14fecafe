"""Contracts of pairs of Mosaic GPU programs that need no GPU: who computes what, lowering for CUDA, what is refused."""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import Layout
from pallas_kernels.backends.early_launch import early_launch
from pallas_kernels.backends.mosaic import matmul as hopper
from pallas_kernels.backends.mosaic import pair_pipeline, pairs
from pallas_kernels.w4a16_matmul import gpu_mosaic as w4a16_mosaic
from tests.pallas_kernels.kernel_cases import newest_jax_by_feature
from tests.pallas_kernels.test_cuda_lowering import abstract_nested_weight, abstract_weight, array, cuda_program

GATE_UP, DOWN = (4096, 28672), (14336, 4096)
KERNEL = "w4a16_pairs_mosaic_gpu"
weight_of = functools.partial(abstract_weight, group_size=128, symmetric=True, layout=Layout.WGMMA)


def paired(x, weight, **options):
    """The product by pairs, whatever is chosen."""
    config = pairs.default_config(x.shape[0], weight.num_outputs, weight.num_inputs)
    return w4a16_mosaic.w4a16_matmul(x, weight, config=config, **options)


def rows_by_block(config: pairs.PairConfig) -> np.ndarray:
    """``[block_m, blocks]``: how often the warpgroups of a pair compute these rows of a block."""
    found = np.zeros((config.block_m, config.blocks), int)
    for rank in range(2):
        for team, num_warpgroups in enumerate(config.teams):
            for phase in range(config.phases):
                start, num_rows = config.rows(team, phase, rank)
                first = config.first_block(team, phase, rank)
                found[start : start + num_rows, first : first + num_warpgroups] += 1
    return found


@pytest.mark.parametrize(("k", "n"), [GATE_UP, DOWN, (4096, 448), (4096, 896), (4096, 6144), (8192, 57344)])
def test_each_output_of_each_row_is_computed_once(k, n):
    for m in range(1, 257):
        config = pairs.default_config(m, n, k)
        assert n % config.block_n == 0
        assert (rows_by_block(config) == 1).all(), m
        assert config.block_m - 16 < m <= config.block_m  # one pair for all rows, and none of them too many


@pytest.mark.parametrize("blocks", range(2, 12))
def test_any_number_of_blocks_is_shared_out_evenly(blocks):
    of_program = (blocks + 1) // 2
    for warpgroups in [count for count in range(1, of_program + 1) if of_program % count == 0]:
        config = pairs.PairConfig(blocks, warpgroups, 1, 32, 3, 8, (40, 232))
        assert (rows_by_block(config) == 1).all()
        assert sum(config.teams) == warpgroups
        assert config.phases * warpgroups == of_program


def test_seven_blocks_are_one_wave_where_two_or_four_waste_a_seventh_of_the_sms():
    num_sms, blocks = 132, 28672 // hopper.ROWS
    busy = {size: blocks / size / (num_sms * math.ceil(blocks / size / num_sms)) for size in (2, 3.5, 4)}
    assert {size: round(share, 2) for size, share in busy.items()} == {2: 0.85, 3.5: 0.97, 4: 0.85}
    assert pairs.default_config(256, 28672, 4096).blocks == 2 * 3.5


@pytest.mark.parametrize(("k", "n"), [GATE_UP, DOWN, (4096, 6144), (4096, 4096)])
def test_sums_are_cut_as_by_other_programs(k, n):
    for m in range(1, 257):
        assert pairs.default_config(m, n, k).split == w4a16_mosaic.default_config(m, n, k).slices


@pytest.mark.parametrize(("k", "n"), [GATE_UP, DOWN])
def test_a_program_fits_into_shared_memory(k, n):
    """Arrays begin at multiples of 1 KiB; a program may have 227 KiB."""
    for m in range(16, 257, 16):
        config = pairs.with_most_slots(pairs.default_config(m, n, k))
        problem = hopper.Problem(m, n, k, k // 128, jnp.bfloat16, jnp.bfloat16)
        scratch = jax.tree.leaves(pair_pipeline._scratch(problem, config))
        arrays = [math.prod(one.shape) * jnp.dtype(one.dtype).itemsize for one in scratch if hasattr(one, "dtype")]
        barriers = [math.prod(one.num_barriers) for one in scratch if not hasattr(one, "dtype")]
        assert sum(arrays) == config.shared_memory
        assert sum(-(-size // 1024) * 1024 for size in arrays) + 8 * sum(barriers) <= 227 * 1024
        assert min(config.num_stages, config.x_slots) >= 2


CASES = [(GATE_UP, 5, "bfloat16"), (GATE_UP, 96, "bfloat16"), (GATE_UP, 100, "float16"), (DOWN, 128, "bfloat16")]
CASES += [(GATE_UP, rows, "bfloat16") for rows in (200, 256)]


def features(shape, num_rows, dtype):
    """What a kernel is lowered from: warpgroups, a halved block, a shared sum, clipped rows, dtype."""
    config = pairs.default_config(num_rows, shape[1], shape[0])
    return config.warpgroups, config.has_half, config.split > 1, num_rows % 8 == 0, dtype


@pytest.mark.parametrize(("shape", "num_rows", "dtype"), newest_jax_by_feature(CASES, features), ids=str)
def test_pairs_lower(shape, num_rows, dtype):
    x, weight = array(num_rows, shape[0], dtype=jnp.dtype(dtype)), weight_of(*shape)
    assert KERNEL in cuda_program(paired, x, weight)


def equations(jaxpr):
    """All equations, those of jaxprs within them too, each with the others of its jaxpr."""
    for equation in jaxpr.eqns:
        yield equation, jaxpr.eqns
        for inner in jax.tree.leaves(equation.params, is_leaf=lambda one: hasattr(one, "eqns")):
            if hasattr(inner, "eqns"):
                yield from equations(inner)


@pytest.mark.newest_jax
def test_who_tells_the_other_program_has_waited_for_all_threads_that_compute():
    """A single thread arrives at the barrier of both, which says nothing of products of other warps."""
    x, weight = array(128, 4096, dtype=jnp.bfloat16), weight_of(*GATE_UP)
    told = []
    for equation, beside in equations(jax.make_jaxpr(paired)(x, weight).jaxpr):
        if equation.primitive.name == "barrier_arrive" and "cluster" in str(equation.invars[0].aval):
            told.append([(one.primitive.name, str(one.invars[0].aval)) for one in beside])
    config = pairs.default_config(128, 28672, 4096)
    assert len(told) == 4 * config.phases  # the pieces of a tile
    for around in told:
        names, of = zip(*around, strict=True)
        assert names == ("barrier_wait", "barrier_arrive", "barrier_wait")
        assert ["cluster" in barrier for barrier in of] == [False, True, True]


def test_pairs_are_chosen_where_they_ran_and_were_faster():
    x, weight = array(96, 4096, dtype=jnp.bfloat16), weight_of(*GATE_UP)
    program = lambda: cuda_program(lambda x, weight: w4a16_mosaic.w4a16_matmul(x, weight), x, weight)  # noqa: E731
    assert KERNEL in program()
    choose = functools.partial(w4a16_mosaic._chosen_config, dtype=jnp.bfloat16, early=False)
    for m in (1, 64, 95, 257):
        assert choose(m, weight) == w4a16_mosaic.default_config(m, 28672, 4096)
    assert choose(96, weight_of(*DOWN)) == w4a16_mosaic.default_config(96, 4096, 14336)
    assert choose(96, weight, dtype=jnp.float16) == w4a16_mosaic.default_config(96, 28672, 4096)
    # What they do not serve is multiplied as before.
    asymmetric = weight_of(*GATE_UP, symmetric=False)
    assert isinstance(choose(96, asymmetric), hopper.MosaicConfig)
    with early_launch():
        assert KERNEL not in program()


@pytest.mark.parametrize(
    ("weight", "reason"),
    [
        (weight_of(*GATE_UP, symmetric=False), "need symmetric weights; this one has zero points"),
        (weight_of(*GATE_UP, group_size=64), "need groups of 128; these are of 64"),
        (weight_of(*GATE_UP, group_size=4096), "need groups of 128; these are of 4096"),
        (weight_of(4096, 6208), "need N to be a multiple of 256; this is 6208"),
        (weight_of(11008, 4096), "need K to be a multiple of 1024; this is 11008"),
        (abstract_nested_weight(*GATE_UP, 128, True, Layout.WGMMA), "need codes of 4 bits; these are nested in 8"),
    ],
)
def test_what_pairs_do_not_serve_is_refused_by_name(weight, reason):
    with pytest.raises(NotImplementedError, match=f"w4a16_matmul: pairs of programs {reason}"):
        cuda_program(paired, array(96, weight.num_inputs, dtype=jnp.bfloat16), weight)


def test_pairs_refuse_to_start_early():
    with early_launch(), pytest.raises(NotImplementedError, match="pairs of programs do not start early"):
        cuda_program(paired, array(96, 4096, dtype=jnp.bfloat16), weight_of(*GATE_UP))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"blocks": 1}, "shares blocks=1"),
        ({"warpgroups": 3}, "has 4 to compute.*not 3"),
        ({"block_m": 40}, "block_m=40; use a multiple of 16 up to 256"),
        ({"block_m": 272}, "block_m=272; use a multiple of 16 up to 256"),
        ({"x_slots": 1}, "x_slots=1; use at least 2"),
    ],
)
def test_an_arrangement_that_cannot_be_is_refused(changes, message):
    config = pairs.default_config(128, 28672, 4096)
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(config, **changes)
