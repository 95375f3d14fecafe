"""The main job on a real model: SmolLM2-135M-Instruct from its GGUF file, on the CPU in float32."""

from __future__ import annotations

import json

import jax
import numpy as np
import pytest

import qspec_jax
from qspec_jax import DecodingPlan, Precision, SamplingParams, View
from tests.conftest import THOROUGH
from tests.golden import make_demo

pytestmark = [
    pytest.mark.contract,
    pytest.mark.demo,
    pytest.mark.slow,  # up to 30 s each on a quiet machine: a real model
    pytest.mark.skipif(jax.default_backend() != "cpu", reason="token identity in float32 is a contract of the CPU"),
]
# Each of the 24 prompts with recorded tokens is read once: by plain decoding, with W4A8 or with W4A4 drafts. All 64
# tokens on request, and then plain decoding reads all prompts.
NUM_TOKENS = make_demo.NUM_TOKENS if THOROUGH else 32
NUM_PLAIN = 24 if THOROUGH else 8
ROWS, CAPACITY = 8, 128  # of every batch, so that they share programs


@pytest.fixture(scope="module")
def model(demo_gguf):
    model = qspec_jax.load(demo_gguf, dtype="float32")
    model.programs.lay_out_weights(model.plan(draft="w4a4"))  # programs from before its sums would be compiled again
    return model


@pytest.fixture(scope="module")
def plain(model):
    options = {"mode": "w4a16", "batch_size": ROWS, "max_seq_len": CAPACITY, "max_new_tokens": NUM_TOKENS}
    return model.generate(make_demo.prompts()[:NUM_PLAIN], **options)


def served(model, plan, asked, max_new_tokens):
    """A batch that has served all that is asked: a limit for each, or one for all."""
    batch = model.pipeline(plan, batch_size=ROWS, max_seq_len=CAPACITY)
    for one, limit in zip(asked, np.broadcast_to(max_new_tokens, len(asked)).tolist(), strict=True):
        batch.submit(one, max_new_tokens=limit)
    return list(batch.results()), batch.totals


def drafted(model, draft, prompts):
    """Results of a slice of the prompts, whose tokens are those recorded. What does not fit the batch has few."""
    asked, recorded = make_demo.prompts()[prompts], recorded_tokens()[prompts]
    limits = [NUM_TOKENS] * ROWS + [8] * (len(asked) - ROWS)
    results, _ = served(model, model.plan(draft=draft), asked, limits)
    assert token_ids(results) == [ids[:limit] for ids, limit in zip(recorded, limits, strict=True)]
    return results[:ROWS]


def token_ids(results):
    return [result.token_ids for result in results]


def recorded_tokens():
    return [ids[:NUM_TOKENS] for ids in json.loads(make_demo.GOLDEN.read_text())]


def totals(results):
    """Acceptance rate and tokens per cycle over all prompts."""
    stats = [result.stats for result in results]
    accepted = sum(s.accepted for s in stats)
    return accepted / sum(s.drafted for s in stats), 1 + accepted / sum(s.cycles for s in stats)


def test_w4a16_equals_the_recorded_greedy_tokens_of_transformers(plain):
    assert token_ids(plain) == recorded_tokens()[:NUM_PLAIN]


# Reading the file with transformers takes half a minute. What they compute is compared with a tiny model of each family
# every time (tests/model/test_decoder.py), and with this file where somebody records its tokens anew.
@pytest.mark.skipif(not THOROUGH, reason="takes half a minute; QSPEC_JAX_THOROUGH=1 runs it")
def test_recorded_tokens_are_those_of_the_installed_transformers(demo_gguf, plain):
    pytest.importorskip("torch", reason="needs torch, the oracle")
    pytest.importorskip("accelerate", reason="transformers reads GGUF with it")
    recorded = recorded_tokens()
    encoded = [result.prompt_token_ids for result in plain]
    assert make_demo.hf_choices(demo_gguf, encoded[:4], recorded[:4]) == recorded[:4]


def test_w4a8_drafts_give_the_same_tokens_and_are_mostly_accepted(model):
    acceptance, tokens_per_cycle = totals(drafted(model, "w4a8", slice(8, 17)))
    assert acceptance > 0.85
    assert tokens_per_cycle > 3.5


def test_w4a4_drafts_give_the_same_tokens_and_are_often_accepted(model):
    acceptance, tokens_per_cycle = totals(drafted(model, "w4a4", slice(16, 24)))
    assert acceptance > 0.72
    assert tokens_per_cycle > 3.15


def test_even_drafts_that_are_rarely_right_change_nothing(model):
    """They see four tokens."""
    plan = DecodingPlan(Precision.W4A16, View(activation_bits=4, cache_window=4), 2)
    results, _ = served(model, plan, make_demo.prompts()[:ROWS], 8)
    assert token_ids(results) == [ids[:8] for ids in recorded_tokens()[:ROWS]]
    assert totals(results)[0] < 0.4


def test_streamed_pieces_join_to_the_text(model, plain):
    *chunks, result = model.stream(make_demo.prompts()[0], draft="w4a8", max_new_tokens=NUM_TOKENS)
    assert len(chunks) > 5
    assert "".join(chunks) == result.text == plain[0].text
    assert result.token_ids == plain[0].token_ids


def test_generation_stops_at_the_end_of_a_turn(model):
    result = model.generate("Say only: yes", draft="w4a8", max_new_tokens=NUM_TOKENS)[0]
    assert result.finish_reason == "stop"
    assert result.token_ids[-1] in model.stop_tokens
    assert "<|im_end|>" not in result.text


def test_a_system_prompt_is_read_once_for_all_conversations(model):
    system = {"role": "system", "content": "You are a sailor, and answer as if you stood at the helm. " * 3}
    questions = [" ".join(make_demo.prompts()[index : index + 3]) for index in range(3)]
    conversations = [[system, {"role": "user", "content": question}] for question in questions]

    def answered(some):
        results, run = served(model, model.plan("w4a16"), some, 4)
        return token_ids(results), run.reused_prompt_tokens

    alone = [answered([one]) for one in conversations]
    shared = model.intake.request(conversations[0]).prefix_length
    assert shared > 50
    assert answered(conversations) == ([ids for (ids,), _ in alone], 2 * shared)
    assert {reused for _, reused in alone} == {0}


def test_a_stop_string_ends_generated_and_streamed_text_alike(model, plain):
    text = plain[0].text
    stop = text[20:23]
    expected = text[: text.index(stop)]
    options = {"draft": "w4a8", "max_new_tokens": NUM_TOKENS, "sampling": SamplingParams(stop=(stop,))}
    result = model.generate(make_demo.prompts()[:1], **options)[0]
    *chunks, streamed = model.stream(make_demo.prompts()[0], **options)
    assert result.text == streamed.text == "".join(chunks) == expected
    assert result.token_ids == streamed.token_ids == plain[0].token_ids[: len(result.token_ids)]
    assert result.finish_reason == "stop"
