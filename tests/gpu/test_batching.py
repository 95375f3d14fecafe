"""On a GPU, in bfloat16 and at a real model's shapes: what a request yields does not depend on what runs beside it."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qspec_jax
from qspec_jax.decoding.chunks import Shape
from qspec_jax.engine.scheduler import Scheduler
from tests.golden import make_demo

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.demo,
    pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs an NVIDIA GPU"),
]
NUM_TOKENS = 48


@pytest.fixture(scope="module")
def model(demo_gguf):
    return qspec_jax.load(demo_gguf, dtype="bfloat16")


def served(model, prompts, *, rows, mode="qspec", sampling=None, slots=512, first=0):
    batch = model.pipeline(model.plan(mode), batch_size=rows, max_seq_len=slots)
    for index, prompt in enumerate(prompts, first):
        batch.submit(prompt, max_new_tokens=NUM_TOKENS - index % 7, sampling=sampling)
    return [result.token_ids for result in batch.results()]


@pytest.mark.parametrize("mode", ["w4a16", "qspec"])
@pytest.mark.parametrize("sampling", [None, {"temperature": 0.8, "top_p": 0.9, "seed": 3}], ids=["greedy", "seeded"])
def test_a_request_yields_the_same_alone_and_in_any_batch(model, mode, sampling):
    prompts = make_demo.prompts()
    alone = served(model, prompts, rows=1, mode=mode, sampling=sampling)
    for rows in (3, 8):
        assert served(model, prompts, rows=rows, mode=mode, sampling=sampling) == alone


@pytest.mark.parametrize("sampling", [None, {"temperature": 0.8, "top_p": 0.9, "seed": 3}], ids=["greedy", "seeded"])
def test_floats_verify_to_the_tokens_of_plain_decoding_with_them_in_any_batch(demo_gguf, sampling):
    model = qspec_jax.load(demo_gguf, dtype="bfloat16", verify="float")
    prompts = make_demo.prompts()
    plain = served(model, prompts, rows=1, mode="float", sampling=sampling)
    for rows in (1, 3, 8):
        assert served(model, prompts, rows=rows, sampling=sampling) == plain
    assert served(model, prompts, rows=8, mode="float", sampling=sampling) == plain


def test_nothing_is_compiled_once_a_batch_runs(model):
    prompts = make_demo.prompts()
    served(model, prompts[:8], rows=8)
    before = model.num_compilations
    served(model, prompts, rows=8)
    assert model.num_compilations == before


def conversations(repeats):
    """Behind a system prompt of about 14 tokens times ``repeats``."""
    system = {"role": "system", "content": "You are a sailor, and answer as if you stood at the helm. " * repeats}
    return [[system, {"role": "user", "content": prompt}] for prompt in make_demo.prompts()]


@pytest.mark.parametrize("mode", ["w4a16", "qspec", "lookup-qspec"])
@pytest.mark.parametrize("sampling", [None, {"temperature": 0.8, "repetition_penalty": 1.2, "seed": 3}])
def test_a_shared_system_prompt_changes_no_token(model, mode, sampling):
    prompts = [prompt for pair in zip(conversations(10), conversations(45), strict=True) for prompt in pair][:16]
    options = {"mode": mode, "sampling": sampling, "slots": 1024}
    alone = [served(model, [prompt], rows=1, first=index, **options) for index, prompt in enumerate(prompts)]
    for rows in (3, 8):
        assert served(model, prompts, rows=rows, **options) == [ids for (ids,) in alone]


@pytest.mark.parametrize("repeats", [10, 45], ids=["one_piece", "two_chunks"])
def test_a_reused_system_prompt_has_the_bits_that_its_row_would_have_computed(model, repeats):
    requests = [model.intake.request(one, max_new_tokens=16) for one in conversations(repeats)[:4]]

    def run(some):
        """What each row holds, by prompt, and how many tokens were reused."""
        scheduler = Scheduler(model.programs, model.plan("w4a16"), rows=4, capacity=1024)
        sequences = [scheduler.add(request) for request in some]
        while scheduler.busy:
            scheduler.advance()
        bits = {}
        for row, sequence in enumerate(sequences):  # a new batch gives rows in order
            end = len(sequence.request.token_ids) + len(sequence.token_ids) - 1
            layers = jax.tree.leaves(scheduler._state.cache.row(jnp.int32(row)).layers)
            bits[tuple(sequence.request.token_ids)] = [np.asarray(a)[..., :end, :, :].view(np.uint16) for a in layers]
        return bits, scheduler.totals.reused_prompt_tokens

    together, reused = run(requests)
    assert reused == 3 * requests[0].prefix_length > 300
    for request in requests:
        alone, reused = run([request])
        assert reused == 0
        key = tuple(request.token_ids)
        for one, other in zip(alone[key], together[key], strict=True):
            np.testing.assert_array_equal(one, other)


def test_filling_a_row_from_another_one_copies_that_row_alone(model):
    """What following needs besides the buffers given does not grow with the number of rows, as the cache does."""
    plan = model.plan("w4a16")
    model.programs.lay_out_weights(plan)

    def fill(rows):
        analysis = model.programs.lower_prefill(plan, Shape(rows, capacity=1024), 32).compile().memory_analysis()
        return analysis.temp_size_in_bytes, analysis.alias_size_in_bytes

    (few, smaller_cache), (many, larger_cache) = fill(4), fill(32)
    assert many - few < (larger_cache - smaller_cache) / 28
