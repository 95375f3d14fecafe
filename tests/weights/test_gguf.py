"""GGUF files: bit-exact 4-bit import, llama.cpp's row order undone, metadata read as a config."""

import dataclasses
import math
import struct

import gguf
import jax.numpy as jnp
import numpy as np
import pytest
from gguf import GGMLQuantizationType

from pallas_kernels.arrays.weight import QuantizedWeight, pack_codes
from qspec_jax.errors import CheckpointError, UnsupportedModelError
from qspec_jax.model.config import ModelConfig, RopeScaling
from qspec_jax.model.linear import WeightFormat
from qspec_jax.weights.gguf import file as gguf_file
from qspec_jax.weights.resolve import open_source
from qspec_jax.weights.source import QuantizedTensor
from tests.tiny import dequantize
from tests.weights.tiny_checkpoints import (
    ARCHITECTURES,
    HEAD_DIM,
    HEADS,
    KV_HEADS,
    gguf_tensors,
    hf_config,
    hf_tensors,
    permute_rows,
    write_gguf,
    write_hf,
)


def packed_floats(tensor: QuantizedTensor) -> np.ndarray:
    """The tensor's values after a round trip through the layout that the kernels read."""
    offset = None if tensor.offset is None else jnp.asarray(tensor.offset)
    weight = QuantizedWeight(pack_codes(jnp.asarray(tensor.codes)), jnp.asarray(tensor.scale), offset)
    return np.asarray(dequantize(weight, jnp.dtype("float32")))


@pytest.fixture
def llama(tmp_path):
    """A config, its tensors under llama.cpp's names, and where to write them."""
    config = hf_config()
    return config, gguf_tensors(config, hf_tensors(config)), tmp_path / "model.gguf"


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_float_tensors_equal_those_of_the_same_model_as_safetensors(tmp_path, architecture):
    config = hf_config(architecture)
    tensors = hf_tensors(config)
    from_hf = open_source(write_hf(tmp_path / "hf", config, tensors))
    from_gguf = open_source(write_gguf(tmp_path / "model.gguf", config, gguf_tensors(config, tensors)))
    assert from_gguf.entries.keys() == from_hf.entries.keys()
    for name, entry in from_gguf.entries.items():
        assert entry.shape == from_hf.entries[name].shape
        np.testing.assert_array_equal(entry.read(), from_hf.entries[name].read(), err_msg=name)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_config_equals_that_of_the_same_model_as_safetensors(tmp_path, architecture, tied):
    config = hf_config(architecture, tie_word_embeddings=tied)
    source = open_source(write_gguf(tmp_path / "model.gguf", config, gguf_tensors(config, hf_tensors(config))))
    assert source.config.rms_norm_eps == pytest.approx(config["rms_norm_eps"])
    expected = ModelConfig.from_hf(config)
    assert dataclasses.replace(source.config, rms_norm_eps=expected.rms_norm_eps) == expected


def test_biases_are_found_and_reordered(tmp_path):
    config = hf_config(attention_bias=True)
    tensors = hf_tensors(config)
    source = open_source(write_gguf(tmp_path / "model.gguf", config, gguf_tensors(config, tensors)))
    assert source.config.qkv_bias
    assert source.config.output_bias
    read = source.entries["layers.1.attention.key.bias"].read()
    np.testing.assert_array_equal(read, tensors["model.layers.1.self_attn.k_proj.bias"])


@pytest.mark.parametrize("linear_type", [GGMLQuantizationType.Q4_0, GGMLQuantizationType.Q4_1])
def test_4_bit_linears_are_bit_exact(llama, linear_type):
    config, tensors, path = llama
    source = open_source(write_gguf(path, config, tensors, linear_type=linear_type))
    symmetric = linear_type == GGMLQuantizationType.Q4_0
    for module, heads in (("query", HEADS), ("key", KV_HEADS), ("value", None), ("output", None)):
        name = {"query": "attn_q", "key": "attn_k", "value": "attn_v", "output": "attn_output"}[module]
        raw = gguf.quants.quantize(tensors[f"blk.1.{name}.weight"], linear_type)
        expected = gguf.quants.dequantize(raw, linear_type)
        entry = source.entries[f"layers.1.attention.{module}.weight"]
        assert entry.codes == WeightFormat(32, symmetric)
        floats = packed_floats(entry.read())
        np.testing.assert_array_equal(floats if heads is None else permute_rows(floats, heads), expected)


