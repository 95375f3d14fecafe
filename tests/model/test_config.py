"""The config of a checkpoint: what it says is honoured, as transformers reads it, or refused."""

import dataclasses

import numpy as np
import pytest

from qspec_jax.errors import UnsupportedModelError, UsageError
from qspec_jax.model.config import FAMILIES, ActivationQuantization, ModelConfig, QuantConfig, RopeScaling
from tests import tiny
from tests.weights import tiny_checkpoints

pytestmark = pytest.mark.newest_jax

BASE = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def read(**changes) -> ModelConfig:
    return ModelConfig.from_hf(BASE | changes)


def test_defaults_are_those_of_llama():
    config = ModelConfig.from_hf({key: value for key, value in BASE.items() if key != "num_key_value_heads"})
    assert (config.num_kv_heads, config.head_dim, config.qkv_sizes) == (4, 16, (64, 64, 64))
    assert (config.rms_norm_eps, config.rope_theta, config.rope_scaling) == (1e-6, 10000.0, None)
    assert not any((config.qkv_bias, config.output_bias, config.mlp_bias, config.qk_norm, config.tie_word_embeddings))
    assert (config.bos_token_id, config.eos_token_ids, config.sliding_window) == (None, (), None)


@pytest.mark.parametrize("architecture", ["Llama", "Mistral", "Qwen2", "Qwen3"])
@pytest.mark.parametrize(
    "changes", [{"num_key_value_heads": 4}, {"num_key_value_heads": 2, "tie_word_embeddings": True}]
)
def test_shapes_equal_those_that_transformers_understands(architecture, changes):
    transformers = pytest.importorskip("transformers")
    name = f"{architecture}ForCausalLM"
    theirs = getattr(transformers, f"{architecture}Config")(**BASE | {"architectures": [name]} | changes)
    ours = ModelConfig.from_hf(theirs.to_diff_dict() | {"architectures": [name]})
    assert ours.num_kv_heads == theirs.num_key_value_heads
    assert ours.head_dim == (getattr(theirs, "head_dim", None) or theirs.hidden_size // theirs.num_attention_heads)
    assert ours.rms_norm_eps == theirs.rms_norm_eps
    assert ours.rope_theta == theirs.rope_parameters["rope_theta"]
    assert ours.tie_word_embeddings == theirs.tie_word_embeddings
    assert ours.max_position_embeddings == theirs.max_position_embeddings
    assert ours.sliding_window == getattr(theirs, "sliding_window", None)


@pytest.mark.parametrize(
    ("changes", "biases"),
    [
        ({}, (False, False, False)),
        ({"attention_bias": True, "mlp_bias": True}, (True, True, True)),
        ({"architectures": ["Qwen2ForCausalLM"]}, (True, False, False)),
        ({"architectures": ["Qwen2ForCausalLM"], "attention_bias": True}, (True, False, False)),
        ({"architectures": ["Qwen3ForCausalLM"], "attention_bias": True}, (True, True, False)),
    ],
)
def test_biases(changes, biases):
    config = read(**changes)
    assert (config.qkv_bias, config.output_bias, config.mlp_bias) == biases


def test_qwen3_has_head_norms_and_its_own_head_size():
    config = read(architectures=["Qwen3ForCausalLM"])
    assert config.qk_norm
    assert config.head_dim == 128


def test_the_model_type_stands_in_for_a_missing_architecture():
    assert ModelConfig.from_hf({**BASE, "architectures": None, "model_type": "qwen3"}).qk_norm


def test_every_family_is_tested_against_transformers_and_in_files():
    recorded = {name for changes in tiny.FAMILIES.values() for name in changes.get("architectures", ())}
    assert recorded | {"LlamaForCausalLM"} == set(FAMILIES) == set(tiny_checkpoints.ARCHITECTURES)
    assert len({family.model_type for family in FAMILIES.values()}) == len(FAMILIES)


@pytest.mark.parametrize(("given", "expected"), [(None, ()), (3, (3,)), ([3, 4], (3, 4))])
def test_end_tokens(given, expected):
    assert read(eos_token_id=given).eos_token_ids == expected


@pytest.mark.parametrize(
    ("changes", "theta", "scaling"),
    [
        ({"rope_theta": 5e5}, 5e5, None),
        ({"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}}, 5e5, None),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, 1e4, RopeScaling("linear", 2.0)),
        ({"rope_theta": 5e5, "rope_scaling": LLAMA3}, 5e5, RopeScaling("llama3", 8.0, 1.0, 4.0, 8192)),
        ({"rope_parameters": LLAMA3 | {"rope_theta": 5e5}}, 5e5, RopeScaling("llama3", 8.0, 1.0, 4.0, 8192)),
    ],
)
def test_rotary_embedding_in_both_spellings(changes, theta, scaling):
    config = read(**changes)
    assert (config.rope_theta, config.rope_scaling) == (theta, scaling)


@pytest.mark.parametrize(
    ("changes", "window"),
    [
        ({"architectures": ["MistralForCausalLM"], "sliding_window": 32}, 32),
        ({"architectures": ["MistralForCausalLM"], "sliding_window": None}, None),
        ({"sliding_window": 32}, None),  # Llama has none
        ({"architectures": ["Qwen2ForCausalLM"], "sliding_window": 32}, None),
        ({"sliding_window": 32, "use_sliding_window": True, "max_window_layers": 4}, None),
        ({"sliding_window": 32, "use_sliding_window": True, "max_window_layers": 0}, 32),
        ({"sliding_window": 32, "use_sliding_window": True, "layer_types": ["full_attention"] * 4}, None),
        (
            {
                "sliding_window": 32,
                "use_sliding_window": True,
                "layer_types": ["sliding_attention"] * 4,
                "max_window_layers": 4,
            },
            32,
        ),
    ],
)
def test_sliding_window(changes, window):
    qwen = {"architectures": ["Qwen2ForCausalLM"]} if "use_sliding_window" in changes else {}
    assert read(**qwen, **changes).sliding_window == window


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, r"GPT2LMHeadModel.*supported: LlamaForCausalLM"),
        ({"architectures": None}, r"names nothing.*supported: LlamaForCausalLM"),
        ({"hidden_size": None, "vocab_size": "many"}, r"missing or not an integer: vocab_size, hidden_size"),
        ({"hidden_act": "gelu"}, r"hidden_act='gelu' \(supported: silu\)"),
        ({"partial_rotary_factor": 0.5}, r"partial_rotary_factor=0\.5"),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, r"partial_rotary_factor=0\.5"),
        (
            {"quantization_config": {"quant_method": "fp8"}},
            r"quant_method='fp8' \(supported: gptq, awq, compressed-tensors, auto-round; or use the unquantised check",
        ),
        ({"compression_config": {}, "quantization_config": {"bits": 4}}, r"quant_method='unknown'"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, r"'llama3' lacks low_freq_factor, high_freq_factor"),
        ({"rope_scaling": {"type": "linear"}}, r"'linear' lacks factor"),
        ({"num_attention_heads": 4, "num_key_value_heads": 3}, r"=4 is not a multiple of num_key_value_heads=3"),
        ({"head_dim": 15}, r"head_dim=15 must be positive and even"),
        ({"num_hidden_layers": 0}, r"num_layers=0 must be positive"),
        (
            {"architectures": ["Qwen3ForCausalLM"], "layer_types": ["full_attention", "chunked_attention"]},
            r"layer_types has 'chunked_attention' \(supported: full_attention, sliding_attention\)",
        ),
        (
            {
                "architectures": ["Qwen2ForCausalLM"],
                "use_sliding_window": True,
                "sliding_window": 8,
                "max_window_layers": 2,
            },
            r"mixes sliding and full attention",
        ),
    ],
)
def test_what_is_not_supported_is_named_with_what_is(changes, message):
    with pytest.raises(UnsupportedModelError, match=message):
        read(**changes)


