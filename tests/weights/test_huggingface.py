"""Hugging Face directories: what is read is what was written, and what is wrong is said."""

import dataclasses
import json

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from qspec_jax.errors import CheckpointError, UnsupportedModelError
from qspec_jax.model.config import ModelConfig
from qspec_jax.model.parameters import expected_parameters
from qspec_jax.weights.resolve import open_source
from tests.weights.tiny_checkpoints import ARCHITECTURES, hf_config, hf_tensors, write_hf

CANONICAL = {
    "model.embed_tokens.weight": "embedding.weight",
    "lm_head.weight": "lm_head.weight",
    "model.norm.weight": "final_norm.weight",
    "model.layers.1.input_layernorm.weight": "layers.1.attention_norm.weight",
    "model.layers.1.post_attention_layernorm.weight": "layers.1.mlp_norm.weight",
    "model.layers.1.self_attn.q_proj.weight": "layers.1.attention.query.weight",
    "model.layers.1.self_attn.k_proj.weight": "layers.1.attention.key.weight",
    "model.layers.1.self_attn.v_proj.weight": "layers.1.attention.value.weight",
    "model.layers.1.self_attn.o_proj.weight": "layers.1.attention.output.weight",
    "model.layers.1.self_attn.q_proj.bias": "layers.1.attention.query.bias",
    "model.layers.1.self_attn.k_norm.weight": "layers.1.attention.key_norm.weight",
    "model.layers.1.mlp.gate_proj.weight": "layers.1.mlp.gate.weight",
    "model.layers.1.mlp.up_proj.weight": "layers.1.mlp.up.weight",
    "model.layers.1.mlp.down_proj.weight": "layers.1.mlp.down.weight",
}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("num_shards", [1, 3])
def test_every_tensor_is_read_as_it_was_written(tmp_path, architecture, num_shards):
    config = hf_config(architecture)
    tensors = hf_tensors(config)
    source = open_source(write_hf(tmp_path, config, tensors, num_shards=num_shards))
    assert source.config == ModelConfig.from_hf(config)
    assert source.entries.keys() == expected_parameters(source.config).keys()
    for name, canonical in CANONICAL.items():
        if name in tensors:
            entry = source.entries[canonical]
            assert entry.shape == tensors[name].shape
            assert entry.codes is None
            np.testing.assert_array_equal(entry.read(), tensors[name])


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_tensors_keep_their_dtype(tmp_path, dtype):
    config = hf_config()
    tensors = hf_tensors(config, dtype)
    source = open_source(write_hf(tmp_path, config, tensors))
    read = source.entries["layers.0.mlp.up.weight"].read()
    assert read.dtype == dtype
    np.testing.assert_array_equal(read, tensors["model.layers.0.mlp.up_proj.weight"])


@pytest.mark.parametrize("options", [{"attention_bias": True}, {"mlp_bias": True}])
def test_biases_are_read_where_the_config_has_them(tmp_path, options):
    config = hf_config(**options)
    source = open_source(write_hf(tmp_path, config, hf_tensors(config)))
    biases = {name.split(".", 2)[2] for name in source.entries if name.endswith("bias")}
    attention = {f"attention.{part}.bias" for part in ("query", "key", "value", "output")}
    assert biases == (attention if "attention_bias" in options else {f"mlp.{p}.bias" for p in ("gate", "up", "down")})


def test_copies_that_are_no_parameters_are_ignored(tmp_path):
    config = hf_config(tie_word_embeddings=True)
    tensors = hf_tensors(config)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.zeros(16, np.float32)
    source = open_source(write_hf(tmp_path, config, tensors))
    assert "lm_head.weight" not in source.entries


@pytest.mark.parametrize(("more", "expected"), [(7, (2, 7)), ([2, 5, 6], (2, 5, 6)), (None, (2,))])
def test_generation_config_adds_end_tokens(tmp_path, more, expected):
    config = hf_config()
    write_hf(tmp_path, config, hf_tensors(config))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": more}))
    assert open_source(tmp_path).config.eos_token_ids == expected


def test_other_safetensors_do_not_join_the_model(tmp_path):
    config = hf_config()
    write_hf(tmp_path, config, hf_tensors(config), num_shards=2)
    save_file({"tok_embeddings.weight": np.zeros(4, np.float32)}, tmp_path / "consolidated.safetensors")
    assert len(open_source(tmp_path).entries) == len(hf_tensors(config))


def test_opening_reads_no_tensor_and_reading_notices_a_file_that_went_away(tmp_path):
    config = hf_config()
    source = open_source(write_hf(tmp_path, config, hf_tensors(config)))
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(OSError, match=r"model\.safetensors"):
        source.entries["embedding.weight"].read()


