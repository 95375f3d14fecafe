"""Typical acceptance: what it accepts, that all else goes by the tokens accepted, and that nobody else feels it."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qspec_jax import SamplingParams, UsageError
from qspec_jax.decoding.sampling import Sampler, choose
from qspec_jax.decoding.sampling_params import SamplingFeatures
from qspec_jax.model.precision import Precision
from tests import tiny

PROMPTS = [[5, 6, 7], [30, 31, 32, 33, 34], [60] * 9]
NUM_TOKENS = 33  # the first, and eight cycles of three drafts and the token after them
ALL_DRAFTS = 1e-30  # accepts every draft that is not ruled out
OPTIONS = {"draft": "w4a4", "draft_length": 3, "max_new_tokens": NUM_TOKENS, "max_seq_len": 64, "batch_size": 4}


_choose = jax.jit(choose)


def token_ids(results):
    return [result.token_ids for result in results]


@pytest.fixture(scope="module")
def model():
    return tiny.language_model()


@pytest.fixture(scope="module")
def run(model):
    """Generates with one set of programs, whatever the options: beside the prompts runs one that needs everything."""
    everything = SamplingParams(
        temperature=1.0, top_k=3, frequency_penalty=0.1, min_new_tokens=1, logprobs=1, typical_acceptance=0.5
    )

    def generate(sampling, **options):
        each = [*([sampling] * len(PROMPTS) if isinstance(sampling, SamplingParams) else sampling), everything]
        return model.generate([*PROMPTS, [1]], sampling=each, **{**OPTIONS, **options})[:-1]

    return generate


@pytest.fixture(scope="module")
def verified(model):
    """From a prompt and new tokens to the logits of each of them at the verify precision: float32 ``[T, V]``."""

    @jax.jit
    def logits(text):
        cache = model.decoder.create_cache(batch=1, capacity=64)
        return model.decoder(text, cache, precision=Precision.W4A16)[0][0]

    def of(prompt, ids):
        text = [*prompt, *ids, *[0] * (64 - len(prompt) - len(ids))]
        return np.asarray(logits(jnp.asarray([text], jnp.int32)))[len(prompt) - 1 :][: len(ids)]

    return of


def test_a_draft_is_accepted_by_the_definition():
    """In float64; each row with options of its own, the logits from flat to steep."""
    params = [
        SamplingParams(typical_acceptance=0.09),
        SamplingParams(typical_acceptance=0.9, top_k=1),  # greedy, which no limit changes
        SamplingParams(typical_acceptance=0.02, temperature=0.6, seed=1),
        SamplingParams(typical_acceptance=0.3, temperature=1.7, seed=2),
        SamplingParams(),
        SamplingParams(temperature=1.2, seed=3, top_k=12),
    ]
    rng = np.random.default_rng(0)
    scale = np.geomspace(0.1, 4, 60)[:, None]
    logits = (rng.standard_normal((len(params), 61, 12)) * np.vstack([scale, scale[:1]])).astype(np.float32)
    drafts = rng.integers(0, 12, (len(params), 60)).astype(np.int32)
    first = jnp.zeros((len(params),), jnp.int32)
    lossless = [dataclasses.replace(one, typical_acceptance=None) for one in params]
    features = SamplingFeatures.of(params)._replace(typical=False)
    chosen = np.asarray(_choose(jnp.asarray(logits), Sampler.create(lossless, features), first=first))
    tokens = _choose(jnp.asarray(logits), Sampler.create(params), first=first, drafts=jnp.asarray(drafts))

    expected, num_swapped = chosen.copy(), 0
    for row, one in enumerate(params):
        for place, draft in enumerate(drafts[row] if one.typical_acceptance else []):
            probabilities = np.exp(logits[row, place].astype(np.float64) / (one.temperature or 1))
            probabilities /= probabilities.sum()
            limit = np.sqrt(one.typical_acceptance) * np.exp((probabilities * np.log(probabilities)).sum())
            if probabilities[draft] > min(one.typical_acceptance, limit):
                num_swapped += int(expected[row, place] != draft)
                expected[row, place] = draft
    assert num_swapped > 20
    np.testing.assert_array_equal(tokens, expected)


def test_both_limits_of_the_definition_count():
    """Flat logits of 4 tokens have an entropy of log 4: the limit is ``sqrt(E) / 4`` where that is less than ``E``."""
    flat = jnp.zeros((1, 2, 4), jnp.float32)
    steep = flat.at[:, :, 0].set(jnp.log(97.0))  # 0.97, 0.01, 0.01, 0.01
    for logits, epsilon, accepted in (
        (flat, 0.98, True),
        (flat, 1.0, False),
        (steep, 0.02, False),
        (steep, 9e-3, True),
    ):
        sampler = Sampler.create([SamplingParams(typical_acceptance=epsilon)])
        first, drafts = jnp.zeros((1,), jnp.int32), jnp.full((1, 1), 3, jnp.int32)
        assert _choose(logits, sampler, first=first, drafts=drafts).tolist() == [[3 if accepted else 0, 0]]


def test_without_it_the_programs_are_those_without_it():
    params = [SamplingParams(temperature=1.0), SamplingParams()]
    assert not SamplingFeatures.of(params).typical
    assert Sampler.create(params).typical_acceptance is None


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_more_drafts_are_accepted_and_the_text_changes(run, temperature):
    lossless = run(SamplingParams(temperature=temperature, seed=3))
    some, most = (
        run(SamplingParams(temperature=temperature, seed=3, typical_acceptance=epsilon))
        for epsilon in (0.3, ALL_DRAFTS)
    )
    accepted = [
        sum(result.stats.accepted for result in results) / sum(result.stats.cycles for result in results)
        for results in (lossless, some, most)
    ]
    assert accepted[0] < accepted[1] < accepted[2] == 3
    assert token_ids(lossless) != token_ids(some) != token_ids(most)


def test_the_token_after_the_drafts_is_the_choice_of_the_verify_precision_after_the_text_as_it_is(verified, run):
    """With every draft accepted it is each fourth. Penalties count the tokens of the text, not those chosen instead."""
    penalised = SamplingParams(presence_penalty=1.5, frequency_penalty=0.4, typical_acceptance=ALL_DRAFTS)
    num_others = 0
    for prompt, ids in zip(PROMPTS, token_ids(run(penalised)), strict=True):
        for place, logits in enumerate(verified(prompt, ids)):
            counts = np.bincount(ids[:place], minlength=len(logits))
            choice = int(np.argmax(logits - 1.5 * (counts > 0) - 0.4 * counts))
            assert ids[place] == choice or place % 4
            num_others += ids[place] != choice
    assert num_others > 5


def test_log_probabilities_are_those_of_the_accepted_tokens(verified, run):
    for prompt, result in zip(PROMPTS, run(SamplingParams(typical_acceptance=ALL_DRAFTS, logprobs=2)), strict=True):
        expected = np.asarray(jax.nn.log_softmax(verified(prompt, result.token_ids)))
        np.testing.assert_allclose(result.logprobs, expected[range(NUM_TOKENS), result.token_ids], atol=1e-4)
        for top, row in zip(result.top_logprobs, expected, strict=True):
            assert list(top) == np.argsort(-row)[:2].tolist()


def test_an_accepted_stop_token_ends_the_text(verified, run):
    """One that the verify precision would not have chosen there."""
    typical = SamplingParams(typical_acceptance=ALL_DRAFTS)
    ids = token_ids(run(typical))[0]
    choices = verified(PROMPTS[0], ids).argmax(axis=1).tolist()
    place = next(place for place, token in enumerate(ids) if token not in (choices[place], *ids[:place]))
    stopped = run(dataclasses.replace(typical, stop_token_ids=(ids[place],)))[0]
    assert (stopped.token_ids, stopped.finish_reason) == (ids[: place + 1], "stop")


def test_tokens_that_are_ruled_out_are_not_accepted(run):
    """By top-k, a bias, or as a stop token too early."""
    only = SamplingParams(temperature=1.0, top_k=1, typical_acceptance=ALL_DRAFTS)
    assert token_ids(run(only)) == token_ids(run(dataclasses.replace(only, typical_acceptance=None)))
    biased = SamplingParams(logit_bias={17: 1e6}, typical_acceptance=ALL_DRAFTS)
    assert token_ids(run(biased)) == [[17] * NUM_TOKENS] * len(PROMPTS)


def test_requests_with_and_without_share_a_batch_and_feel_nothing_of_each_other(model, run):
    """Those without are what a program without it, and without drafts, gives."""
    typical = SamplingParams(typical_acceptance=0.1)
    without = [SamplingParams(), SamplingParams(temperature=1.1, seed=5)]
    lossless = token_ids(model.generate(PROMPTS[:2], **{**OPTIONS, "mode": "w4a16", "sampling": without}))
    together, alone = token_ids(run([*without, typical])), token_ids(run(typical))
    assert together[:2] == lossless
    assert together[2] == alone[2]
    assert alone[0] != lossless[0]


def test_without_drafts_there_is_nothing_to_accept(run):
    typical = SamplingParams(typical_acceptance=ALL_DRAFTS)
    assert token_ids(run(typical, mode="w4a16")) == token_ids(run(SamplingParams(), mode="w4a16"))


def test_a_text_does_not_depend_on_what_ran_in_its_row_before(model):
    """Looked-up drafts are of the text itself alone, since one that is accepted would show where it comes from."""
    options = {**OPTIONS, "mode": "lookup", "batch_size": 1}
    prompts = [PROMPTS[1], PROMPTS[2], PROMPTS[1], [8], PROMPTS[1]]
    again = token_ids(model.generate(prompts, sampling=SamplingParams(typical_acceptance=ALL_DRAFTS), **options))
    assert again[0] == again[2] == again[4]


@pytest.mark.parametrize("epsilon", [0.0, -0.1, 1.5, float("nan")])
def test_values_that_make_no_sense_are_refused(epsilon):
    with pytest.raises(UsageError, match=r"typical_acceptance=.*: use more than 0 .*up to 1, or None \(lossless\)"):
        SamplingParams(typical_acceptance=epsilon)


def test_it_is_an_option_of_a_line_of_json():
    assert SamplingParams.of({"typical_acceptance": 1}) == SamplingParams(typical_acceptance=1.0)
    assert SamplingParams.of({"typical_acceptance": None}) == SamplingParams()
    with pytest.raises(UsageError, match=r"typical_acceptance='0\.1': use a number, or null"):
        SamplingParams.of({"typical_acceptance": "0.1"})