def test_all_unsupported_options_are_named_at_once():
    with pytest.raises(UnsupportedModelError, match=r"hidden_act.*; quantization_config"):
        read(hidden_act="gelu", quantization_config={"quant_method": "aqlm"})


@pytest.mark.parametrize(
    ("settings", "maker"),
    [
        ({"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}, "bitsandbytes"),
        ({"quantization_config": {"quant_method": "exl2", "bits": 4.0}}, "ExLlamaV2"),
        ({"quantization_config": {"quant_method": "hqq"}}, "HQQ"),
        ({"quantization_config": {"quant_method": "FP8"}}, "8-bit floats"),
        ({"quantization_config": {"group_size": 64, "bits": 4}}, "MLX"),
        ({"quantization": {"group_size": 64, "bits": 4, "mode": "affine"}}, "MLX"),
        ({"quantization_config": {"load_in_8bit": True}}, "bitsandbytes"),
        ({"quantization_config": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}}, "bitsandbytes"),
        ({"quantization_config": {"quant_algo": "NVFP4"}}, r"NVIDIA ModelOpt \('NVFP4'\)"),
        ({"quantization_config": {"quant_method": "modelopt", "quant_algo": "FP8"}}, r"NVIDIA ModelOpt \('FP8'\)"),
    ],
)
def test_what_made_a_checkpoint_that_is_not_read_is_named(settings, maker):
    with pytest.raises(UnsupportedModelError, match=rf"quantization_config of {maker}.*supported: gptq"):
        read(**settings)


@pytest.mark.parametrize(
    ("changes", "field", "value"),
    [
        ({"eos_token_id": [-1, 3, 3, 100, 10**30]}, "eos_token_ids", (3,)),
        ({"eos_token_id": "</s>"}, "eos_token_ids", ()),
        ({"eos_token_id": [[1], None, True, 2]}, "eos_token_ids", (2,)),
        ({"bos_token_id": [5, 6]}, "bos_token_id", 5),
        ({"bos_token_id": -1}, "bos_token_id", None),
        ({"pad_token_id": 100, "sep_token_id": "none"}, "eos_token_ids", ()),
        ({"head_dim": None, "num_key_value_heads": None, "hidden_act": None}, "head_dim", 16),
        ({"architectures": "LlamaForCausalLM"}, "head_dim", 16),
        ({"attention_bias": None, "mlp_bias": 0}, "mlp_bias", False),
        # Models that have no such biases in transformers, whatever their config says.
        ({"architectures": ["MistralForCausalLM"], "attention_bias": True}, "qkv_bias", False),
        ({"architectures": ["MistralForCausalLM"], "attention_bias": True}, "output_bias", False),
        ({"architectures": ["MistralForCausalLM"], "mlp_bias": True}, "mlp_bias", False),
        ({"architectures": ["Qwen2ForCausalLM"], "mlp_bias": "yes"}, "mlp_bias", False),
        ({"architectures": ["Qwen3ForCausalLM"], "mlp_bias": True}, "mlp_bias", False),
    ],
)
def test_entries_that_are_not_used_never_matter(changes, field, value):
    assert getattr(read(**changes), field) == value


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_key_value_heads": "two"}, "num_key_value_heads='two' is not an integer"),
        ({"head_dim": [16]}, r"head_dim=\[16\] is not an integer"),
        ({"vocab_size": True}, "not an integer: vocab_size"),
        ({"num_hidden_layers": 10**9}, "num_layers=1000000000 must be positive and of a possible size"),
        ({"hidden_size": 10**5000}, "hidden_size=a number of 16610 bits must be"),
        ({"num_key_value_heads": -4}, "num_kv_heads=-4 must be positive"),
        ({"num_key_value_heads": 0}, "num_kv_heads=0 must be positive"),
        ({"rms_norm_eps": "1e-5"}, "rms_norm_eps='1e-5' is not a finite number"),
        ({"rms_norm_eps": -1.0}, "must be positive"),
        ({"rms_norm_eps": 0}, "rms_norm_eps=0.0, .* must be positive"),
        ({"max_position_embeddings": 2048.5}, "max_position_embeddings=2048.5 is not an integer"),
        ({"architectures": ["MistralForCausalLM"], "sliding_window": 0}, "sliding_window=0 must be positive"),
        ({"attention_bias": "false"}, "attention_bias='false' is neither true nor false"),
        ({"mlp_bias": 2}, "mlp_bias=2 is neither true nor false"),
        ({"tie_word_embeddings": []}, r"tie_word_embeddings=\[\] is neither true nor false"),
        ({"architectures": ["Qwen2ForCausalLM"], "use_sliding_window": "no"}, "use_sliding_window='no' is neither"),
        ({"quantization_config": "gptq"}, "quantization_config='gptq' is neither an object nor null"),
        ({"quantization_config": [{"quant_method": "gptq"}]}, r"quantization_config=\[.* is neither an object nor"),
    ],
)
def test_entries_that_are_used_are_checked_by_name(changes, message):
    with pytest.raises(UnsupportedModelError, match=message):
        read(**changes)


