"""Drafts that read a part of the cache: the tokens are those of plain decoding, whatever part it is."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import EVERYTHING
from qspec_jax.decoding import chunks, speculative
from qspec_jax.decoding.chunks import Shape, empty_chunks
from qspec_jax.decoding.plan import DRAFT_BUDGET, FULL_BELOW, DecodingPlan, Lookup, missing_drafts, plan_of
from qspec_jax.decoding.prefill import prefill as read_prompt
from qspec_jax.decoding.sampling_params import SamplingParams
from qspec_jax.decoding.state import PromptChunk
from qspec_jax.errors import UsageError
from qspec_jax.model.config import ModelConfig, QuantConfig
from qspec_jax.model.decoder import Decoder
from qspec_jax.model.layouts import rounds_in_vain
from qspec_jax.model.precision import Precision
from qspec_jax.model.view import View
from tests import tiny

NUM_TOKENS = 24
# Long enough for blocks to be left out; one chunk each, of one width.
PROMPTS = [np.random.default_rng(seed).integers(3, 96, size).tolist() for seed, size in enumerate((330, 280, 480))]
SMALL = 176  # four blocks beyond those that are read in any case


LONG = {**tiny.BASE_HF_CONFIG, "max_position_embeddings": 1024}


def language_model():
    return tiny.language_model(ModelConfig.from_hf(LONG))


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
    view = View(**{"activation_bits": 8, "cache_budget": budget, **options})
    return DecodingPlan(Precision.W4A16, view, length)


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


def test_drafts_of_the_activations_that_verify_differ_by_what_they_read_alone(model, plain):
    """A budget that pays for all that there is makes drafts that are accepted whenever the text goes on."""
    some, everything = (run(model, guided(budget, activation_bits=None), PROMPTS[:2]) for budget in (112, 496))
    assert tokens_of(some) == tokens_of(everything) == plain[:2]
    assert {result.stats.draft for result in some} == {"w4a16@112"}
    not_all = [[sum(result.stats.accepted_lengths[:-1]) for result in results] for results in (some, everything)]
    assert max(not_all[1]) <= 1  # cycles that accepted less than all: the last one, which is cut short
    assert min(not_all[0]) > 1


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


def test_a_model_of_another_kind_keeps_its_tokens():
    """With norms of queries and keys, and a window that is shorter than the texts."""
    config = dataclasses.replace(ModelConfig.from_hf({**LONG, **tiny.FAMILIES["qwen3_qk_norm"]}), sliding_window=150)
    other = tiny.language_model(config)
    expected = tokens_of(run(other, other.plan("w4a16"), PROMPTS[:2]))
    assert tokens_of(run(other, guided(), PROMPTS[:2])) == expected


def test_a_wrong_table_changes_what_is_accepted_and_nothing_else(plain, right, monkeypatch):
    """Each row of a batch has another fault, and each prompt is in each row once."""
    choose = Decoder.with_chosen_blocks

    def choose_wrongly(self, cache, masses, *, view):
        blocks = choose(self, cache, masses, view=view).blocks
        lightest = choose(self, cache, 1 - masses, view=view).blocks
        others, stale, outside = jnp.roll(blocks, 1, axis=0), jnp.minimum(blocks, 2), blocks + 1000
        again = jnp.full_like(blocks, 1)  # one block, again and again
        rows = [wrong[row] for row, wrong in enumerate((others, stale, outside, again, lightest))]
        return dataclasses.replace(cache, blocks=jnp.stack(rows))

    monkeypatch.setattr(Decoder, "with_chosen_blocks", choose_wrongly)
    model, prompts = language_model(), [*range(3), *range(3), *range(3)]
    accepted = []  # by prompt and row
    for first in range(3):
        places = prompts[first:][:5]
        results = run(model, guided(), [PROMPTS[place] for place in places], batch_size=5)
        assert tokens_of(results) == [plain[place] for place in places]
        accepted.append(dict(zip(range(5), zip(places, (one.stats for one in results), strict=True), strict=True)))
    for row in range(5):
        of_row = [by_row[row] for by_row in accepted]
        assert any(stats.accepted_lengths != right[place].stats.accepted_lengths for place, stats in of_row), row
    # With the blocks that weigh least fewer drafts are accepted than with those that weigh most.
    best = sum(result.stats.accepted for result in right)
    assert best > sum(by_row[4][1].accepted for by_row in accepted)


def test_a_wrong_target_would_be_noticed(plain):
    """Where the target itself reads a part of the cache, tokens are others: the tests above can fail."""
    wrong = language_model()
    run_whole = Decoder.run

    def run_part(self, tokens, cache, *, precision, **options):
        return run_whole(self, tokens, cache, precision=View(cache_window=100), **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Decoder, "run", run_part)
        assert tokens_of(run(wrong, guided(), PROMPTS[:2])) != plain[:2]


@pytest.fixture(scope="module")
def prefilled(model):
    """Two rows after their prompts, where blocks were chosen for the texts before."""
    plan = guided(length=2)
    shape = Shape.of(plan, rows=2, capacity=448)
    state = model.programs.idle_state(shape)
    state = dataclasses.replace(
        state, cache=dataclasses.replace(state.cache, blocks=np.full_like(state.cache.blocks, 5))
    )
    fields = empty_chunks(shape, 512)
    for row, prompt in enumerate(PROMPTS[:2]):
        fields["tokens"][row, : len(prompt)] = prompt
        fields["num_tokens"][row], fields["last"][row], fields["max_new_tokens"][row] = len(prompt), True, 20
    prefill = jax.jit(lambda state, chunk: read_prompt(model.decoder, state, chunk, plan=plan))
    return prefill(state, PromptChunk(**fields))


def after_one_cycle(model, state, plan):
    return jax.jit(lambda state: speculative.generate(model.decoder, state, jnp.int32(1), plan=plan)[0])(state)


def test_the_first_cycle_after_a_prompt_reads_everything_and_the_next_ones_their_blocks(model, prefilled):
    """Until there are cycles of another plan, which forget the choice."""
    assert (np.asarray(prefilled.cache.blocks)[..., 0] == EVERYTHING).all()
    state = after_one_cycle(model, prefilled, guided(length=2))
    blocks, lengths = np.asarray(state.cache.blocks), np.asarray(state.cache.lengths)
    for row in range(2):
        assert (np.diff(blocks[row], axis=-1) > 0).all()
        newest = range((lengths[row] - 64) // 16, (lengths[row] + 16) // 16 + 1)
        for table in blocks[row].reshape(-1, blocks.shape[-1]):
            assert {0, *newest} <= set(table.tolist())
    assert (blocks[0] != blocks[1]).any()
    # Layers and key/value heads choose for themselves.
    assert len({table.tobytes() for table in blocks[0].reshape(-1, blocks.shape[-1])}) > 1
    forgotten = after_one_cycle(model, state, DecodingPlan(Precision.W4A16))
    assert (np.asarray(forgotten.cache.blocks)[..., 0] == EVERYTHING).all()


def test_short_sequences_are_read_whole_with_auto(model, prefilled):
    view = View(activation_bits=8, cache_budget=SMALL, cache_full_below=310)
    state = after_one_cycle(model, prefilled, DecodingPlan(Precision.W4A16, view, draft_length=2))
    blocks = np.asarray(state.cache.blocks)
    assert (blocks[0] >= 0).all()
    assert (blocks[1] == EVERYTHING).all()


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


def test_sessions_batches_and_services_tell_what_their_caches_lack():
    model, told = tiny.language_model(), []
    plan = model.plan("qspec", draft="w4a16", draft_context=128)
    options: dict = {"max_seq_len": 64, "on_event": told.append}
    for begin in (model.session, model.pipeline):
        begin(plan, **options)
    with model.service(plan, **options):
        pass
    assert told == [missing_drafts(plan, 64)] * 3
    model.session(plan, **{**options, "max_seq_len": 256})  # its first cache may lack them, its largest does not
    assert len(told) == 3


def test_drafts_that_read_all_that_verifies_are_none():
    """Where a cache is small nothing is drafted, and where nobody asked for less it is refused."""
    plan = plan_of("qspec", draft="w4a16", draft_length=3)
    assert plan == guided(DRAFT_BUDGET, activation_bits=None, cache_full_below=FULL_BELOW)  # on any device
    assert plan.in_cache(FULL_BELOW) == DecodingPlan(Precision.W4A16)
    looked_up = plan_of("lookup-qspec", draft="w4a16", draft_context=256)
    assert looked_up.in_cache(256) == DecodingPlan(Precision.W4A16, Lookup(), 3)
    assert missing_drafts(plan, FULL_BELOW).startswith("nothing is drafted: w4a16@512 x3 would read all of a cache of")
    assert missing_drafts(plan, FULL_BELOW + 64) is missing_drafts(guided(), 64) is None
    lengths = plan_of("qspec", draft="w4a16", draft_length="auto", draft_context=256)
    assert lengths.in_cache(256) == DecodingPlan(Precision.W4A16)
    assert "qspec would read all" in missing_drafts(lengths, 256)
    of_ones_own = DecodingPlan(Precision.W4A16, Precision.W4A16, 3)  # which has no budget
    assert of_ones_own.in_cache(64) == of_ones_own
    automatic = plan_of("auto", draft="w4a16", draft_context=256)
    assert [one.label for one in automatic.choices if not one.lookup][:3] == ["w4a16", "w4a16@256 x1", "w4a16@256 x2"]
    assert {one.draft for one in automatic.in_cache(256).choices} == {None, Lookup()}
    for one, name in ((looked_up, "w4a16@256 x3"), (automatic, "auto")):
        assert missing_drafts(one, 256).startswith(f"drafts are looked up alone: {name} would read all of a cache of")
    assert missing_drafts(plan_of("lookup"), 64) is missing_drafts(plan_of("auto", draft="w4a8"), 64) is None
    assert plan_of("qspec", draft="w4a16", draft_context="full", draft_head=4).draft == View(head_bits=4)
    assert plan_of("qspec", draft="w4a16", draft_context="full", verify="float", held=(4, None)).draft == View()
    for mode in ("qspec", "lookup-qspec", "auto"):
        with pytest.raises(UsageError, match="costs a plain step; use draft_context='auto' or a number"):
            plan_of(mode, draft="w4a16", draft_context="full")
    assert plan_of("lookup", draft="w4a16", draft_context="full").draft == Lookup()  # which nobody drafts for


def test_the_engine_chooses_drafts_of_16_bits_with_a_budget_where_8_bits_take_longer(monkeypatch):
    """Beside those of 8 bits that read everything; what somebody names stays as it is."""
    options = {"draft_context": 512, "rounds_in_vain": True}

    def drafts(mode, **given):
        choices = plan_of(mode, **{**options, **given}).choices
        return {one.draft for one in choices} - {None, Lookup()}

    whole, part = View(activation_bits=8), View(cache_budget=512)
    for asked in ({"mode": "auto"}, {"mode": "qspec", "draft_length": "auto"}):
        assert drafts(**asked) == {whole, part}
        assert drafts(**asked, draft="w4a8") == {whole, View(activation_bits=8, cache_budget=512)}
        assert drafts(**asked, draft_context="full") == {whole}
        assert drafts(**asked, rounds_in_vain=False) == {whole, View(activation_bits=8, cache_budget=512)}
        # Of a small cache they would be five loops more.
        floats = {"verify": "float", "held": (4, None)}
        assert drafts(**asked, **floats) == {whole, View(activation_bits=8, cache_budget=512)}
    assert plan_of("qspec", **options).draft == View(activation_bits=8, cache_budget=512)
    asymmetric, symmetric, floats = (
        tiny.language_model(quantization=one, kernels=None, dtype="bfloat16")
        for one in (QuantConfig(symmetric=False), QuantConfig(symmetric=True), None)
    )
    others = [
        tiny.language_model(quantization=QuantConfig(symmetric=False), **options)
        for options in ({"dtype": "bfloat16"}, {"kernels": None})  # by the reference; in float32
    ]
    assert not rounds_in_vain(asymmetric.decoder)  # on a CPU
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert rounds_in_vain(asymmetric.decoder)
    assert not any(rounds_in_vain(one.decoder) for one in (symmetric, floats, *others))
    assert part in {one.draft for one in asymmetric.plan("auto", draft_context=512).choices}


@pytest.mark.parametrize("value", [0, 111, "some", "512", True])
def test_other_draft_contexts_are_refused_with_those_that_there_are(value):
    with pytest.raises(UsageError, match="use full, auto or a number of tokens from 112 on"):
        plan_of("qspec", draft_context=value)


def test_prompts_that_share_rows_keep_their_tokens(model, plain, monkeypatch):
    """A row that is copied for its prefix has no blocks chosen for the new text."""
    monkeypatch.setattr(chunks, "CHUNK_WIDTHS", (256,))
    long, other = PROMPTS[2], PROMPTS[0]
    alike = [*long[:256], 7, 8, 9]
    prompts = [long, alike, other, long, alike]  # the last two in rows that others have left
    expected = run(model, model.plan("w4a16"), prompts)
    results = run(model, guided(), prompts)
    for found in (expected, results):
        assert sum(result.stats.reused_prompt_tokens for result in found) == 3 * 256
        assert [found[index].token_ids for index in (0, 2, 3)] == [plain[2], plain[0], plain[2]]
    assert tokens_of(results) == tokens_of(expected)