@pytest.mark.parametrize("linear_type", [GGMLQuantizationType.Q4_0, GGMLQuantizationType.Q4_1])
def test_query_and_key_rows_are_reordered_for_llama_only(tmp_path, linear_type):
    llama, qwen = hf_config(), hf_config("Qwen3ForCausalLM")
    tensors = hf_tensors(qwen)
    plain = gguf_tensors(qwen, tensors)
    reordered = {name: tensor for name, tensor in gguf_tensors(llama, tensors).items() if "_norm.weight" not in name}
    reordered |= {name: plain[name] for name in plain if name.endswith((".attn_norm.weight", "ffn_norm.weight"))}
    reordered["output_norm.weight"] = plain["output_norm.weight"]
    from_llama = open_source(write_gguf(tmp_path / "llama.gguf", llama, reordered, linear_type=linear_type))
    from_qwen = open_source(write_gguf(tmp_path / "qwen.gguf", qwen, plain, linear_type=linear_type))
    assert not np.array_equal(reordered["blk.0.attn_q.weight"], plain["blk.0.attn_q.weight"])
    for name in ("layers.0.attention.query.weight", "layers.1.attention.key.weight", "layers.0.mlp.down.weight"):
        one, other = from_llama.entries[name].read(), from_qwen.entries[name].read()
        np.testing.assert_array_equal(one.codes, other.codes)
        np.testing.assert_array_equal(one.scale, other.scale)


@pytest.mark.parametrize(
    "linear_type", [GGMLQuantizationType.Q5_0, GGMLQuantizationType.F16, GGMLQuantizationType.BF16]
)
def test_other_types_are_dequantised(llama, linear_type):
    config, tensors, path = llama
    source = open_source(write_gguf(path, config, tensors, linear_type=linear_type))
    for name, theirs in (("layers.0.mlp.gate.weight", "blk.0.ffn_gate.weight"), ("lm_head.weight", "output.weight")):
        expected = gguf.quants.dequantize(gguf.quants.quantize(tensors[theirs], linear_type), linear_type)
        read = source.entries[name].read()
        assert read.dtype == np.float32
        assert source.entries[name].codes is None
        np.testing.assert_array_equal(read, expected)


def test_4_bit_embeddings_are_dequantised(llama):
    config, tensors, path = llama
    source = open_source(write_gguf(path, config, tensors, linear_type=GGMLQuantizationType.Q4_0))
    assert source.entries["embedding.weight"].codes is None
    assert source.entries["embedding.weight"].read().dtype == np.float32


def test_demo_model_is_bit_exact(demo_gguf):
    source = open_source(demo_gguf)
    theirs = {tensor.name: tensor for tensor in gguf.GGUFReader(demo_gguf).tensors}
    names = {"attention.query": "attn_q", "attention.key": "attn_k", "attention.value": "attn_v"}
    names |= {"attention.output": "attn_output", "mlp.gate": "ffn_gate", "mlp.up": "ffn_up", "mlp.down": "ffn_down"}
    heads = {"attention.query": 9, "attention.key": 3}
    for layer in (0, 14, 29):
        for module, name in names.items():
            tensor = theirs[f"blk.{layer}.{name}.weight"]
            assert tensor.tensor_type == GGMLQuantizationType.Q4_1
            floats = packed_floats(source.entries[f"layers.{layer}.{module}.weight"].read())
            if module in heads:
                floats = permute_rows(floats, heads[module])
            assert np.array_equal(floats, gguf.quants.dequantize(tensor.data, tensor.tensor_type)), (layer, module)


