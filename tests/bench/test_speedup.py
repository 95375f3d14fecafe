"""The formula of what speculation gains, and what is drawn of it."""

from __future__ import annotations

import dataclasses
import re

import numpy as np
import pytest

from qspec_jax.bench.decode.plot import plot_speedup
from qspec_jax.bench.decode.speedup import Speculation, targets_of
from qspec_jax.bench.decode.tables import model_line, speculation_table
from qspec_jax.decoding.speedup import acceptance_for, expected_tokens
from qspec_jax.errors import UsageError
from qspec_jax.evaluation.scores import DraftScore
from qspec_jax.model.config import QuantConfig

SPECULATION = Speculation("w4a8", 3, 16, 512, plain_ms=4.0, draft_ms=3.0, verify_ms=5.0, cycle_ms=15.0)
SCORE = DraftScore("w4a8", 3, 8, 512, 400, 0.8, 3.4, (0.9, 0.8, 0.7), 8)


@pytest.mark.parametrize("draft_length", [1, 3, 7])
@pytest.mark.parametrize("acceptance", [0.3, 0.8, 0.95])
def test_expected_tokens_are_equation_1_and_a_simulation(acceptance, draft_length):
    closed = (1 - acceptance ** (draft_length + 1)) / (1 - acceptance)
    accepted = np.random.default_rng(0).random((200_000, draft_length)) < acceptance
    simulated = 1 + np.cumprod(accepted, axis=1).sum(axis=1).mean()
    assert expected_tokens(acceptance, draft_length) == pytest.approx(closed)
    assert simulated == pytest.approx(closed, rel=0.01)


@pytest.mark.parametrize("draft_length", range(1, 8))
def test_a_cycle_yields_one_token_at_least_and_all_of_them_at_most(draft_length):
    assert expected_tokens(0.0, draft_length) == 1
    assert expected_tokens(1.0, draft_length) == draft_length + 1


def test_the_acceptance_for_a_yield_inverts_it():
    for acceptance in (0.01, 0.5, 0.9, 1.0):
        assert acceptance_for(expected_tokens(acceptance, 3), 3) == pytest.approx(acceptance)
    assert acceptance_for(0.7, 3) == pytest.approx(0)  # a cycle cheaper than a step gains at once
    assert acceptance_for(4.01, 3) is None


@pytest.mark.parametrize(
    ("function", "first", "draft_length", "message"),
    [
        (expected_tokens, 1.1, 3, "acceptance=1.1: use a chance, 0 to 1"),
        (expected_tokens, float("nan"), 3, "acceptance=nan: use a chance"),
        (expected_tokens, "0.5", 3, "acceptance='0.5': use a number"),
        (expected_tokens, 0.5, -1, "draft_length=-1: use 0 or more"),
        (expected_tokens, 0.5, 2.5, "draft_length=2.5: use a whole number"),
        (acceptance_for, float("nan"), 3, "tokens=nan: use 0 or more"),
        (acceptance_for, 2.0, None, "draft_length=None: use a whole number"),
    ],
)
def test_what_is_no_chance_no_yield_or_no_length_is_refused(function, first, draft_length, message):
    with pytest.raises(UsageError, match=re.escape(message)):
        function(first, draft_length)


def test_speedup_is_yield_over_cost_and_breaks_even_at_one():
    assert SPECULATION.draft_ratio == 0.75
    assert SPECULATION.verify_ratio == 1.25
    assert SPECULATION.gap_ms == 1.0
    assert SPECULATION.costs == {"parts": 3.5, "loop": 3.75}
    found = SPECULATION.to_dict()
    assert found["curve"][-1]["acceptance"] == 1.0
    assert found["curve"][-1]["speedup"] == {"parts": pytest.approx(4 / 3.5), "loop": pytest.approx(4 / 3.75)}
    for kind, even in found["break_even"].items():
        assert SPECULATION.speedups(expected_tokens(even, 3))[kind] == pytest.approx(1)


def test_measured_acceptance_stands_on_the_curve():
    one = Speculation("w4a8", 3, 16, 512, 4.0, 3.0, 5.0, 15.0, SCORE)
    assert expected_tokens(one.accepted_alpha, 3) == pytest.approx(3.4)
    assert one.accepted_alpha > SCORE.acceptance_rate  # which counts drafts after a rejected one as drafted
    found = one.to_dict()["accepted"]
    assert found["speedup"] == {"parts": pytest.approx(3.4 / 3.5), "loop": pytest.approx(3.4 / 3.75)}
    assert found["alpha"] == one.accepted_alpha


@pytest.mark.parametrize("target", ["w4a16", "w8a16", "float"])
def test_the_table_names_the_target_that_it_compares_with(target):
    one = dataclasses.replace(SPECULATION, verify=target)
    assert f"Speed-up over plain {target.upper()} decoding" in speculation_table([one])
    assert targets_of([one, SPECULATION]) == ("W4A16" if target == "w4a16" else f"{target.upper()} or W4A16")


@pytest.mark.parametrize(
    ("formats", "told", "form"),
    [
        ([(64, 8)], {}, "8-bit in groups of 64 (symmetric), float32"),
        ([(64, 4)], {"keep_floats": True}, "in floating point and 4-bit in groups of 64 (symmetric), float32"),
        ([], None, "in floating point, float32"),
        ([(64, 8)], {"head_bits": 8, "draft_head": 4}, "LM head of 8 bits, LM head of drafts of 4 bits, float32"),
    ],
)
def test_the_line_of_a_model_says_which_weights_it_holds(formats, told, form):
    made = [{"group_size": size, "symmetric": True, "bits": bits} for size, bits in formats]
    quantization = None if told is None else dataclasses.asdict(QuantConfig(**told))
    facts = {"weights": "synthetic", "formats": made, "quantization": quantization, "num_bytes": 10**9}
    line = model_line({"name": "8b", "dtype": "float32", "kernels": "auto", **facts}, 1.0)
    assert form.replace(", float32", ", 1.00 GB, float32") in line


def test_the_plot_is_a_png(tmp_path):
    pytest.importorskip("matplotlib")
    path = tmp_path / "speedup.png"
    plot_speedup(path, [SPECULATION, Speculation("w4a4", 1, 1, 64, 4.0, 3.0, 5.0, 9.0, SCORE)], title="a device")
    assert path.read_bytes().startswith(b"\x89PNG")
