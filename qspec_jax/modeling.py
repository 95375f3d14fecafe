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
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Float32, Int32

import pallas_kernels
from pallas_kernels import QuantizedActivation
from qspec_jax import rope
from qspec_jax.cache import KVCache, LayerCache
from qspec_jax.config import ModelConfig, QuantConfig
from qspec_jax.linear import Linear, WeightFormat, float_matmul
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

    positions: Int32[Array, "B T"]
    rotations: tuple[Float32[Array, "B T 1 half_HD"], Float32[Array, "B T 1 half_HD"]]
    mask: Bool[Array, "B 1 T S"]


class RMSNorm(nnx.Module):
    """``x / sqrt(mean(x^2) + eps) * weight``, normalised in float32 (Zhang and Sennrich, 2019)."""

    def __init__(self, size: int, *, epsilon: float, dtype: DTypeLike, layers: tuple[int, ...] = ()):
        self.epsilon = epsilon
        self.weight = nnx.Param(jnp.ones((*layers, size), dtype))

    def __call__(self, x: Float[Array, "*batch size"]) -> Float[Array, "*batch size"]:
        return pallas_kernels.rms_norm(x, self.weight.get_value(), epsilon=self.epsilon)

    def quantize(self, x: Float[Array, "*batch size"], **settings: Any) -> QuantizedActivation:
        """The norm as the integers that a draft's linear reads."""
        return pallas_kernels.rms_norm_quantize(x, self.weight.get_value(), epsilon=self.epsilon, **settings)


class SwiGLU:
    """``silu(gate) * up`` of two halves side by side (Shazeer, 2020)."""

    def __call__(self, gate_up: Float[Array, "*batch two_F"]) -> Float[Array, "*batch F"]:
        return pallas_kernels.swiglu(gate_up)

    def quantize(self, gate_up: Float[Array, "*batch two_F"], **settings: Any) -> QuantizedActivation:
        """The product as the integers that a draft's linear reads."""
        return pallas_kernels.swiglu_quantize(gate_up, **settings)


class Attention(nnx.Module):
    """Grouped-query attention over the cache, of ``norm(x)``."""

    def __init__(self, config: ModelConfig, *, output: Linear, qkv: Linear, dtype: DTypeLike, layers: tuple[int, ...]):
        self.config = config
        self.qkv = qkv
        self.output = output
        if config.qk_norm:
            self.query_norm = RMSNorm(config.head_dim, epsilon=config.rms_norm_eps, dtype=dtype, layers=layers)
            self.key_norm = RMSNorm(config.head_dim, epsilon=config.rms_norm_eps, dtype=dtype, layers=layers)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        cache: LayerCache,
        context: TokenContext,
        *,
        norm: RMSNorm,
        precision: Precision,
    ) -> tuple[Float[Array, "B T D"], LayerCache]:
        config = self.config
        batch, new_tokens, _ = x.shape
        query_size, key_size, _ = config.qkv_sizes
        flat = jnp.split(self.qkv(x, after=norm, precision=precision), (query_size, query_size + key_size), axis=-1)
        query, key, value = (part.reshape(batch, new_tokens, -1, config.head_dim) for part in flat)
        if config.qk_norm:
            query, key = self.query_norm(query), self.key_norm(key)
        query, key = rope.rotate(query, context.rotations), rope.rotate(key, context.rotations)
        with jax.named_scope("cache_write"):
            cache = cache.write(key, value, context.positions)
        # The library function mixes dtypes inside, which strict promotion would refuse.
        with jax.named_scope("attention"), jax.numpy_dtype_promotion("standard"):
            mixed = jax.nn.dot_product_attention(query, cache.keys, cache.values, mask=context.mask)
        return self.output(mixed.reshape(batch, new_tokens, -1), precision=precision), cache


class MLP(nnx.Module):
    """``down(silu(gate(y)) * up(y))`` of ``y = norm(x)``."""

    def __init__(self, *, gate_up: Linear, down: Linear):
        self.gate_up = gate_up
        self.down = down

    def __call__(self, x: Float[Array, "B T D"], *, norm: RMSNorm, precision: Precision) -> Float[Array, "B T D"]:
        gate_up = self.gate_up(x, after=norm, precision=precision)
        return self.down(gate_up, after=SwiGLU(), precision=precision)


