"""Models of a given shape with random 4-bit weights: as fast as real ones, and there in seconds.

A decoder is arranged exactly as :func:`qspec_jax.load` arranges it, and filled array by array on the device, so that
memory holds the model and the random bits of one array. What it generates is noise.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array

from pallas_kernels import QuantizedWeight
from qspec_jax.bench.random_arrays import random_normal, random_weight
from qspec_jax.device.memory import check_memory, explain_out_of_memory
from qspec_jax.engine.language_model import LanguageModel
from qspec_jax.model.config import ModelConfig, QuantConfig
from qspec_jax.model.decoder import abstract_decoder, num_bytes
from qspec_jax.model.placement import decoder_options, kernels_in_use


def synthetic_model(
    config: ModelConfig,
    *,
    quantization: QuantConfig | None,
    dtype: str | None = None,
    kernels: str = "auto",
    name: str = "synthetic",
) -> LanguageModel:
    """A model without a tokenizer. Weights are of about ``1 / sqrt(K)``, which keeps activations finite.

    Args:
        config: the shape.
        quantization: how weights are stored; None for floating point.
        dtype: of what is not quantised, as in :func:`qspec_jax.load`.
        kernels: as in :func:`qspec_jax.load`.
        name: of the model.

    Raises:
        UsageError: ``dtype`` or ``kernels`` make no sense here.
        OutOfMemoryError: the model does not fit; raised before anything is made where that can be told.
    """
    arrangement = decoder_options(kernels, dtype)
    decoder = abstract_decoder(config, quantization=quantization, formats=None, **arrangement)
    needed = num_bytes(decoder)
    check_memory(needed, what=f"the weights of {name}")
    state = nnx.state(decoder, nnx.Param)
    keys = _Keys()

    def fill(path: tuple[Any, ...], like: Any) -> Any:
        # One after the other: allocation would otherwise run ahead of the temporary arrays that are freed.
        return jax.block_until_ready(_random_like(keys.next(), like, kind=_kind(path)))

    with explain_out_of_memory(f"while making {name}, whose weights take {needed / 1e9:.2f} GB"):
        nnx.update(decoder, jax.tree.map_with_path(fill, state, is_leaf=_is_quantized))
    return LanguageModel(decoder, None, quantization=quantization, kernels=kernels_in_use(decoder, kernels), name=name)


class _Keys:
    """Keys one after the other, of the generator that is fast and needs least memory for large arrays."""

    def __init__(self) -> None:
        self._key = jax.random.key(0, impl="rbg")

    def next(self) -> Array:
        self._key, key = jax.random.split(self._key)
        return key


def _is_quantized(leaf: Any) -> bool:
    return isinstance(leaf, QuantizedWeight)


def _kind(path: tuple[Any, ...]) -> str:
    """``norm``, ``bias`` or ``matrix``, by the path of a parameter in the decoder."""
    names = [str(getattr(step, "key", getattr(step, "name", step))) for step in path]
    if any(name.endswith("norm") for name in names):
        return "norm"
    return "bias" if "bias" in names else "matrix"


def _random_like(key: Array, like: Any, *, kind: str) -> Any:
    if isinstance(like, QuantizedWeight):
        sizes = {"k": like.num_inputs, "n": like.num_outputs, "group_size": like.group_size}
        weight = random_weight(key, symmetric=like.symmetric, layers=like.packed.shape[:-2], **sizes)
        return dataclasses.replace(weight, layout=like.layout)  # codes are as random in any order
    if kind == "norm":
        return jnp.ones(like.shape, like.dtype)
    deviation = 0.02 if kind == "bias" else 1 / math.sqrt(like.shape[-1])
    return random_normal(key, like.shape, like.dtype, deviation)
