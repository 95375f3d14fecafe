"""The cycle inside a JAX program of one's own, and what a cost model reads."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax
from jax.sharding import PartitionSpec

import qspec_jax
from qspec_jax import SamplingParams
from qspec_jax.engine.results import acceptance_by_position
from qspec_jax.errors import UsageError
from tests import tiny

PROMPTS = [[5, 6, 7], [8, 9]]


@pytest.fixture(scope="module")
def model():
    return tiny.language_model()


def own_program(model, plan, **options):
    """Tokens of :data:`PROMPTS`, by one program with the cycle in a loop of its own."""
    graph, weights = nnx.split(model.decoder_for(plan))

    @jax.jit
    def program(weights, tokens, num_tokens):
        decoder = nnx.merge(graph, weights)
        state = qspec_jax.begin_decoding(decoder, tokens, num_tokens, plan=plan, **options)
        return lax.while_loop(
            lambda state: ~state.finished.all(), lambda state: qspec_jax.cycle(decoder, state, plan=plan), state
        )

    width = max(map(len, PROMPTS))
    tokens = jnp.asarray([prompt + [0] * (width - len(prompt)) for prompt in PROMPTS], jnp.int32)
    return program(weights, tokens, jnp.asarray([len(prompt) for prompt in PROMPTS], jnp.int32))


@pytest.mark.parametrize("mode", ["qspec", "lookup"])
def test_a_program_of_ones_own_yields_the_tokens_of_the_engine(model, mode):
    sampling = [SamplingParams(stop_token_ids=(7,)), SamplingParams(temperature=1.2, seed=3, presence_penalty=0.5)]
    plan = model.plan(mode, draft="w4a8")
    options = {"max_new_tokens": 10, "stop_tokens": (33,)}
    state = own_program(model, plan, sampling=sampling, keep_drafts=True, **options)
    asked = [dataclasses.replace(one, stop_token_ids=(*one.stop_token_ids, 33)) for one in sampling]
    expected = model.generate(PROMPTS, mode=mode, draft="w4a8", max_new_tokens=10, sampling=asked)
    found = [row[:count].tolist() for row, count in zip(np.asarray(state.tokens), state.num_tokens, strict=True)]
    assert found == [result.token_ids for result in expected]
    assert (np.asarray(state.record.accepted) >= 0).sum() == sum(result.stats.cycles for result in expected)


def test_sampling_and_stop_tokens_are_what_generate_takes(model):
    """The same of all rows, whose seeds count up, or mappings; and tokens of any dtype."""
    plan, stop_tokens = model.plan("w4a16"), jnp.asarray([33, 7])
    tokens, num_tokens = np.asarray([[5, 6, 7], [5, 6, 300]]), np.asarray([3, 2], np.uint8)
    for sampling in ({"temperature": 1.2, "seed": 3}, [{"temperature": 1.2, "seed": 3}, SamplingParams(1.2, seed=4)]):
        options = {"max_new_tokens": 2, "stop_tokens": stop_tokens, "sampling": sampling}
        state = qspec_jax.begin_decoding(model.decoder_for(plan), tokens, num_tokens, plan=plan, **options)
        assert state.sampler.seed.tolist() == [3, 4]
        assert state.stop_tokens[:, :3].tolist() == [[33, 7, -1]] * 2
        assert state.last_token.dtype == state.cache.lengths.dtype == jnp.int32


def test_64_bits_of_jax_change_no_token(model):
    plan = model.plan(draft="w4a8")
    options = {"max_new_tokens": 6, "sampling": {"temperature": 0.9, "seed": 3, "top_k": 8, "presence_penalty": 0.5}}
    expected = own_program(model, plan, **options)
    with jax.enable_x64(True):
        state = own_program(model, plan, **options)
    np.testing.assert_array_equal(state.tokens, expected.tokens)
    assert jax.tree.map(lambda a: a.dtype, state) == jax.tree.map(lambda a: a.dtype, expected)


def test_a_sequence_that_ignores_the_models_stop_tokens_ends_with_its_own(model):
    sampling = [SamplingParams(stop_token_ids=(7,)), SamplingParams(ignore_eos=True, stop_token_ids=(7,))]
    tokens, num_tokens = jnp.asarray([[5, 6], [7, 8]], jnp.int32), jnp.asarray([2, 2], jnp.int32)
    options = {"max_new_tokens": 4, "stop_tokens": (33,), "sampling": sampling}
    plan = model.plan("w4a16")
    state = qspec_jax.begin_decoding(model.decoder_for(plan), tokens, num_tokens, plan=plan, **options)
    assert [[token for token in row if token >= 0] for row in state.stop_tokens.tolist()] == [[33, 7], [7]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
        ({"max_new_tokens": 4, "sampling": [SamplingParams()]}, "1 sampling parameters for 2 prompts"),
        ({"max_new_tokens": 4, "stop_tokens": range(17)}, "use up to 16"),
        ({"max_new_tokens": 4, "stop_tokens": 3}, "stop_tokens=3: use a list of token ids"),
        ({"max_new_tokens": 4, "stop_tokens": (2**40,)}, "stop_tokens=1099511627776: use token ids"),
        ({"max_new_tokens": 4, "sampling": 3}, "sampling=3: use SamplingParams or a mapping"),
        ({"max_new_tokens": 4, "sampling": [None, {"heat": 1}]}, "'heat' is no sampling parameter"),
        ({"max_new_tokens": 4, "sampling": {"logit_bias": {96: 1}}}, r"logit_bias has token 96; use 0\.\.95"),
        ({"max_new_tokens": 256}, "a prompt of 1 tokens and max_new_tokens=256 do not fit the model's context of 256"),
        ({"max_new_tokens": 4, "keep_drafts": 2}, "keep_drafts=2"),
        ({"max_new_tokens": 4, "plan": {"mode": "auto"}}, "chooses from several plans"),
        ({"max_new_tokens": 4, "plan": {"draft_context": 112}}, r"use plan.in_cache\(7\)"),
    ],
)
def test_what_makes_no_sense_is_refused(model, options, message):
    plan = model.plan(draft="w4a8", **options.pop("plan", {}))
    with pytest.raises(UsageError, match=message):
        own_program(model, plan, **options)


@pytest.mark.parametrize(
    ("tokens", "num_tokens", "message"),
    [
        ([[5, 6]], jnp.asarray([2]), r"tokens=\[\[5, 6\]\]: use an array of whole numbers, \[B, T\] int32"),
        (jnp.asarray([5, 6]), jnp.asarray([2]), r"tokens is int32\[2\]; use \[B, T\] int32"),
        (jnp.asarray([[5.0, 6.0]]), jnp.asarray([2]), r"tokens is float32\[1, 2\]"),
        (jnp.zeros((0, 4), jnp.int32), jnp.zeros(0, jnp.int32), "with at least one token"),
        (jnp.asarray([[5, 6]]), jnp.asarray([2, 2]), "num_tokens is of 2 prompts and tokens of 1; give one for each"),
        (jnp.asarray([[5, 6]]), jnp.asarray([3]), r"num_tokens=\[3\]: each prompt has between 1 and 2 tokens here"),
        (jnp.asarray([[5, 6]]), jnp.asarray([0]), r"num_tokens=\[0\]: each prompt has between 1 and 2 tokens here"),
        (jnp.asarray([[5, 96]]), jnp.asarray([2]), r"tokens has a token id outside 0\.\.95"),
        (np.asarray([[5, -1]]), np.asarray([2]), r"tokens has a token id outside 0\.\.95"),
        (np.ones((1, 253), int), np.asarray([253]), "a prompt of 253 tokens and max_new_tokens=4 do not fit the model"),
    ],
    ids=str,
)
def test_what_are_no_prompts_is_refused(model, tokens, num_tokens, message):
    with pytest.raises(UsageError, match=message):
        qspec_jax.begin_decoding(model.decoder, tokens, num_tokens, plan=model.plan("w4a16"), max_new_tokens=4)


def test_what_is_no_decoder_and_no_state_is_refused(model):
    plan, prompt = model.plan("w4a16"), (np.asarray([[5, 6]]), np.asarray([2]))
    with pytest.raises(UsageError, match=r"decoder=LanguageModel.*: use that of LanguageModel\.decoder_for"):
        qspec_jax.begin_decoding(model, *prompt, plan=plan, max_new_tokens=4)
    with pytest.raises(UsageError, match="state=None: use what begin_decoding or cycle returned"):
        qspec_jax.cycle(model.decoder, None, plan=plan)
    with pytest.raises(UsageError, match=r"decoder=None: use that of"):
        qspec_jax.cycle(None, None, plan=plan)


def test_what_a_program_knows_only_when_it_runs_is_said_to_be_so(model):
    """As a number, as one of the options, and where the whole engine is called within a program."""
    plan, prompt = model.plan("w4a16"), (np.asarray([[5, 6]]), np.asarray([2]))
    begin = lambda **options: qspec_jax.begin_decoding(model.decoder, *prompt, plan=plan, **options)  # noqa: E731
    within = r"known while a program is traced \(make it static, or call this outside of jit\)"
    with pytest.raises(UsageError, match=f"max_new_tokens=.*{within}"):
        jax.jit(lambda count: begin(max_new_tokens=count))(4)
    with pytest.raises(UsageError, match=f"seed=.*{within}"):
        jax.jit(lambda seed: begin(max_new_tokens=4, sampling={"seed": seed}))(4)
    with pytest.raises(UsageError, match=f"prompt 1 is .*{within}"):
        jax.jit(lambda tokens: model.generate([tokens]))(jnp.ones(3, jnp.int32))
    with pytest.raises(UsageError, match=r"use a whole number$"):
        begin(max_new_tokens=4.0)


def test_a_shard_map_that_checks_what_varies_is_told_not_to(model):
    plan, mesh = model.plan("w4a16"), jax.sharding.Mesh(jax.devices()[:1], ("rows",))
    graph, weights = nnx.split(model.decoder_for(plan))

    def first_tokens(weights, tokens, num_tokens):
        decoder = nnx.merge(graph, weights)
        return qspec_jax.begin_decoding(decoder, tokens, num_tokens, plan=plan, max_new_tokens=4).tokens

    def logits(weights, tokens, num_tokens):
        decoder = nnx.merge(graph, weights)
        return decoder(tokens, decoder.create_cache(batch=1, capacity=8), precision=plan.verify)[0]

    specs = (PartitionSpec(), PartitionSpec("rows"), PartitionSpec("rows"))
    given = weights, jnp.asarray([[5, 6]]), jnp.asarray([2])
    for program in (first_tokens, logits):
        over = functools.partial(jax.shard_map, program, mesh=mesh, in_specs=specs, out_specs=PartitionSpec("rows"))
        with pytest.raises(UsageError, match=r"tokens vary over rows .*use jax\.shard_map with check_vma=False"):
            jax.eval_shape(over(), *given)
        assert jax.eval_shape(over(check_vma=False), *given).shape[0] == 1


def test_what_is_no_plan_is_refused(model):
    with pytest.raises(UsageError, match=r"plan='qspec': use what LanguageModel\.plan returns"):
        qspec_jax.begin_decoding(
            model.decoder, jnp.ones((1, 2), jnp.int32), jnp.ones(1, jnp.int32), plan="qspec", max_new_tokens=4
        )


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        ({"mode": "auto"}, "chooses from several plans"),
        ({"draft": "w4a8", "draft_length": 5}, "the state keeps 2 drafts of a cycle, and the plan has 5"),
    ],
)
def test_a_cycle_of_a_plan_that_does_not_fit_its_state_is_refused(model, plan, message):
    begun = model.plan(draft="w4a8", draft_length=2)
    tokens, options = np.asarray([[5, 6]]), {"plan": begun, "max_new_tokens": 4, "keep_drafts": True}
    begin = lambda: qspec_jax.begin_decoding(model.decoder, tokens, np.asarray([2]), **options)  # noqa: E731
    state = jax.eval_shape(begin)
    with pytest.raises(UsageError, match=message):
        jax.eval_shape(lambda state: qspec_jax.cycle(model.decoder, state, plan=model.plan(**plan)), state)


def test_bytes_of_a_cycle_and_acceptance_by_position(model):
    plain, drafting = model.plan("w4a16"), model.plan(draft="w4a8", draft_length=3)
    short, long = (model.cycle_bytes(plain, context=context) for context in (1, 101))
    position = 2 * model.config.num_layers * model.config.num_kv_heads * model.config.head_dim * 4
    assert long - short == 100 * position
    assert model.cycle_bytes(drafting, context=101) == 4 * long
    for wrong in ({"plan": model.plan("auto"), "context": 1}, {"plan": plain, "context": 0}, {"plan": 3, "context": 1}):
        with pytest.raises(UsageError):
            model.cycle_bytes(wrong["plan"], context=wrong["context"])
    assert acceptance_by_position([1, 0, 1, 2]) == (0.75, 0.75, 0.5)
    assert acceptance_by_position([4]) == acceptance_by_position([]) == acceptance_by_position([0, 0]) == ()
    batch = model.run([model.attempt([5, 6], drafting, max_new_tokens=8)], drafting)
    (result,) = batch.collect()
    assert result.stats.acceptance_by_position == batch.totals.acceptance_by_position
    assert sum(result.stats.acceptance_by_position) == pytest.approx(result.stats.tokens_per_cycle - 1)


def test_public_names_of_the_cost_model_agree():
    assert qspec_jax.expected_tokens(0.5, 2) == 1.75
    assert qspec_jax.acceptance_for(1.75, 2) == pytest.approx(0.5)
    weight = qspec_jax.quantize_rtn(jnp.ones((8, 64), jnp.float32), group_size=32)
    assert (weight.num_outputs, weight.num_inputs) == (8, 64)
