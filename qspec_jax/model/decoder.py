"""One decoder-only transformer in Flax NNX that covers the Llama, Mistral and Qwen families by config.

``logits, cache = model(tokens, cache, precision=...)`` runs any number of new tokens per sequence
against the shared cache. Query, key and value projections are one linear, and so are gate and up.

Layers come in two arrangements. *Unrolled*: one module and one cache array per layer, for kernels that
read their weights in place. *Scanned* (``scan_layers=True``): one module whose arrays have a leading
layer axis under ``lax.scan``, for implementations made of XLA operations: it compiles in a fraction of
the time and keeps the 4-bit weights packed inside a loop, where XLA would otherwise hoist and keep the
dequantised ones.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32, Int32

import pallas_kernels
from pallas_kernels import PartialSums, QuantizedActivation, value_of
from pallas_kernels.dispatch import REFERENCE
from qspec_jax import rope
from qspec_jax.cache import KVCache, LayerCache
from qspec_jax.config import ModelConfig, QuantConfig
from qspec_jax.linear import Linear, WeightFormat, other_kernels
from qspec_jax.types import Precision


def linear_inputs(config: ModelConfig) -> dict[str, int]:
    """Inputs of each linear of a layer, by its path in the layer."""
    return {
        "attention.qkv": config.hidden_size,
        "attention.output": config.qkv_sizes[0],
        "mlp.gate_up": config.hidden_size,
        "mlp.down": config.intermediate_size,
    }


class TokenContext(NamedTuple):
    """What every layer needs to know of the new tokens: computed once per call."""

    lengths: Int32[Array, " B"]
    rotations: tuple[Float32[Array, "B T half_HD"], Float32[Array, "B T half_HD"]]


class ResidualStream(NamedTuple):
    """``x + update``, or ``x`` alone.

    A block's result stays an update, or the partial sums of one, until the next norm adds it, in the kernel that
    normalises the sum.
    """

    x: Float[Array, "B T D"]
    update: Float[Array, "B T D"] | PartialSums | None = None

    def value(self) -> Float[Array, "B T D"]:
        """The sum."""
        return self.x if self.update is None else self.x + value_of(self.update)


class RMSNorm(nnx.Module):
    """``x / sqrt(mean(x^2) + eps) * weight``, normalised in float32 (Zhang and Sennrich, 2019)."""

    def __init__(
        self, size: int, *, epsilon: float, kernels: str | None, dtype: DTypeLike, layers: tuple[int, ...] = ()
    ):
        self.epsilon = epsilon
        self.implementation = other_kernels(kernels)
        self.weight = nnx.Param(jnp.ones((*layers, size), dtype))

    def __call__(self, x: Float[Array, "*batch size"]) -> Float[Array, "*batch size"]:
        return pallas_kernels.rms_norm(
            x, self.weight.get_value(), epsilon=self.epsilon, implementation=self.implementation
        )

    def of_stream(
        self, stream: ResidualStream, *, quantization: dict[str, Any] | None
    ) -> tuple[Float[Array, "B T D"], Float[Array, "B T D"] | QuantizedActivation]:
        """The value of the stream and its norm, as integers where ``Linear.input_quantization`` says how."""
        normalise: Any = functools.partial(pallas_kernels.rms_norm, implementation=self.implementation)
        if quantization is not None:
            normalise = functools.partial(pallas_kernels.rms_norm_quantize, **quantization)
        gain = self.weight.get_value()
        if stream.update is None:
            return stream.x, normalise(stream.x, gain, epsilon=self.epsilon)
        return normalise(stream.x, gain, epsilon=self.epsilon, update=stream.update)


class Attention(nnx.Module):
    """Grouped-query attention over the cache."""

    def __init__(
        self,
        config: ModelConfig,
        *,
        output: Linear,
        qkv: Linear,
        head_norm: Callable[[], RMSNorm],
        kernels: str | None,
    ):
        self.config = config
        self.kernels = other_kernels(kernels)
        self.qkv = qkv
        self.output = output
        if config.qk_norm:
            self.query_norm, self.key_norm = head_norm(), head_norm()

    def __call__(
        self,
        x: Float[Array, "B T D"] | QuantizedActivation,
        cache: LayerCache,
        context: TokenContext,
        *,
        precision: Precision,
    ) -> tuple[Float[Array, "B T D"] | PartialSums, LayerCache]:
        config, lengths = self.config, context.lengths
        batch, new_tokens, _ = context.rotations[0].shape
        qkv = self.qkv.partial_sums(x, precision=precision).reshape(batch, new_tokens, -1, config.head_dim)
        if config.qk_norm:
            qkv = self._normalise_queries_and_keys(value_of(qkv))
        with jax.named_scope("cache_write"):
            query, keys, values = pallas_kernels.rotate_and_write(
                qkv, *context.rotations, cache.keys, cache.values, lengths, implementation=self.kernels
            )
        # A prefill is a large matrix product, which the reference leaves to XLA.
        kernels = self.kernels if new_tokens <= pallas_kernels.MAX_DECODE_TOKENS else REFERENCE
        with jax.named_scope("attention"):
            mixed = pallas_kernels.decode_attention(
                query, keys, values, lengths, window=config.sliding_window, implementation=kernels
            )
        mixed = mixed.reshape(batch, new_tokens, -1)
        return self.output.partial_sums(mixed, precision=precision), LayerCache(keys, values)

    def _normalise_queries_and_keys(self, qkv: Float[Array, "B T heads HD"]) -> Float[Array, "B T heads HD"]:
        """Qwen3's norm of each head, before rotation."""
        first_key, first_value = self.config.num_heads, self.config.num_heads + self.config.num_kv_heads
        query, key, value = jnp.split(qkv, (first_key, first_value), axis=2)
        return jnp.concatenate([self.query_norm(query), self.key_norm(key), value], axis=2)


