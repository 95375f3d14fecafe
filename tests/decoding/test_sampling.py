"""Sampling draws from the right distribution, and speculation changes none of its tokens.

``QSPEC_JAX_THOROUGH=1 pytest tests/decoding/test_sampling.py -rP`` shows the p-values of the chi-square tests, and
runs those of the loop with every option and seed instead of some.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.scipy.special import gammaincc as _gammaincc

from qspec_jax import ModelConfig, SamplingParams, UsageError
from qspec_jax.decoding import speculative
from qspec_jax.decoding.sampling import Sampler, _let_through, choose, gumbel_noise
from qspec_jax.model.precision import Precision
from tests import tiny

NUM_DRAWS = 20_000
SEEDS = (0, 1_000_000, 4_000_000_000)  # of the first draw; each draw has the next one
THOROUGH = os.environ.get("QSPEC_JAX_THOROUGH", "0") != "0"
LOOP_SEEDS = SEEDS if THOROUGH else SEEDS[:1]
PROMPTS = [[5, 6, 7], [30, 31, 32, 33, 34], [60] * 9]
WARM = SamplingParams(temperature=0.9, seed=7)
# Every option that changes the distribution, alone (but for penalties) and together.
OPTIONS = {
    "temperature": {"temperature": 0.7},
    "top_k": {"temperature": 1.0, "top_k": 3},
    "top_p": {"temperature": 1.3, "top_p": 0.8},
    "min_p": {"temperature": 1.0, "min_p": 0.2},
    "top_k_top_p_min_p": {"temperature": 1.5, "top_k": 4, "top_p": 0.8, "min_p": 0.1},
    "penalties": {
        "temperature": 1.0,
        "repetition_penalty": 1.4,
        "presence_penalty": 0.5,
        "frequency_penalty": 0.3,
    },
    "logit_bias": {"temperature": 1.0, "logit_bias": {1: -1.0, 4: 2.5}},
    "min_new_tokens": {"temperature": 1.0, "min_new_tokens": 4, "stop_token_ids": (0, 3)},
    "min_new_tokens_reached": {"temperature": 1.0, "min_new_tokens": 3, "stop_token_ids": (0, 3)},
    "all": {
        **{"temperature": 2.0, "top_k": 4, "top_p": 0.9, "min_p": 0.05, "logit_bias": {2: 1.0, 3: -0.5}},
        **{"repetition_penalty": 0.8, "presence_penalty": 0.2, "frequency_penalty": -0.4},
    },
}
LOGITS = np.asarray([2.0, 1.5, 1.2, 0.9, 0.3, 0.0, -0.4, -0.7, -1.5, -3.0], np.float32)
PROMPT, OUTPUT = [0, 4, 8], [1, 1, 4, 9]  # tokens that penalties know of
PADDING = [2, 2]  # of the prompt: not in it
PLACE = 3  # of the token that is drawn, among the new ones


def expected_distribution(logits, params, *, prompt=(), output=(), place=PLACE):
    """The definition, in float64, one token after the other."""
    logits = np.array(logits, np.float64)
    for token in range(len(logits)):
        logits[token] += params.logit_bias.get(token, 0.0)
        if place < params.min_new_tokens and token in params.stop_token_ids:
            logits[token] = -np.inf
        count = list(output).count(token)
        if count or token in prompt:
            factor = params.repetition_penalty
            logits[token] = logits[token] / factor if logits[token] > 0 else logits[token] * factor
        logits[token] -= params.presence_penalty * (count > 0) + params.frequency_penalty * count
    logits /= params.temperature
    kept = np.ones(len(logits), bool)
    order = np.argsort(-logits)
    if params.top_k:
        kept[order[params.top_k :]] = False
    probabilities = np.where(kept, np.exp(logits - logits.max()), 0)
    probabilities /= probabilities.sum()
    before = 0.0
    for token in order:
        kept[token] &= before < params.top_p
        before += probabilities[token]
    kept &= probabilities >= params.min_p * probabilities.max()
    probabilities = np.where(kept, probabilities, 0)
    return probabilities / probabilities.sum()


def chi_square_p_value(counts, probabilities):
    """Of the counts under the probabilities; 0 if something impossible was drawn. What is rare counts as one thing."""
    counts, expected = np.asarray(counts, np.float64), probabilities * np.sum(counts)
    if counts[expected == 0].any():
        return 0.0
    rare = expected < 5
    counts, expected = (np.append(of[~rare], of[rare].sum()) for of in (counts, expected))
    counts, expected = counts[expected > 0], expected[expected > 0]
    statistic = ((counts - expected) ** 2 / expected).sum()
    freedom = len(counts) - 1
    assert freedom, "there is nothing to choose from"
    return float(gammaincc(freedom / 2, statistic / 2))


gammaincc = jax.jit(_gammaincc)


def draw(params, seed, *, logits=LOGITS):
    """One token for each of many seeds, from the same logits after the same tokens."""
    sampler = jax.tree.map(lambda column: np.repeat(column, NUM_DRAWS, axis=0), Sampler.create([params]))
    sampler = dataclasses.replace(sampler, seed=(seed + np.arange(NUM_DRAWS)).astype(np.uint32))
    return np.asarray(_draw(sampler, logits))[:, 0]


@jax.jit
def _draw(sampler, logits):
    prompts, output = (jnp.tile(jnp.asarray([text]), (NUM_DRAWS, 1)) for text in ([*PROMPT, *PADDING], OUTPUT))
    sampler = sampler.for_prompts(prompts, jnp.full((NUM_DRAWS,), len(PROMPT)), len(logits))
    sampler = sampler.after(output, jnp.ones(output.shape, bool))
    return choose(jnp.tile(logits, (NUM_DRAWS, 1, 1)), sampler, first=jnp.full((NUM_DRAWS,), PLACE))


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_tokens_follow_the_distribution_of_their_options(options):
    params = SamplingParams(**options)
    expected = expected_distribution(LOGITS, params, prompt=PROMPT, output=OUTPUT)
    for seed in SEEDS:
        counts = np.bincount(draw(params, seed), minlength=len(LOGITS))
        p_value = chi_square_p_value(counts, expected)
        print(f"seed {seed}: p = {p_value:.3g}")
        assert p_value > 1e-4, f"seed {seed}"


EXTREMES = {
    "lowest_temperature": {"temperature": 1.2e-38},
    "low_temperature_and_bias": {"temperature": 1e-37, "logit_bias": {4: 2.0, 5: -1e28}},
    "low_temperature_and_limits": {"temperature": 1e-38 * 1.2, "top_k": 3, "top_p": 0.9, "min_p": 0.1},
    "highest_temperature": {"temperature": 3.4e38},
    "highest_penalties": {"temperature": 1.0, "presence_penalty": 1e28, "frequency_penalty": 1e28},
    "lowest_penalties": {"temperature": 1.0, "presence_penalty": -1e28, "frequency_penalty": -1e28},
    "highest_repetition_penalty": {"temperature": 1.0, "repetition_penalty": 1e6},
    "lowest_repetition_penalty": {"temperature": 1e-37, "repetition_penalty": 1e-6},
    "highest_biases": {"temperature": 0.5, "logit_bias": {2: 1e28, 3: 1e28, 4: -1e28}, "repetition_penalty": 1e6},
    "lowest_limits": {"temperature": 1.0, "min_p": 5e-324},
    "lowest_top_p": {"temperature": 1.0, "top_p": 5e-324},
}


@pytest.mark.parametrize("options", EXTREMES.values(), ids=EXTREMES.keys())
def test_values_at_the_ends_of_what_is_allowed_do_what_they_do_in_double(options):
    params, logits = SamplingParams(**options), LOGITS * 20 if options["temperature"] < 1 else LOGITS
    expected = expected_distribution(logits, params, prompt=PROMPT, output=OUTPUT)
    counts = np.bincount(draw(params, 0, logits=logits), minlength=len(LOGITS))
    likely = expected > 1e-9
    assert not counts[~likely].any()
    assert likely.sum() == 1 or chi_square_p_value(counts, expected) > 1e-4


def test_a_temperature_near_0_chooses_what_0_does_whatever_the_penalties():
    for options in ({"repetition_penalty": 1.3}, {"presence_penalty": 1e6}, {"logit_bias": {9: 1e28}}):
        both = (SamplingParams(temperature=temperature, **options) for temperature in (0.0, 1.2e-38))
        greedy, cold = (draw(params, 0, logits=LOGITS * 20)[:9] for params in both)
        np.testing.assert_array_equal(greedy, cold)


@pytest.mark.parametrize(
    ("logits", "options", "expected"),
    [
        ([1, 0, 0, -1], {"top_k": 2}, {0, 1, 2}),  # tokens tied with the last one are let through
        ([1, 0, 0, -1], {"top_k": 2, "top_p": 0.5}, {0}),  # and top-p counts them: 1/2, 1/4, 1/4
        ([1, 0, 0, -1], {"top_k": 2, "top_p": 0.51}, {0, 1, 2}),
        ([2, 1, 0, 0], {"top_p": 0.5}, {0}),  # of probabilities 1/2, 1/4, 1/8, 1/8 (temperature 1/log 2) one reaches it
        ([2, 1, 0, 0], {"top_p": 0.51}, {0, 1}),
        ([2, 1, 0, 0], {"min_p": 0.5}, {0, 1}),
    ],
    ids=str,
)
def test_limits_let_through_what_reaches_them_exactly(logits, options, expected):
    params = SamplingParams(temperature=1 / math.log(2), **options)
    drawn = draw(params, 0, logits=np.asarray([*logits, *[-1e9] * 6], np.float32))
    assert set(drawn.tolist()) == expected


def test_a_request_without_limits_loses_no_token_beside_one_with():
    """Though in float32 the first token alone has all of the probability."""
    sampler = Sampler.create([SamplingParams(temperature=1.0), SamplingParams(temperature=1.0, top_p=0.9)])
    kept = jax.jit(_let_through)(jnp.asarray([[[0.0, -20.0, -21.0, -22.0]]] * 2), sampler)
    assert kept[:, 0].tolist() == [[True] * 4, [True, False, False, False]]


def test_another_distribution_would_be_noticed():
    counts = np.bincount(draw(SamplingParams(temperature=1.0), 0), minlength=len(LOGITS))
    assert chi_square_p_value(counts, expected_distribution(LOGITS, SamplingParams(temperature=1.1))) < 1e-6


TEXTS = list(itertools.product(range(5), repeat=3))
START = [1, 2]


def enumerable_model():
    """A decoder with five tokens."""
    return tiny.language_model(ModelConfig.from_hf({**tiny.BASE_HF_CONFIG, "vocab_size": 5}))


@pytest.fixture(scope="module")
def enumerable():
    return enumerable_model()


@pytest.fixture(scope="module")
def text_logits(enumerable):
    """What it says after every text of up to three tokens."""

    @jax.jit
    def run(tokens):
        cache = enumerable.decoder.create_cache(batch=len(tokens), capacity=8)
        return enumerable.decoder(tokens, cache, precision=Precision.W4A16)[0]

    return np.asarray(run(np.asarray([[*START, *text] for text in TEXTS], np.int32)))


def texts_p_value(model, logits, *, params, first_seed=0, num_samples=2000, beside=None):
    """Of the new tokens of many requests, two of a cycle, under the verify precision's own distribution.

    Args:
        beside: options of one more request, whose features the programs have.
    """
    each = [dataclasses.replace(params, seed=(first_seed + sample) % 2**32) for sample in range(num_samples)]
    each += [] if beside is None else [beside]
    options = {"draft": "w4a4", "draft_length": 2, "max_new_tokens": 3, "batch_size": 200}
    results = model.generate([START] * len(each), sampling=each, **options)[:num_samples]
    index = {text: row for row, text in enumerate(TEXTS)}
    counts = np.bincount([index[tuple(result.token_ids)] for result in results], minlength=len(TEXTS))
    joint = np.ones(len(TEXTS))
    for row, text in enumerate(TEXTS):
        for place, token in enumerate(text):
            after = logits[row, len(START) - 1 + place]
            joint[row] *= expected_distribution(after, params, prompt=START, output=text[:place], place=place)[token]
    p_value = chi_square_p_value(counts, joint)
    print(f"first seed {first_seed}: p = {p_value:.3g}")
    return p_value


@pytest.mark.parametrize("first_seed", LOOP_SEEDS)
@pytest.mark.parametrize("name", OPTIONS if THOROUGH else ["temperature", "all"])
def test_text_of_the_loop_follows_the_verify_precision(enumerable, text_logits, name, first_seed):
    """Beside a request that needs everything, which saves programs of fewer features: theirs give the same tokens."""
    options = {"params": SamplingParams(**OPTIONS[name]), "beside": SamplingParams(**OPTIONS["all"])}
    assert texts_p_value(enumerable, text_logits, first_seed=first_seed, **options) > 1e-4


@pytest.mark.parametrize("first_seed", LOOP_SEEDS)
def test_typical_acceptance_changes_the_distribution(enumerable, text_logits, first_seed):
    params = SamplingParams(temperature=1.5, typical_acceptance=0.1)
    assert texts_p_value(enumerable, text_logits, params=params, first_seed=first_seed, num_samples=600) < 1e-6


@pytest.mark.parametrize("first_seed", LOOP_SEEDS)
def test_a_wrong_acceptance_rule_changes_the_distribution(text_logits, monkeypatch, first_seed):
    def emit_the_drafts(draft_tokens, target_tokens):
        return jnp.full((draft_tokens.shape[0],), draft_tokens.shape[1], jnp.int32)

    def verify_nothing(model, last_token, draft_tokens, cache, **settings):
        found = verify(model, last_token, draft_tokens, cache, **settings)
        return found._replace(tokens=jnp.concatenate([draft_tokens, found.tokens[:, -1:]], axis=1))

    verify = speculative.verify
    monkeypatch.setattr(speculative, "verify", verify_nothing)
    monkeypatch.setattr(speculative, "accept", emit_the_drafts)
    params = SamplingParams(temperature=1.5)
    assert texts_p_value(enumerable_model(), text_logits, params=params, first_seed=first_seed, num_samples=600) < 1e-6


@pytest.fixture(scope="module")
def model():
    return tiny.laid_out(tiny.language_model(), draft="w4a4")


# Log-probabilities too, as in test_intake.py: the programs are the same.
EVERYTHING = SamplingParams(temperature=1.0, top_k=3, frequency_penalty=0.1, logit_bias={1: 0.1}, logprobs=1)


@pytest.fixture(scope="module")
def run(model):
    """Generates with one set of programs, whatever the options: beside the prompts runs one that needs everything."""

    def generate(prompts, each, **options):
        each = [each] * len(prompts) if isinstance(each, SamplingParams) else each
        options = {"max_new_tokens": 24, "max_seq_len": 64, "batch_size": 4, **options}
        return model.generate([*prompts, [1]], sampling=[*each, EVERYTHING], **options)[:-1]

    return generate


def token_ids(results):
    return [result.token_ids for result in results]


@pytest.mark.contract
@pytest.mark.parametrize("name", ["temperature", "top_k_top_p_min_p", "all"])
def test_a_seed_gives_the_same_text_with_and_without_drafts(run, name):
    each = [SamplingParams(**OPTIONS[name], seed=seed) for seed in (3, 4, 5)]
    plain = token_ids(run(PROMPTS, each, mode="w4a16"))
    results = run(PROMPTS, each, draft="w4a4")
    assert token_ids(results) == plain
    assert 0 < sum(result.stats.accepted for result in results) < sum(result.stats.drafted for result in results)


def test_drafts_draw_with_the_noise_of_the_verification(run):
    """With noise of their own the text would be the same, but most drafts would be wrong."""
    each = [SamplingParams(temperature=1.0, seed=seed) for seed in range(24)]
    results = run(PROMPTS * 8, each, draft="w4a4")
    accepted, drafted = (sum(getattr(r.stats, name) for r in results) for name in ("accepted", "drafted"))
    assert accepted > 0.5 * drafted  # 0.68; with another noise 0.21


def test_drafts_are_penalised_for_the_drafts_before_them(run):
    """Biases and penalties leave one text, in which two tokens take turns: what knows of all before is right."""
    sampling = SamplingParams(frequency_penalty=100.0, logit_bias={10: 1e4, 11: 1e4 - 50})
    results = run(PROMPTS, sampling, draft="w4a4", max_new_tokens=17)
    assert token_ids(results) == [[10, 11] * 8 + [10]] * len(PROMPTS)
    assert all(result.stats.acceptance_rate == 1 for result in results)


@pytest.mark.contract
def test_a_request_is_the_same_alone_and_among_others(model, run):
    """Alone with programs that have no sampler, or less of one, and are of another shape."""
    each = [SamplingParams(), WARM, SamplingParams(temperature=1.2, top_k=9, frequency_penalty=0.5, seed=1)]
    together = token_ids(run(PROMPTS, each, draft="w4a4"))
    turned = token_ids(run(PROMPTS[::-1], each[::-1], draft="w4a4"))
    assert together == turned[::-1]
    options = {"draft": "w4a4", "max_new_tokens": 24, "max_seq_len": 64}
    for index in range(2):
        assert token_ids(model.generate([PROMPTS[index]], sampling=[each[index]], **options)) == [together[index]]


@pytest.mark.contract
@pytest.mark.parametrize("generator", ["rbg", "unsafe_rbg"])
def test_noise_is_that_of_a_seed_whatever_generator_jax_uses_otherwise(generator):
    """Bits of these depend on what is beside them, where a function is mapped."""
    seeds, places = jnp.asarray([3, 4], jnp.uint32), jnp.asarray([[0, 1], [5, 6]], jnp.int32)
    expected = gumbel_noise(seeds, places, 8)
    with jax.default_prng_impl(generator):
        np.testing.assert_array_equal(gumbel_noise(seeds, places, 8), expected)
        np.testing.assert_array_equal(gumbel_noise(seeds[1:], places[1:], 8), expected[1:])


def test_parameters_have_a_hash_as_static_arguments_need_it():
    one, same = (SamplingParams(logit_bias={4: 1.0}, temperature=0.5) for _ in range(2))
    assert hash(one) == hash(same)
    assert {one: 1}[same] == 1
    assert one != SamplingParams(temperature=0.5)


def test_seeds_count_up_from_prompt_to_prompt_and_matter(model):
    """One for all that needs everything shares the programs of the other tests."""
    one_for_all = dataclasses.replace(EVERYTHING, top_k=20, seed=7)
    options = {"draft": "w4a4", "max_new_tokens": 16, "max_seq_len": 64, "batch_size": 4}
    texts = token_ids(model.generate([PROMPTS[0]] * 4, sampling=one_for_all, **options))
    assert len({tuple(text) for text in texts}) == 4
    third = dataclasses.replace(one_for_all, seed=9)
    assert token_ids(model.generate([PROMPTS[0]] * 4, sampling=third, **options))[:2] == texts[2:]


@pytest.mark.contract
def test_greedy_requests_run_the_program_without_a_sampler(model):
    options = {"draft": "w4a4", "max_new_tokens": 24, "max_seq_len": 64}
    greedy = token_ids(model.generate(PROMPTS[:1], **options))
    programs = len(model.programs)
    assert token_ids(model.generate(PROMPTS[:1], sampling=SamplingParams(top_k=3, seed=9), **options)) == greedy
    assert len(model.programs) == programs


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1.0}, r"temperature=-1\.0: use 0 \(greedy\) or more"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"top_k": -1}, "top_k=-1: use 0"),
        ({"top_p": 0.0}, r"top_p=0\.0: use more than 0"),
        ({"min_p": 1.5}, r"min_p=1\.5: use 0"),
        ({"repetition_penalty": 0.0}, r"repetition_penalty=0\.0: use more than 0"),
        ({"presence_penalty": float("inf")}, "presence_penalty=inf: use a finite number"),
        ({"seed": -1}, "seed=-1: use 0"),
    ],
    ids=str,
)
def test_parameters_out_of_range_are_named(options, message):
    with pytest.raises(UsageError, match=message):
        SamplingParams(**options)


def test_parameters_for_another_number_of_prompts_are_refused(model):
    with pytest.raises(UsageError, match="there are 2 sampling parameters for 3 prompts"):
        model.generate(PROMPTS, sampling=[WARM, WARM])
