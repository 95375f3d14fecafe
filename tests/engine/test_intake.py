"""Options of a request that end its text, change its logits or report its log-probabilities, in the loop."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qspec_jax import SamplingParams, UsageError
from qspec_jax.model.precision import Precision
from tests import tiny

PROMPTS = [[5, 6, 7], [30, 31, 32, 33, 34], [60] * 9]


@pytest.fixture(scope="module")
def model():
    return tiny.language_model()


@pytest.fixture(scope="module")
def run(model):
    """Generates with one set of programs, whatever the options: beside the prompts runs one that needs everything."""
    everything = SamplingParams(temperature=1.0, top_k=3, frequency_penalty=0.1, min_new_tokens=1, logprobs=1)

    def generate(sampling, *, mode="qspec"):
        each = [*([sampling] * len(PROMPTS) if isinstance(sampling, SamplingParams) else sampling), everything]
        options = {"mode": mode, "draft": "w4a8", "max_new_tokens": 16, "max_seq_len": 64, "batch_size": 4}
        return model.generate([*PROMPTS, [1]], sampling=each, **options)[:-1]

    return generate


@pytest.fixture(scope="module")
def greedy(run):
    return run(SamplingParams())


def test_log_probabilities_are_those_of_the_verify_precision(model, run, greedy):
    results = run(SamplingParams(logprobs=3))
    assert [result.token_ids for result in results] == [result.token_ids for result in greedy]

    @jax.jit
    def logits_of(text):
        cache = model.decoder.create_cache(batch=1, capacity=32)
        return model.decoder(text, cache, precision=Precision.W4A16)[0][0]

    for prompt, result in zip(PROMPTS, results, strict=True):
        text = [*prompt, *result.token_ids]
        logits = logits_of(jnp.asarray([text + [0] * (32 - len(text))], jnp.int32))  # what follows changes nothing
        expected = np.asarray(jax.nn.log_softmax(logits[len(prompt) - 1 :][:16]))
        np.testing.assert_allclose(result.logprobs, expected[range(16), result.token_ids], atol=1e-4)
        for top, row in zip(result.top_logprobs, expected, strict=True):
            assert list(top) == np.argsort(-row)[:3].tolist()
            np.testing.assert_allclose(list(top.values()), row[list(top)], atol=1e-4)


def test_log_probabilities_are_there_only_for_those_who_ask(run):
    results = run([SamplingParams(logprobs=0), SamplingParams(), SamplingParams(logprobs=2)])
    assert len(results[0].logprobs) == 16
    assert results[0].top_logprobs is None
    assert results[1].logprobs is results[1].top_logprobs is None
    assert all(len(top) == 2 for top in results[2].top_logprobs)


def test_log_probabilities_do_not_depend_on_what_the_tokens_are_drawn_with(run):
    params = SamplingParams(temperature=1.4, seed=3, repetition_penalty=1.2, logit_bias={4: 2.0}, logprobs=20)
    for result in run(params):
        for token, logprob, top in zip(result.token_ids, result.logprobs, result.top_logprobs, strict=True):
            assert top.get(token, logprob) == logprob


def test_a_bias_is_added_to_the_logits_of_its_tokens_only(run, greedy):
    assert all(result.token_ids == [17] * 16 for result in run(SamplingParams(logit_bias={17: 1e6})))
    banned = set(greedy[0].token_ids[:2])
    result = run(SamplingParams(logit_bias=dict.fromkeys(banned, -1e6)))[0]
    assert not banned & set(result.token_ids)
    assert [one.token_ids for one in run(SamplingParams(logit_bias={17: 0.0}))] == [one.token_ids for one in greedy]


def test_stop_tokens_wait_for_min_new_tokens(run, greedy):
    ids = greedy[1].token_ids
    stop = ids[3]
    early = run(SamplingParams(stop_token_ids=(stop,)))[1]
    assert early.token_ids == ids[: ids.index(stop) + 1]
    assert early.finish_reason == "stop"
    late = run(SamplingParams(stop_token_ids=(stop,), min_new_tokens=9))[1]
    assert stop not in late.token_ids[:9]
    assert late.token_ids[: ids.index(stop)] == ids[: ids.index(stop)]


def test_the_models_own_stop_tokens_end_no_text_that_ignores_them(model, run, greedy, monkeypatch):
    ids = greedy[1].token_ids
    own, up_to_own = ids[3], ids[: ids.index(ids[3]) + 1]
    monkeypatch.setattr(model, "stop_tokens", (own,))
    assert run(SamplingParams())[1].token_ids == up_to_own
    for ignoring in (SamplingParams(ignore_eos=True), SamplingParams(ignore_eos=True, min_new_tokens=9)):
        result = run(ignoring)[1]
        assert (result.token_ids, result.finish_reason) == (ids, "length")
    asked = run(SamplingParams(ignore_eos=True, stop_token_ids=(own,)))[1]
    assert (asked.token_ids, asked.finish_reason) == (up_to_own, "stop")


@pytest.mark.parametrize("mode", ["w4a16"])
def test_drafts_change_none_of_it(run, mode):
    each = [
        SamplingParams(logit_bias={3: 1.5, 9: -2.0}, temperature=0.9, seed=2),
        SamplingParams(min_new_tokens=6, stop_token_ids=tuple(range(16)), logprobs=2),
        SamplingParams(logit_bias={7: 3.0}, presence_penalty=0.7),
    ]
    drafted, plain = run(each), run(each, mode=mode)
    assert [result.token_ids for result in drafted] == [result.token_ids for result in plain]
    np.testing.assert_allclose(drafted[1].logprobs, plain[1].logprobs, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"logprobs": 21}, "logprobs=21: use 0"),
        ({"min_new_tokens": -1}, "min_new_tokens=-1: use 0 or more"),
        ({"stop": ("",)}, "stop=.*at least one character"),
        ({"stop_token_ids": tuple(range(17))}, "stop_token_ids=.*use up to 16"),
        ({"logit_bias": {3: float("nan")}}, "logit_bias=.*finite numbers"),
        ({"logit_bias": dict.fromkeys(range(301), 1.0)}, "logit_bias=.*up to 300 tokens"),
    ],
    ids=str,
)
def test_options_out_of_range_are_named(options, message):
    with pytest.raises(UsageError, match=message):
        SamplingParams(**options)


def test_samples_of_a_prompt_follow_each_other_with_the_next_seeds(model):
    options = {"mode": "w4a16", "max_new_tokens": 8, "max_seq_len": 64, "batch_size": 4}
    warm = SamplingParams(temperature=1.5, seed=5)
    both = model.generate(PROMPTS[:2], sampling=warm, num_samples=2, **options)
    assert [result.prompt_token_ids for result in both] == [PROMPTS[0], PROMPTS[0], PROMPTS[1], PROMPTS[1]]
    seeds = [SamplingParams(temperature=1.5, seed=seed) for seed in (5, 6, 7, 8)]
    doubled = [PROMPTS[0], PROMPTS[0], PROMPTS[1], PROMPTS[1]]
    assert [r.token_ids for r in both] == [r.token_ids for r in model.generate(doubled, sampling=seeds, **options)]
    each = model.generate(PROMPTS[:2], sampling=[seeds[0], seeds[2]], num_samples=2, **options)
    assert [r.token_ids for r in each] == [r.token_ids for r in both]


def test_a_bias_of_a_token_that_is_not_there_is_refused(model):
    with pytest.raises(UsageError, match=r"logit_bias has token 96; use 0\.\.95"):
        model.generate([[1]], sampling=SamplingParams(logit_bias={96: 1.0}))


def test_options_from_json_have_the_types_of_the_fields():
    given = {"temperature": 1, "stop": "\n", "stop_token_ids": [3], "logit_bias": {"5": 2}, "logprobs": None}
    expected = SamplingParams(temperature=1.0, stop=("\n",), stop_token_ids=(3,), logit_bias={5: 2.0})
    assert SamplingParams.of(given) == expected
    for wrong in ({"logit_bias": [5]}, {"stop": 3}, {"stop_token_ids": "3"}, {"seed": True}, {"logprobs": 1.5}):
        with pytest.raises(UsageError, match=f"{next(iter(wrong))}=.*use a"):
            SamplingParams.of(wrong)
