"""Which tensors a model has, and how a checkpoint that does not have them is reported."""

import collections
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from qspec_jax.errors import CheckpointError
from qspec_jax.model.config import ModelConfig, QuantConfig
from qspec_jax.model.parameters import expected_parameters
from qspec_jax.weights.fill import load_decoder, load_layer, weight_formats
from qspec_jax.weights.gguf import source as _gguf  # noqa: F401 - imported late, and counted
from qspec_jax.weights.huggingface import directory as _directory  # noqa: F401
from qspec_jax.weights.resolve import open_source
from qspec_jax.weights.source import FoundTensor, TensorEntry, check_entries
from tests.weights.tiny_checkpoints import (
    ARCHITECTURES,
    HEAD_DIM,
    HEADS,
    HIDDEN,
    KV_HEADS,
    MLP,
    VOCAB,
    gguf_tensors,
    hf_config,
    hf_tensors,
    write_gguf,
    write_hf,
)


@pytest.mark.parametrize("kind", ["directory", "gguf"])
def test_opening_and_loading_lists_the_parameters_once_and_reads_the_config_once(tmp_path, monkeypatch, kind):
    calls = collections.Counter()
    for name, module in list(sys.modules.items()):  # in whichever file it is asked for
        if name.startswith("qspec_jax.") and getattr(module, "expected_parameters", None) is expected_parameters:
            monkeypatch.setattr(module, "expected_parameters", count(calls, "parameters", expected_parameters))
    read_bytes = Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda path: calls.update([path.name]) or read_bytes(path))
    config = hf_config()
    if kind == "directory":
        source = open_source(write_hf(tmp_path, config, hf_tensors(config)))
    else:
        tensors = gguf_tensors(config, hf_tensors(config))
        source = open_source(write_gguf(tmp_path / "model.gguf", config, tensors))
    load_decoder(
        source,
        quantization=QuantConfig(),
        formats=weight_formats(source, QuantConfig()),
        dtype=jnp.float32,
        kernels="reference",
        scan_layers=True,
    )
    load_layer(source, 0)
    assert (calls["parameters"], calls["config.json"]) == (1, int(kind == "directory"))
    assert source.specs == expected_parameters(source.config)


def count(calls, what, function):
    return lambda *arguments: calls.update([what]) or function(*arguments)


def found(config: ModelConfig) -> list[FoundTensor]:
    return [
        FoundTensor(f"file.{name}", name, TensorEntry(spec.shape, lambda: np.zeros(0)))
        for name, spec in expected_parameters(config).items()
    ]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("tied", [False, True])
def test_parameters_are_as_many_and_as_large_as_those_of_transformers(architecture, tied):
    config = hf_config(architecture, tie_word_embeddings=tied)
    expected = expected_parameters(ModelConfig.from_hf(config))
    theirs = sorted(tensor.shape for tensor in hf_tensors(config).values())
    assert sorted(spec.shape for spec in expected.values()) == theirs


def test_names_shapes_and_kinds():
    config = ModelConfig.from_hf(hf_config("Qwen3ForCausalLM", attention_bias=True))
    specs = {name: (spec.shape, spec.kind) for name, spec in expected_parameters(config).items()}
    assert specs["embedding.weight"] == specs["lm_head.weight"] == ((VOCAB, HIDDEN), "embedding")
    assert specs["layers.1.attention.query.weight"] == ((HEADS * HEAD_DIM, HIDDEN), "linear")
    assert specs["layers.1.attention.key.bias"] == ((KV_HEADS * HEAD_DIM,), "bias")
    assert specs["layers.0.attention.query_norm.weight"] == ((HEAD_DIM,), "norm")
    assert specs["layers.0.mlp.down.weight"] == ((HIDDEN, MLP), "linear")


def test_fitting_tensors_come_back_in_the_order_of_the_model():
    config = ModelConfig.from_hf(hf_config())
    entries = check_entries(expected_parameters(config), reversed(found(config)), path=Path("model"))
    assert list(entries) == list(expected_parameters(config))


def test_all_problems_are_listed_at_once():
    config = ModelConfig.from_hf(hf_config())
    tensors = {tensor.name: tensor for tensor in found(config)}
    read = tensors["embedding.weight"].entry.read
    del tensors["final_norm.weight"]
    tensors["lm_head.weight"] = FoundTensor("file.lm_head", "lm_head.weight", TensorEntry((1, 2), read))
    tensors["embedding.weight"] = FoundTensor(
        "file.embedding", "embedding.weight", TensorEntry((VOCAB, HIDDEN), read), "is I64 (supported: F32)"
    )
    extra = [
        FoundTensor("file.adapter", None, TensorEntry((3,), read)),
        FoundTensor("file.twice", "layers.0.mlp.up.weight", TensorEntry((MLP, HIDDEN), read)),
        FoundTensor("file.layer9", "layers.9.mlp.up.weight", TensorEntry((MLP, HIDDEN), read)),
    ]
    with pytest.raises(CheckpointError) as caught:
        check_entries(expected_parameters(config), [*tensors.values(), *extra], path=Path("some/model"))
    message = str(caught.value)
    assert message.startswith("some/model: ")
    assert "unknown (2): file.adapter, file.layer9" in message
    assert "missing (1): final_norm.weight" in message
    assert "duplicate (1): file.twice (as file.layers.0.mlp.up.weight)" in message
    assert f"wrong shape (1): file.lm_head is [1, 2], expected [{VOCAB}, {HIDDEN}]" in message
    assert "wrong dtype (1): file.embedding is I64 (supported: F32)" in message


def test_long_lists_are_cut_with_a_count():
    config = ModelConfig.from_hf(hf_config())
    with pytest.raises(CheckpointError, match=r"missing \(\d+\): .*, and \d+ more") as caught:
        check_entries(expected_parameters(config), [], path=Path("model"))
    assert len(str(caught.value)) < 1000
