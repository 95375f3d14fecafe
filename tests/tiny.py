"""Tiny models with deterministic random weights, as sources held in memory."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding

import pallas_kernels
from pallas_kernels import Layout, QuantizedWeight, with_layout
from qspec_jax.engine.language_model import LanguageModel
from qspec_jax.model.config import ModelConfig, QuantConfig
from qspec_jax.model.decoder import Decoder
from qspec_jax.model.parameters import expected_parameters
from qspec_jax.model.precision import Precision
from qspec_jax.model.sharding import spec_of, to_shard_order
from qspec_jax.model.shards import Shards, parameters
from qspec_jax.model.view import View
from qspec_jax.weights.fill import load_decoder, weight_formats
from qspec_jax.weights.source import Source, TensorEntry

# One program for each shape, not one for each operation.
dequantize = jax.jit(pallas_kernels.dequantize, static_argnums=1)

BASE_HF_CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
    "bos_token_id": 1,
    "eos_token_id": 2,
}

_YARN_ROPE = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}

# Every family and option that `ModelConfig` supports appears in one of these.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama2": {"num_key_value_heads": 4},
    "llama3_rope_scaling": {"rope_theta": 500000.0, "rope_scaling": _LLAMA3_ROPE},
    "linear_rope_scaling": {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
    "llama_with_biases": {"attention_bias": True, "mlp_bias": True},
    "smollm2_tied": {"tie_word_embeddings": True},
    "mistral_sliding_window": {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": 5},
    "qwen2_qkv_bias": {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"},
    "qwen2_yarn": {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "rope_scaling": _YARN_ROPE},
    "qwen3_qk_norm": {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"},
    "wide_heads": {"head_dim": 32},
}


def hf_config(family: str) -> dict[str, Any]:
    """A tiny ``config.json`` of one of ``FAMILIES``."""
    return {**BASE_HF_CONFIG, **FAMILIES[family]}


def weights(config: ModelConfig, seed: int = 0) -> dict[str, np.ndarray]:
    """Canonical name to float32 array; the same on every machine."""
    rng = np.random.default_rng(seed)
    made = {}
    for name, spec in expected_parameters(config).items():
        draw = rng.standard_normal(spec.shape).astype(np.float32)
        scale = {"norm": 0.1, "bias": 0.1, "embedding": 0.5, "linear": 1.5 / spec.shape[-1] ** 0.5}[spec.kind]
        made[name] = (draw * np.float32(scale) + np.float32(spec.kind == "norm")).astype(np.float32)
    return made


def source(config: ModelConfig, seed: int = 0) -> Source:
    """The tiny weights of ``config``, in memory."""
    entries = {
        name: TensorEntry(array.shape, functools.partial(np.copy, array))
        for name, array in weights(config, seed).items()
    }
    return Source(config, Path("tiny"), entries, expected_parameters(config))


@contextlib.contextmanager
def compiled_quickly():
    """What makes weights compiles quickly for contracts too, unless all is thorough: they ask of what reads weights."""
    before = jax.config.read("jax_disable_most_optimizations")
    thorough = os.environ.get("QSPEC_JAX_THOROUGH", "0") != "0"
    quickly = before or (jax.default_backend() == "cpu" and not thorough)
    try:
        _compile(quickly=quickly)
        yield
    finally:
        _compile(quickly=before)


def _compile(*, quickly: bool) -> None:
    """As ``conftest.py`` sets it before each test."""
    if quickly != jax.config.read("jax_disable_most_optimizations"):
        jax.config.update("jax_disable_most_optimizations", quickly)
        jax.config.update("jax_xla_profile_version", int(quickly))


def decoder(
    config: ModelConfig | None = None,
    *,
    quantization: QuantConfig | None = QuantConfig(),  # noqa: B008 - frozen
    scan_layers: bool = True,
    dtype: str = "float32",
    kernels: str | None = "reference",
    seed: int = 0,
) -> Decoder:
    """A tiny decoder."""
    checkpoint = source(config or ModelConfig.from_hf(BASE_HF_CONFIG), seed)
    options = {"dtype": jnp.dtype(dtype), "kernels": kernels, "scan_layers": scan_layers}
    with compiled_quickly():
        formats = weight_formats(checkpoint, quantization)
        return load_decoder(checkpoint, quantization=quantization, formats=formats, **options)


def logits(decoder: Decoder, tokens: Any, precision: Precision | View, *, slots: int = 64) -> np.ndarray:
    """What a decoder yields of new sequences, in one program, which decoders of the same graph share."""
    return np.asarray(_logits(*nnx.split(decoder), jnp.asarray(tokens, jnp.int32), precision, slots))


@functools.partial(jax.jit, static_argnums=(0, 3, 4))
def _logits(graph: Any, state: Any, tokens: jax.Array, precision: Precision | View, slots: int) -> jax.Array:
    made = nnx.merge(graph, state)
    return made(tokens, made.create_cache(batch=tokens.shape[0], capacity=slots), precision=precision)[0]


def language_model(
    config: ModelConfig | None = None,
    *,
    quantization: QuantConfig | None = QuantConfig(),  # noqa: B008 - frozen
    **options: Any,
) -> LanguageModel:
    """A tiny model without a tokenizer and without stop tokens."""
    config = dataclasses.replace(config or ModelConfig.from_hf(BASE_HF_CONFIG), eos_token_ids=())
    made = decoder(config, quantization=quantization, **options)
    return LanguageModel(made, None, quantization=quantization, kernels="reference", name="tiny")


def laid_out(model: LanguageModel, *, draft: str) -> LanguageModel:
    """The model, its weights as drafts read them: programs from before would be compiled again."""
    with compiled_quickly():
        model.programs.lay_out_weights(model.plan(draft=draft))
    return model


def distributed(whole: Decoder, shards: Shards) -> Decoder:
    """The decoder of a mesh with the arrays of one on a single device: put there one by one, each from memory."""
    made = nnx.clone(shards.local)
    source = dict(parameters(whole))

    def put(path: str, array: Any, layout: Layout = Layout.PLANES) -> Any:
        array = to_shard_order(path, np.asarray(array), whole.config, shards.split, layout=layout)
        sharding = NamedSharding(shards.mesh, spec_of(path, array.shape))
        return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])

    for path, parameter in parameters(made):
        value, like = source[path].get_value(), parameter.get_value()
        if not isinstance(value, QuantizedWeight):
            parameter.set_value(put(path, value))
            continue
        value = with_layout(jax.tree.map(np.asarray, dataclasses.replace(value, group_sum=None)), Layout.PLANES)
        parts = {part: getattr(value, part) for part in ("scale", "offset") if getattr(value, part) is not None}
        arrays = {part: put(f"{path}.{part}", array) for part, array in parts.items()}
        packed = put(f"{path}.packed", value.packed, like.layout)
        parameter.set_value(dataclasses.replace(like, packed=packed, **arrays))
    return made
