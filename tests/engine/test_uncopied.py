"""What is bound to a device is neither pickled nor copied, and says what to do; what a user keeps of it is."""

from __future__ import annotations

import copy
import pickle

import pytest

from qspec_jax.decoding.sampling_params import SamplingParams
from qspec_jax.engine.answer import Answer
from qspec_jax.engine.drafts import Drafts
from qspec_jax.engine.language_model import LanguageModel
from qspec_jax.engine.pipeline import Pipeline
from qspec_jax.engine.results import GenerationResult, GenerationStats, RunTotals
from qspec_jax.engine.service import Service
from qspec_jax.engine.session import Session
from qspec_jax.model.config import ModelConfig, QuantConfig
from qspec_jax.model.decoder import abstract_decoder
from tests import tiny

STATS = GenerationStats("qspec", "w4a8", 1, (1, 2), 6, 3, 0.1, 0.5, 0.0, "cpu", "reference", choices={"w4a8 x1": 3})


@pytest.fixture(scope="module")
def shell():
    """A model of shapes."""
    config = ModelConfig.from_hf(tiny.BASE_HF_CONFIG)
    decoder = abstract_decoder(config, quantization=QuantConfig(), formats=None, scan_layers=False)
    return LanguageModel(decoder, None, quantization=QuantConfig(), kernels="reference", name="tiny")


@pytest.mark.parametrize("attempt", [pickle.dumps, copy.copy, copy.deepcopy])
def test_what_holds_a_device_says_what_to_do_instead(shell, attempt):
    with pytest.raises(TypeError, match=r"LanguageModel cannot be .*; qspec_jax\.save.* qspec_jax\.load"):
        attempt(shell)
    for one in (shell.pipeline(batch_size=1), shell.session(), shell.service(batch_size=1)):
        with pytest.raises(TypeError, match=f"{type(one).__name__} cannot be pickled or copied, .*from the model"):
            attempt(one)


def test_all_that_is_made_for_requests_is_bound_to_its_device():
    bound = (LanguageModel, Pipeline, Session, Service, Answer)
    assert len({kind.__reduce_ex__ for kind in bound}) == 1


def test_what_a_user_keeps_goes_through_pickle_and_copy(shell):
    result = GenerationResult(
        "a", [1], "b", [2], "stop", STATS, top_logprobs=[{2: -0.5}], drafts=Drafts.of([2], [], None)
    )
    plans = [shell.plan(), shell.plan("auto"), shell.plan("lookup-qspec"), shell.plan(draft_context=512)]
    for one in (result, *plans, SamplingParams(stop="x", logit_bias={3: 1.0}), RunTotals(2), shell.config):
        assert pickle.loads(pickle.dumps(one)) == copy.deepcopy(one) == copy.copy(one) == one
