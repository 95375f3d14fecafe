"""Runs a float model layer by layer on a text, for the moments or the maxima of its activations."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float32, Int32

from qspec_jax.device.memory import check_memory, explain_out_of_memory
from qspec_jax.errors import CheckpointError
from qspec_jax.model.blocks import DecoderLayer
from qspec_jax.model.config import ModelConfig
from qspec_jax.model.parameters import layer_anatomy
from qspec_jax.quantization.principal import ActivationMoments
from qspec_jax.recipes.layerwise import calibration_bytes, embed
from qspec_jax.recipes.observe import advance, largest_inputs, linear_of, second_moments
from qspec_jax.weights.fill import load_layer
from qspec_jax.weights.source import Source

MAX_WINDOWS = 16  # of the text; more change the moments little


def measure_moments(
    source: Source,
    tokens: Int32[np.ndarray, "windows T"],
    *,
    fold_gains: bool,
    bar: Callable[[Iterable[int], str], Iterable[int]] = lambda items, _: items,
) -> ActivationMoments:
    """The moments of a model's activations on the first windows of a text.

    Args:
        source: the model, in floats or in 4 bits.
        tokens: the text.
        fold_gains: of the stream as it is once the gains of norms have moved into the linears after them.
        bar: wraps the iteration over layers.

    Raises:
        UsageError: a token is not of this model.
        CheckpointError: a tensor cannot be read, or activations are not finite.
        OutOfMemoryError: a layer does not fit; raised beforehand where that can be told.
    """
    config, tokens = source.config, tokens[:MAX_WINDOWS]
    what = f"measuring {source.path.name} on {tokens.size} tokens"
    needed = calibration_bytes(config, tokens.shape)  # rounding a linear, which comes later, takes more
    check_memory(needed, what=f"the largest layer and its moments, for {what},")
    stream, values, mlp = np.zeros((config.hidden_size,) * 2), [], []
    with explain_out_of_memory(f"while {what}"):
        streams = embed(source, tokens)
        for index in bar(range(config.num_layers), "measuring"):
            layer = load_layer(source, index)
            if fold_gains:
                _fold_gains(layer)
            moment = functools.partial(_moment, layer, streams, where=f"layer {index}")
            for path in _norms_before(config):
                found = moment(path).astype(np.float64)
                stream += found / np.trace(found)
            values.append(_by_kv_head(moment("attention.output"), config))
            mlp.append(np.diag(moment("mlp.down")).astype(np.float64))
            if index + 1 < config.num_layers:
                streams = advance(layer, streams)
    return ActivationMoments(stream, tuple(values), tuple(mlp))


def channel_maxima(source: Source, tokens: Int32[np.ndarray, "windows T"], linear: str) -> Float32[np.ndarray, "L K"]:
    """The largest magnitude of each input of a linear (by its path) in each layer.

    Raises:
        UsageError: a token is not of this model.
        CheckpointError: a tensor cannot be read.
    """
    maxima, streams = [], embed(source, tokens)
    for index in range(source.config.num_layers):
        layer = load_layer(source, index)
        maxima.append(largest_inputs(layer, streams, linear))
        streams = advance(layer, streams)
    return np.stack(maxima)


def _moment(layer: DecoderLayer, streams: list, linear: str, *, where: str) -> np.ndarray:
    moment = np.asarray(second_moments(layer, streams, linear))
    if not np.isfinite(moment).all():
        raise CheckpointError(
            f"the inputs of {where} {linear} are not finite on the calibration text; the weights of the model are "
            "damaged, or too large for float32"
        )
    return moment


def _norms_before(config: ModelConfig) -> dict[str, str]:
    """The linears of a layer that read the residual stream, and the norm that each reads it through."""
    linears = layer_anatomy(config).linears.items()
    return {path: linear.norm_before for path, linear in linears if linear.norm_before is not None}


def _fold_gains(layer: DecoderLayer) -> None:
    for path, norm_path in _norms_before(layer.attention.config).items():
        norm, weight = getattr(layer, norm_path), linear_of(layer, path).weight
        weight.set_value(weight.get_value() * norm.weight.get_value())
        norm.weight.set_value(jnp.ones_like(norm.weight.get_value()))


def _by_kv_head(moment: np.ndarray, config: ModelConfig) -> np.ndarray:
    """The diagonal blocks ``[KH, HD, HD]``, summed over the query heads that share values."""
    heads = moment.reshape(config.num_heads, config.head_dim, config.num_heads, config.head_dim)
    blocks = np.stack([heads[head, :, head] for head in range(config.num_heads)])
    return blocks.reshape(config.num_kv_heads, -1, config.head_dim, config.head_dim).sum(1).astype(np.float64)
