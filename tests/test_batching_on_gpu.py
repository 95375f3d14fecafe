"""On a GPU, in bfloat16 and at a real model's shapes: what a request yields does not depend on what runs beside it."""

from __future__ import annotations

import jax
import pytest

import qspec_jax
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


def served(model, prompts, *, rows, mode="qspec", sampling=None):
    batch = model.pipeline(model.plan(mode), batch_size=rows, max_seq_len=512)
    for index, prompt in enumerate(prompts):
        batch.submit(prompt, max_new_tokens=NUM_TOKENS - index % 7, sampling=sampling)
    return [result.token_ids for result in batch.results()]


@pytest.mark.parametrize("mode", ["w4a16", "qspec"])
@pytest.mark.parametrize("sampling", [None, {"temperature": 0.8, "top_p": 0.9, "seed": 3}], ids=["greedy", "seeded"])
def test_a_request_yields_the_same_alone_and_in_any_batch(model, mode, sampling):
    prompts = make_demo.prompts()
    alone = served(model, prompts, rows=1, mode=mode, sampling=sampling)
    for rows in (3, 8):
        assert served(model, prompts, rows=rows, mode=mode, sampling=sampling) == alone


def test_nothing_is_compiled_once_a_batch_runs(model):
    prompts = make_demo.prompts()
    served(model, prompts[:8], rows=8)
    before = model.num_compilations
    served(model, prompts, rows=8)
    assert model.num_compilations == before
