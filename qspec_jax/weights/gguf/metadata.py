"""The metadata of a GGUF file as a model's config.

Defaults are those of llama.cpp (``llama-model.cpp``): what it reads without a fuss is read here.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, NoReturn

import numpy as np

from qspec_jax.errors import CheckpointError, UnsupportedModelError
from qspec_jax.model.config import ModelConfig
from qspec_jax.model.rope import llama3_multipliers
from qspec_jax.model.rope_scaling import RopeScaling, shown
from qspec_jax.weights.gguf.file import HF_ARCHITECTURE, GGUFFile
from qspec_jax.weights.gguf.values import read_floats, shape_of

ROPE_FACTORS = "rope_freqs.weight"  # a table made from the config, not a parameter


def read_config(file: GGUFFile) -> ModelConfig:
    """The model's config, out of the metadata and the set of tensors.

    Raises:
        CheckpointError: required metadata or the embedding is missing.
        UnsupportedModelError: the architecture, or an option of it, is not supported.
    """
    _ = file.architecture  # what is no model of a known one has nothing of what follows
    try:
        config = ModelConfig.from_hf(_hf_config(file))
    except UnsupportedModelError as error:
        raise UnsupportedModelError(f"{file.path} (metadata read as a config.json): {error}") from error

    def any_bias(*names: str) -> bool:
        return any(f"blk.0.{name}.bias" in file.tensors for name in names)

    return dataclasses.replace(
        config,
        qkv_bias=any_bias("attn_q", "attn_k", "attn_v"),
        output_bias=any_bias("attn_output"),
        mlp_bias=any_bias("ffn_gate", "ffn_up", "ffn_down"),
        eos_token_ids=file.eos_token_ids,
        rope_scaling=_rope_scaling(file, config),
    )


def _hf_config(file: GGUFFile) -> dict[str, Any]:
    """The metadata in the terms of a Hugging Face ``config.json``."""
    architecture, values = file.architecture, _Metadata(file)
    if "token_embd.weight" not in file.tensors:
        raise CheckpointError(f"{file.path}: tensor token_embd.weight is missing; it may hold a vocabulary alone")
    embedding = shape_of(file.tensors["token_embd.weight"])
    if values.whole("expert_count", 0):
        raise UnsupportedModelError(
            f"{architecture}.expert_count={values.get('expert_count')} (supported: dense models)"
        )
    if values.get("attention.causal") is False:
        raise UnsupportedModelError(f"{architecture}.attention.causal=False (supported: models that generate text)")
    hidden_size, heads = values.whole("embedding_length"), values.whole("attention.head_count")
    head_dim = values.whole("attention.key_length", 0) or hidden_size // max(heads, 1)
    if values.whole("attention.value_length", head_dim) != head_dim:
        raise UnsupportedModelError("attention.key_length and attention.value_length differ (supported: equal lengths)")
    window = values.whole("attention.sliding_window", 0) if architecture == "llama" else 0
    return {
        "architectures": ["MistralForCausalLM" if window else HF_ARCHITECTURE[architecture]],
        "vocab_size": embedding[0] if embedding else 0,
        "hidden_size": hidden_size,
        "intermediate_size": values.whole("feed_forward_length"),
        "num_hidden_layers": values.whole("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": values.whole("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "partial_rotary_factor": (values.whole("rope.dimension_count", 0) or head_dim) / max(head_dim, 1),
        "rms_norm_eps": values.real("attention.layer_norm_rms_epsilon"),
        "rope_theta": values.real("rope.freq_base", 10000.0),
        "rope_scaling": _scaling(values),
        "max_position_embeddings": values.whole("context_length", 2048),
        "sliding_window": window,
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "bos_token_id": file.metadata.get("tokenizer.ggml.bos_token_id"),
    }


class _Metadata:
    """The part of the metadata that is the architecture's."""

    def __init__(self, file: GGUFFile) -> None:
        self._file = file

    def get(self, key: str) -> Any:
        """The value; of a list with an entry for every layer, all the same, that entry."""
        value = self._file.metadata.get(f"{self._file.architecture}.{key}")
        if isinstance(value, list) and value:
            if any(other != value[0] for other in value):
                raise UnsupportedModelError(f"{key} is not the same in all layers (supported: layers that are alike)")
            return value[0]
        return value

    def whole(self, key: str, default: int | None = None) -> int:
        """The whole number under ``key``, ``default`` if there is none."""
        value = self.get(key)
        value = default if value is None else value
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            self._refuse(key, value, "whole number")
        return value

    def real(self, key: str, default: float | None = None) -> float:
        """The number under ``key``, ``default`` if there is none."""
        value = self.get(key)
        value = default if value is None else value
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not math.isfinite(value):
            self._refuse(key, value, "finite number")
        return float(value)

    def _refuse(self, key: str, value: Any, wanted: str) -> NoReturn:
        name = f"{self._file.architecture}.{key}"
        if value is None:
            raise CheckpointError(f"{self._file.path}: metadata {name} is missing (a {wanted})")
        raise CheckpointError(f"{self._file.path}: metadata {name}={shown(value)} is not a {wanted}")


