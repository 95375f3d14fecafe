"""Runs a float model layer by layer on a text, for the moments or the maxima of its activations."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float32, Int32

from qspec_jax.config import ModelConfig
from qspec_jax.errors import CheckpointError
from qspec_jax.layerwise import embed
from qspec_jax.loading.decoder import load_layer
from qspec_jax.loading.parameters import CheckpointSource
from qspec_jax.modeling import DecoderLayer
from qspec_jax.quantization.calibration import advance, largest_inputs, linear_of, second_moments
from qspec_jax.quantization.principal import ActivationMoments

MAX_WINDOWS = 16  # of the text; more change the moments little
_NORM_OF = {"attention.qkv": "attention_norm", "mlp.gate_up": "mlp_norm"}


def measure_moments(
    source: CheckpointSource,
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
        CheckpointError: a tensor cannot be read, or activations are not finite.
        OutOfMemoryError: a layer does not fit.
    """
    config = source.config
    stream, values, mlp = np.zeros((config.hidden_size,) * 2), [], []
    streams = embed(source, tokens[:MAX_WINDOWS])
    for index in bar(range(config.num_layers), "measuring"):
        layer = load_layer(source, index)
        if fold_gains:
            _fold_gains(layer)
        found = {name: _moment(layer, streams, name, f"layer {index}") for name in (*_NORM_OF, "attention.output")}
        for name in _NORM_OF:
            stream += found[name] / np.trace(found[name])
        values.append(_by_kv_head(found["attention.output"], config))
        mlp.append(np.diag(_moment(layer, streams, "mlp.down", f"layer {index}")).copy())
        if index + 1 < config.num_layers:
            streams = advance(layer, streams)
    return ActivationMoments(stream, tuple(values), tuple(mlp))


def channel_maxima(
    source: CheckpointSource, tokens: Int32[np.ndarray, "windows T"], linear: str
) -> Float32[np.ndarray, "L K"]:
    """The largest magnitude of each input of a linear (a key of ``linear_inputs``) in each layer.

    Raises:
        CheckpointError: a tensor cannot be read.
    """
    maxima, streams = [], embed(source, tokens)
    for index in range(source.config.num_layers):
        layer = load_layer(source, index)
        maxima.append(largest_inputs(layer, streams, linear))
        streams = advance(layer, streams)
    return np.stack(maxima)


def _moment(layer: DecoderLayer, streams: list, linear: str, where: str) -> np.ndarray:
    moment = np.asarray(second_moments(layer, streams, linear), np.float64)
    if not np.isfinite(moment).all():
        raise CheckpointError(
            f"the inputs of {where} {linear} are not finite on the calibration text; the weights of the model are "
            "damaged, or too large for float32"
        )
    return moment


def _fold_gains(layer: DecoderLayer) -> None:
    for name, norm_name in _NORM_OF.items():
        norm, weight = getattr(layer, norm_name), linear_of(layer, name).weight
        weight.set_value(weight.get_value() * norm.weight.get_value())
        norm.weight.set_value(jnp.ones_like(norm.weight.get_value()))


def _by_kv_head(moment: np.ndarray, config: ModelConfig) -> np.ndarray:
    """The diagonal blocks ``[KH, HD, HD]``, summed over the query heads that share values."""
    heads = moment.reshape(config.num_heads, config.head_dim, config.num_heads, config.head_dim)
    blocks = np.stack([heads[head, :, head] for head in range(config.num_heads)])
    return blocks.reshape(config.num_kv_heads, -1, config.head_dim, config.head_dim).sum(1)
