"""Drafts that read a part of the cache: the tokens are those of plain decoding, whatever part it is."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import EVERYTHING
from qspec_jax.decoding import speculative
from qspec_jax.decoding.plan import DRAFT_BUDGET, FULL_BELOW, DecodingPlan, Lookup, plan_of
from qspec_jax.decoding.sampling_params import SamplingParams
from qspec_jax.errors import UsageError
from qspec_jax.model.config import ModelConfig
from qspec_jax.model.decoder import Decoder
from qspec_jax.model.precision import Precision
from qspec_jax.model.view import View
from tests import tiny

NUM_TOKENS = 24
# Long enough for blocks to be left out; one chunk each, of one width.
PROMPTS = [np.random.default_rng(seed).integers(3, 96, size).tolist() for seed, size in enumerate((330, 280, 480))]
SMALL = 176  # four blocks beyond those that are read in any case


def language_model(**options):
    config = ModelConfig.from_hf({**tiny.BASE_HF_CONFIG, "max_position_embeddings": 1024, **options})
    return tiny.language_model(config)


@pytest.fixture(scope="module")
def model():
    return language_model()


@pytest.fixture(scope="module")
def plain(model):
    return tokens_of(model.generate(PROMPTS, mode="w4a16", max_new_tokens=NUM_TOKENS))


def tokens_of(results):
    return [result.token_ids for result in results]


def run(model, plan, prompts=PROMPTS, *, batch_size=3, **options):
    requests = [model.attempt(prompt, plan, max_new_tokens=NUM_TOKENS, **options) for prompt in prompts]
    return model.run(requests, plan, batch_size=batch_size).collect()


def guided(budget=SMALL, length=3, **options):
    return DecodingPlan(Precision.W4A16, View(activation_bits=8, cache_budget=budget, **options), length)


@pytest.fixture(scope="module")
def right(model):
    """What drafts that read the blocks that matter yield."""
    return run(model, guided())


@pytest.mark.parametrize(
    ("budget", "length", "block"), [pytest.param(112, 5, 16, marks=pytest.mark.contract), (288, 2, 48)]
)
def test_a_budget_changes_what_is_accepted_and_nothing_else(model, plain, budget, length, block):
    results = run(model, guided(budget, length, cache_block=block))
    assert tokens_of(results) == plain
    assert {result.stats.draft for result in results} == {f"w4a8@{budget}"}
    assert any(result.stats.accepted for result in results)


def test_a_sequence_is_the_same_alone_and_in_a_batch(model, plain, right):
    """Also what is accepted of its drafts: the blocks that it reads are its own."""
    alone = run(model, guided(), batch_size=1)
    assert tokens_of(alone) == plain
    accepted = [[result.stats.accepted_lengths for result in results] for results in (right, alone)]
    assert accepted[0] == accepted[1]


def test_sampled_tokens_are_those_of_plain_decoding(model):
    """And so are their log-probabilities: the target reads the whole cache, which tokens alone need not show."""
    sampling = SamplingParams(temperature=1.2, top_p=0.9, seed=3, logprobs=1)
    expected = run(model, model.plan("w4a16"), sampling=sampling)
    results = run(model, guided(112), sampling=sampling)
    assert tokens_of(results) == tokens_of(expected)
    for found, plain in zip(results, expected, strict=True):
        np.testing.assert_allclose(found.logprobs, plain.logprobs, atol=1e-4)


@pytest.mark.parametrize("family", ["window", "qk_norm"])
def test_models_of_other_kinds_keep_their_tokens(family):
    options = {
        "window": {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": 150},
        "qk_norm": {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"},
    }[family]
    other = language_model(**options)
    expected = tokens_of(run(other, other.plan("w4a16"), PROMPTS[:2]))
    assert tokens_of(run(other, guided(), PROMPTS[:2])) == expected


@pytest.mark.parametrize("broken", ["another row's", "stale", "out of range", "one block, again and again"])
def test_a_wrong_table_changes_what_is_accepted_and_nothing_else(plain, right, monkeypatch, broken):
    choose = Decoder.with_chosen_blocks

    def choose_wrongly(self, cache, masses, *, view):
        blocks = choose(self, cache, masses, view=view).blocks
        wrong = {
            "another row's": jnp.roll(blocks, 1, axis=0),
            "stale": jnp.minimum(blocks, 2),
            "out of range": blocks + 1000,
            "one block, again and again": jnp.full_like(blocks, 1),
        }[broken]
        return dataclasses.replace(cache, blocks=wrong)

    monkeypatch.setattr(Decoder, "with_chosen_blocks", choose_wrongly)
    results = run(language_model(), guided())
    assert tokens_of(results) == tokens_of(right) == plain
    assert [one.stats.accepted_lengths for one in results] != [one.stats.accepted_lengths for one in right]


def test_a_wrong_target_would_be_noticed(plain):
    """Where the target itself reads a part of the cache, tokens are others: the tests above can fail."""
    wrong = language_model()
    run_whole = Decoder.run

    def run_part(self, tokens, cache, *, precision, **options):
        return run_whole(self, tokens, cache, precision=View(cache_window=100), **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Decoder, "run", run_part)
        assert tokens_of(run(wrong, guided(), PROMPTS[:2])) != plain[:2]


def test_drafts_that_read_what_matters_are_better_than_those_that_read_anything(right):
    """With the blocks that weigh least, fewer drafts are accepted."""
    choose = Decoder.with_chosen_blocks

    def choose_the_lightest(self, cache, masses, *, view):
        return choose(self, cache, 1 - masses, view=view)

    best = sum(result.stats.accepted for result in right)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Decoder, "with_chosen_blocks", choose_the_lightest)
        worst = sum(result.stats.accepted for result in run(language_model(), guided()))
    assert best > worst


def test_the_first_cycle_after_a_prompt_reads_everything_and_the_next_ones_their_blocks():
    decoder, plan = language_model().decoder, guided(length=2)
    shape = speculative_shape(plan, rows=2, capacity=448)
    state = prefilled(decoder, plan, [PROMPTS[0], PROMPTS[1]], shape)
    assert (state.cache.blocks[..., 0] == EVERYTHING).all()
    state = jax.jit(lambda state: speculative.cycle(decoder, state, plan=plan))(state)
    blocks, lengths = np.asarray(state.cache.blocks), np.asarray(state.cache.lengths)
    for row in range(2):
        assert (np.diff(blocks[row], axis=-1) > 0).all()
        newest = range((lengths[row] - 64) // 16, (lengths[row] + 16) // 16 + 1)
        for table in blocks[row].reshape(-1, blocks.shape[-1]):
            assert {0, *newest} <= set(table.tolist())
    assert (blocks[0] != blocks[1]).any()
    # Layers and key/value heads choose for themselves.
    assert len({table.tobytes() for table in blocks[0].reshape(-1, blocks.shape[-1])}) > 1


def speculative_shape(plan, *, rows, capacity):
    from qspec_jax.decoding.chunks import Shape

    return Shape.of(plan, rows=rows, capacity=capacity)


def prefilled(decoder, plan, prompts, shape):
    from qspec_jax.decoding.chunks import empty_chunks
    from qspec_jax.decoding.programs import Programs
    from qspec_jax.decoding.state import PromptChunk

    state = Programs(decoder).idle_state(shape)
    if state.cache.blocks is not None:  # of the texts before
        cache = dataclasses.replace(state.cache, blocks=jnp.full_like(state.cache.blocks, 5))
        state = dataclasses.replace(state, cache=cache)
    fields = empty_chunks(shape, 512)
    for row, prompt in enumerate(prompts):
        fields["tokens"][row, : len(prompt)] = prompt
        fields["num_tokens"][row], fields["last"][row], fields["max_new_tokens"][row] = len(prompt), True, 20
    chunk = jax.tree.map(jnp.asarray, PromptChunk(**fields))
    return jax.jit(lambda state, chunk: speculative.prefill(decoder, state, chunk, plan=plan))(state, chunk)


def test_cycles_of_other_plans_forget_the_choice():
    decoder, plan = language_model().decoder, guided(length=2)
    state = prefilled(decoder, plan, [PROMPTS[0]], speculative_shape(plan, rows=1, capacity=448))

    def after(state, plan):
        run = jax.jit(lambda state: speculative.generate(decoder, state, jnp.int32(1), plan=plan)[0])
        return run(state)

    state = after(state, plan)
    assert (state.cache.blocks[..., 0] == 0).all()
    assert (after(state, DecodingPlan(Precision.W4A16)).cache.blocks[..., 0] == EVERYTHING).all()


def test_short_sequences_are_read_whole_with_auto():
    plan = DecodingPlan(
        Precision.W4A16, View(activation_bits=8, cache_budget=SMALL, cache_full_below=310), draft_length=2
    )
    decoder = language_model().decoder
    state = prefilled(decoder, plan, [PROMPTS[0], PROMPTS[1]], speculative_shape(plan, rows=2, capacity=448))
    state = jax.jit(lambda state: speculative.cycle(decoder, state, plan=plan))(state)
    assert (state.cache.blocks[0] >= 0).all()
    assert (state.cache.blocks[1] == EVERYTHING).all()


def test_a_cache_that_the_budget_pays_for_is_read_whole(monkeypatch):
    assert guided(256).in_cache(256) == DecodingPlan(Precision.W4A16, Precision.W4A8, 3)
    assert guided(256).in_cache(320) == guided(256)
    assert plan_of("qspec", draft="w4a8", draft_context="auto").draft == View(activation_bits=8)  # no such kernel here
    monkeypatch.setattr("qspec_jax.decoding.plan._reads_blocks_alone", lambda: True)
    automatic = plan_of("qspec", draft="w4a8", draft_context="auto")
    assert automatic.draft == View(activation_bits=8, cache_budget=DRAFT_BUDGET, cache_full_below=FULL_BELOW)
    assert automatic.in_cache(FULL_BELOW) == plan_of("qspec", draft="w4a8", draft_context="full")
    looked_up = plan_of("lookup-qspec", draft="w4a8", draft_context=512)
    assert looked_up.in_cache(512).draft == Lookup(View(activation_bits=8))
    assert (looked_up.num_blocks, looked_up.weigh, looked_up.draft_source) == (32, 16, "w4a8@512")
    assert plan_of("w4a16", draft_context=512).weigh is None


@pytest.mark.parametrize("value", [0, 111, "some", "512", True])
def test_other_draft_contexts_are_refused_with_those_that_there_are(value):
    with pytest.raises(UsageError, match="use full, auto or a number of tokens from 112 on"):
        plan_of("qspec", draft_context=value)


def test_prompts_that_share_rows_keep_their_tokens(model):
    """A row that is copied for its prefix has no blocks chosen for the new text."""
    long = [*PROMPTS[2], *PROMPTS[1]]
    prompts = [long, [*long[:512], 7, 8, 9], long]
    expected = tokens_of(run(model, model.plan("w4a16"), prompts, batch_size=2))
    assert tokens_of(run(model, guided(), prompts, batch_size=2)) == expected
