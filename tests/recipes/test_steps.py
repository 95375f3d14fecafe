"""A recipe is its steps: what they say of their result beforehand is what comes out."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from qspec_jax.errors import UsageError
from qspec_jax.model.config import ModelConfig
from qspec_jax.model.parameters import expected_parameters
from qspec_jax.recipes.catalogue import RECIPES
from qspec_jax.recipes.layerwise import Calibration
from qspec_jax.recipes.steps import Progress, RecipeContext, RecipeOptions
from qspec_jax.recipes.work_folder import WorkFolder
from tests import tiny

TOKENS = np.random.default_rng(0).integers(0, 40, (2, 16)).astype(np.int32)


@pytest.fixture
def context(tmp_path):
    text = Calibration(TOKENS, WorkFolder(tmp_path / "out", "key"))
    return RecipeContext(RecipeOptions(), Progress(), text)


@pytest.mark.parametrize("name", [name for name in RECIPES if name != "keep"])  # which floats have nothing for
def test_configs_are_those_of_what_the_steps_make(name, context):
    source = tiny.source(ModelConfig.from_hf(tiny.hf_config("smollm2_tied")))
    made = RECIPES[name].apply(source, context)
    assert made.config == RECIPES[name].config(source.config)
    assert made.specs == expected_parameters(made.config)
    assert made.entries.keys() == made.specs.keys()
    rounded = {made.entries[name].codes is not None for name, spec in made.specs.items() if spec.kind == "linear"}
    assert rounded == {"rtn" not in name}


def test_only_steps_that_need_text_make_a_recipe_need_it():
    assert {name for name, recipe in RECIPES.items() if recipe.needs_text} == {"gptq", "quarot-gptq", "atom", "resq"}


@pytest.mark.parametrize("name", ["quarot-rtn", "quarot-gptq", "atom", "resq"])
def test_a_rotated_model_is_refused_before_anything_runs(name):
    config = ModelConfig.from_hf(tiny.hf_config("llama2"))
    with pytest.raises(UsageError, match="rotated already; use a recipe that does not rotate"):
        RECIPES[name].config(dataclasses.replace(config, down_hadamard=True))
