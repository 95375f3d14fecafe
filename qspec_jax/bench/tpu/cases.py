"""What ``bench tpu`` compiles: the kernels at the shapes of a model's decode, and what they have to read and write."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

import pallas_kernels
from pallas_kernels import Int8Cache, Layout, QuantizedActivation, QuantizedWeight
from pallas_kernels.block_attention import tpu as block_attention
from pallas_kernels.decode_attention import tpu as attention
from pallas_kernels.decode_attention_int8 import tpu as int8_attention
from pallas_kernels.rotate_and_write import tpu as rotation
from pallas_kernels.rotate_and_write_int8 import tpu as int8_writing
from qspec_jax.bench.presets import distinct, linear_shapes
from qspec_jax.model.config import ModelConfig

_WRITTEN = 32  # slots of the tiles that new tokens fall into, at most two, read and written

_BLOCKS = (16, 64)  # slots of a block
_BUDGET = 512  # slots that a draft reads of a longer cache

OPS = ("w4a16", "w8a16", "w4a8", "attention", "masses", "blocks", "write", "hadamard", "head")
OPS += ("attention-int8", "masses-int8", "write-int8")


@dataclasses.dataclass(frozen=True)
class Case:
    """A call to compile.

    Attributes:
        op: one of :data:`OPS`.
        shape: for people.
        function, args, options: as for :func:`qspec_jax.bench.tpu.compiler.compile_for`.
        num_bytes: that cross the memory's bus in one call.
    """

    op: str
    shape: str
    function: Callable[..., Any]
    args: tuple[Any, ...]
    num_bytes: int
    options: dict[str, Any] = dataclasses.field(default_factory=dict)


def cases(config: ModelConfig, *, rows: int, context: int, group_size: int, tokens: int) -> Iterator[Case]:
    """Of a decode of ``rows`` sequences, whose attention is of ``tokens`` new tokens over a full cache."""
    yield from _matmuls(config, rows=rows, group_size=group_size)
    width = config.num_kv_heads * config.head_dim
    cache, new = (_array(rows, length, width, dtype="bfloat16") for length in (context, tokens))
    query = _array(rows, tokens, config.num_heads, config.head_dim, dtype="bfloat16")
    lengths = _array(rows, dtype="int32")
    shape = f"{rows} x {tokens} tokens, {context} slots"
    attend = functools.partial(attention.attend, window=None)
    args, num_bytes = (query, cache, cache, lengths), _bytes((query, query, cache, cache))
    yield Case("attention", shape, attend, args, num_bytes)
    weigh = functools.partial(attention.attend_and_weigh, block_size=_BLOCKS[0], window=None)
    masses = 4 * rows * config.num_kv_heads * -(-context // _BLOCKS[0])
    yield Case("masses", shape, weigh, args, num_bytes + masses)
    yield from (_blocks(config, cache, lengths, block_size) for block_size in _BLOCKS)
    written = 4 * rows * _WRITTEN * width * cache.dtype.itemsize  # keys and values, to and fro
    donated = {"donate_argnums": (0, 1)}
    yield Case("write", shape, rotation.write, (cache, cache, new, new, lengths), written, donated)
    yield from _int8(config, query, context, shape)
    x = _array(rows, config.intermediate_size, dtype="bfloat16")
    yield Case("hadamard", f"{rows} x {x.shape[1]}", pallas_kernels.hadamard, (x,), 2 * _bytes(x))
    x, weight = (_array(n, config.hidden_size, dtype="bfloat16") for n in (rows, config.vocab_size))
    logits = 4 * rows * config.vocab_size
    shape = f"{rows} x {config.hidden_size} x {config.vocab_size}"
    yield Case("head", shape, pallas_kernels.float_matmul, (x, weight), _bytes((x, weight)) + logits)


def _int8(config: ModelConfig, query: Any, context: int, shape: str) -> Iterator[Case]:
    """The same over a cache of int8."""
    (rows, tokens, *_), heads, head_dim = query.shape, config.num_kv_heads, config.head_dim
    sizes: Any = {"num_kv_heads": heads, "head_dim": head_dim, "dtype": query.dtype}
    cache = jax.eval_shape(lambda: Int8Cache.zeros(batch=rows, capacity=context, **sizes))
    new, lengths = _array(rows, tokens, heads, head_dim, dtype="bfloat16"), _array(rows, dtype="int32")
    args, num_bytes = (query, cache, lengths), _bytes((query, query, cache))
    attend = functools.partial(int8_attention.decode_attention_int8, window=None)
    yield Case("attention-int8", shape, attend, args, num_bytes)
    weigh = functools.partial(int8_attention.decode_attention_int8_with_masses, block_size=_BLOCKS[0], window=None)
    masses = 4 * rows * heads * -(-context // _BLOCKS[0])
    yield Case("masses-int8", shape, weigh, args, num_bytes + masses)
    # To and fro: two tiles of values and of the ring, one of scales of either kind. No block becomes whole.
    width = heads * head_dim
    written = 2 * rows * (2 * 32 * width + 2 * 16 * 2 * width + 8 * 4 * width + 4 * heads * 128)
    donated = {"donate_argnums": (0,)}
    yield Case("write-int8", shape, int8_writing.write, (cache, new, new, lengths), written, donated)


def _blocks(config: ModelConfig, cache: Any, lengths: Any, block_size: int) -> Case:
    """Attention of one new token to the blocks that a draft with a budget reads."""
    rows, context, width = cache.shape
    entries = -(-min(_BUDGET, context) // block_size)
    query = _array(rows, 1, config.num_heads, config.head_dim, dtype="bfloat16")
    tables = _array(rows, config.num_layers, config.num_kv_heads, entries, dtype="int32")
    attend = functools.partial(block_attention.attend, block_size=block_size, window=None)
    args = query, cache, cache, lengths, tables, _array(dtype="int32")
    read = 2 * rows * min(entries * block_size, context) * width * cache.dtype.itemsize
    shape = f"{rows} x {entries} blocks of {block_size}"
    return Case("blocks", shape, attend, args, _bytes((query, query)) + read)


def _matmuls(config: ModelConfig, *, rows: int, group_size: int) -> Iterator[Case]:
    multiply = functools.partial(pallas_kernels.w4a4_matmul, dtype=jnp.bfloat16)
    for linear in distinct(linear_shapes(config)):
        shape = f"{rows} x {linear}"
        weight, outputs = _weight(linear.k, linear.n, group_size), 2 * rows * linear.n
        x = _array(rows, linear.k, dtype="bfloat16")
        for op, one in (("w4a16", weight), ("w8a16", dataclasses.replace(weight, low=weight.packed))):
            yield Case(op, shape, pallas_kernels.w4a16_matmul, (x, one), _bytes((x, one)) + outputs)
        codes, scale = _array(rows, linear.k, dtype="int8"), _array(rows, 1, dtype="float32")
        x = QuantizedActivation(codes, scale, None, bits=8)
        yield Case("w4a8", shape, multiply, (x, weight), _bytes((x, weight)) + outputs)


def _weight(k: int, n: int, group_size: int) -> QuantizedWeight:
    scale = _array(k // group_size, n, dtype="float16")
    return QuantizedWeight(_array(n, k // 2, dtype="uint8"), scale, None, None, Layout.PLANES)


def _array(*shape: int, dtype: str) -> Any:
    return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))


def _bytes(tree: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
