"""The mode ``auto``: whatever runs from burst to burst, the tokens are those of plain decoding."""

from __future__ import annotations

import gc
import itertools

import jax
import pytest

from qspec_jax.decoding.chunks import Shape
from qspec_jax.decoding.plan import AutoPlan, DecodingPlan, Lookup
from qspec_jax.engine.chooser import Burst, Chooser
from qspec_jax.model.view import View
from tests.decoding.test_draft_context import NUM_TOKENS, PROMPTS, language_model, tokens_of

PLAIN = DecodingPlan(View())
BUDGET = View(activation_bits=8, cache_budget=176)
PLANS = AutoPlan("auto", (PLAIN, DecodingPlan(View(), BUDGET, 2), DecodingPlan(View(), Lookup(), 3)))


@pytest.fixture(scope="module")
def model():
    model = language_model()
    model.programs.compile(PLANS, Shape.of(PLANS, rows=2, capacity=512), [512])
    return model


def run(model, plan, *, on_event=None, **options):
    requests = [model.attempt(prompt, plan, max_new_tokens=NUM_TOKENS, **options) for prompt in PROMPTS]
    pipeline = model.run(requests, plan, batch_size=2, max_seq_len=512, on_event=on_event)
    return pipeline.collect(), pipeline.totals


def taking_turns(monkeypatch):
    """Every burst runs the next plan, a few cycles of it."""
    turns = itertools.cycle([*PLANS.choices, *reversed(PLANS.choices)])
    monkeypatch.setattr(Chooser, "choose", lambda self, **options: Burst(next(turns), None, 2, "its turn"))


def test_plans_that_take_turns_yield_the_tokens_of_plain_decoding(model, monkeypatch):
    """Rows enter and leave meanwhile; blocks and texts are handed from one plan to the next."""
    expected, _ = run(model, PLAIN)
    taking_turns(monkeypatch)
    results, totals = run(model, PLANS)
    assert tokens_of(results) == tokens_of(expected)
    assert totals.choices.keys() == {"w4a16", "w4a8@176 x2", "lookup x3"}
    assert all(one.cycles and one.seconds and one.why == "its turn" for one in totals.choices.values())
    assert sum(one.cycles for one in totals.choices.values()) == totals.cycles
    assert totals.choices["w4a8@176 x2"].accepted > 0


def test_what_was_chosen_is_counted_for_each_sequence(model, monkeypatch):
    taking_turns(monkeypatch)
    results, totals = run(model, PLANS)
    for result in results:
        stats = result.stats
        assert (stats.mode, stats.draft, stats.draft_length) == ("auto", "auto", 3)
        assert sum(stats.choices.values()) == stats.cycles == sum(stats.accepted_lengths)
        drafted = 2 * stats.choices.get("w4a8@176 x2", 0) + 3 * stats.choices.get("lookup x3", 0)
        assert stats.drafted == drafted >= stats.accepted
        assert result.to_dict()["choices"] == dict(stats.choices)
    assert totals.drafted == sum(result.stats.drafted for result in results)


def test_it_starts_plainly_and_compiles_beside(monkeypatch):
    """A batch is never kept waiting for another plan; one that does not compile is never run."""
    model, asked = language_model(), []
    compile_it = type(model.programs).compile

    def compile_or_fail(self, plan, *arguments, **options):
        asked.append(plan)
        if plan != PLAIN:
            raise RuntimeError("no such kernel")
        return compile_it(self, plan, *arguments, **options)

    monkeypatch.setattr(type(model.programs), "compile", compile_or_fail)
    monkeypatch.setattr("qspec_jax.engine.trials.PossibleTrial.is_promising", lambda self, rest_s: True)
    monkeypatch.setattr("qspec_jax.engine.chooser._FEW_REPLAYED", 0)
    # A step counts as measured at once.
    monkeypatch.setattr("qspec_jax.engine.chooser._LEARNING_BURST_S", 0.001)
    monkeypatch.setattr("qspec_jax.decoding.costs._SOUND_S", 0.0)
    events = []
    results, totals = run(model, PLANS, on_event=events.append)
    assert "lookup x3 is left out, as it cannot be compiled: no such kernel" in events
    assert totals.choices.keys() == {"w4a16"}
    assert len(set(asked)) > 1
    assert all(len(result.token_ids) == NUM_TOKENS for result in results)


def test_a_batch_that_is_done_leaves_no_cache_behind(model):
    """Not even until Python looks for circles: the cache of the next batch would have to fit beside it."""
    run(model, PLANS)
    gc.collect()
    gc.disable()
    try:
        before = len(jax.live_arrays())
        run(model, PLANS)
        assert len(jax.live_arrays()) == before
    finally:
        gc.enable()


def test_weights_are_looked_at_once_for_all_batches(model, monkeypatch):
    """That takes 15 ms for each choice of a model of 30 layers."""
    run(model, PLANS)
    monkeypatch.setattr("qspec_jax.decoding.programs.lay_out", None)
    run(model, PLANS)