def test_demo_model_config(demo_gguf):
    config = open_source(demo_gguf).config
    assert (config.num_layers, config.hidden_size, config.intermediate_size, config.vocab_size) == (
        30,
        576,
        1536,
        49152,
    )
    assert (config.num_heads, config.num_kv_heads, config.head_dim) == (9, 3, 64)
    assert (config.rope_theta, config.tie_word_embeddings, config.eos_token_ids) == (
        100000.0,
        True,
        (2, 0, 4),
    )  # <|im_end|>, <|endoftext|>, <reponame>


def test_a_file_is_parsed_once_while_its_source_is_held(llama, monkeypatch):
    """The tokenizer of the model is made of the same file."""
    config, tensors, path = llama
    parsed, parse = [], gguf_file._parse
    monkeypatch.setattr(gguf_file, "_parse", lambda path: parsed.append(path) or parse(path))
    source = open_source(write_gguf(path, config, tensors))
    gguf_file.GGUFFile.open(path)
    assert parsed == [source.path]
    write_gguf(path, config | {"rope_theta": 5.0}, tensors | {"output.weight": tensors["output.weight"] + 1})
    gguf_file.GGUFFile.open(path)
    assert parsed == [source.path] * 2


def llama3_divisors(factor: float, theta: float, *, low: float = 1.0, high: float = 4.0) -> np.ndarray:
    """As written by llama.cpp's converter, in its loop over the frequencies."""
    divisors = []
    for frequency in 1.0 / theta ** (np.arange(0, HEAD_DIM, 2, dtype=np.float32) / HEAD_DIM):
        wavelength = 2 * np.pi / frequency
        if wavelength < 8192 / high:
            divisors.append(1.0)
        elif wavelength > 8192 / low:
            divisors.append(factor)
        else:
            smooth = (8192 / wavelength - low) / (high - low)
            divisors.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(divisors, np.float32)


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama3_rope_scaling_is_recognised(llama, factor):
    config, tensors, path = llama
    config["rope_theta"] = 500000.0
    tensors["rope_freqs.weight"] = llama3_divisors(factor, 500000.0)
    scaling = open_source(write_gguf(path, config, tensors)).config.rope_scaling
    assert scaling == RopeScaling("llama3", factor, 1.0, 4.0, 8192)


