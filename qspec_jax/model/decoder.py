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
import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float32, Int32

import pallas_kernels
from pallas_kernels import Int8Cache, QuantizedWeight, value_of
from pallas_kernels.dispatch import REFERENCE
from qspec_jax.device.mesh import MODEL
from qspec_jax.errors import UsageError
from qspec_jax.model import rope
from qspec_jax.model.blocks import DecoderLayer, ResidualStream, RMSNorm, TokenContext
from qspec_jax.model.cache import KV_OF_MODEL, KVCache, LayerCache
from qspec_jax.model.collectives import check_varying, current_mailbox, embed, is_bound, sending_to
from qspec_jax.model.config import ModelConfig, QuantConfig
from qspec_jax.model.fields import whole
from qspec_jax.model.head import empty_head, head_product
from qspec_jax.model.linear import WeightFormat, activation_quantization, complete_formats, in_pieces
from qspec_jax.model.parameters import check_activation_groups, layer_anatomy
from qspec_jax.model.precision import Precision
from qspec_jax.model.sharding import cached_config, local_config, local_formats
from qspec_jax.model.view import AHEAD, RECENT, View


class Decoder(nnx.Module):
    """A decoder-only language model.

    Attributes:
        config: of the whole model.
        split: devices that share it; each runs a smaller decoder (``sharding.py``), as which this one is called.
        axis: of the mesh that they are on; None for one device.
        kv: what its caches keep, one of ``KV_FORMATS``; to be set before any program is made.
        embedding: ``[V, D]``; also the LM head where the config ties them, unless ``head_bits`` are given.
        lm_head: ``[V, D]``, of its own; None where the config ties them, or ``head_bits`` are given.
        quantized_head: the LM head in 8 or 4 bits, that all views read (``head_bits``) or those with 4 bits for it.
        head_bits: of the head that verifies; None for floats.
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
        split: int = 1,
    ):
        """Allocates the parameters as zeros.

        Args:
            config: shape and options.
            quantization: how weights are stored and draft activations quantised; None for float weights.
            formats: the storage of single linears (by path in their layer) where it is not that of
                ``quantization``.
            kernels: implementation name for the operations of ``pallas_kernels``, None for the best that works.
            dtype: of embedding, norms, biases, LM head, cache and activations.
            scan_layers: stack the layers and scan over them (see the module docstring).
            split: devices that share the model; what is allocated is what one of them has.
        """
        self.config = config
        self.split = split
        self.axis = MODEL if split > 1 else None
        self.dtype = jnp.dtype(dtype)
        self.kv = KV_OF_MODEL
        self.scan_layers = scan_layers
        # Kernels of another name do not serve every dtype and number of rows of an LM head.
        self.head_kernels = REFERENCE if kernels == REFERENCE else None
        complete = local_formats(config, complete_formats(layer_anatomy(config).linears, quantization, formats), split)
        tied, local = config.tie_word_embeddings, local_config(config, split)
        count, leading = (1, (config.num_layers,)) if scan_layers else (config.num_layers, ())
        self.has_8_bits = any(one is not None and one.bits == 8 for one in complete.values())
        self.embedding = nnx.Param(jnp.zeros((local.vocab_size, config.hidden_size), dtype))
        self.layers = nnx.List(
            DecoderLayer(
                local,
                formats=complete,
                quantization=quantization,
                kernels=kernels,
                dtype=dtype,
                layers=leading,
                sum_over=self.axis,
            )
            for _ in range(count)
        )
        self.final_norm = RMSNorm(config.hidden_size, epsilon=config.rms_norm_eps, kernels=kernels, dtype=dtype)
        self.head_bits = None if quantization is None else quantization.head_bits
        kept = not tied and self.head_bits is None
        self.lm_head = nnx.Param(jnp.zeros((local.vocab_size, config.hidden_size), dtype)) if kept else None
        head = empty_head(local, quantization, formats, kernels=self.head_kernels, dtype=dtype)
        self.quantized_head = None if head is None else nnx.Param(head)

    def __repr__(self) -> str:
        config = self.config
        sizes = f"{config.num_layers} layers, hidden {config.hidden_size}, MLP {config.intermediate_size}"
        return f"Decoder({sizes}, {config.vocab_size} tokens, {self.dtype})"

    def create_cache(self, *, batch: int | Any, capacity: int | Any, num_blocks: int | Any = 0) -> KVCache:
        """An empty cache, arranged as the layers are; see :meth:`KVCache.create`.

        In the program of one of several devices it is that of this device, elsewhere that of all of them.

        Raises:
            UsageError: a size is no whole number that is known while a program is traced, or less than none.
        """
        given = {"batch": batch, "capacity": capacity, "num_blocks": num_blocks}
        sizes: Any = {name: whole(name, size) for name, size in given.items()}
        if negative := [name for name, size in sizes.items() if size < 0]:
            raise UsageError(f"{negative[0]}={sizes[negative[0]]} must be at least 0")
        is_local = self.axis is not None and is_bound(self.axis)
        config = (local_config if is_local else cached_config)(self.config, self.split)
        return KVCache.create(config, **sizes, dtype=self.dtype, stacked=self.scan_layers, kv=self.kv)

    def __call__(
        self,
        tokens: Int32[Array, "B T"] | Any,
        cache: KVCache | Any,
        *,
        precision: Precision | View | Any,
        logits_at: Int32[Array, " B"] | Any = None,
        idle: Bool[Array, " B"] | Any = None,
    ) -> tuple[Float32[Array, "B T_out V"], KVCache]:
        """:meth:`run` without masses.

        Raises:
            UsageError: as of :meth:`run`; or the tokens are of another shape or dtype, of more or fewer sequences than
                the cache has, or all of their logits are wanted and they are more than its positions; or ``cache`` is
                none; or ``logits_at`` or ``idle`` are of another shape or dtype; or a ``jax.shard_map`` checks what
                varies: use ``check_vma=False``.
        """
        _check_tokens(tokens, cache, padded=logits_at is not None)
        check_varying(tokens, cache)
        _check_of_each("logits_at", logits_at, tokens.shape[0], jnp.integer, "whole numbers, [B] int32")
        _check_of_each("idle", idle, tokens.shape[0], jnp.bool_, "truth values, [B] bool")
        logits, cache, _ = self.run(tokens, cache, precision=precision, logits_at=logits_at, idle=idle)
        return logits, cache

    def run(
        self,
        tokens: Int32[Array, "B T"],
        cache: KVCache,
        *,
        precision: Precision | View,
        logits_at: Int32[Array, " B"] | None = None,
        weigh: int | None = None,
        idle: Bool[Array, " B"] | None = None,
    ) -> tuple[Float32[Array, "B T_out V"], KVCache, Float32[Array, "B L KH NB"] | None]:
        """Runs ``T`` new tokens of each sequence, the first of which takes position ``cache.lengths``.

        Args:
            tokens: the new tokens. Sequences with fewer than ``T`` are padded on the right; the caller
                then corrects the lengths (``cache.with_lengths``).
            cache: its positions ``lengths .. lengths + T - 1`` are overwritten.
            precision: what the pass reads: one of the usual precisions, or any view; static.
            logits_at: index into ``T`` of the one token per sequence whose logits are wanted; padding comes after it.
            weigh: positions of the blocks whose masses are wanted; static.
            idle: sequences whose results nobody reads. Attention reads as little of them as of an empty sequence.

        Returns:
            float32 logits (``T_out = T``, or 1 with ``logits_at``), of the tokens of the vocabulary that this device
            has; the cache with ``lengths + T``, and the masses of its blocks
            (``pallas_kernels.decode_attention_with_masses``) or None.

        Raises:
            UsageError: several devices share the model, and this is not the program of one of them; or the view reads
                weights that the model has not.
        """
        self._check_axis()
        view = View.of(precision)
        self.check_view(view)
        with _exact_float32(self.dtype):
            context = self._context(tokens, cache, view, logits_at=logits_at, idle=idle)
            stream, layers, masses = self._hidden(
                self._in_whole_tiles(tokens, view), cache, context, view=view, weigh=weigh
            )
            batch, num_tokens = tokens.shape
            cache = dataclasses.replace(cache, layers=layers, lengths=cache.lengths + num_tokens)
            if logits_at is not None:
                stream = ResidualStream(jnp.take_along_axis(stream.value()[:batch], logits_at[:, None, None], axis=1))
            # Behind the head, which does not signal as the norm before it does (backends/early_launch.py).
            return self._logits(stream, view)[:batch], cache, masses

    def read_pieces(
        self,
        tokens: Int32[Array, "N T"],
        cache: KVCache,
        *,
        rows: Int32[Array, " N"],
        starts: Int32[Array, " N"],
        ends: Int32[Array, " P"],
        view: View,
    ) -> tuple[Float32[Array, "P 1 V"], KVCache]:
        """Reads pieces of prompts, of several rows of the cache at once; a long prompt may be several of them.

        A token attends to its own row alone: to what is there before ``starts`` of its first piece, and to its pieces.
        Those of a chunk stand side by side. For a cache of int8 a chunk starts where one of its blocks does.

        Args:
            tokens: of each piece, padded on the right where its prompt ends.
            cache: whose positions ``starts .. starts + T - 1`` of ``rows`` are overwritten. Its lengths stay.
            rows: of each piece; negative for one of nothing.
            starts: position of the first token of each piece.
            ends: the tokens whose logits are wanted, as places in ``N * T``.
            view: what the pass reads, all of the cache.

        Returns:
            float32 logits of the tokens that are wanted, and the cache.
        """
        self._check_axis()
        positions = starts[:, None] + jnp.arange(tokens.shape[1], dtype=jnp.int32)
        rotations = rope.rotation(positions, self.config)
        with _exact_float32(self.dtype):
            context = TokenContext(lengths=starts, seen=starts, rotations=rotations, rows=rows)
            stream, layers, _ = self._hidden(tokens, cache, context, view=view, weigh=None)
            wanted = stream.value().reshape(-1, self.config.hidden_size)[ends]
            logits = self._logits(ResidualStream(wanted[:, None]), view)
            return logits, dataclasses.replace(cache, layers=layers)

    def _check_axis(self) -> None:
        if self.axis is not None and not is_bound(self.axis):
            raise UsageError(
                f"this decoder is on a mesh ({self.axis}={self.split}), whose programs run it: use the methods of "
                "LanguageModel, or load the model without a mesh to call it"
            )

    def _logits(self, stream: ResidualStream, view: View) -> Float32[Array, "B_all T V"]:
        with jax.named_scope("lm_head"):
            _, y = self.final_norm.of_stream(stream, quantization=None)
            assert isinstance(y, jax.Array)
            multiply = functools.partial(head_product, self.head_for(view), implementation=self.head_kernels)
            return value_of(in_pieces(multiply, y))

    def check_view(self, view: View) -> None:
        """Refuses a view that would read other weights than its name says. A float weight refuses codes itself.

        Raises:
            UsageError: it reads 8-bit weights, or an LM head in 4 bits, and there are none; or groups of activations
                that do not fit the model.
        """
        if (quantization := self.layers[0].attention.qkv.quantization) is not None:
            activations = activation_quantization(quantization, view)
            check_activation_groups(self.config, activations, what=f"view {view.name}")
        if view.weight_bits == 8 and not self.has_8_bits:
            raise UsageError(
                f"view {view.name} reads 8-bit weights, which this model has not; load it with verify='w8a16', or use "
                "Precision.W4A16"
            )
        if view.head_bits is not None and self.quantized_head is None:
            raise UsageError(
                f"view {view.name} reads an LM head of {view.head_bits} bits, which this model has not; load it with "
                "QuantConfig(draft_head=4)"
            )

    def head_for(self, view: View) -> Array | QuantizedWeight:
        """The LM head that a view reads.

        Raises:
            UsageError: the model has not what the view reads.
        """
        self.check_view(view)
        if view.head_bits is None and self.head_bits is None:
            return (self.embedding if self.lm_head is None else self.lm_head).get_value()
        assert self.quantized_head is not None
        head = self.quantized_head.get_value()
        return head if view.head_bits is None else pallas_kernels.upper_nibbles(head)

    def with_chosen_blocks(self, cache: KVCache, masses: Float32[Array, "B L KH NB"], *, view: View) -> KVCache:
        """The cache with the blocks that a view with a budget reads from now on, by the masses of :meth:`run`."""
        blocks = pallas_kernels.choose_blocks(
            masses,
            cache.lengths,
            num_blocks=view.num_blocks,
            block_size=view.cache_block,
            recent=RECENT,
            ahead=AHEAD,
            implementation=self.layers[0].attention.kernels,
        )
        if view.cache_full_below:
            is_short = cache.lengths < view.cache_full_below
            blocks = jnp.where(is_short[:, None, None, None], pallas_kernels.EVERYTHING, blocks)
        return dataclasses.replace(cache, blocks=blocks)

    def _context(
        self,
        tokens: Int32[Array, "B T"],
        cache: KVCache,
        view: View,
        *,
        logits_at: Int32[Array, " B"] | None,
        idle: Bool[Array, " B"] | None,
    ) -> TokenContext:
        positions = cache.lengths[:, None] + jnp.arange(tokens.shape[1], dtype=jnp.int32)
        return TokenContext(
            lengths=cache.lengths,
            seen=cache.lengths if idle is None else jnp.where(idle, 0, cache.lengths),
            rotations=rope.rotation(positions, self.config),
            blocks=None if view.cache_budget is None else cache.blocks,
            num_tokens=None if logits_at is None else logits_at + 1,
        )

    def _in_whole_tiles(self, tokens: Int32[Array, "B T"], view: View) -> Int32[Array, "B_all T"]:
        """The tokens, and those of further sequences that make up the rows which the kernels of all linears read.

        Each of them would copy its rows otherwise. They still do where no number of whole sequences has as many rows.
        """
        further = self.sequences_run(*tokens.shape, view=view) - tokens.shape[0]
        return jnp.pad(tokens, ((0, further), (0, 0))) if further else tokens

    def sequences_run(self, batch: int, num_tokens: int, *, view: View) -> int:
        """Of how many sequences the layers compute so many tokens each: of those given, and of some for whole tiles."""
        rows = self.layers[0].rows_read(batch * num_tokens, view=view)
        return batch if rows % num_tokens else rows // num_tokens

    def _hidden(
        self, tokens: Int32[Array, "B_all T"], cache: KVCache, context: TokenContext, *, view: View, weigh: int | None
    ) -> tuple[
        ResidualStream, tuple[LayerCache | Int8Cache, ...] | LayerCache | Int8Cache, Float32[Array, "B L KH NB"] | None
    ]:
        """The stream after all layers, what they wrote, and the masses."""
        stream = ResidualStream(embed(self.embedding.get_value(), tokens, self.axis))
        if not isinstance(cache.layers, tuple):
            stream, layers, masses = self._scan(stream, cache.layers, context, view=view, weigh=weigh)
        else:
            written, weighed = [], []
            for index, (layer, layer_cache) in enumerate(zip(self.layers, cache.layers, strict=True)):
                graph, parameters = nnx.split(layer)
                of_layer = context.of_layer(jnp.int32(index))
                arguments = parameters, stream, layer_cache, of_layer, view, weigh, current_mailbox()
                stream, layer_cache, masses = _run_layer(graph, *arguments)
                written.append(layer_cache)
                weighed.append(masses)
            layers = tuple(written)
            masses = None if weigh is None else jnp.stack(weighed, axis=1)
        return stream, layers, masses

    def _scan(
        self,
        stream: ResidualStream,
        stacked: LayerCache | Int8Cache,
        context: TokenContext,
        *,
        view: View,
        weigh: int | None,
    ) -> tuple[ResidualStream, LayerCache | Int8Cache, Float32[Array, "B L KH NB"] | None]:
        graph, parameters = nnx.split(self.layers[0])

        # The cache travels in the carry and is updated in place; as a scan output it would be copied.
        def one_layer(carry: tuple[Array, LayerCache | Int8Cache], inputs: tuple[Array, nnx.State]):
            x, stacked = carry
            index, layer_parameters = inputs
            layer_cache = jax.tree.map(lambda a: lax.dynamic_index_in_dim(a, index, keepdims=False), stacked)
            layer = nnx.merge(graph, layer_parameters)
            stream, layer_cache, masses = layer(
                ResidualStream(x), layer_cache, context.of_layer(index), view=view, weigh=weigh
            )
            stacked = jax.tree.map(
                lambda all_layers, one: lax.dynamic_update_index_in_dim(all_layers, one, index, 0), stacked, layer_cache
            )
            return (stream.value(), stacked), masses

        indices = jnp.arange(self.config.num_layers, dtype=jnp.int32)
        (x, stacked), masses = lax.scan(one_layer, (stream.value(), stacked), (indices, parameters))
        return ResidualStream(x), stacked, None if masses is None else jnp.moveaxis(masses, 0, 1)


# A jit of its own, so that layers that are alike are traced and lowered once.
@functools.partial(jax.jit, static_argnums=(0, 5, 6))
def _run_layer(
    graph: nnx.GraphDef[DecoderLayer],
    parameters: nnx.State,
    stream: ResidualStream,
    cache: LayerCache | Int8Cache,
    context: TokenContext,
    view: View,
    weigh: int | None,
    mailbox: Any,  # an argument, since what was traced once serves others as well
) -> tuple[ResidualStream, LayerCache | Int8Cache, Float32[Array, "B KH NB"] | None]:
    with sending_to(mailbox):
        return nnx.merge(graph, parameters)(stream, cache, context, view=view, weigh=weigh)


def _exact_float32(dtype: DTypeLike) -> contextlib.AbstractContextManager[object]:
    """In float32, keeps accelerators from rounding matmul operands to tf32 or bf16."""
    return jax.default_matmul_precision("highest") if dtype == jnp.float32 else contextlib.nullcontext()


def abstract_decoder(
    config: ModelConfig,
    *,
    quantization: QuantConfig | None,
    formats: Mapping[str, WeightFormat] | None,
    dtype: DTypeLike = jnp.float32,
    scan_layers: bool = True,
    kernels: str | None = None,
    split: int = 1,
) -> Decoder:
    """A decoder of shapes and dtypes; its parameters take no memory. With ``split``, that of one of so many devices."""

    def build() -> Decoder:
        return Decoder(
            config,
            quantization=quantization,
            formats=formats,
            kernels=kernels,
            dtype=dtype,
            scan_layers=scan_layers,
            split=split,
        )

    return nnx.eval_shape(build)


def _check_of_each(name: str, given: Any, batch: int, kind: Any, allowed: str) -> None:
    """Refuses what is no array with a value of each sequence: JAX would take one value for all of them."""
    if given is None:
        return
    shape, dtype = getattr(given, "shape", None), getattr(given, "dtype", None)
    if shape != (batch,) or dtype is None or not jnp.issubdtype(dtype, kind):
        what = type(given).__name__ if dtype is None else f"{dtype}{list(shape or ())}"
        raise UsageError(f"{name} is {what}; use an array of {allowed}, of B={batch} sequences")


def _check_tokens(tokens: Any, cache: Any, *, padded: bool) -> None:
    """Refuses what JAX would take and drop: tokens behind the last position, and rows of other sequences."""
    if not isinstance(cache, KVCache):
        raise UsageError(f"cache is {type(cache).__name__}; use what create_cache or the call before returned")
    shape, dtype = getattr(tokens, "shape", None), getattr(tokens, "dtype", None)
    if shape is None or dtype is None or len(shape) != 2 or not jnp.issubdtype(dtype, jnp.integer):
        what = type(tokens).__name__ if shape is None else f"{dtype}{list(shape)}"
        raise UsageError(f"tokens is {what}; use an array of whole numbers, [B, T] int32")
    batch, capacity = cache.lengths.shape[0], cache.capacity
    if shape[0] != batch:
        raise UsageError(f"tokens has {shape[0]} sequences and the cache {batch}; create_cache(batch={shape[0]}, ...)")
    if shape[1] > capacity and not padded:
        raise UsageError(f"tokens has {shape[1]} tokens and the cache {capacity} positions; raise its capacity")


def num_bytes(decoder: Decoder) -> int:
    """Bytes of a decoder's parameters, real or abstract."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(nnx.state(decoder)))