class MLP(nnx.Module):
    """``down(silu(gate(x)) * up(x))`` (Shazeer, 2020); gate and up are halves side by side.

    In a rotated model, whose ``down`` is rotated to match, each ``down_hadamard`` consecutive values of the product go
    through a Hadamard transform.
    """

    def __init__(self, *, gate_up: Linear, down: Linear, down_hadamard: int | None):
        self.gate_up = gate_up
        self.down = down
        self.down_hadamard = down_hadamard

    def __call__(
        self, x: Float[Array, "B T D"] | QuantizedActivation, *, precision: Precision
    ) -> Float[Array, "B T D"] | PartialSums:
        gate_up = self.gate_up(x, precision=precision)
        return self.down.partial_sums(self._gated(gate_up, precision), precision=precision)

    def _gated(
        self, gate_up: Float[Array, "B T two_F"], precision: Precision
    ) -> Float[Array, "B T F"] | QuantizedActivation:
        """The inputs of ``down``, as integers where it reads integers."""
        quantization = self.down.input_quantization(precision)
        if self.down_hadamard is None:
            if quantization is None:
                return pallas_kernels.swiglu(gate_up, implementation=other_kernels(self.down.kernels))
            return pallas_kernels.swiglu_quantize(gate_up, **quantization)
        if quantization is None:
            return pallas_kernels.swiglu_hadamard(
                gate_up, block=self.down_hadamard, implementation=other_kernels(self.down.kernels)
            )
        return pallas_kernels.swiglu_hadamard_quantize(gate_up, block=self.down_hadamard, **quantization)


