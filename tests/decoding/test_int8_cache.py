"""Decoding over a cache of int8: QSpec yields the tokens of plain decoding, whoever is in the batch and was before."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qspec_jax.decoding import chunks, prefill
from qspec_jax.decoding.sampling_params import SamplingParams
from qspec_jax.engine.requests import Request
from qspec_jax.engine.scheduler import Scheduler
from qspec_jax.model.cache import KV_INT8
from qspec_jax.model.config import ModelConfig
from tests import tiny

CAPACITY, NEW, ROWS = 448, 40, 3
# Blocks end within the prompt, just before and after its end, and among the drafts.
_RNG = np.random.default_rng(0)
PROMPTS = [_RNG.integers(0, 96, size).tolist() for size in (100, 125, 128, 230, 300)]
SEEDED = SamplingParams(temperature=1.0, seed=3)


@pytest.fixture(autouse=True)
def _few_widths(monkeypatch):
    """Fewer programs, and prompts of several chunks."""
    monkeypatch.setattr(chunks, "CHUNK_WIDTHS", (128,))


def model_of(**config):
    made = ModelConfig.from_hf({**tiny.BASE_HF_CONFIG, "max_position_embeddings": 1024, **config})
    model = tiny.language_model(made)
    model.decoder.kv = KV_INT8
    model.programs.lay_out_weights(model.plan(draft="w4a4"))
    return model


@pytest.fixture(scope="module")
def model():
    return model_of()


def scheduler_of(model, mode="qspec", context="full"):
    plan = (
        model.plan(mode, draft="w4a4", draft_length=5, draft_context=context) if mode == "qspec" else model.plan(mode)
    )
    return Scheduler(model.programs, plan, rows=ROWS, capacity=CAPACITY)


def asked(prompt, sampling=SEEDED, **options):
    return Request(prompt, NEW, sampling, **options)


def finish(scheduler, requests):
    sequences = [scheduler.add(one) for one in requests]
    while scheduler.busy:
        scheduler.advance(4)
    return [sequence.token_ids for sequence in sequences]


def test_qspec_equals_plain_across_the_ends_of_blocks(model):
    """Greedy and seeded, alone and in a batch."""
    wanted = [asked(prompt, SEEDED if place % 2 else SamplingParams()) for place, prompt in enumerate(PROMPTS)]
    plain = finish(scheduler_of(model, "w4a16"), wanted)
    assert finish(scheduler_of(model), wanted) == plain
    scheduler = scheduler_of(model)
    assert [finish(scheduler, [one]) for one in wanted[3:]] == [[tokens] for tokens in plain[3:]]


def test_a_wrong_block_would_be_noticed(model, monkeypatch):
    """Scales of keys that are those of another block."""
    wanted = [asked(PROMPTS[4])]
    [expected] = finish(scheduler_of(model), wanted)
    keep = prefill.prefill

    def shifted(*arguments, **options):
        state = keep(*arguments, **options)
        layers = dataclasses.replace(state.cache.layers, key_scales=jnp.roll(state.cache.layers.key_scales, 1, axis=-2))
        return dataclasses.replace(state, cache=dataclasses.replace(state.cache, layers=layers))

    monkeypatch.setattr(prefill, "prefill", shifted)
    assert finish(scheduler_of(model_of(), "w4a16"), wanted) != [expected]


def test_rows_that_begin_alike_and_texts_of_a_session_change_no_token(model, monkeypatch):
    """Rows are copied after whole blocks alone: what a longer text has in the ring is of no use to a shorter one."""
    prefix = [*PROMPTS[4][:256]]
    wanted = [asked([*prefix, *range(index, 5 * index + 3)], prefix_length=256) for index in range(1, 6)]
    alone = [finish(scheduler_of(model), [one])[0] for one in wanted]
    scheduler = scheduler_of(model)
    assert finish(scheduler, wanted) == alone
    assert scheduler.totals.reused_prompt_tokens == 4 * 256
    first, second = (dataclasses.replace(one, session="a") for one in (wanted[-1], asked([*prefix[:250], 7, 7])))
    scheduler = scheduler_of(model)
    finish(scheduler, [first])
    assert finish(scheduler, [second]) == finish(scheduler_of(model), [second])
    assert scheduler.totals.reused_prompt_tokens == 128


def test_a_window_unrolled_layers_a_budget_and_more_capacity_change_nothing():
    windowed = model_of(sliding_window=150, model_type="mistral", architectures=["MistralForCausalLM"])
    wanted = [asked(prompt, SamplingParams()) for prompt in PROMPTS[2:5]]
    scheduler = scheduler_of(windowed, context=112)
    expected = finish(scheduler, wanted)
    assert scheduler._state.cache.blocks is not None
    unrolled = tiny.language_model(windowed.config, scan_layers=False)
    unrolled.decoder.kv = KV_INT8
    assert finish(scheduler_of(unrolled, "w4a16"), wanted) == expected
    cache = scheduler._state.cache

    @jax.jit
    def grow(cache):
        grown = windowed.decoder.create_cache(batch=ROWS, capacity=CAPACITY + 128).with_entries_of(cache)
        return grown, grown.row(jnp.int32(1))

    grown, row = grow(cache)
    leaves = zip(jax.tree.leaves(grown.layers), jax.tree.leaves(cache.layers), strict=True)
    for ours, theirs in leaves:
        np.testing.assert_array_equal(ours[..., : theirs.shape[-2], : theirs.shape[-1]], theirs)
    assert row.layers.value_scales.shape == (2, 1, 2, CAPACITY + 128)
