"""What calibration needs: text as windows of tokens, and the second moments of what each linear of a layer reads.

A layer is run as it is, over all windows at once, from empty caches. To see the inputs of one of its linears, that
module is replaced, while the layer is traced, by one that hands on what it is given; XLA leaves out what comes after.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Float32, Int32

from pallas_kernels import PartialSums, rms_norm, value_of
from pallas_kernels.dispatch import REFERENCE
from qspec_jax.model import rope
from qspec_jax.model.blocks import DecoderLayer, ResidualStream, TokenContext
from qspec_jax.model.cache import LayerCache
from qspec_jax.model.linear import Linear
from qspec_jax.model.parameters import layer_anatomy
from qspec_jax.model.precision import Precision
from qspec_jax.model.view import View

MAX_BATCH = 8  # windows that run together


def advance(layer: DecoderLayer, streams: Sequence[Float32[Array, "B T D"]]) -> list[Array]:
    """The residual streams, which are all there is between two layers, after a float32 layer."""
    graph, state = nnx.split(layer)
    with jax.default_matmul_precision("highest"):
        return [_advance(graph, state, stream) for stream in streams]


def second_moments(
    layer: DecoderLayer, streams: Sequence[Float32[Array, "B T D"]], linear: str
) -> Float32[Array, "K K"]:
    """Mean of ``x x^T`` over the inputs ``x`` that a linear of a float32 layer reads.

    Args:
        layer: of a model.
        streams: the residual streams before it.
        linear: by its path in the layer.
    """
    graph, state = nnx.split(layer)
    num_inputs = layer_anatomy(layer.attention.config).linears[linear].num_inputs
    total = jnp.zeros((num_inputs, num_inputs), jnp.float32)
    with jax.default_matmul_precision("highest"):
        for stream in streams:
            total = _accumulate(graph, state, stream, total, linear=linear)
    return total / sum(stream.shape[0] * stream.shape[1] for stream in streams)


def largest_inputs(
    layer: DecoderLayer, streams: Sequence[Float32[Array, "B T D"]], linear: str
) -> Float32[np.ndarray, " K"]:
    """The largest magnitude of each input that a linear of a float32 layer reads; arguments as ``second_moments``."""
    graph, state = nnx.split(layer)
    with jax.default_matmul_precision("highest"):
        return np.max([_largest(graph, state, stream, linear=linear) for stream in streams], axis=0)


def moments_of_norms(
    streams: Sequence[Float32[Array, "B T D"]], gain: Float32[Array, " D"], *, epsilon: float
) -> Float32[Array, "D D"]:
    """Mean of ``x x^T`` over the norms ``x`` of residual streams: behind the last layer, what an LM head reads."""
    total = jnp.zeros((len(gain), len(gain)), jnp.float32)
    with jax.default_matmul_precision("highest"):
        for stream in streams:
            total = _accumulate_norms(stream, gain, total, epsilon=epsilon)
    return total / sum(stream.shape[0] * stream.shape[1] for stream in streams)


def linear_of(layer: DecoderLayer, linear: str) -> Linear:
    """A linear of a layer, by its path in the layer."""
    return operator.attrgetter(linear)(layer)


class _Observed(nnx.Module):
    """A linear whose inputs somebody else sees too."""

    def __init__(self, linear: Linear, observe: Callable[[Array], None]) -> None:
        self.linear = linear
        self.kernels = linear.kernels
        self.observe = observe

    def __call__(self, x: Float[Array, "*batch K"], *, view: View) -> Float[Array, "*batch N"]:
        return value_of(self.partial_sums(x, view=view))

    def partial_sums(self, x: Float[Array, "*batch K"], *, view: View) -> Float[Array, "*batch N"] | PartialSums:
        self.observe(x)
        return self.linear.partial_sums(x, view=view)

    def gated(self, x: Float[Array, "*batch K"], *, view: View, quantization: dict[str, Any] | None) -> None:
        """None, so that :meth:`partial_sums` is asked, and seen."""

    def input_quantization(self, view: View) -> dict[str, Any] | None:
        return self.linear.input_quantization(view)


@functools.partial(jax.jit, static_argnums=0)
def _advance(graph: nnx.GraphDef, state: nnx.State, stream: Array) -> Array:
    return _run(nnx.merge(graph, state), stream).value()


@functools.partial(jax.jit, static_argnums=0, static_argnames="linear", donate_argnums=3)
def _accumulate(graph: nnx.GraphDef, state: nnx.State, stream: Array, total: Array, *, linear: str) -> Array:
    inputs = _inputs(nnx.merge(graph, state), stream, linear)
    return total + jnp.einsum("btk,btl->kl", inputs, inputs)


@functools.partial(jax.jit, static_argnames="epsilon", donate_argnums=2)
def _accumulate_norms(stream: Array, gain: Array, total: Array, *, epsilon: float) -> Array:
    norms = rms_norm(stream, gain, epsilon=epsilon, implementation=REFERENCE)
    return total + jnp.einsum("btk,btl->kl", norms, norms)


@functools.partial(jax.jit, static_argnums=0, static_argnames="linear")
def _largest(graph: nnx.GraphDef, state: nnx.State, stream: Array, *, linear: str) -> Array:
    return jnp.abs(_inputs(nnx.merge(graph, state), stream, linear)).max((0, 1))


def _inputs(layer: DecoderLayer, stream: Array, linear: str) -> Float32[Array, "B T K"]:
    seen: list[Array] = []
    *blocks, name = linear.split(".")
    setattr(functools.reduce(getattr, blocks, layer), name, _Observed(linear_of(layer, linear), seen.append))
    _run(layer, stream)
    (inputs,) = seen
    return inputs


def _run(layer: DecoderLayer, stream: Float32[Array, "B T D"]) -> ResidualStream:
    config = layer.attention.config
    batch, num_tokens, _ = stream.shape
    positions = jnp.broadcast_to(jnp.arange(num_tokens, dtype=jnp.int32), (batch, num_tokens))
    lengths: Int32[Array, " B"] = jnp.zeros((batch,), jnp.int32)
    context = TokenContext(lengths, lengths, rope.rotation(positions, config))
    empty = jnp.zeros((batch, num_tokens, config.num_kv_heads, config.head_dim), jnp.float32)
    stream_after, _, _ = layer(ResidualStream(stream), LayerCache(empty, empty), context, view=View.of(Precision.FLOAT))
    return stream_after
