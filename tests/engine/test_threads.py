"""Several threads with one model, or with one pipeline: each gets what it would get alone."""

from __future__ import annotations

import itertools
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from qspec_jax import QuantConfig
from qspec_jax.decoding.program_store import passed_over
from qspec_jax.model.config import ActivationQuantization
from tests import tiny

PROMPTS = [[5, 6, 7], [30, 31], [60] * 9]
OPTIONS = {"max_new_tokens": 12, "max_seq_len": 64, "batch_size": 2, "draft_length": 2}
# Its activations have zero points: the first plan that drafts with them adds sums to the weights.
QUANTIZATION = QuantConfig(w4a8=ActivationQuantization(symmetric=False))


@pytest.fixture(autouse=True)
def _switch_threads_often():
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-4)
    yield
    sys.setswitchinterval(before)


def tokens(results):
    return [result.token_ids for result in results]


def test_two_threads_with_plans_of_other_drafts_get_what_each_gets_alone():
    plans = [{"mode": "w4a16"}, {"mode": "qspec", "draft": "w4a8"}]
    alone = tokens(tiny.language_model(quantization=QUANTIZATION).generate(PROMPTS, mode="w4a16", **OPTIONS))
    for delays in ((0, 0), (2, 0)):
        model, start = tiny.language_model(quantization=QUANTIZATION), threading.Barrier(2)

        def run(plan, delay, model=model, start=start):
            start.wait()
            return [tokens(model.generate(PROMPTS, **plan, **OPTIONS)) for _ in range(1 + delay)]

        with ThreadPoolExecutor(2) as pool:
            for got in pool.map(run, plans, delays):
                assert got == [alone] * len(got)
        keys = [key for key in model.programs.compiled if key[0] == "loop"]
        assert len(keys) == 2


def test_weights_that_another_thread_lays_out_meanwhile_do_no_harm():
    model = tiny.language_model(quantization=QUANTIZATION)
    alone = tokens(model.generate(PROMPTS, mode="w4a16", **OPTIONS))
    batch = model.pipeline(model.plan("w4a16"), batch_size=1, max_seq_len=64)
    for prompt in PROMPTS:
        batch.submit(prompt, max_new_tokens=12)
    got = []
    for result in batch.results():
        got.append(result.token_ids)
        if len(got) == 1:
            leaves = len(model.programs.leaves)
            model.programs.lay_out_weights(model.plan("qspec", draft="w4a8"))
            assert len(model.programs.leaves) > leaves
    assert got == alone


def test_each_program_is_compiled_once_however_many_threads_ask_for_it():
    model = tiny.language_model()
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda _: tokens(model.generate(PROMPTS, mode="w4a16", **OPTIONS)), range(4)))
    assert results == [results[0]] * 4
    assert model.num_compilations == len(model.programs)


def test_a_cache_that_several_threads_pass_over_is_used_again_afterwards():
    import jax

    jax.config.update("jax_enable_compilation_cache", True)
    first, second = passed_over(), passed_over()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert not jax.config.jax_enable_compilation_cache
    second.__exit__(None, None, None)
    assert jax.config.jax_enable_compilation_cache


def test_requests_may_be_submitted_by_one_thread_while_another_takes_results():
    model = tiny.language_model()
    batch = model.pipeline(model.plan("w4a16"), batch_size=2, max_seq_len=64)
    one = tokens(model.generate([5, 6], mode="w4a16", max_new_tokens=3, max_seq_len=64, batch_size=2))[0]
    started, count = threading.Event(), 300

    def submit():
        for index in range(count):
            batch.submit([5, 6], max_new_tokens=1 + index % 3)
            started.set()

    with ThreadPoolExecutor(1) as pool:
        submitted = pool.submit(submit)
        assert started.wait(60)
        got = []
        while not submitted.done():
            got += tokens(batch.results())
        submitted.result()
        got += tokens(batch.results())
    assert got == [one[: 1 + index % 3] for index in range(count)]


def test_two_threads_that_take_results_get_each_of_them_once():
    model = tiny.language_model()
    batch = model.pipeline(model.plan("w4a16"), batch_size=2, max_seq_len=64)
    for index in range(60):
        batch.submit([1 + index], max_new_tokens=2)
    with ThreadPoolExecutor(3) as pool:
        taken = list(pool.map(lambda _: [one.prompt_token_ids[0] for one in batch.results()], range(3)))
    assert all(one == sorted(one) for one in taken)
    assert sorted(itertools.chain(*taken)) == list(range(1, 61))