@pytest.mark.parametrize(
    "settings",
    [
        {"bits": 4, "group_size": 128, "desc_act": False},
        {"bits": 4, "group_size": 128, "zero_point": True},
        {"config_groups": {}},
        {"quant_method": "compressed_tensors"},
        {"quant_method": "auto_round"},
    ],
)
def test_a_method_that_is_not_named_is_known_by_its_settings(settings):
    assert read(quantization_config=settings) == read()


@pytest.mark.parametrize(
    ("name", "field"),
    [
        ("max_position_embeddings", "max_position_embeddings"),
        ("sliding_window", "sliding_window"),
        ("num_key_value_heads", "num_kv_heads"),
        ("head_dim", "head_dim"),
    ],
)
@pytest.mark.parametrize("architecture", ["Llama", "Mistral", "Qwen2", "Qwen3"])
def test_what_a_config_does_not_say_is_as_in_transformers(architecture, name, field):
    transformers = pytest.importorskip("transformers")
    changes = {"use_sliding_window": True, "max_window_layers": 0, "num_attention_heads": 64, "hidden_size": 1024}
    config = {key: value for key, value in (BASE | changes).items() if key != name}
    theirs = getattr(transformers, f"{architecture}Config")(**config)
    ours = ModelConfig.from_hf(config | {"architectures": [f"{architecture}ForCausalLM"]})
    usual = 1024 // 64 if name == "head_dim" else None
    assert getattr(ours, field) == getattr(theirs, name, usual)