def test_missing_unknown_misshapen_and_mistyped_tensors_are_listed_together(tmp_path):
    config = hf_config()
    tensors = hf_tensors(config)
    del tensors["model.norm.weight"]
    tensors["model.layers.0.mlp.up_proj.weight"] = np.zeros((3, 4), np.float32)
    tensors["lm_head.weight"] = tensors["lm_head.weight"].astype(np.int8)
    tensors["score.weight"] = np.zeros(4, np.float32)
    with pytest.raises(CheckpointError) as caught:
        open_source(write_hf(tmp_path, config, tensors))
    for part in (
        "unknown (1): score.weight",
        "missing (1): final_norm.weight",
        "wrong shape (1): model.layers.0.mlp.up_proj.weight is [3, 4]",
        "wrong dtype (1): lm_head.weight is I8 (supported: F32, F16, BF16)",
    ):
        assert part in str(caught.value)


def test_a_tensor_in_two_shards_is_a_duplicate_unless_both_are_equal(tmp_path):
    config = hf_config()
    tensors = hf_tensors(config)
    write_hf(tmp_path, config, tensors, num_shards=2)
    save_file(tensors, tmp_path / "model-00002-of-00002.safetensors")
    assert open_source(tmp_path)
    save_file({name: tensor + 1 for name, tensor in tensors.items()}, tmp_path / "model-00002-of-00002.safetensors")
    with pytest.raises(CheckpointError, match="duplicate"):
        open_source(tmp_path)


def corrupt(path, *, name="model.safetensors", content=None, keep_bytes=None):
    file = path / name
    file.write_bytes(content if content is not None else file.read_bytes()[:keep_bytes])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: (path / "config.json").unlink(), "has no config.json"),
        (lambda path: corrupt(path, name="config.json", content=b'{"a": '), "config.json is not valid JSON"),
        (lambda path: corrupt(path, name="config.json", content=b"[]"), "JSON list, not an object"),
        (lambda path: corrupt(path, keep_bytes=5), "truncated or is not a safetensors file"),
        (lambda path: corrupt(path, content=b""), "truncated or is not a safetensors file"),
        (lambda path: corrupt(path, content=b"<html><body>404</body></html>"), "is not a safetensors file"),
        (
            lambda path: corrupt(path, content=b"version https://git-lfs.github.com/spec/v1"),
            "Git LFS pointer; run `git",
        ),
        (lambda path: corrupt(path, keep_bytes=100), "truncated within its header"),
        (lambda path: corrupt(path, keep_bytes=-1), r"truncated: its header places \S+ at bytes"),
        (lambda path: corrupt(path, content=b"\x02" + 7 * b"\0" + b"{]"), "header is not valid JSON"),
        (lambda path: (path / "model.safetensors").unlink(), r"no \*\.safetensors"),
        (
            lambda path: (path / "model.safetensors").rename(path / "pytorch_model.bin"),
            r"pytorch_model\.bin.*convert them to safetensors",
        ),
    ],
)
def test_damaged_directories(tmp_path, damage, message):
    config = hf_config()
    write_hf(tmp_path, config, hf_tensors(config))
    damage(tmp_path)
    with pytest.raises(CheckpointError, match=message):
        open_source(tmp_path)


def test_missing_shards_are_named(tmp_path):
    config = hf_config()
    write_hf(tmp_path, config, hf_tensors(config), num_shards=3)
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"1 of 3 shards .* missing: model-00002-of-00003\.safetensors"):
        open_source(tmp_path)


def test_unsupported_architecture_names_the_supported(tmp_path):
    write_hf(tmp_path, hf_config("GPT2LMHeadModel"), {})
    with pytest.raises(UnsupportedModelError, match=r"GPT2LMHeadModel.*supported: LlamaForCausalLM"):
        open_source(tmp_path)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("tied", [False, True])
def test_directories_saved_by_transformers(tmp_path, architecture, tied):
    pytest.importorskip("torch", reason="transformers saves models with torch")
    import transformers

    config = hf_config(architecture, tie_word_embeddings=tied, dtype="bfloat16")
    config_class = getattr(transformers, architecture.replace("ForCausalLM", "Config"))
    model = getattr(transformers, architecture)(config_class(**config))
    model.save_pretrained(tmp_path, max_shard_size="50KB")
    source = open_source(tmp_path)
    expected = dataclasses.replace(ModelConfig.from_hf(config), sliding_window=source.config.sliding_window)
    assert source.config == expected
    state = model.state_dict()
    for name, canonical in CANONICAL.items():
        if canonical in source.entries:
            theirs = state[name].float().numpy()
            np.testing.assert_array_equal(source.entries[canonical].read().astype(np.float32), theirs)
    assert source.entries.keys() == expected_parameters(source.config).keys()
