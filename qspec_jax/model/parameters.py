"""The parameters of a decoder under their canonical names: unfused, independent of any file format."""

from __future__ import annotations

import dataclasses
from typing import Literal

from qspec_jax.model.config import ModelConfig

# Of the projections that share an array, the module that holds it and the place among its parts.
PART_OF = {
    "attention.query": ("attention.qkv", 0),
    "attention.key": ("attention.qkv", 1),
    "attention.value": ("attention.qkv", 2),
    "mlp.gate": ("mlp.gate_up", 0),
    "mlp.up": ("mlp.gate_up", 1),
}


def part_sizes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Output rows of each part of the modules that hold several projections."""
    return {"attention.qkv": config.qkv_sizes, "mlp.gate_up": (config.intermediate_size,) * 2}


@dataclasses.dataclass(frozen=True)
class ParameterSpec:
    """One parameter of a model.

    Attributes:
        name: canonical name.
        shape: of the float parameter; a linear is ``[N, K]``, outputs first.
        kind: only a ``linear`` is ever quantised. The LM head counts as an ``embedding``.
    """

    name: str
    shape: tuple[int, ...]
    kind: Literal["linear", "embedding", "norm", "bias"]


def expected_parameters(config: ModelConfig) -> dict[str, ParameterSpec]:
    """Every parameter of the model that ``config`` describes, by canonical name."""
    vocabulary, hidden = config.vocab_size, config.hidden_size
    specs = [ParameterSpec("embedding.weight", (vocabulary, hidden), "embedding")]
    for layer in range(config.num_layers):
        specs += _layer_parameters(config, f"layers.{layer}")
    specs.append(ParameterSpec("final_norm.weight", (hidden,), "norm"))
    if not config.tie_word_embeddings:
        specs.append(ParameterSpec("lm_head.weight", (vocabulary, hidden), "embedding"))
    return {spec.name: spec for spec in specs}


def _layer_parameters(config: ModelConfig, prefix: str) -> list[ParameterSpec]:
    hidden, mlp = config.hidden_size, config.intermediate_size
    query, key, value = config.qkv_sizes
    linears = [
        ("attention.query", query, hidden, config.qkv_bias),
        ("attention.key", key, hidden, config.qkv_bias),
        ("attention.value", value, hidden, config.qkv_bias),
        ("attention.output", hidden, query, config.output_bias),
        ("mlp.gate", mlp, hidden, config.mlp_bias),
        ("mlp.up", mlp, hidden, config.mlp_bias),
        ("mlp.down", hidden, mlp, config.mlp_bias),
    ]
    norms = [("attention_norm", hidden), ("mlp_norm", hidden)]
    if config.qk_norm:
        norms += [("attention.query_norm", config.head_dim), ("attention.key_norm", config.head_dim)]
    specs = [ParameterSpec(f"{prefix}.{name}.weight", (size,), "norm") for name, size in norms]
    for name, outputs, inputs, bias in linears:
        specs.append(ParameterSpec(f"{prefix}.{name}.weight", (outputs, inputs), "linear"))
        if bias:
            specs.append(ParameterSpec(f"{prefix}.{name}.bias", (outputs,), "bias"))
    return specs


def linear_inputs(config: ModelConfig) -> dict[str, int]:
    """Inputs of each linear of a layer, by its path in the layer."""
    return {
        "attention.qkv": config.hidden_size,
        "attention.output": config.qkv_sizes[0],
        "mlp.gate_up": config.hidden_size,
        "mlp.down": config.intermediate_size,
    }