@pytest.mark.parametrize("architecture", ["Llama", "Qwen2", "Qwen3"])
def test_as_many_key_value_heads_as_query_heads_are_null_as_in_transformers(architecture):
    transformers = pytest.importorskip("transformers")
    config = BASE | {"num_key_value_heads": None}
    theirs = getattr(transformers, f"{architecture}Config")(**config)
    ours = ModelConfig.from_hf(config | {"architectures": [f"{architecture}ForCausalLM"]})
    assert ours.num_kv_heads == theirs.num_key_value_heads == 4


@pytest.mark.parametrize("architecture", ["Mistral", "Qwen2", "Qwen3"])
def test_key_value_heads_that_a_config_does_not_say_and_that_do_not_fit_are_asked_for(architecture):
    config = {key: value for key, value in BASE.items() if key != "num_key_value_heads"}
    with pytest.raises(UnsupportedModelError, match=r"lacks num_key_value_heads, .* divide num_attention_heads=4; add"):
        ModelConfig.from_hf(config | {"architectures": [f"{architecture}ForCausalLM"]})


@pytest.mark.parametrize("key", ["quantization_config", "compression_config"])
@pytest.mark.parametrize("method", ["gptq", "awq", "compressed-tensors", "auto-round"])
def test_ready_made_4_bit_checkpoints_pass(method, key):
    assert read(**{key: {"quant_method": method}}) == read()


def test_configurations_are_values():
    assert hash(read()) == hash(read())
    assert hash(QuantConfig()) == hash(QuantConfig())
    with pytest.raises(dataclasses.FrozenInstanceError):
        QuantConfig().group_size = 64


@pytest.mark.parametrize("group_size", [0, 16, 48, 256])
def test_group_sizes_that_are_not_supported(group_size):
    with pytest.raises(UsageError, match="use 32, 64, 128 or None"):
        QuantConfig(group_size=group_size)


@pytest.mark.parametrize(
    "options",
    [{"group_size": 0}, {"clip_ratio": 0.0}, {"clip_ratio": 1.5}, {"outlier_groups": -1}, {"outlier_groups": 1}],
)
def test_activation_quantisation_that_makes_no_sense(options):
    with pytest.raises(UsageError, match=next(iter(options))):
        ActivationQuantization(**options)


@pytest.mark.parametrize("value", ["no", 1, None, [], np.array([True, False])], ids=str)
@pytest.mark.parametrize("kind", [QuantConfig, ActivationQuantization])
def test_what_is_no_truth_value_is_refused_by_name(kind, value):
    with pytest.raises(UsageError, match=r"^symmetric must be True or False, and is of type"):
        kind(symmetric=value)


@pytest.mark.parametrize(
    "value", ["32", 32.0, True, [32], np.array([32, 64]), 2**40, 10**5000], ids=lambda one: type(one)
)
@pytest.mark.parametrize(
    ("kind", "name"),
    [(QuantConfig, "group_size"), (ActivationQuantization, "group_size"), (ActivationQuantization, "outlier_groups")],
)
def test_what_is_no_whole_number_is_refused_by_name(kind, name, value):
    with pytest.raises(UsageError, match=rf"^(activation )?{name}.* must be a whole number"):
        kind(**{name: value})


def test_other_fields_of_quantisation_are_checked_by_name():
    for value in ("0.5", None, True, [0.5], float("nan"), np.array([0.5])):
        with pytest.raises(UsageError, match=r"^clip_ratio.* must be"):
            ActivationQuantization(clip_ratio=value)
    for name in ("w4a4", "w4a8"):
        with pytest.raises(UsageError, match=rf"^{name} is of type dict; use an ActivationQuantization"):
            QuantConfig(**{name: {"group_size": 32}})
    made = QuantConfig(np.int64(32), np.bool_(False), ActivationQuantization(np.int32(32), clip_ratio=np.float32(0.5)))
    assert made == QuantConfig(32, False, ActivationQuantization(32, clip_ratio=0.5))
    assert [type(value) for value in (made.group_size, made.symmetric, made.w4a4.clip_ratio)] == [int, bool, float]