def _scaling(values: _Metadata) -> dict[str, Any] | None:
    """As llama.cpp reads it: linear without a type, and a factor of 0 or 1 is none."""
    kind = values.get("rope.scaling.type")
    kind = "linear" if kind is None else kind
    factor = values.real("rope.scaling.factor", 0.0) or values.real("rope.scale_linear", 0.0)  # of older files
    magnitude = values.real("rope.scaling.yarn_attn_factor", values.real("rope.scaling.attn_factor", 1.0))
    if kind == "none" or (factor in (0.0, 1.0) and kind in ("linear", "yarn") and magnitude == 1.0):
        return None
    if kind == "linear" and magnitude == 1.0:
        return {"rope_type": "linear", "factor": factor}
    if kind != "yarn":
        return {"rope_type": kind if magnitude == 1.0 else f"{kind} with attn_factor={magnitude}"}
    for key, usual in {"yarn_ext_factor": 1.0, "yarn_log_multiplier": 0.0}.items():
        if (value := values.real(f"rope.scaling.{key}", usual)) not in (usual, -1.0):
            raise UnsupportedModelError(f"rope.scaling.{key}={value} (supported: {usual})")
    return {
        "rope_type": "yarn",
        "factor": factor or 1.0,
        "original_max_position_embeddings": values.whole(
            "rope.scaling.original_context_length", values.whole("context_length", 2048)
        ),
        "beta_fast": values.real("rope.scaling.yarn_beta_fast", 32.0),
        "beta_slow": values.real("rope.scaling.yarn_beta_slow", 1.0),
        "attention_factor": magnitude * (1.0 + 0.1 * math.log(max(factor, 1.0))),
    }


def _rope_scaling(file: GGUFFile, config: ModelConfig) -> RopeScaling | None:
    """Recognises Llama 3.1+ scaling, which llama.cpp stores as one divisor per frequency.

    The divisors do not say which parameters made them, so those of the released models are tried: their
    factor is the largest divisor, the other three never changed.
    """
    if ROPE_FACTORS not in file.tensors:
        return config.rope_scaling
    try:
        divisors = read_floats(file.tensors[ROPE_FACTORS]).reshape(-1)
    except (ValueError, NotImplementedError) as error:
        raise CheckpointError(f"{file.path}: cannot read tensor {ROPE_FACTORS}: {error}") from error
    if divisors.size != config.head_dim // 2:
        raise CheckpointError(
            f"{file.path}: {ROPE_FACTORS} has {divisors.size} factors, expected {config.head_dim // 2}"
        )
    if np.allclose(divisors, 1.0, rtol=0, atol=1e-5):
        return config.rope_scaling
    scaling = RopeScaling("llama3", factor=max(float(divisors.max()), 1.0))
    frequencies = config.rope_theta ** -(np.arange(0, config.head_dim, 2) / config.head_dim)
    expected = 1.0 / llama3_multipliers(frequencies, scaling)
    if not np.allclose(divisors, expected, rtol=1e-5, atol=0):
        raise UnsupportedModelError(
            f"{file.path}: the rotary factors in {ROPE_FACTORS} are not those of Llama 3.1 to 3.3; "
            "use the model's safetensors checkpoint, whose config.json names its scaling"
        )
    return scaling
