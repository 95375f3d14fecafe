"""How many rows are filled together: the share before anything is known, and then what costs a batch the least."""

from __future__ import annotations

import math

import numpy as np
import pytest

from qspec_jax.engine.pace import Pace
from qspec_jax.engine.refill import Refill

PASS_S, TOKEN_S, CYCLE_S = 0.004, 3e-6, 0.0012


def measured(rows, *, finished, pass_s=PASS_S, cycle_s=CYCLE_S, gap_s=0.0, rounds=1, serves=False, noise=0.0):
    """Of which is known what a batch took, of as many readings as bursts."""
    refill, draw = Refill(rows, serves=serves), np.random.default_rng(0)
    for passes in (4, 1, 2, 1, 1, 3, 1, 1, 1, 2):
        passes *= rounds
        tokens = int(passes * draw.integers(200, 2_000))
        seconds = (passes * pass_s + tokens * TOKEN_S) * (1 + noise * draw.standard_normal())
        refill.note_reading(rounds=rounds, passes=passes, tokens=tokens, seconds=seconds)
        refill.note_burst(seconds=50 * cycle_s, finished=round(50 * finished), gap_s=gap_s)
    return refill


@pytest.mark.parametrize(("rows", "serves", "share"), [(64, False, 8), (64, True, 4), (8, False, 1), (3, True, 1)])
def test_a_share_of_the_rows_is_filled_together_before_more_is_known(rows, serves, share):
    refill = Refill(rows, serves=serves)
    assert refill.until_finished(active=rows, others_wait=True) == share
    assert refill.until_finished(active=rows - 2, others_wait=True) == share + 2  # two are idle already
    assert (
        refill.until_finished(active=1, others_wait=True) == refill.until_finished(active=1, others_wait=False) == rows
    )


def cost_s(together, *, rows, finished, fixed_s, prompt_s=0.0, num_prompts=4_000):
    """Seconds of a batch whose rows end one after another: cycles until so many are idle, and then all of them read."""
    seconds, idle, left = 0.0, 0.0, num_prompts
    while left > 0:
        active = rows - idle
        seconds, idle = seconds + CYCLE_S, idle + finished * active / rows
        if idle >= together:
            seconds, left, idle = seconds + fixed_s + prompt_s * together, left - together, idle - together
    return seconds


@pytest.mark.parametrize(
    ("rows", "finished", "pass_s"), [(64, 0.5, PASS_S), (64, 0.2, 0.002), (64, 0.2, 0.0005), (16, 0.1, 0.0015)]
)
@pytest.mark.parametrize("noise", [0.0, 0.02])
def test_what_costs_a_batch_the_least_is_filled_together(rows, finished, pass_s, noise):
    chosen = measured(rows, finished=finished, pass_s=pass_s, noise=noise).together()
    costs = {
        count: cost_s(count, rows=rows, finished=finished, fixed_s=pass_s, prompt_s=2e-4)
        for count in range(1, rows // 4 + 1)
    }
    assert costs[chosen] <= 1.01 * min(costs.values())
    assert costs[chosen] < 0.97 * max(costs.values())  # it matters


def test_it_is_the_formula_and_a_quarter_of_the_rows_at_most():
    finished, rows = 0.2, 64
    expected = math.sqrt(2 * finished * rows * PASS_S / CYCLE_S)
    assert measured(rows, finished=finished).together() == round(expected) == 9
    assert measured(rows, finished=finished, rounds=2).together() == round(expected * math.sqrt(2))
    assert measured(rows, finished=finished, gap_s=PASS_S).together() == round(expected * math.sqrt(2))
    assert measured(rows, finished=finished, pass_s=0.1).together() == 16
    assert measured(rows, finished=finished, pass_s=0.0).together() == 1
    assert measured(4, finished=1.0).together() == 1


def test_of_a_batch_that_serves_a_smaller_share_whatever_is_known():
    assert measured(64, finished=0.5, serves=True).together() == 4


def test_nothing_is_known_of_passes_that_are_all_alike():
    refill = Refill(64, serves=False)
    for _ in range(10):
        refill.note_reading(rounds=1, passes=1, tokens=500, seconds=0.005)
        refill.note_burst(seconds=0.06, finished=10, gap_s=0.0)
    assert refill.together() == 8


def test_nothing_is_known_where_nobody_has_ended():
    assert measured(64, finished=0.0).together() == 8


def test_a_batch_that_goes_on_with_the_totals_of_another_counts_its_own_gaps():
    pace, gaps = Pace(64, burst_s=0.5, serves=False), []
    pace._refill.note_burst = lambda *, gap_s, **_: gaps.append(gap_s)
    for gap_s in (60.0, 60.001, 60.003):
        pace.note_burst(cycles=10, seconds=0.1, finished=3, gap_s=gap_s)
    assert gaps == pytest.approx([0.0, 0.001, 0.002])