def test_rope_factors_of_one_are_no_scaling(llama):
    config, tensors, path = llama
    tensors["rope_freqs.weight"] = np.ones(HEAD_DIM // 2, np.float32)
    assert open_source(write_gguf(path, config, tensors)).config.rope_scaling is None


def test_unknown_rope_factors_are_refused(llama):
    config, tensors, path = llama
    tensors["rope_freqs.weight"] = llama3_divisors(8.0, 500000.0, low=2.0)
    with pytest.raises(UnsupportedModelError, match="use the model's safetensors checkpoint"):
        open_source(write_gguf(path, config | {"rope_theta": 500000.0}, tensors))


@pytest.mark.parametrize(
    ("metadata", "expected"),
    [
        ({"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}, RopeScaling("linear", 4.0)),
        ({"llama.rope.scale_linear": 2.0}, RopeScaling("linear", 2.0)),
        ({"llama.rope.scaling.type": "none", "llama.rope.scaling.factor": 4.0}, None),
        ({"llama.rope.scaling.factor": 4.0}, RopeScaling("linear", 4.0)),
        ({"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 0.0}, None),
        ({"llama.rope.scaling.type": "linear"}, None),
        ({"llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": 0.0}, None),
        (
            {
                "llama.rope.scaling.type": "yarn",
                "llama.rope.scaling.factor": 4.0,
                "llama.rope.scaling.original_context_length": 64,
                "llama.rope.scaling.yarn_beta_fast": 16.0,
            },
            RopeScaling(
                "yarn",
                4.0,
                original_max_position_embeddings=64,
                beta_fast=16.0,
                attention_factor=1.0 + 0.1 * math.log(4.0),
            ),
        ),
    ],
)
def test_rope_scaling(llama, metadata, expected):
    config, tensors, path = llama
    assert open_source(write_gguf(path, config, tensors, metadata=metadata)).config.rope_scaling == expected


def test_end_tokens_of_the_metadata(llama):
    config, tensors, path = llama
    write_gguf(path, config, tensors, metadata={"tokenizer.ggml.eot_token_id": 9})
    assert open_source(path).config.eos_token_ids == (2, 9)


LOG_MULTIPLIER = {"llama.rope.scaling.yarn_log_multiplier": 0.1}


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"llama.rope.scaling.type": "longrope"}, "rope scaling 'longrope' is not supported"),
        ({"llama.rope.scaling.attn_factor": 1.2}, r"rope scaling 'linear with attn_factor=1\.2\d*' is not supported"),
        ({"llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": 2.0} | LOG_MULTIPLIER, "yarn_log_multiplier"),
        ({"llama.attention.head_count_kv": [2, 1]}, "head_count_kv is not the same in all layers"),
        ({"general.type": "adapter"}, "is a GGUF file of type 'adapter', not a model"),
        ({"llama.expert_count": 8}, "expert_count=8"),
        ({"llama.rope.dimension_count": 16}, "partial_rotary_factor=0.5"),
    ],
)
def test_unsupported_options(llama, metadata, message):
    config, tensors, path = llama
    with pytest.raises(UnsupportedModelError, match=message):
        open_source(write_gguf(path, config, tensors, metadata=metadata))


def test_unsupported_architecture_names_the_supported(llama):
    config, tensors, path = llama
    with pytest.raises(UnsupportedModelError, match="'gemma2' is not supported; supported: llama, qwen2, qwen3"):
        open_source(write_gguf(path, config, tensors, architecture="gemma2"))


def test_missing_unknown_and_unreadable_tensors_are_listed_together(llama):
    config, tensors, path = llama
    del tensors["blk.1.ffn_up.weight"]
    tensors["blk.0.attn_qkv.weight"] = np.zeros((8, 32), np.float32)
    tensors["output_norm.weight"] = tensors["output_norm.weight"].astype(np.int32)
    with pytest.raises(CheckpointError) as caught:
        open_source(write_gguf(path, config, tensors))
    assert "unknown (1): blk.0.attn_qkv.weight" in str(caught.value)
    assert "missing (1): layers.1.mlp.up.weight" in str(caught.value)
    assert "wrong dtype (1): output_norm.weight is I32, which cannot be read" in str(caught.value)


@pytest.mark.parametrize("fraction", [0.0005, 0.003, 0.02, 0.5, 0.999])
def test_truncated_files(llama, fraction):
    config, tensors, path = llama
    content = write_gguf(path, config, tensors).read_bytes()
    path.write_bytes(content[: max(5, int(len(content) * fraction))])
    with pytest.raises(CheckpointError, match="truncated or damaged"):
        open_source(path)


def test_lists_of_numbers_are_read_with_their_types(llama):
    lists = {"a": [1, -2, 3], "b": [0.5, -1.0], "c": [True, False, True]}
    config, tensors, path = llama
    metadata = gguf_file.GGUFFile.open(write_gguf(path, config, tensors, metadata=lists)).metadata
    assert {name: metadata[name] for name in lists} == lists
    assert [type(value) for value in (metadata["a"][0], metadata["b"][0], metadata["c"][0])] == [int, float, bool]


def test_a_list_that_claims_more_than_the_file_is_refused(llama):
    config, tensors, path = llama
    content = write_gguf(path, config, tensors, metadata={"a": [7, 7, 7]}).read_bytes()
    claim = struct.pack("<Q", 3) + struct.pack("<i", 7) * 3
    assert content.count(claim) == 1
    path.write_bytes(content.replace(claim, struct.pack("<Q", 2**40) + claim[8:]))
    with pytest.raises(CheckpointError, match="a list of numbers goes beyond the end"):
        open_source(path)


@pytest.mark.parametrize("content", [b"", b"GG", b"<html></html>", b"\x80\x02}q\x00"])
def test_files_that_are_not_gguf(tmp_path, content):
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="is not a GGUF file"):
        open_source(path)


def test_a_vocabulary_without_a_model_is_refused(llama):
    config, _, path = llama
    with pytest.raises(CheckpointError, match=r"token_embd\.weight is missing"):
        open_source(write_gguf(path, config, {"output_norm.weight": np.zeros(64, np.float32)}))
