"""``decode_attention`` as a Pallas kernel for TPUs, compiled for v5e, v6e and 7x; no TPU has run it.

Blocks of slots pass through the programs of a sequence, with an online softmax in float32. Blocks that no token sees
are neither copied nor computed: the lengths are there before blocks are asked for (scalar prefetch), and a block that
is asked for twice is copied once. Heads lie side by side in lanes. Where several share 128 lanes, a query has zeros in
the lanes of the others, and of its result those lanes are dropped: nothing is ever shuffled.

It reads caches ``[B, S, KH * HD]``. In those of four axes a TPU pads and interleaves heads, and XLA copies the whole
cache before each call.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Float32, Int32

from pallas_kernels.backends.tpu.dots import dot
from pallas_kernels.decode_attention import reference
from pallas_kernels.decode_attention.tpu_masses import Weighing
from pallas_kernels.decode_attention.tpu_sizes import LANES as LANES
from pallas_kernels.decode_attention.tpu_sizes import Sizes as Sizes

UNSEEN = -1e30  # finite: exp(UNSEEN - UNSEEN) of a block that a row does not see must not be NaN


def obstacle(num_tokens: int, head_dim: int, dtype: jnp.dtype | None = None) -> str | None:
    """Why this kernel cannot serve a call, as the end of a sentence; None if it can."""
    if dtype == jnp.float16:
        return "needs float32 or bfloat16: a TPU does not load float16"
    if num_tokens > reference.MAX_DECODE_TOKENS:
        return f"needs at most {reference.MAX_DECODE_TOKENS} tokens per sequence; these are {num_tokens}"
    if head_dim > 256:
        return f"needs a head dimension of at most 256; this is {head_dim}"
    return None


def decode_attention(
    query: Float[Array, "B T H HD"],
    keys: Float[Array, "B S KH HD"],
    values: Float[Array, "B S KH HD"],
    lengths: Int32[Array, " B"],
    *,
    window: int | None,
    interpret: Any = False,
) -> Float[Array, "B T H HD"]:
    """See the public function."""
    flat = [array.reshape(*array.shape[:2], -1) for array in (keys, values)]
    return attend(query, *flat, lengths, window=window, interpret=interpret)


def decode_attention_with_masses(
    query: Float[Array, "B T H HD"],
    keys: Float[Array, "B S KH HD"],
    values: Float[Array, "B S KH HD"],
    lengths: Int32[Array, " B"],
    *,
    block_size: int,
    window: int | None,
    interpret: Any = False,
) -> tuple[Float[Array, "B T H HD"], Float32[Array, "B KH NB"]]:
    """See the public function. XLA weighs blocks that do not fit the kernel's, and reads the keys a second time."""
    flat = [array.reshape(*array.shape[:2], -1) for array in (keys, values)]
    sizes = Sizes.of(query, flat[0], window)
    if sizes.weighing(block_size).is_served:
        return attend_and_weigh(query, *flat, lengths, block_size=block_size, window=window, interpret=interpret)
    arrays = query, keys, values, lengths
    _, masses = reference.decode_attention_with_masses(*arrays, block_size=block_size, window=window)
    return decode_attention(*arrays, window=window, interpret=interpret), masses


class CacheReader(NamedTuple):
    """How the kernel reads a cache.

    Attributes:
        arrays: of the cache.
        specs: the blocks of each that a step reads.
        add_tile: takes references to these blocks, a tile's number and its queries, maxima, sums and totals, a block of
            slots, the length, and sizes; adds the slots, and returns what :func:`add_logits` does.
        name: of the kernel, as profiles show it.
        newest: a function of a block, the length and sizes, and what takes the place of ``add_tile`` where it is true;
            None where all blocks are alike.
    """

    arrays: Sequence[Array]
    specs: Sequence[pl.BlockSpec]
    add_tile: Callable[..., tuple[Array, Array]]
    name: str
    newest: tuple[Callable[..., Array], Callable[..., tuple[Array, Array]]] | None = None


@functools.partial(jax.jit, static_argnames=("window", "interpret"))
def attend(
    query: Float[Array, "B T H HD"],
    keys: Float[Array, "B S W"],
    values: Float[Array, "B S W"],
    lengths: Int32[Array, " B"],
    *,
    window: int | None,
    interpret: Any = False,
) -> Float[Array, "B T H HD"]:
    """Attention over caches whose heads lie side by side."""
    sizes = Sizes.of(query, keys, window)
    return call(query, _reader(keys, values, sizes), lengths, sizes, None, interpret=interpret)[0]


