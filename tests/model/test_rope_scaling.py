"""Rotary embedding as ``config.json`` describes it: read, ranked and computed as by transformers."""

import copy
import importlib

import jax.numpy as jnp
import numpy as np
import pytest

from qspec_jax.errors import UnsupportedModelError
from qspec_jax.model import rope
from qspec_jax.model.config import ModelConfig
from tests.model.test_config import BASE, LLAMA3, read

transformers = pytest.importorskip("transformers")

LINEAR = {"rope_type": "linear", "factor": 2.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
RANKED = [
    {"rope_theta": 5e5},
    {"rope_theta": 1e4, "rope_parameters": {"rope_theta": 1e6, "rope_type": "default"}},
    {"rope_theta": 1e4, "rope_parameters": {"rope_theta": 1e6}},
    {"rope_theta": 5e5, "rope_parameters": {"rope_type": "default"}},
    {"rope_theta": 5e5, "rope_scaling": LINEAR | {"rope_theta": 1e6}},
    {"rope_parameters": LLAMA3 | {"rope_theta": 5e5}, "rope_scaling": LINEAR},
    {"rope_parameters": {"rope_theta": 5e5}, "rope_scaling": LINEAR},
    {"rope_parameters": LLAMA3, "rope_scaling": {}, "rope_theta": 5e5},
    {"rope_parameters": LLAMA3, "rope_scaling": None},
    {"rope_scaling": {"type": "linear", "rope_type": "yarn", **YARN}},
    {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_theta": 5e5},
    {"rope_scaling": {k: v for k, v in LLAMA3.items() if k[0] != "o"}, "max_position_embeddings": 64},
    {"rope_scaling": LLAMA3, "original_max_position_embeddings": 16, "max_position_embeddings": 64},
    {"rope_scaling": YARN, "original_max_position_embeddings": 64},
    {"rope_scaling": {"type": "yarn", "factor": 4}, "max_position_embeddings": 64},
    {"rope_scaling": YARN | {"factor": None}, "max_position_embeddings": 512},
    *(
        {"rope_scaling": YARN | more, "rope_theta": 1e6, "head_dim": 64}
        for more in (
            {},
            {"truncate": False},
            {"attention_factor": 1.5},
            {"mscale": 0.7, "mscale_all_dim": 1.2},
            {"mscale": 0.7},
            {"beta_fast": 8, "beta_slow": 0.5},
            {"beta_fast": None, "beta_slow": None},
            {"original_max_position_embeddings": 32768, "factor": 4.0},
            {"original_max_position_embeddings": 2, "factor": 1.0},
        )
    ),
]


def theirs(architecture: str, changes: dict):
    """The config class of transformers, of a copy: it writes into dictionaries."""
    config_class = getattr(transformers, f"{architecture}Config")
    return config_class(**copy.deepcopy(BASE | {"max_position_embeddings": 2048} | changes))


@pytest.mark.parametrize("architecture", ["Llama", "Mistral", "Qwen2", "Qwen3"])
@pytest.mark.parametrize("changes", RANKED)
def test_places_are_ranked_as_by_transformers(architecture, changes):
    expected = theirs(architecture, changes).rope_parameters
    config = read(architectures=[f"{architecture}ForCausalLM"], **changes)
    assert config.rope_theta == expected["rope_theta"]
    assert (config.rope_scaling.kind if config.rope_scaling else "default") == expected["rope_type"]


@pytest.mark.parametrize("architecture", ["Llama", "Qwen3"])
@pytest.mark.parametrize("changes", RANKED)
def test_rotations_are_those_of_transformers(architecture, changes):
    torch = pytest.importorskip("torch")
    name = architecture.lower()
    modeling = importlib.import_module(f"transformers.models.{name}.modeling_{name}")
    embedding = getattr(modeling, f"{architecture}RotaryEmbedding")(theirs(architecture, changes))
    positions = np.array([[0, 1, 31, 500, 30000]], np.int32)
    expected = [half.numpy() for half in embedding(torch.zeros(1, 1), torch.from_numpy(positions))]
    config = ModelConfig.from_hf(BASE | {"architectures": [f"{architecture}ForCausalLM"]} | changes)
    for ours, both_halves in zip(rope.rotation(jnp.asarray(positions), config), expected, strict=True):
        # The last digit of a frequency is that of the angle, 30000 times over.
        np.testing.assert_allclose(ours, both_halves[..., : config.head_dim // 2], atol=5e-3)
        np.testing.assert_allclose(ours[:, :4], both_halves[:, :4, : config.head_dim // 2], atol=1e-4)


def test_a_model_stretched_by_yarn_takes_longer_texts():
    scaling = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
    assert read(max_position_embeddings=32768, rope_scaling=scaling).max_position_embeddings == 131072
    assert read(max_position_embeddings=262144, rope_scaling=scaling).max_position_embeddings == 262144


@pytest.mark.parametrize("kind", ["dynamic", "longrope", "su", "mrope", "proportional", ["yarn"], 7])
def test_other_kinds_are_refused_by_name(kind):
    with pytest.raises(UnsupportedModelError, match=r"is not supported; supported: linear, llama3, yarn"):
        read(rope_scaling={"rope_type": kind, "factor": 2.0})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rope_scaling": "yarn"}, "rope_scaling='yarn' is neither an object nor null"),
        ({"rope_scaling": LINEAR | {"factor": 0}}, r"'linear': factor=0\.0 must be positive"),
        ({"rope_scaling": LINEAR | {"factor": "2"}}, "factor='2' is not a finite number"),
        ({"rope_scaling": YARN | {"beta_fast": -1}}, "beta_fast=-1.0 must be positive"),
        ({"rope_scaling": YARN | {"attention_factor": 0.0}}, "attention_factor=0.0 must be positive"),
        ({"rope_scaling": LLAMA3 | {"low_freq_factor": 4.0}}, "low_freq_factor and high_freq_factor are equal"),
        ({"rope_scaling": YARN | {"truncate": "false"}}, "truncate='false' is neither true nor false"),
        ({"rope_theta": float("nan")}, "rope_theta=nan is not a finite number"),
        ({"rope_theta": 10**400}, "rope_theta=a number of 1329 bits is not a finite number"),
        ({"rope_theta": 0}, r"rope_theta=0\.0 must be greater than 1"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "settings of their own for full_attention"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}, "partial_rotary_factor": 1.0}, "factor=0.5"),
    ],
)
def test_what_cannot_be_computed_is_named(changes, message):
    with pytest.raises(UnsupportedModelError, match=message):
        read(**changes)


def test_the_share_of_a_head_that_turns_is_ranked_too():
    assert read(partial_rotary_factor=0.5, rope_parameters={"partial_rotary_factor": 1.0}) == read()
