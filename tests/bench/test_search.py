"""What the tuner takes and what it rejects, with made-up times and results."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import QuantizedActivation, QuantizedWeight
from pallas_kernels.backends.triton.tiles import TileConfig
from pallas_kernels.backends.triton.tuning import DECODE_ROWS, OPS, takes_wgmma
from pallas_kernels.w4a4_matmul import gpu_triton as w4a4_triton
from pallas_kernels.w4a16_matmul import gpu_triton as w4a16_triton
from qspec_jax.bench.tune.search import PREFILL_ROWS, Trial, complete_classes, kept_orders, search
from qspec_jax.bench.tune.tile_space import Problem, TileSpace, neighbours, order_of

PROBLEM = Problem("w4a8", 256, 64, 128, True)
SPACE = TileSpace(PROBLEM)
EVERYTHING = 100_000


def plain_time(rows, tiles):
    """Distinct for all tiles, and lowest for the built-in ones."""
    return 10.0 + sum(abs(a - b) for a, b in zip(astuple(tiles), astuple(SPACE.built_in(rows)), strict=True)) / 100


def astuple(tiles):
    return dataclasses.astuple(tiles)


def bits_of_order(rows, tiles):
    return str(order_of(tiles))


class FakeLaboratory:
    """Tells for each candidate what it is given, and remembers what it was asked."""

    def __init__(self, *, time=plain_time, error=lambda rows, tiles: 1e-3, bits=bits_of_order, agree=lambda d: True):
        self.time, self.error, self.bits, self.agree = time, error, bits, agree
        self.asked = {}

    def trials(self, rows, tiles, *, deadline):
        for one in tiles:
            self.asked.setdefault(rows, []).append(one)
            microseconds = self.time(rows, one)
            yield (
                Trial(one)
                if microseconds is None
                else Trial(one, microseconds, self.error(rows, one), self.bits(rows, one))
            )

    def rows_agree(self, decode):
        return self.agree(decode)

    def relative_error(self, rows, tiles):
        return self.error(rows, tiles)


def fastest_but(rows, rejected):
    """The fastest built-in-order tiles of a bucket without those that are rejected."""
    order = order_of(SPACE.built_in(16))
    pool = [tiles for tiles in SPACE.decode(rows) if order_of(tiles) == order and tiles not in rejected]
    return min(pool, key=lambda tiles: plain_time(rows, tiles))


def test_the_fastest_candidates_win_and_share_one_order():
    outcome = search(FakeLaboratory(), SPACE, candidates=EVERYTHING)
    winner = outcome.winner
    assert set(winner.decode) == set(DECODE_ROWS)
    assert {order_of(trial.tiles) for trial in winner.decode.values()} == {winner.order}
    assert winner.decode[16].tiles == SPACE.built_in(16)
    assert outcome.prefill.tiles == SPACE.built_in(PREFILL_ROWS)
    assert (outcome.num_failed, outcome.num_wrong, outcome.num_other_bits, outcome.num_variant) == (0, 0, 0, 0)
    assert outcome.built_in_us[16] == 10.0


@pytest.mark.parametrize("error", [0.28, float("nan"), float("inf")])
def test_a_wrong_candidate_loses_even_when_it_is_the_fastest(error):
    culprit = fastest_but(16, [SPACE.built_in(16)])
    laboratory = FakeLaboratory(
        time=lambda rows, tiles: 0.001 if tiles == culprit else plain_time(rows, tiles),
        error=lambda rows, tiles: error if tiles == culprit else 1e-3,
    )
    outcome = search(laboratory, SPACE, candidates=EVERYTHING)
    assert culprit in laboratory.asked[16]
    assert culprit not in [trial.tiles for trial in outcome.winner.decode.values()]
    assert outcome.num_wrong == sum(culprit in asked for asked in laboratory.asked.values())


def test_a_candidate_that_rounds_differently_loses_even_when_it_is_the_fastest():
    culprit = fastest_but(64, [SPACE.built_in(64)])
    laboratory = FakeLaboratory(
        time=lambda rows, tiles: 0.001 if (rows, tiles) == (64, culprit) else plain_time(rows, tiles),
        bits=lambda rows, tiles: "other" if (rows, tiles) == (64, culprit) else bits_of_order(rows, tiles),
    )
    outcome = search(laboratory, SPACE, candidates=EVERYTHING)
    assert culprit in laboratory.asked[64]
    assert outcome.winner.decode[64].tiles != culprit
    assert outcome.winner.bits != "other"
    assert outcome.num_other_bits == 1


def test_tiles_that_round_by_their_shape_are_compared_not_predicted():
    """As where wide tiles take another instruction: the bucket of 256 rows is slower for it, and right."""
    laboratory = FakeLaboratory(
        time=lambda rows, tiles: 1.0 if tiles.block_m >= 64 and rows >= 64 else plain_time(rows, tiles),
        bits=lambda rows, tiles: f"{order_of(tiles)} {tiles.block_m >= 64}",
    )
    outcome = search(laboratory, SPACE, candidates=EVERYTHING)
    assert all(trial.tiles.block_m < 64 for trial in outcome.winner.decode.values())
    assert outcome.num_other_bits > 0


def test_an_order_that_is_fast_in_one_bucket_only_does_not_win():
    common, other = order_of(SPACE.built_in(16)), (64, 2)
    assert common != other

    def search_with(times_of_16, times_of_256):
        def time(rows, tiles):
            times = times_of_16 if rows <= 128 else times_of_256
            return times.get(order_of(tiles), 50.0)

        return search(FakeLaboratory(time=time), SPACE, candidates=EVERYTHING).winner

    assert search_with({common: 5.0, other: 5.1}, {common: 9.0, other: 8.0}).order == common
    assert search_with({common: 5.0, other: 5.1}, {common: 90.0, other: 8.0}).order == other


def test_a_class_that_fails_the_last_check_gives_way_to_the_next():
    first = search(FakeLaboratory(), SPACE, candidates=EVERYTHING).winner
    not_the_first = lambda decode: order_of(decode[16]) != first.order  # noqa: E731
    outcome = search(FakeLaboratory(agree=not_the_first), SPACE, candidates=EVERYTHING)
    assert outcome.winner.order != first.order
    assert outcome.winner.cost > first.cost
    assert outcome.num_variant == 1
    never = search(FakeLaboratory(agree=lambda decode: False), SPACE, candidates=EVERYTHING)
    assert never.winner is None
    assert never.num_variant > 1


def test_candidates_that_do_not_compile_are_counted_and_skipped():
    laboratory = FakeLaboratory(time=lambda rows, tiles: None if tiles.num_stages > 3 else plain_time(rows, tiles))
    outcome = search(laboratory, SPACE, candidates=EVERYTHING)
    asked = [tiles for tried in laboratory.asked.values() for tiles in tried]
    assert outcome.num_failed == sum(tiles.num_stages > 3 for tiles in asked) > 0
    assert outcome.num_tried == len(asked)
    assert all(trial.tiles.num_stages <= 3 for trial in outcome.winner.decode.values())
    nothing = search(FakeLaboratory(time=lambda rows, tiles: None), SPACE, candidates=EVERYTHING)
    assert nothing.winner is nothing.prefill is None


def test_a_prefill_must_be_right_for_rows_that_fill_no_block():
    culprit = SPACE.built_in(PREFILL_ROWS)
    laboratory = FakeLaboratory(error=lambda rows, tiles: 0.3 if (rows, tiles) == (517, culprit) else 1e-3)
    outcome = search(laboratory, SPACE, candidates=EVERYTHING)
    assert outcome.prefill.tiles != culprit
    assert culprit in laboratory.asked[PREFILL_ROWS]


def test_built_in_tiles_stay_where_no_set_that_passes_is_as_fast():
    """Which happens where the fastest sets fail the last check, or time runs out."""
    built_in = {rows: SPACE.built_in(rows) for rows in DECODE_ROWS}
    faster = lambda rows, tiles: plain_time(rows, tiles) - (3 if tiles.num_warps == 8 and rows == 64 else 0)  # noqa: E731
    laboratory = FakeLaboratory(time=faster, agree=lambda decode: decode == built_in or decode[16] != built_in[16])
    outcome = search(laboratory, SPACE, candidates=EVERYTHING)
    assert outcome.num_variant > 0
    assert outcome.winner is None
    assert outcome.keeps_built_in
    laboratory = FakeLaboratory(time=faster, agree=lambda decode: decode[16] != built_in[16])  # nor are they invariant
    assert search(laboratory, SPACE, candidates=EVERYTHING).winner is not None


@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("group_size", [128, 4096], ids=["groups", "row"])
@pytest.mark.parametrize("op", OPS)
def test_built_in_tiles_are_those_that_the_kernels_take(op, group_size, symmetric):
    """Without a table. The tuner compares all others with them."""
    n, k = 6144, 4096
    space = TileSpace(Problem(op, k, n, group_size, symmetric))
    scales = jax.ShapeDtypeStruct((k // group_size, n), jnp.float16)
    packed = jax.ShapeDtypeStruct((n, k // 2), jnp.uint8)
    weight = QuantizedWeight(packed, scales, None if symmetric else scales)
    of_tokens = jax.ShapeDtypeStruct((1, k // space.problem.group_sizes[1]), jnp.float32)
    codes = jax.ShapeDtypeStruct((1, k), jnp.int8)
    x = QuantizedActivation(codes, of_tokens, of_tokens if op == "w4a4" else None, bits=8)
    for rows in (1, 16, 17, 33, 64, 256, 257):
        if op != "w4a16":
            assert space.built_in(rows) == w4a4_triton._tile_config(rows, x, weight)
        elif rows <= DECODE_ROWS[-1]:
            assert space.built_in(rows) == w4a16_triton._tile_config(rows, jnp.dtype(jnp.bfloat16), weight)


def test_a_weight_only_prefill_has_no_tiles():
    laboratory = FakeLaboratory()
    outcome = search(laboratory, TileSpace(dataclasses.replace(PROBLEM, op="w4a16")), candidates=1)
    assert outcome.prefill is None
    assert set(laboratory.asked) == set(DECODE_ROWS)


@pytest.mark.parametrize("candidates", [1, 12])
def test_a_small_budget_still_finds_a_complete_winner(candidates):
    laboratory = FakeLaboratory()
    outcome = search(laboratory, SPACE, candidates=candidates)
    assert set(outcome.winner.decode) == set(DECODE_ROWS)
    assert all(len(asked) <= max(candidates, 6) for asked in laboratory.asked.values())
    assert all(len(set(asked)) == len(asked) for asked in laboratory.asked.values())


def test_stages_share_the_time_and_an_empty_one_leaves_no_winner():
    deadlines = {}

    class Hasty(FakeLaboratory):
        def trials(self, rows, tiles, *, deadline):
            deadlines[rows] = deadline
            yield from () if rows == 64 else super().trials(rows, tiles, deadline=deadline)

    end = 1e9
    outcome = search(Hasty(), SPACE, candidates=8, deadline=end)
    assert outcome.winner is None
    assert sorted(deadlines.values()) == [deadlines[rows] for rows in (*DECODE_ROWS, PREFILL_ROWS)]
    assert len(set(deadlines.values())) == 6
    assert max(deadlines.values()) < end


def test_the_built_in_order_stays_in_the_race():
    trials = [Trial(TileConfig(16, 64, 32, split, 4, 3), float(split), 0.0, "") for split in (1, 2, 4, 8)]
    assert kept_orders(trials, (32, 8)) == [(32, 1), (32, 2), (32, 4), (32, 8)]
    assert kept_orders(trials, (32, 1)) == [(32, 1), (32, 2), (32, 4)]
    assert kept_orders(trials, (128, 1)) == [(32, 1), (32, 2), (32, 4)]


def test_the_cost_weighs_few_rows_most():
    def trial(order, microseconds):
        return Trial(TileConfig(16, 64, *order, 4, 3), microseconds, 0.0, str(order))

    few, many = (64, 1), (64, 2)
    right = {rows: [trial(few, 10.0), trial(many, 10.0)] for rows in DECODE_ROWS}
    right[16] = [trial(few, 10.0), trial(many, 12.0)]
    right[256] = [trial(few, 12.0), trial(many, 10.0)]
    classes = complete_classes(right)
    assert [one.order for one in classes] == [few, many]
    assert classes[0].cost == pytest.approx(1 + 0.05 * 0.2)
    assert classes[1].cost == pytest.approx(1 + 0.55 * 0.2)


@pytest.mark.parametrize(
    "problem",
    [
        Problem("w4a16", 4096, 28672, 128, True),
        Problem("w4a8", 14336, 4096, 14336, True),
        Problem("w4a4", 4096, 6144, 128, False),
        Problem("w4a16", 576, 960, 32, False),
        Problem("w4a16", 576, 48, 32, False),
    ],
    ids=str,
)
def test_candidates_cut_the_weight_evenly(problem):
    space = TileSpace(problem)
    for rows, candidates in {16: space.decode(16), 256: space.decode(256), 2048: space.prefill(2048)}.items():
        assert len(candidates) > 10
        assert len(set(candidates)) == len(candidates)
        for tiles in candidates:
            assert problem.n % tiles.block_n == 0
            assert problem.k // 2 % (tiles.block_k * tiles.split) == 0
            assert all(size % tiles.block_k == 0 for size in problem.group_sizes)
            assert rows > 256 or tiles.block_m <= rows


@pytest.mark.parametrize(
    ("problem", "takes"),
    [
        (Problem("w4a16", 4096, 28672, 128, True), False),
        (Problem("w4a16", 576, 960, 32, False), True),
        (Problem("w4a16", 576, 48, 32, False), False),
    ],
    ids=str,
)
def test_all_candidates_of_float_products_take_one_instruction(problem, takes):
    space = TileSpace(problem)
    for rows in DECODE_ROWS:
        for tile in (space.built_in(rows), *space.decode(rows)):
            left = tile.block_n if problem.group_size == 32 else tile.block_m
            assert takes_wgmma(left, tile.num_warps) == takes


@pytest.mark.parametrize(
    ("k", "group_size", "symmetric", "rounds"),
    [
        (4096, 32, False, True),
        (4096, 64, False, False),
        (4096, 32, True, False),
        (576, 64, False, True),  # tiles of 32 inputs, as half a row is 288
        (576, 576, False, False),
    ],
)
def test_weights_are_rounded_where_sums_would_be_scaled_often(k, group_size, symmetric, rounds):
    assert Problem("w4a16", k, 960, group_size, symmetric).rounds_weights == rounds
    assert not Problem("w4a8", k, 960, group_size, symmetric).rounds_weights


def test_neighbours_differ_in_one_field_or_keep_the_area():
    space = SPACE.decode(64)
    for other in neighbours(SPACE.built_in(64), space):
        mine, theirs = astuple(SPACE.built_in(64)), astuple(other)
        differing = sum(a != b for a, b in zip(mine, theirs, strict=True))
        assert differing == 1 or mine[0] * mine[1] == theirs[0] * theirs[1]
    assert neighbours(SPACE.built_in(64), space)