class DecoderLayer(nnx.Module):
    """Pre-norm attention and MLP, each with a residual.

    Norms and ``silu(gate) * up`` are handed to the linear that reads them, which computes them in the form that
    its precision wants.
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

        hidden, mlp_size = config.hidden_size, config.intermediate_size
        self.attention_norm = RMSNorm(hidden, epsilon=config.rms_norm_eps, dtype=dtype, layers=layers)
        self.attention = Attention(
            config,
            qkv=linear("attention.qkv", sum(config.qkv_sizes), config.qkv_bias),
            output=linear("attention.output", hidden, config.output_bias),
            dtype=dtype,
            layers=layers,
        )
        self.mlp_norm = RMSNorm(hidden, epsilon=config.rms_norm_eps, dtype=dtype, layers=layers)
        self.mlp = MLP(
            gate_up=linear("mlp.gate_up", 2 * mlp_size, config.mlp_bias),
            down=linear("mlp.down", hidden, config.mlp_bias),
        )

    def __call__(
        self, x: Float[Array, "B T D"], cache: LayerCache, context: TokenContext, *, precision: Precision
    ) -> tuple[Float[Array, "B T D"], LayerCache]:
        attended, cache = self.attention(x, cache, context, norm=self.attention_norm, precision=precision)
        x = x + attended
        return x + self.mlp(x, norm=self.mlp_norm, precision=precision), cache


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
            kernels: implementation name for the matmuls, None for the best that works.
            dtype: of embedding, norms, biases, LM head, cache and activations.
            scan_layers: stack the layers and scan over them (see the module docstring).
        """
        self.config = config
        self.dtype = jnp.dtype(dtype)
        self.scan_layers = scan_layers
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
        self.final_norm = RMSNorm(config.hidden_size, epsilon=config.rms_norm_eps, dtype=dtype)
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
            hidden, cache = self._hidden(tokens, cache, precision=precision)
            if logits_at is not None:
                hidden = jnp.take_along_axis(hidden, logits_at[:, None, None], axis=1)
            with jax.named_scope("lm_head"):
                head = self.embedding if self.lm_head is None else self.lm_head
                return float_matmul(self.final_norm(hidden), head.get_value()), cache

    def _hidden(
        self, tokens: Int32[Array, "B T"], cache: KVCache, *, precision: Precision
    ) -> tuple[Float[Array, "B T D"], KVCache]:
        new_tokens = tokens.shape[1]
        positions = cache.lengths[:, None] + jnp.arange(new_tokens, dtype=jnp.int32)
        context = TokenContext(
            positions=positions,
            rotations=rope.rotation(positions, rope.inverse_frequencies(self.config)),
            mask=attention_mask(positions, slots=cache.slots, window=self.config.sliding_window),
        )
        x = jnp.take(self.embedding.get_value(), tokens, axis=0)
        if isinstance(cache.layers, LayerCache):
            x, layers = self._scan(x, cache.layers, context, precision=precision)
        else:
            written = []
            for layer, layer_cache in zip(self.layers, cache.layers, strict=True):
                x, layer_cache = layer(x, layer_cache, context, precision=precision)
                written.append(layer_cache)
            layers = tuple(written)
        return x, KVCache(layers, cache.lengths + new_tokens)

    def _scan(
        self, x: Float[Array, "B T D"], stacked: LayerCache, context: TokenContext, *, precision: Precision
    ) -> tuple[Float[Array, "B T D"], LayerCache]:
        graph, parameters = nnx.split(self.layers[0])

        # The cache travels in the carry and is updated in place; as a scan output it would be copied.
        def one_layer(carry: tuple[Array, LayerCache], inputs: tuple[Array, nnx.State]):
            x, stacked = carry
            index, layer_parameters = inputs
            layer_cache = jax.tree.map(lambda a: lax.dynamic_index_in_dim(a, index, keepdims=False), stacked)
            x, layer_cache = nnx.merge(graph, layer_parameters)(x, layer_cache, context, precision=precision)
            stacked = jax.tree.map(
                lambda all_layers, one: lax.dynamic_update_index_in_dim(all_layers, one, index, 0), stacked, layer_cache
            )
            return (x, stacked), None

        (x, stacked), _ = lax.scan(one_layer, (x, stacked), (jnp.arange(self.config.num_layers), parameters))
        return x, stacked


def attention_mask(positions: Int32[Array, "B T"], *, slots: int, window: int | None) -> Bool[Array, "B 1 T S"]:
    """True where a token may attend: to its own slot and earlier ones, within the sliding window."""
    distance = positions[:, None, :, None] - jnp.arange(slots, dtype=jnp.int32)
    visible = distance >= 0
    return visible if window is None else visible & (distance < window)


def _exact_float32(dtype: DTypeLike) -> contextlib.AbstractContextManager[object]:
    """In float32, keeps accelerators from rounding matmul operands to tf32 or bf16."""
    return jax.default_matmul_precision("highest") if dtype == jnp.float32 else contextlib.nullcontext()
