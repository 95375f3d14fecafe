"""The blocks of a decoder in Flax NNX: norm, attention, MLP, and the layer made of them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32, Int32

import pallas_kernels
from pallas_kernels import MAX_DECODE_TOKENS, Int8Cache, PartialSums, QuantizedActivation, value_of
from qspec_jax.model.cache import LayerCache
from qspec_jax.model.config import ModelConfig, QuantConfig
from qspec_jax.model.linear import Linear, WeightFormat, other_kernels
from qspec_jax.model.parameters import layer_anatomy
from qspec_jax.model.view import View


class TokenContext(NamedTuple):
    """What every layer needs to know of the new tokens: computed once per call.

    It is of the rows of the cache. A pass may have further sequences, whose results nobody reads.
    """

    lengths: Int32[Array, " B"]
    seen: Int32[Array, " B"]  # as many of these as attention reads: none of sequences that are idle
    rotations: tuple[Float32[Array, "B T half_HD"], Float32[Array, "B T half_HD"]]
    blocks: Int32[Array, "B L KH N"] | None = None  # that a view with a budget reads, of all layers
    layer: Int32[Array, ""] | None = None  # which of them this is; None where there are no blocks
    num_tokens: Int32[Array, " B"] | None = None  # new ones that are more than padding; None for all
    rows: Int32[Array, " B"] | None = None  # of the cache that the sequences are pieces of; None for a row each

    def of_layer(self, index: Int32[Array, ""]) -> TokenContext:
        """What this layer needs to know."""
        return self if self.blocks is None else self._replace(layer=index)


class ResidualStream(NamedTuple):
    """``x + update``, or ``x`` alone.

    A block's result stays an update, or the partial sums of one, until the next norm adds it, in the kernel that
    normalises the sum.
    """

    x: Float[Array, "B_all T D"]
    update: Float[Array, "B_all T D"] | PartialSums | None = None

    def value(self) -> Float[Array, "B_all T D"]:
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


def _attention_over(
    cache: LayerCache | Int8Cache,
) -> tuple[Callable[..., Any], Callable[..., Any], Callable[..., Any]]:
    """To all of a cache, the same with the masses of its blocks, and to some of its blocks."""
    kernels = pallas_kernels
    if isinstance(cache, Int8Cache):
        return (
            kernels.decode_attention_int8,
            kernels.decode_attention_int8_with_masses,
            kernels.block_attention_int8,
        )
    return kernels.decode_attention, kernels.decode_attention_with_masses, kernels.block_attention


class Attention(nnx.Module):
    """Grouped-query attention over the cache."""

    def __init__(
        self,
        config: ModelConfig,
        *,
        output: Linear,
        qkv: Linear,
        norm: Callable[[str], RMSNorm],
        kernels: str | None,
    ):
        self.config = config
        self.kernels = other_kernels(kernels)
        self.qkv = qkv
        self.output = output
        if config.qk_norm:
            self.query_norm, self.key_norm = norm("attention.query_norm"), norm("attention.key_norm")

    def __call__(
        self,
        x: Float[Array, "B_all T D"] | QuantizedActivation,
        cache: LayerCache | Int8Cache,
        context: TokenContext,
        *,
        view: View,
        weigh: int | None,
    ) -> tuple[Float[Array, "B_all T D"] | PartialSums, LayerCache | Int8Cache, Float32[Array, "B KH NB"] | None]:
        config = self.config
        qkv = self.qkv.partial_sums(x, view=view)
        batch, new_tokens, _ = qkv.shape
        qkv = qkv.reshape(batch, new_tokens, -1, config.head_dim)
        if config.qk_norm:
            qkv = self._normalise_queries_and_keys(value_of(qkv))
        if isinstance(cache, Int8Cache) and (context.rows is not None or new_tokens > MAX_DECODE_TOKENS):
            (mixed, cache), masses = self._read_into_int8(qkv, cache, context, view.window(config.sliding_window)), None
        else:
            with jax.named_scope("cache_write"):
                query, cache = self._write(qkv, cache, context)
            with jax.named_scope("attention"):
                mixed, masses = self._mix(query, cache, context, view=view, weigh=weigh)
        mixed = mixed.reshape(batch, new_tokens, -1)
        return self.output.partial_sums(mixed, view=view), cache, masses

    def _read_into_int8(
        self,
        qkv: Float[Array, "B T heads HD"] | PartialSums,
        cache: Int8Cache,
        context: TokenContext,
        window: int | None,
    ) -> tuple[Float[Array, "B T H HD"], Int8Cache]:
        """The attention of prompts, or of pieces of some, and the cache with their entries."""
        arrays = qkv, *context.rotations, cache
        if context.rows is None:
            places: Any = (context.lengths,)
            return pallas_kernels.prefill_int8(*arrays, *places, num_tokens=context.num_tokens, window=window)
        places = context.rows, context.lengths
        return pallas_kernels.prefill_pieces_int8(*arrays, *places, window=window, implementation=self.kernels)

    def _write(
        self, qkv: Float[Array, "B_all T heads HD"] | PartialSums, cache: LayerCache | Int8Cache, context: TokenContext
    ) -> tuple[Float[Array, "B_all T H HD"], LayerCache | Int8Cache]:
        """The rotated queries, and the cache with the new entries."""
        options: Any = {"implementation": self.kernels}
        if isinstance(cache, Int8Cache):
            return pallas_kernels.rotate_and_write_int8(qkv, *context.rotations, cache, context.lengths, **options)
        arrays = cache.keys, cache.values, context.lengths
        query, keys, values = pallas_kernels.rotate_and_write(
            qkv, *context.rotations, *arrays, rows=context.rows, **options
        )
        return query, LayerCache(keys, values)

    def _mix(
        self,
        query: Float[Array, "B_all T H HD"],
        cache: LayerCache | Int8Cache,
        context: TokenContext,
        *,
        view: View,
        weigh: int | None,
    ) -> tuple[Float[Array, "B_all T H HD"], Float32[Array, "B KH NB"] | None]:
        """What attention makes of the cache, and the masses of its blocks of ``weigh`` positions."""
        window = view.window(self.config.sliding_window)
        if context.rows is not None or query.shape[1] > MAX_DECODE_TOKENS:
            assert isinstance(cache, LayerCache)
            places = (context.rows, context.seen)
            attend = functools.partial(pallas_kernels.prefill_attention, window=window, implementation=self.kernels)
            return attend(query, cache.keys, cache.values, *places), None
        attend, with_masses, to_blocks = _attention_over(cache)
        held = (cache,) if isinstance(cache, Int8Cache) else (cache.keys, cache.values)
        arrays: Any = query, *held, context.seen
        options: Any = {"window": window, "implementation": self.kernels}
        if context.blocks is not None and context.layer is not None:
            return to_blocks(*arrays, context.blocks, context.layer, block_size=view.cache_block, **options), None
        if weigh is not None:
            return with_masses(*arrays, block_size=weigh, **options)
        return attend(*arrays, **options), None

    def _normalise_queries_and_keys(self, qkv: Float[Array, "B_all T heads HD"]) -> Float[Array, "B_all T heads HD"]:
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
        self, x: Float[Array, "B_all T D"] | QuantizedActivation, *, view: View
    ) -> Float[Array, "B_all T D"] | PartialSums:
        return self.down.partial_sums(self._gated(x, view), view=view)

    def _gated(
        self, x: Float[Array, "B_all T D"] | QuantizedActivation, view: View
    ) -> Float[Array, "B T F"] | QuantizedActivation:
        """The inputs of ``down``, as integers where it reads integers."""
        quantization = self.down.input_quantization(view)
        if self.down_hadamard is None:
            gated = self.gate_up.gated(x, view=view, quantization=quantization)
            if gated is not None:
                return gated
        gate_up = self.gate_up.partial_sums(x, view=view)
        if self.down_hadamard is None:
            if quantization is None:
                return pallas_kernels.swiglu(gate_up, implementation=other_kernels(self.down.kernels))
            return pallas_kernels.swiglu_quantize(gate_up, **quantization)
        gate_up = value_of(gate_up)
        if quantization is None:
            return pallas_kernels.swiglu_hadamard(
                gate_up, block=self.down_hadamard, implementation=other_kernels(self.down.kernels)
            )
        return pallas_kernels.swiglu_hadamard_quantize(gate_up, block=self.down_hadamard, **quantization)


class DecoderLayer(nnx.Module):
    """Pre-norm attention and MLP, each with a residual.

    Norms and ``silu(gate) * up`` are computed in the form that the linear after them reads.
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
        sum_over: str | None = None,
    ):
        anatomy = layer_anatomy(config)

        def linear(path: str) -> Linear:
            spec = anatomy.linears[path]
            return Linear(
                spec.num_inputs,
                spec.num_outputs,
                bias=spec.bias,
                weight_format=formats[path],
                quantization=quantization,
                kernels=kernels,
                dtype=dtype,
                layers=layers,
                sum_over=sum_over if spec.writes_stream else None,
            )

        def norm(path: str) -> RMSNorm:
            size = anatomy.norms[path]
            return RMSNorm(size, epsilon=config.rms_norm_eps, kernels=kernels, dtype=dtype, layers=layers)

        self.attention_norm = norm("attention_norm")
        self.attention = Attention(
            config, qkv=linear("attention.qkv"), output=linear("attention.output"), norm=norm, kernels=kernels
        )
        self.mlp_norm = norm("mlp_norm")
        self.mlp = MLP(
            gate_up=linear("mlp.gate_up"),
            down=linear("mlp.down"),
            down_hadamard=(config.hadamard_block or config.intermediate_size) if config.down_hadamard else None,
        )

    def __repr__(self) -> str:
        return f"DecoderLayer(qkv={self.attention.qkv}, gate_up={self.mlp.gate_up})"

    def rows_read(self, num_rows: int, *, view: View) -> int:
        """How many rows the products of so many read, see :meth:`Linear.rows_read`."""
        linears = self.attention.qkv, self.attention.output, self.mlp.gate_up, self.mlp.down
        return max(linear.rows_read(num_rows, view=view) for linear in linears)

    def __call__(
        self,
        stream: ResidualStream,
        cache: LayerCache | Int8Cache,
        context: TokenContext,
        *,
        view: View,
        weigh: int | None = None,
    ) -> tuple[ResidualStream, LayerCache | Int8Cache, Float32[Array, "B KH NB"] | None]:
        x, y = self.attention_norm.of_stream(stream, quantization=self.attention.qkv.input_quantization(view))
        attended, cache, masses = self.attention(y, cache, context, view=view, weigh=weigh)
        stream = ResidualStream(x, attended)
        x, y = self.mlp_norm.of_stream(stream, quantization=self.mlp.gate_up.input_quantization(view))
        return ResidualStream(x, self.mlp(y, view=view)), cache, masses
