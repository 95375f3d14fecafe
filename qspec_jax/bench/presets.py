"""Shapes of well-known models, and the matmuls of a model: its fused linears."""

from __future__ import annotations

import dataclasses

from qspec_jax.model.config import ModelConfig
from qspec_jax.model.parameters import layer_anatomy

PRESETS = {
    "llama-2-7b": ModelConfig(
        vocab_size=32000,
        hidden_size=4096,
        intermediate_size=11008,
        num_layers=32,
        num_heads=32,
        num_kv_heads=32,
        head_dim=128,
        max_position_embeddings=4096,
    ),
    "llama-3-8b": ModelConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_layers=32,
        num_heads=32,
        num_kv_heads=8,
        head_dim=128,
        max_position_embeddings=8192,
    ),
    "llama-3-70b": ModelConfig(
        vocab_size=128256,
        hidden_size=8192,
        intermediate_size=28672,
        num_layers=80,
        num_heads=64,
        num_kv_heads=8,
        head_dim=128,
        max_position_embeddings=8192,
    ),
    "llama-3.1-405b": ModelConfig(
        vocab_size=128256,
        hidden_size=16384,
        intermediate_size=53248,
        num_layers=126,
        num_heads=128,
        num_kv_heads=8,
        head_dim=128,
        max_position_embeddings=131072,
    ),
    "qwen2.5-14b": ModelConfig(
        vocab_size=152064,
        hidden_size=5120,
        intermediate_size=13824,
        num_layers=48,
        num_heads=40,
        num_kv_heads=8,
        head_dim=128,
        qkv_bias=True,
        max_position_embeddings=131072,
    ),
    "smollm2-135m": ModelConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_layers=30,
        num_heads=9,
        num_kv_heads=3,
        head_dim=64,
        tie_word_embeddings=True,
        max_position_embeddings=8192,
    ),
}
# As far as shapes go; its frequencies are scaled.
PRESETS["llama-3.1-8b"] = dataclasses.replace(PRESETS["llama-3-8b"], max_position_embeddings=131072)


@dataclasses.dataclass(frozen=True)
class MatmulShape:
    """A weight of ``n`` outputs and ``k`` inputs, with where it stands."""

    k: int
    n: int
    name: str = ""

    def __str__(self) -> str:
        return f"{self.k}x{self.n}"


def linear_shapes(config: ModelConfig, *, prefix: str = "") -> list[MatmulShape]:
    """The linears of a layer as they run: query, key and value are one, and so are gate and up."""
    linears = layer_anatomy(config).linears
    return [MatmulShape(linear.num_inputs, linear.num_outputs, f"{prefix}{path}") for path, linear in linears.items()]


def distinct(shapes: list[MatmulShape]) -> list[MatmulShape]:
    """The shapes with equal ones merged under their joined names, in order."""
    names: dict[tuple[int, int], list[str]] = {}
    for shape in shapes:
        names.setdefault((shape.k, shape.n), []).append(shape.name)
    return [MatmulShape(k, n, ", ".join(filter(None, given))) for (k, n), given in names.items()]
