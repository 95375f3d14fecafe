"""A model verifies with what it was loaded for, wherever nobody says otherwise."""

from __future__ import annotations

import jax.numpy as jnp
import pytest

import qspec_jax
from qspec_jax import DecodingPlan, LanguageModel, QuantConfig, UsageError, View
from qspec_jax.decoding.plan import LOOKUP_MODES, plan_of
from qspec_jax.engine import language_model
from qspec_jax.model.config import ModelConfig
from tests import tiny

NESTED = QuantConfig(group_size=32, symmetric=True, bits=8)
CODES, EIGHT = View(), View(weight_bits=8)


class ReachedError(Exception):
    """What would run was made, with a plan."""


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    path = tmp_path_factory.mktemp("nested") / "model"
    qspec_jax.save(tiny.language_model(quantization=NESTED), path)
    return path


@pytest.fixture(scope="module")
def model(saved):
    return qspec_jax.load(saved, verify="w4a16", kernels="reference", dtype="float32")


WAYS_IN = {
    "plan": lambda model, **options: model.plan(**options),
    "generate": lambda model, **options: model.generate([[1, 2, 3]], **options),
    "stream": lambda model, **options: list(model.stream([1, 2, 3], **options)),
}
WITHOUT_OPTIONS = {
    "pipeline": lambda model: model.pipeline(),
    "session": lambda model: model.session(),
    "service": lambda model: model.service(),
}


@pytest.fixture
def target(monkeypatch):
    """The target of what a way into a model would run; nothing is run."""

    def reach(*arguments, **_):
        raise ReachedError(next(one for one in arguments if isinstance(one, language_model.Plan)))

    for name in ("Pipeline", "Session", "Service", "Scheduler"):
        monkeypatch.setattr(language_model, name, reach)

    def enter(way, *arguments, **options):
        try:
            return way(*arguments, **options).verify
        except ReachedError as reached:
            return reached.args[0].verify

    return enter


@pytest.mark.parametrize("way", [*WAYS_IN, *WITHOUT_OPTIONS])
def test_every_way_in_verifies_with_what_the_model_was_loaded_for(way, model, target):
    assert target((WAYS_IN | WITHOUT_OPTIONS)[way], model) == CODES


@pytest.mark.parametrize("way", WAYS_IN)
def test_a_call_says_otherwise(way, model, target):
    assert target(WAYS_IN[way], model, verify="w8a16") == EIGHT
    assert target(WAYS_IN[way], model, mode="w8a16") == EIGHT
    assert target(WAYS_IN[way], model, mode="w4a8") == View(activation_bits=8)


@pytest.mark.parametrize(
    ("view", "message"),
    [
        (EIGHT, "view w8a16 reads 8-bit weights, which this model has not; load it with verify='w8a16'"),
        (View(head_bits=4), "reads an LM head of 4 bits, which this model has not; load it with QuantConfig"),
    ],
)
def test_a_plan_of_weights_that_a_model_has_not_is_refused(view, message, target):
    """As a call that asks for them: it ran on those that are there, by the name of the others."""
    model = tiny.language_model()
    plan = DecodingPlan(view)
    ways = {name: getattr(model, name) for name in (*WITHOUT_OPTIONS, "decoder_for")}
    ways |= {"run": lambda plan: model.run([], plan), "cycle_bytes": lambda plan: model.cycle_bytes(plan, context=1)}
    cache = model.decoder.create_cache(batch=1, capacity=2)
    ways["decoder"] = lambda plan: model.decoder(jnp.zeros((1, 1), jnp.int32), cache, precision=plan.verify)
    for way in ways.values():
        with pytest.raises(UsageError, match=message):
            target(way, plan)


def test_a_plan_says_otherwise(model, target):
    plan = DecodingPlan(EIGHT, CODES, 2)
    for name in WITHOUT_OPTIONS:
        assert target(getattr(model, name), plan) == EIGHT
    assert target(model.run, [], plan) == EIGHT


def test_the_harness_takes_a_model_with_its_target_and_asks_for_another(model):
    pytest.importorskip("lm_eval")
    from qspec_jax.evaluation.harness_model import HarnessModel

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("qspec_jax.evaluation.harness_model.scores_function", lambda model, view: view)
        patch.setattr(model, "tokenizer", "some")
        assert HarnessModel(model, mode="qspec")._scores == CODES
        assert HarnessModel(model, mode="qspec", verify="w8a16")._scores == EIGHT


@pytest.mark.parametrize("asked", [{}, {"verify": "w8a16"}, {"mesh": "data=1"}])
def test_without_a_word_all_bits_verify(saved, asked):
    loaded = qspec_jax.load(saved, kernels="reference", dtype="float32", **asked)
    assert loaded.plan().verify == EIGHT
    assert loaded.verify == asked.get("verify", "auto")


def test_a_mesh_and_a_model_of_shapes_know_it_too(saved):
    seen = []
    options = {"mesh": "data=1", "kernels": "reference", "dtype": "float32", "verify": "w4a16"}
    loaded = qspec_jax.load(saved, **options, compile_ahead=lambda shell: seen.append(shell.plan().verify))
    assert [loaded.plan().verify, *seen] == [CODES, CODES]


@pytest.mark.parametrize("mode", ["qspec", *LOOKUP_MODES, "auto"])
def test_modes_that_draft_take_the_usual_target_and_plain_ones_their_own(mode):
    assert plan_of(mode, usual="w4a16", held=(8, 4)).verify == CODES
    assert plan_of(mode, usual="w4a16", verify="w8a16", held=(8, 4)).verify == EIGHT
    assert plan_of(mode, usual="w4a16", held=(4, None)).verify == CODES
    assert plan_of("w8a16", usual="w4a16", held=(8, 4)).verify == EIGHT


def test_a_target_that_is_none_is_refused():
    whole = tiny.language_model()
    with pytest.raises(UsageError, match="verify='w4a8' is unknown"):
        LanguageModel(whole.decoder, None, quantization=QuantConfig(), kernels="reference", verify="w4a8")


def test_a_draft_whose_groups_of_activations_do_not_fit_the_model_is_refused():
    config = ModelConfig.from_hf({**tiny.BASE_HF_CONFIG, "head_dim": 20})
    model = tiny.language_model(config, quantization=QuantConfig(group_size=None))
    assert model.plan(draft="w4a8")
    with pytest.raises(UsageError, match=r"view w4a4 quantises .* groups of 32, .* the 80 inputs of attention\.output"):
        model.generate([[5, 6]], draft="w4a4", max_new_tokens=1)