class DecoderLayer(nnx.Module):
    """Pre-norm attention and MLP, each with a residual.

    Norms and ``silu(gate) * up`` are computed in the form that the linear after them reads at the precision.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        formats: Mapping[str, WeightFormat | None],
        quantization: QuantConfig | None,
        kernels: str | None,
        dtype: DTypeLike,
        layers: tuple[int, ...] = (),
    ):
        def linear(name: str, num_outputs: int, bias: bool) -> Linear:
            return Linear(
                linear_inputs(config)[name],
                num_outputs,
                bias=bias,
                weight_format=formats[name],
                quantization=quantization,
                kernels=kernels,
                dtype=dtype,
                layers=layers,
            )

        def norm(size: int) -> RMSNorm:
            return RMSNorm(size, epsilon=config.rms_norm_eps, kernels=kernels, dtype=dtype, layers=layers)

        hidden, mlp_size = config.hidden_size, config.intermediate_size
        self.attention_norm = norm(hidden)
        self.attention = Attention(
            config,
            qkv=linear("attention.qkv", sum(config.qkv_sizes), config.qkv_bias),
            output=linear("attention.output", hidden, config.output_bias),
            head_norm=lambda: norm(config.head_dim),
            kernels=kernels,
        )
        self.mlp_norm = norm(hidden)
        self.mlp = MLP(
            gate_up=linear("mlp.gate_up", 2 * mlp_size, config.mlp_bias),
            down=linear("mlp.down", hidden, config.mlp_bias),
            down_hadamard=(config.hadamard_block or mlp_size) if config.down_hadamard else None,
        )

    def __call__(
        self, stream: ResidualStream, cache: LayerCache, context: TokenContext, *, precision: Precision
    ) -> tuple[ResidualStream, LayerCache]:
        x, y = self.attention_norm.of_stream(stream, quantization=self.attention.qkv.input_quantization(precision))
        attended, cache = self.attention(y, cache, context, precision=precision)
        stream = ResidualStream(x, attended)
        x, y = self.mlp_norm.of_stream(stream, quantization=self.mlp.gate_up.input_quantization(precision))
        return ResidualStream(x, self.mlp(y, precision=precision)), cache


class Decoder(nnx.Module):
    """A decoder-only language model.

    Attributes:
        embedding: ``[V, D]``; also the LM head where the config ties them.
        layers: ``num_layers`` modules, or one that holds them all stacked (``scan_layers``).
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        quantization: QuantConfig | None = None,
        formats: Mapping[str, WeightFormat] | None = None,
        kernels: str | None = None,
        dtype: DTypeLike = jnp.float32,
        scan_layers: bool = True,
    ):
        """Allocates the parameters as zeros.

        Args:
            config: shape and options.
            quantization: how weights are stored and draft activations quantised; None for float weights.
            formats: the storage of single linears (keys of :func:`linear_inputs`) where it is not that of
                ``quantization``.
            kernels: implementation name for the operations of ``pallas_kernels``, None for the best that works.
            dtype: of embedding, norms, biases, LM head, cache and activations.
            scan_layers: stack the layers and scan over them (see the module docstring).
        """
        self.config = config
        self.dtype = jnp.dtype(dtype)
        self.scan_layers = scan_layers
        # Kernels of another name do not serve every dtype and number of rows of an LM head.
        self.head_kernels = REFERENCE if kernels == REFERENCE else None
        default = None if quantization is None else WeightFormat(quantization.group_size, quantization.symmetric)
        complete = {name: (formats or {}).get(name, default) for name in linear_inputs(config)}
        count, leading = (1, (config.num_layers,)) if scan_layers else (config.num_layers, ())
        self.embedding = nnx.Param(jnp.zeros((config.vocab_size, config.hidden_size), dtype))
        self.layers = nnx.List(
            DecoderLayer(
                config, formats=complete, quantization=quantization, kernels=kernels, dtype=dtype, layers=leading
            )
            for _ in range(count)
        )
        self.final_norm = RMSNorm(config.hidden_size, epsilon=config.rms_norm_eps, kernels=kernels, dtype=dtype)
        tied = config.tie_word_embeddings
        self.lm_head = None if tied else nnx.Param(jnp.zeros((config.vocab_size, config.hidden_size), dtype))

    def create_cache(self, *, batch: int, slots: int) -> KVCache:
        """An empty cache arranged as this model's layers are."""
        return KVCache.create(self.config, batch=batch, slots=slots, dtype=self.dtype, stacked=self.scan_layers)

    def __call__(
        self,
        tokens: Int32[Array, "B T"],
        cache: KVCache,
        *,
        precision: Precision,
        logits_at: Int32[Array, " B"] | None = None,
    ) -> tuple[Float32[Array, "B T_out V"], KVCache]:
        """Runs ``T`` new tokens of each sequence, the first of which takes position ``cache.lengths``.

        Args:
            tokens: the new tokens. Sequences with fewer than ``T`` are padded on the right; the caller
                then corrects the lengths (``cache.with_lengths``).
            cache: its slots ``lengths .. lengths + T - 1`` are overwritten.
            precision: of every linear; static.
            logits_at: index into ``T`` of the one token per sequence whose logits are wanted.

        Returns:
            float32 logits (``T_out = T``, or 1 with ``logits_at``), and the cache with ``lengths + T``.
        """
        with _exact_float32(self.dtype):
            stream, cache = self._hidden(tokens, cache, precision=precision)
            if logits_at is not None:
                stream = ResidualStream(jnp.take_along_axis(stream.value(), logits_at[:, None, None], axis=1))
            with jax.named_scope("lm_head"):
                head = self.embedding if self.lm_head is None else self.lm_head
                _, y = self.final_norm.of_stream(stream, quantization=None)
                assert isinstance(y, jax.Array)
                return pallas_kernels.float_matmul(y, head.get_value(), implementation=self.head_kernels), cache

    def _hidden(
        self, tokens: Int32[Array, "B T"], cache: KVCache, *, precision: Precision
    ) -> tuple[ResidualStream, KVCache]:
        new_tokens = tokens.shape[1]
        positions = cache.lengths[:, None] + jnp.arange(new_tokens, dtype=jnp.int32)
        context = TokenContext(
            lengths=cache.lengths,
            rotations=rope.rotation(positions, rope.inverse_frequencies(self.config)),
        )
        stream = ResidualStream(jnp.take(self.embedding.get_value(), tokens, axis=0))
        if isinstance(cache.layers, LayerCache):
            stream, layers = self._scan(stream, cache.layers, context, precision=precision)
        else:
            written = []
            for layer, layer_cache in zip(self.layers, cache.layers, strict=True):
                graph, parameters = nnx.split(layer)
                stream, layer_cache = _run_layer(graph, parameters, stream, layer_cache, context, precision)
                written.append(layer_cache)
            layers = tuple(written)
        return stream, KVCache(layers, cache.lengths + new_tokens)

    def _scan(
        self, stream: ResidualStream, stacked: LayerCache, context: TokenContext, *, precision: Precision
    ) -> tuple[ResidualStream, LayerCache]:
        graph, parameters = nnx.split(self.layers[0])

        # The cache travels in the carry and is updated in place; as a scan output it would be copied.
        def one_layer(carry: tuple[Array, LayerCache], inputs: tuple[Array, nnx.State]):
            x, stacked = carry
            index, layer_parameters = inputs
            layer_cache = jax.tree.map(lambda a: lax.dynamic_index_in_dim(a, index, keepdims=False), stacked)
            layer = nnx.merge(graph, layer_parameters)
            stream, layer_cache = layer(ResidualStream(x), layer_cache, context, precision=precision)
            stacked = jax.tree.map(
                lambda all_layers, one: lax.dynamic_update_index_in_dim(all_layers, one, index, 0), stacked, layer_cache
            )
            return (stream.value(), stacked), None

        indices = jnp.arange(self.config.num_layers)
        (x, stacked), _ = lax.scan(one_layer, (stream.value(), stacked), (indices, parameters))
        return ResidualStream(x), stacked


# A jit of its own, so that layers that are alike are traced and lowered once.
@functools.partial(jax.jit, static_argnums=(0, 5))
def _run_layer(
    graph: nnx.GraphDef[DecoderLayer],
    parameters: nnx.State,
    stream: ResidualStream,
    cache: LayerCache,
    context: TokenContext,
    precision: Precision,
) -> tuple[ResidualStream, LayerCache]:
    return nnx.merge(graph, parameters)(stream, cache, context, precision=precision)


def _exact_float32(dtype: DTypeLike) -> contextlib.AbstractContextManager[object]:
    """In float32, keeps accelerators from rounding matmul operands to tf32 or bf16."""
    return jax.default_matmul_precision("highest") if dtype == jnp.float32 else contextlib.nullcontext()
