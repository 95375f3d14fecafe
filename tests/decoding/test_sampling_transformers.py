"""Sampling against Hugging Face transformers: what tokens are drawn from, whole texts, and log-probabilities.

transformers has no presence or frequency penalty. Those are OpenAI's formula, where ``generate`` puts processors of the
caller: after all that change logits whatever is drawn, and before the temperature.
"""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qspec_jax import ModelConfig, SamplingParams
from qspec_jax.decoding.sampling import Sampler, adjusted, gumbel_noise
from tests import tiny
from tests.golden import make as golden

torch = pytest.importorskip("torch", reason="needs torch, the oracle")

VOCAB = 64
ROWS = 256
FAMILY = "llama2"
# Few values of each, the ends of what is allowed among them: every pair of them comes up.
VALUES = {
    "temperature": (0.0, 1.2e-38, 0.05, 0.7, 1.0, 1.5, 30.0),
    "top_k": (0, 1, 5, VOCAB, VOCAB + 1, 2**31 - 1),
    "top_p": (1.0, 5e-324, 1e-6, 0.3, 0.5, 0.9, 0.999, 1 - 1e-9),
    "min_p": (0.0, 5e-324, 0.05, 0.5, 1.0),
    "repetition_penalty": (1.0, 1.3, 0.5, 2.0, 10.0),
    "presence_penalty": (0.0, 0.6, -1.5),
    "frequency_penalty": (0.0, 0.25, -0.5),
    "logit_bias": ({}, {3: 2.0, 7: -100.0}, {0: 1e28}),
    "min_new_tokens": (0, 2, 5),
}
LIMITS = ("top_k", "top_p", "min_p")
KINDS = {
    "usual": lambda rng, logits: logits,
    "bfloat16": lambda rng, logits: np.asarray(jnp.asarray(logits, jnp.bfloat16), np.float32),
    "tied": lambda rng, logits: np.round(2 * logits) / 2,
    "equal": lambda rng, logits: np.zeros_like(logits),
    "ruled_out": lambda rng, logits: np.where(rng.random(logits.shape) < 0.7, -np.inf, logits),
}


def options_of(params, num_prompt_tokens):
    """A generation config with some options, and the processors for those that it has no name for."""
    from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

    class OfTheOutput(LogitsProcessor):
        def __call__(self, input_ids, scores):
            output = input_ids[:, num_prompt_tokens:]
            counts = torch.zeros_like(scores).scatter_add(1, output, torch.ones_like(output, dtype=scores.dtype))
            return scores - params.presence_penalty * (counts > 0) - params.frequency_penalty * counts

    config = GenerationConfig(
        **{name: getattr(params, name) for name in ("top_k", "top_p", "min_p", "repetition_penalty")},
        do_sample=not params.greedy,
        temperature=params.temperature or 1.0,
        sequence_bias={(token,): bias for token, bias in params.logit_bias.items()} or None,
        min_new_tokens=params.min_new_tokens,
        eos_token_id=list(params.stop_token_ids) or None,
    )
    return config, LogitsProcessorList([OfTheOutput()])


def expected_scores(model, params, logits, prompt, output):
    """Of one place ``[V]``, in float64: before the limits of what is drawn from, and after them.

    By the processors of ``generate`` in its order, of which the list has no public name.
    """
    from transformers import MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    config, own = options_of(params, len(prompt))
    model._prepare_special_tokens(config)
    given = {"generation_config": config, "input_ids_seq_length": len(prompt), "logits_processor": own}
    scores, ids = torch.tensor(logits[None], dtype=torch.float64), torch.tensor([[*prompt, *output]])
    before = None
    for apply in model._get_logits_processor(**given, device="cpu", model_kwargs={}):
        if before is None and isinstance(apply, TopKLogitsWarper | TopPLogitsWarper | MinPLogitsWarper):
            before = scores
        scores = apply(ids, scores)
    return (scores if before is None else before)[0].numpy(), scores[0].numpy()


