"""The speculative cycle: what it keeps, what it overwrites, where it stops."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qspec_jax.decoding import prefill, speculative
from qspec_jax.decoding.plan import DecodingPlan, Lookup
from qspec_jax.decoding.sampling import NO_TOKEN, Sampler
from qspec_jax.decoding.sampling_params import MAX_STOP_TOKENS, SamplingFeatures, SamplingParams
from qspec_jax.decoding.state import DecodeState, PromptChunk
from qspec_jax.model.cache import KVCache, LayerCache
from qspec_jax.model.config import ActivationQuantization, QuantConfig
from qspec_jax.model.precision import Precision
from qspec_jax.model.view import View
from tests import tiny

RAGGED_PROMPTS = [[5, 6, 7], list(range(10, 25)), [90], [11, 12, 13, 14, 15, 16, 17]]
NUM_TOKENS = 40
CAPACITY = 64  # what the longest prompt and its new tokens fit: tests of fewer tokens share programs with the others
COARSE = ActivationQuantization(group_size=None, symmetric=True)


def token_ids(results):
    return [result.token_ids for result in results]


@pytest.fixture(scope="module")
def model():
    return tiny.laid_out(tiny.language_model(), draft="w4a4")


@pytest.fixture(scope="module")
def plain_as_compiled(model):
    @functools.cache
    def plain(quickly):
        return token_ids(model.generate(RAGGED_PROMPTS, mode="w4a16", max_new_tokens=NUM_TOKENS))

    return plain


@pytest.fixture
def plain(plain_as_compiled):
    """The tokens of a program that is optimised as hard as those of the test are."""
    return plain_as_compiled(jax.config.read("jax_disable_most_optimizations"))


@pytest.mark.parametrize(
    ("draft", "draft_length"),
    [
        pytest.param("w4a4", 3, marks=pytest.mark.contract),
        pytest.param("w4a8", 3, marks=pytest.mark.contract),
        ("w4a4", 1),
        ("w4a8", 5),
    ],
)
def test_greedy_qspec_equals_greedy_w4a16(model, plain, draft, draft_length):
    results = model.generate(RAGGED_PROMPTS, draft=draft, draft_length=draft_length, max_new_tokens=NUM_TOKENS)
    assert token_ids(results) == plain
    stats = [result.stats for result in results]
    assert all(s.drafted == s.cycles * draft_length and 0 <= s.accepted <= s.drafted for s in stats)
    assert 0 < sum(s.accepted for s in stats) < sum(s.drafted for s in stats)


def test_unrolled_layers_give_the_same_tokens(plain):
    model = tiny.language_model(scan_layers=False)
    assert token_ids(model.generate(RAGGED_PROMPTS, draft="w4a4", max_new_tokens=NUM_TOKENS)) == plain


@pytest.mark.contract
def test_a_sequence_is_the_same_alone_and_in_a_batch(model, plain):
    options = {"draft": "w4a4", "max_new_tokens": NUM_TOKENS, "max_seq_len": CAPACITY}
    alone = [model.generate([prompt], **options)[0].token_ids for prompt in RAGGED_PROMPTS]
    assert alone == plain


def test_a_wrong_acceptance_rule_is_noticed(plain, monkeypatch):
    def accept_everything(draft_tokens, target_tokens):
        return jnp.full((draft_tokens.shape[0],), draft_tokens.shape[1], jnp.int32)

    monkeypatch.setattr(speculative, "accept", accept_everything)
    model = tiny.language_model()
    assert token_ids(model.generate(RAGGED_PROMPTS, draft="w4a4", max_new_tokens=NUM_TOKENS)) != plain


def test_surviving_draft_entries_would_be_noticed(plain, monkeypatch):
    """Without the overwriting of drafted keys and values, the output is another one."""
    quantization = QuantConfig(w4a4=COARSE)
    options = {"draft": "w4a4", "max_new_tokens": NUM_TOKENS}
    model = tiny.language_model(quantization=quantization)
    assert token_ids(model.generate(RAGGED_PROMPTS, **options)) == plain

    def verify_without_overwriting(model, last_token, draft_tokens, cache, *, view, **sampling):
        tokens = jnp.concatenate([last_token[:, None], draft_tokens], axis=1)
        logits, written = model(tokens, cache, precision=view)
        # Keep the draft's entries: only the position of the last draft is new.
        layers = jax.tree.map(lambda old, new: restore(old, new, cache.lengths, tokens.shape[1] - 1), cache, written)
        cache = dataclasses.replace(layers, lengths=written.lengths)
        return speculative.Verification(speculative.choose(logits), logits, cache, None)

    def restore(old, new, lengths, count):
        if old.ndim < 4:
            return new
        positions = jnp.arange(old.shape[-2])
        drafted = (positions >= lengths[:, None]) & (positions < lengths[:, None] + count)
        return jnp.where(drafted[:, :, None], old, new)

    monkeypatch.setattr(speculative, "verify", verify_without_overwriting)
    stale = tiny.language_model(quantization=quantization)
    assert token_ids(stale.generate(RAGGED_PROMPTS, **options)) != plain


def prefilled(decoder, plan, prompts, lengths, *, capacity=48, max_new_tokens=32):
    """The state after the prompts, without stop tokens."""
    rows = prompts.shape[:1]
    chunk = PromptChunk(
        tokens=prompts,
        num_tokens=lengths.astype(np.int32),
        start=np.zeros(rows, np.int32),
        last=np.ones(rows, bool),
        max_new_tokens=np.full(rows, max_new_tokens, np.int32),
        stop_tokens=np.full((*rows, MAX_STOP_TOKENS), NO_TOKEN, np.int32),
    )
    idle = DecodeState.idle(decoder.create_cache(batch=rows[0], capacity=capacity))
    read = jax.jit(functools.partial(prefill.prefill, decoder, plan=plan))
    return read(jax.tree.map(jnp.asarray, idle), chunk)


@pytest.fixture(scope="module")
def cache_of(model):
    """The cache of W4A16 after a text, padded to 48 tokens: what follows changes nothing."""

    @jax.jit
    def run(text):
        decoder = model.decoder
        return decoder(text, decoder.create_cache(batch=1, capacity=48), precision=Precision.W4A16)[1]

    return lambda text: jax.tree.map(np.asarray, run(np.asarray([text + [0] * (48 - len(text))], np.int32)))


@pytest.mark.parametrize("draft", [Precision.W4A4, Precision.W4A8])
def test_the_cache_after_each_cycle_is_that_of_w4a16(model, cache_of, draft):
    plan = DecodingPlan(Precision.W4A16, draft, 3)
    prompts = [[5, 6, 7], [10, 11, 12, 13]]
    state = prefilled(model.decoder, plan, np.asarray([[*prompts[0], 0], prompts[1]], np.int32), np.asarray([3, 4]))
    step = jax.jit(lambda state: speculative.cycle(model.decoder, state, plan=plan))
    for _ in range(4):
        state = step(state)
        seen = jax.tree.map(np.asarray, state)
        for row, prompt in enumerate(prompts):
            text = [*prompt, *seen.tokens[row, : seen.num_tokens[row]].tolist()]
            valid = len(text) - 1
            assert seen.cache.lengths[row] == valid
            fresh = cache_of(text[:-1])
            for ours, expected in zip(jax.tree.leaves(seen.cache.layers), jax.tree.leaves(fresh.layers), strict=True):
                np.testing.assert_allclose(ours[:, row, :valid], expected[:, 0, :valid], atol=1e-4)
    assert seen.accepted_lengths[:, :3].sum() > 0  # some drafts were rejected


@pytest.mark.parametrize(
    ("drafts", "targets", "expected"),
    [
        ([1, 2, 3], [1, 2, 3, 4], 3),
        ([1, 2, 9], [1, 2, 3, 4], 2),
        ([9, 2, 3], [1, 2, 3, 4], 0),
        ([1, 9, 3], [1, 2, 3, 4], 1),
    ],
)
def test_accept_keeps_drafts_up_to_the_first_difference(drafts, targets, expected):
    assert speculative.accept(jnp.asarray([drafts]), jnp.asarray([targets])).tolist() == [expected]


def emitted(target_tokens, num_accepted, *, room=10, stop_tokens=(), finished=False, **others):
    """One sequence, which already has one token, after `emit`."""
    one = np.ones((1,), np.int32)
    entries = np.zeros((1, 12, 1), np.float32)
    state = dataclasses.replace(
        DecodeState.idle(KVCache((LayerCache(entries, entries),), one)),
        last_token=one,
        tokens=np.asarray([[1] + [0] * 11], np.int32),
        num_tokens=one,
        max_new_tokens=one * (1 + room),
        stop_tokens=np.asarray([[*stop_tokens, *[NO_TOKEN] * (MAX_STOP_TOKENS - len(stop_tokens))]], np.int32),
        finished=np.asarray([finished]),
        accepted_lengths=np.zeros((1, 4), np.int32),
        **others,
    )
    return _emit(state, one * 7, np.asarray([target_tokens], np.int32), one * num_accepted)


_emit = jax.jit(speculative.emit)


def test_emit_appends_accepted_drafts_and_the_token_after_them():
    state = emitted([21, 22, 23, 24], 2)
    assert state.tokens[0, :5].tolist() == [1, 21, 22, 23, 0]
    assert (int(state.num_tokens[0]), int(state.last_token[0]), int(state.cache.lengths[0])) == (4, 23, 10)
    assert not bool(state.finished[0])
    assert state.accepted_lengths.tolist() == [[0, 0, 1, 0]]


def test_a_stop_token_inside_a_draft_ends_the_sequence_there():
    state = emitted([21, 2, 2, 24], 3, stop_tokens=(2, 50))
    assert state.tokens[0, :4].tolist() == [1, 21, 2, 0]
    assert bool(state.finished[0])
    assert int(state.num_tokens[0]) == 3


def test_a_rejected_stop_token_does_not_end_the_sequence():
    state = emitted([21, 22, 2, 24], 1, stop_tokens=(2,))
    assert state.tokens[0, :4].tolist() == [1, 21, 22, 0]
    assert not bool(state.finished[0])


def test_the_token_limit_inside_a_draft_ends_the_sequence_there():
    state = emitted([21, 22, 23, 24], 3, room=2)
    assert state.tokens[0, :4].tolist() == [1, 21, 22, 0]
    assert bool(state.finished[0])


def test_a_finished_sequence_does_not_change():
    state = emitted([21, 22, 23, 24], 3, finished=True)
    assert state.tokens[0].tolist() == [1] + [0] * 11
    assert (int(state.num_tokens[0]), int(state.last_token[0]), int(state.cache.lengths[0])) == (1, 1, 7)
    assert state.accepted_lengths.tolist() == [[0, 0, 0, 0]]


def test_emit_tells_penalties_and_history_the_tokens_it_keeps():
    params = [SamplingParams(frequency_penalty=0.1)]
    sampler = Sampler.idle(1, 96, SamplingFeatures.of(params))
    after = emitted([21, 22, 22, 24], 2, sampler=sampler, history=np.full((1, 12), 9, np.int32))
    assert after.sampler is not None
    np.testing.assert_array_equal(after.sampler.counts[0], np.bincount([21, 22, 22], minlength=96))
    assert after.history is not None
    assert after.history[0].tolist() == [9] * 8 + [21, 22, 22] + [9]


@pytest.mark.contract
def test_each_sequence_stops_at_its_own_stop_token(model, plain, monkeypatch):
    """The stop token is taken from the middle of one output; each output is cut where it first has it."""
    stop = plain[0][10]
    monkeypatch.setattr(model, "stop_tokens", (stop,))
    expected = [ids[: ids.index(stop) + 1] if stop in ids else ids for ids in plain]
    assert len({len(ids) for ids in expected}) > 1
    for mode in ("w4a16", "qspec"):
        results = model.generate(RAGGED_PROMPTS, mode=mode, draft="w4a8", max_new_tokens=NUM_TOKENS)
        assert token_ids(results) == expected
        assert [r.finish_reason for r in results] == ["stop" if stop in ids else "length" for ids in plain]


@pytest.mark.parametrize("max_new_tokens", [1, 2, 3, 6])
def test_exactly_max_new_tokens_are_generated(model, plain, max_new_tokens):
    limits = {"max_new_tokens": max_new_tokens, "max_seq_len": CAPACITY}
    results = model.generate(RAGGED_PROMPTS, draft="w4a8", draft_length=3, **limits)
    assert token_ids(results) == [ids[:max_new_tokens] for ids in plain]


@pytest.mark.parametrize("mode", ["w4a16", "w4a4"])
def test_plain_decoding_is_the_loop_without_a_draft(model, mode):
    results = model.generate(RAGGED_PROMPTS, mode=mode, max_new_tokens=9, max_seq_len=CAPACITY)
    stats = [result.stats for result in results]
    assert all((s.cycles, s.drafted, s.accepted, s.num_tokens) == (8, 0, 0, 9) for s in stats)
    assert all(s.acceptance_rate is None and s.tokens_per_cycle == 1 for s in stats)


def test_a_plan_says_where_drafts_come_from_exactly_if_it_drafts():
    with pytest.raises(ValueError, match="where drafts come from"):
        DecodingPlan(Precision.W4A16, draft_length=3)
    with pytest.raises(ValueError, match="where drafts come from"):
        DecodingPlan(Precision.W4A16, Precision.W4A8)


def test_drafts_that_read_a_window_of_the_cache_change_what_is_accepted_and_nothing_else(model, plain):
    accepted = {}
    for window in (None, CAPACITY, 1):
        plan = DecodingPlan(Precision.W4A16, View(activation_bits=8, cache_window=window), 3)
        batch = model.pipeline(plan, batch_size=len(RAGGED_PROMPTS), max_seq_len=CAPACITY)
        for prompt in RAGGED_PROMPTS:
            batch.submit(prompt, max_new_tokens=NUM_TOKENS)
        results = list(batch.results())
        assert token_ids(results) == plain
        accepted[window] = sum(result.stats.accepted for result in results)
        assert {result.stats.draft for result in results} == {plan.draft_source}
    assert accepted[1] < accepted[CAPACITY] <= accepted[None]


def test_a_plan_takes_a_precision_for_the_view_that_it_names():
    plan = DecodingPlan(Precision.W4A16, Precision.W4A8, 3)
    assert plan == DecodingPlan(View(), View(activation_bits=8), 3)
    assert (plan.mode, plan.draft_source, plan.views) == ("qspec", "w4a8", (View(), View(activation_bits=8)))
    looked_up = DecodingPlan(Precision.W4A16, Lookup(View.of(Precision.W4A4)), 3)
    assert (looked_up.mode, looked_up.draft_source, looked_up.lookup) == ("lookup-qspec", "w4a4", True)
    nothing_else = DecodingPlan(Precision.W4A16, Lookup(), 3)
    assert (nothing_else.mode, nothing_else.draft_source, nothing_else.draft_view) == ("lookup", "lookup", None)
    assert dataclasses.replace(plan, draft_length=5).draft_length == 5
