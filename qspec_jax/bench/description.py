"""What is measured: the quantised weights of a decoder, and a model in a few JSON values."""

from __future__ import annotations

import dataclasses
from typing import Any

from flax import nnx

from pallas_kernels import QuantizedWeight
from qspec_jax.engine.language_model import LanguageModel
from qspec_jax.model.decoder import Decoder
from qspec_jax.model.linear import Linear


def quantized_weights(decoder: Decoder) -> list[QuantizedWeight]:
    """Those of all linears of a decoder."""
    weights = [module.weight.get_value() for _, module in nnx.iter_modules(decoder) if isinstance(module, Linear)]
    return [weight for weight in weights if isinstance(weight, QuantizedWeight)]


def describe_model(model: LanguageModel, *, synthetic: bool) -> dict[str, Any]:
    """What is measured, JSON-serialisable; ``formats`` are those that its linears have."""
    quantization, decoder = model.quantization, model.decoder
    formats = {(weight.group_size, weight.symmetric, weight.bits) for weight in quantized_weights(decoder)}
    return {
        "name": model.name,
        "weights": "synthetic" if synthetic else "loaded",
        "formats": [dict(zip(("group_size", "symmetric", "bits"), one, strict=True)) for one in sorted(formats)],
        "quantization": None if quantization is None else dataclasses.asdict(quantization),
        "dtype": str(decoder.dtype),
        "kv": decoder.kv,
        "kernels": model.kernels,
        "num_bytes": model.nbytes,
    }