@functools.partial(jax.jit, static_argnames=("block_size", "window", "interpret"))
def attend_and_weigh(
    query: Float[Array, "B T H HD"],
    keys: Float[Array, "B S W"],
    values: Float[Array, "B S W"],
    lengths: Int32[Array, " B"],
    *,
    block_size: int,
    window: int | None,
    interpret: Any = False,
) -> tuple[Float[Array, "B T H HD"], Float32[Array, "B KH NB"]]:
    """The same, and the masses of blocks."""
    sizes = Sizes.of(query, keys, window)
    weighing = sizes.weighing(block_size)
    out, masses = call(query, _reader(keys, values, sizes), lengths, sizes, weighing, interpret=interpret)
    return out, weighing.by_heads(masses, sizes.num_kv)


def _reader(keys: Array, values: Array, sizes: Sizes) -> CacheReader:
    return CacheReader((keys, values), [slots_spec(sizes)] * 2, _add_tile, "decode_attention")


def slots_spec(sizes: Sizes) -> pl.BlockSpec:
    """The slots of a step, of an array ``[B, S, KH * HD]``."""
    shape = None, sizes.block, sizes.num_kv * sizes.head_dim
    return pl.BlockSpec(shape, lambda b, s, lengths: (b, sizes.block_of_step(lengths[b], s), 0))


def whole_spec(*shape: int) -> pl.BlockSpec:
    """All that an array has of a sequence."""
    return pl.BlockSpec((None, *shape), lambda b, s, lengths: (b, *(0 for _ in shape)))


def call(
    query: Array, reader: CacheReader, lengths: Array, sizes: Sizes, weighing: Weighing | None, *, interpret: Any
) -> list[Array]:
    """The kernel's results: attention and, where something weighs, masses."""
    batch = query.shape[0]
    tiles = (sizes.num_tiles, sizes.share * sizes.padded)
    scratch = [pltpu.VMEM((*tiles, width), jnp.float32) for width in (LANES, LANES, sizes.width)]
    out_shapes: list[tuple[tuple[int, ...], Any]] = [((*tiles, sizes.width), query.dtype)]
    if weighing is not None:
        out_shapes.append((weighing.masses_shape, jnp.float32))
        scratch.append(pltpu.VMEM(weighing.sums_shape, jnp.float32))
    about = {"sizes": sizes, "weighing": weighing, "num_arrays": len(reader.arrays)}
    results: Any = pl.pallas_call(
        functools.partial(_kernel, reader=reader._replace(arrays=reader.arrays[:0]), **about),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(batch, sizes.num_steps),
            in_specs=[whole_spec(*tiles, sizes.width), *reader.specs],
            out_specs=[whole_spec(*shape) for shape, _ in out_shapes],
            scratch_shapes=scratch,
        ),
        out_shape=[jax.ShapeDtypeStruct((batch, *shape), dtype) for shape, dtype in out_shapes],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        interpret=interpret,
        name=reader.name,
    )(lengths, to_tiles(query, sizes), *reader.arrays)
    return [from_tiles(results[0], sizes).reshape(query.shape), *results[1:]]


def to_tiles(query: Array, sizes: Sizes) -> Array:
    """``[B, tiles, share * padded, width]``: row ``t * group + g`` of a head, in the lanes of its keys."""
    batch, num_kv = query.shape[0], sizes.num_kv
    query = query.reshape(batch, sizes.num_tokens, num_kv, sizes.group, sizes.head_dim).transpose(0, 2, 1, 3, 4)
    query = query.reshape(batch, num_kv, sizes.rows, sizes.head_dim)
    missing = sizes.num_tiles * sizes.share - num_kv
    query = jnp.pad(query, ((0, 0), (0, missing), (0, sizes.padded - sizes.rows), (0, 0)))
    query = query.reshape(batch, sizes.num_tiles, sizes.share, sizes.padded, sizes.head_dim)
    own = jnp.eye(sizes.share, dtype=query.dtype)
    query = query[:, :, :, :, None, :] * own[:, None, :, None]
    return query.reshape(batch, sizes.num_tiles, sizes.share * sizes.padded, sizes.width)


def from_tiles(out: Array, sizes: Sizes) -> Array:
    """``[B, T, KH, group, HD]``, each head from its own lanes."""
    batch = out.shape[0]
    out = out.reshape(batch, sizes.num_tiles, sizes.share, sizes.padded, sizes.share, sizes.head_dim)
    out = jnp.stack([out[:, :, head, :, head] for head in range(sizes.share)], axis=2)
    out = out.reshape(batch, sizes.num_tiles * sizes.share, sizes.padded, sizes.head_dim)
    out = out[:, : sizes.num_kv, : sizes.rows]
    out = out.reshape(batch, sizes.num_kv, sizes.num_tokens, sizes.group, sizes.head_dim)
    return out.transpose(0, 2, 1, 3, 4)