def made_up(rng, kind):
    """Logits ``[ROWS, VOCAB]``, options, prompts and outputs of as many requests."""
    logits = KINDS[kind](rng, rng.normal(size=(ROWS, VOCAB)) * rng.choice([0.1, 1, 3, 20], size=(ROWS, 1)))
    each = []
    for row in range(ROWS):
        names = VALUES if row % 2 else LIMITS
        drawn = {name: VALUES[name][rng.integers(len(VALUES[name]))] for name in names}
        each.append(SamplingParams(**{"temperature": 1.0, **drawn}, stop_token_ids=(0, 9)))
    prompts, outputs = rng.integers(0, VOCAB, (ROWS, 6)), rng.integers(0, VOCAB // 4, (ROWS, 4))
    return logits.astype(np.float32), each, prompts, outputs, rng.integers(1, 7, ROWS), rng.integers(0, 5, ROWS)


@jax.jit
def our_scores(logits, sampler, prompts, outputs, prompt_lengths, output_lengths):
    kept = jnp.arange(outputs.shape[1], dtype=jnp.int32) < output_lengths[:, None]
    sampler = sampler.for_prompts(prompts, prompt_lengths, logits.shape[-1]).after(outputs, kept)
    return adjusted(logits[:, None], sampler, places=output_lengths[:, None])[:, 0]


def probabilities(scores):
    weights = np.exp(scores.astype(np.float64) - scores.max())
    return weights / weights.sum()


@pytest.fixture(scope="module")
def oracle():
    return golden.hf_model(FAMILY)


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_are_drawn_from_what_transformers_draws_from(oracle, kind):
    """All requests in one batch. Besides, top-p lets through what is tied with the last token that it lets through."""
    rng = np.random.default_rng(len(kind))
    logits, each, prompts, outputs, prompt_lengths, output_lengths = made_up(rng, kind)
    arrays = (prompts, outputs, prompt_lengths, output_lengths)
    ours = np.asarray(our_scores(logits, Sampler.create(each), *(array.astype(np.int32) for array in arrays)))
    for row, params in enumerate(each):
        texts = prompts[row, : prompt_lengths[row]].tolist(), outputs[row, : output_lengths[row]].tolist()
        before, theirs = expected_scores(oracle, params, logits[row], *texts)
        if params.top_p < 1 and not params.greedy:
            theirs = np.where(before >= before[np.isfinite(theirs)].min(), before, -np.inf)
        possible = probabilities(before) > 1e-8
        let_through = (np.isfinite(scores)[possible] for scores in (ours[row], theirs))
        np.testing.assert_array_equal(*let_through, err_msg=f"{row}: {params}")
        np.testing.assert_allclose(probabilities(ours[row]), probabilities(theirs), atol=1e-4, err_msg=f"{params}")


NEW = 12
TEXTS = {
    "temperature": {"temperature": 1.3, "seed": 5},
    "limits": {"temperature": 1.0, "top_k": 20, "top_p": 0.9, "min_p": 0.02, "seed": 4_000_000_000},
    "penalties": {
        **{"temperature": 0.9, "repetition_penalty": 1.4, "presence_penalty": 0.5, "frequency_penalty": 0.3},
        **{"logit_bias": {3: 1.5, 8: -4.0}, "min_new_tokens": 4, "stop_token_ids": tuple(range(16, 32)), "seed": 11},
    },
    "greedy_with_penalties": {"repetition_penalty": 1.4, "presence_penalty": -0.5, "logit_bias": {3: 1.5}},
}
PROMPTS = ([5, 6, 7], [30, 31, 32, 33, 34], [60] * 9)


def their_text(model, params, prompt, monkeypatch):
    """What ``generate`` yields where it draws with the noise of a seed, and its logits ``[T, V]`` before options."""
    places = itertools.count()

    def draw(probabilities, num_samples):
        place = jnp.full((1, 1), next(places), jnp.int32)
        noise = np.array(gumbel_noise(jnp.asarray([params.seed], jnp.uint32), place, probabilities.shape[-1]))[0]
        return torch.argmax(torch.log(probabilities) + torch.from_numpy(noise), dim=-1, keepdim=True)

    config, own = options_of(params, len(prompt))
    options = {"max_new_tokens": NEW, "return_dict_in_generate": True, "output_logits": True, "pad_token_id": 0}
    config.update(**options)
    with monkeypatch.context() as patch, torch.inference_mode():
        patch.setattr(torch, "multinomial", draw)
        made = model.generate(torch.tensor([prompt]), generation_config=config, logits_processor=own)
    assert params.greedy or next(places) == len(made.logits)
    return made.sequences[0, len(prompt) :].tolist(), torch.cat(made.logits).double()


@pytest.fixture(scope="module")
def model():
    return tiny.language_model(ModelConfig.from_hf(tiny.hf_config(FAMILY)), quantization=None)


def test_texts_and_their_log_probabilities_are_those_of_transformers(oracle, model, monkeypatch):
    """All in one batch, with the same noise; each is as long as it is there, up to the same stop token."""
    asked = [(SamplingParams(**options, logprobs=3), prompt) for options in TEXTS.values() for prompt in PROMPTS]
    each, prompts = zip(*asked, strict=True)
    results = model.generate(list(prompts), sampling=list(each), mode="float", max_new_tokens=NEW, batch_size=4)
    lengths = set()
    for result, (params, prompt) in zip(results, asked, strict=True):
        token_ids, logits = their_text(oracle, params, prompt, monkeypatch)
        assert result.token_ids == token_ids, params
        lengths.add(len(token_ids))
        logprobs = torch.log_softmax(logits, dim=-1).numpy()
        chosen = logprobs[np.arange(len(token_ids)), token_ids]
        np.testing.assert_allclose(result.logprobs, chosen, atol=1e-3)
        for place, top in enumerate(result.top_logprobs):
            expected = np.argsort(-logprobs[place])[:3]
            np.testing.assert_array_equal(list(top), expected)
            np.testing.assert_allclose(list(top.values()), logprobs[place, expected], atol=1e-3)
    assert len(lengths) > 1