def _kernel(
    lengths_ref,  # [B] int32
    query_ref,  # [tiles, share * padded, width]
    # the cache's; as the queries; masses; [tiles, share * padded, 128] f32, the same in all lanes: maxima, sums; totals
    *refs,
    num_arrays: int,
    reader: CacheReader,
    sizes: Sizes,
    weighing: Weighing | None,
):
    cache_refs, refs = refs[:num_arrays], refs[num_arrays:]
    out_ref, *masses_ref = refs[: 1 if weighing is None else 2]
    max_ref, sum_ref, total_ref, *block_sums_ref = refs[1 + len(masses_ref) :]
    step = pl.program_id(1)
    length = lengths_ref[pl.program_id(0)]
    block = sizes.first_block(length) + step

    @pl.when(step == 0)
    def _():
        max_ref[...] = jnp.full_like(max_ref, UNSEEN)
        for ref in (sum_ref, total_ref, *block_sums_ref):
            ref[...] = jnp.zeros_like(ref)

    def add_block(add_tile: Callable[..., tuple[Array, Array]]) -> None:
        belongs: Any = None if weighing is None else weighing.belongs(block)
        for tile in range(sizes.num_tiles):
            lanes = sizes.lanes(tile)
            state = max_ref.at[tile], sum_ref.at[tile], total_ref.at[tile]
            query = query_ref[tile][:, : lanes.stop - lanes.start]
            weights, kept = add_tile(cache_refs, tile, query, state, block, length, sizes)
            if weighing is not None:
                weighing.add(block_sums_ref[0].at[tile], weights, kept, belongs, block)

    is_seen = block <= sizes.last_block(length)
    if reader.newest is None:
        pl.when(is_seen)(lambda: add_block(reader.add_tile))
    else:
        has_newest, add_newest = reader.newest
        newest = has_newest(block, length, sizes)
        pl.when(is_seen & ~newest)(lambda: add_block(reader.add_tile))
        pl.when(is_seen & newest)(lambda: add_block(add_newest))

    @pl.when(step == pl.num_programs(1) - 1)
    def _():
        for tile in range(sizes.num_tiles):
            total = sum_ref[tile][:, :1]
            # A row that sees nothing gets zeros.
            out_ref[tile] = (total_ref[tile] / jnp.where(total > 0, total, 1.0)).astype(out_ref.dtype)
            if weighing is not None:
                weighing.finish(masses_ref[0].at[tile], block_sums_ref[0].at[tile], total)


def _add_tile(refs, tile: int, query, state, block, length, sizes: Sizes) -> tuple[Array, Array]:
    """As :class:`CacheReader` says, of keys and values as they are."""
    keys, values = (ref[:, sizes.lanes(tile)] for ref in refs)
    seen = sizes.seen(block, length, (query.shape[0], keys.shape[0]))
    if sizes.slots % sizes.block:  # what is copied beyond the last slot may be anything, NaN too
        inside = block * sizes.block + lax.broadcasted_iota(jnp.int32, values.shape, 0) < sizes.slots
        values = jnp.where(inside, values.astype(jnp.float32), 0.0).astype(values.dtype)
    return add_slots(state, query, keys, values, seen, sizes)


def add_slots(state, query, keys, values, seen, sizes: Sizes) -> tuple[Array, Array]:
    """Adds slots, as :func:`add_logits` does."""
    return add_logits(state, dot(query, keys, contract=(1, 1)), values, seen, sizes)


def add_logits(state, logits, values, seen, sizes: Sizes, *, value_scales: Array | None = None) -> tuple[Array, Array]:
    """Adds slots to maxima, sums and totals of a tile's rows; values that are not seen must not be NaN.

    Args:
        state: references to these three.
        logits: ``[rows, slots]``, not yet divided by the root of the head dimension.
        values: ``[slots, width]``.
        seen: which of the slots a row sees.
        sizes: of the call.
        value_scales: ``[rows, slots]``, which multiply the values.

    Returns:
        exponentials of the slots, relative to the largest logit so far, and what scales earlier ones to it.
    """
    max_ref, sum_ref, total_ref = state
    logits = jnp.where(seen, logits * jnp.float32(sizes.head_dim**-0.5), UNSEEN)
    largest = max_ref[:, :1]
    new_largest = jnp.maximum(largest, jnp.max(logits, axis=1, keepdims=True))
    weights = jnp.where(seen, jnp.exp(logits - new_largest), 0.0)
    kept = jnp.exp(largest - new_largest)
    scaled = weights if value_scales is None else jnp.where(seen, weights * value_scales, 0.0)
    update = dot(scaled.astype(values.dtype), values)
    total = kept * sum_ref[:, :1] + jnp.sum(weights, axis=1, keepdims=True)
    sum_ref[...] = jnp.broadcast_to(total, sum_ref.shape)
    max_ref[...] = jnp.broadcast_to(new_largest, max_ref.shape)
    total_ref[:, : values.shape[1]] = kept * total_ref[:, : values.shape[1]] + update
    return weights, kept
