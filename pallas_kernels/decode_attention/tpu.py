"""``decode_attention`` as a Pallas kernel for TPUs, compiled for v5e, v6e and 7x; no TPU has run it.

Blocks of slots pass through the programs of a sequence, with an online softmax in float32. Blocks that no token sees
are neither copied nor computed: the lengths are there before blocks are asked for (scalar prefetch), and a block that
is asked for twice is copied once. Heads lie side by side in lanes. Where several share 128 lanes, a query has zeros in
the lanes of the others, and of its result those lanes are dropped: nothing is ever shuffled.

It reads caches ``[B, S, KH * HD]``. In those of four axes a TPU pads and interleaves heads, and XLA copies the whole
cache before each call.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Float32, Int32

from pallas_kernels.decode_attention import reference
from pallas_kernels.decode_attention.tpu_masses import Weighing

LANES = 128
_ROWS = 16  # of a tile of 16 bits
_BLOCK_SLOTS = 512
_BLOCK_BYTES = 8 * 2**20  # of keys and values, two blocks of each; a kernel has 16 MiB on v5e
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


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What the kernel is told: tokens, queries of a key/value head, and their rows up to whole tiles.

    Attributes:
        share: heads of keys that share a tile of lanes.
        width: lanes of such a tile.
        itemsize: bytes of a key.
        block: slots that a step adds, fewer where heads are many.
    """

    num_tokens: int
    group: int
    head_dim: int
    num_kv: int
    slots: int
    window: int | None
    itemsize: int = 2

    @classmethod
    def of(cls, query: Array, keys: Array, window: int | None, **more: int) -> Any:
        """Those of arrays whose heads lie side by side."""
        (_, num_tokens, num_heads, head_dim), (_, slots, flat) = query.shape, keys.shape
        num_kv, itemsize = flat // head_dim, keys.dtype.itemsize
        return cls(num_tokens, num_heads // num_kv, head_dim, num_kv, slots, window, itemsize, **more)

    def weighing(self, block_size: int) -> Weighing:
        """How blocks are weighed, and by which rows."""
        rows = reference.weighed_tokens(self.num_tokens, self.group) * self.group
        return Weighing(block_size, self.slots, self.block, self.num_tiles, self.share, self.padded, rows)

    @property
    def rows(self) -> int:
        return self.num_tokens * self.group

    @property
    def padded(self) -> int:
        return -(-self.rows // _ROWS) * _ROWS

    @property
    def share(self) -> int:
        return min(self.num_kv, math.lcm(self.head_dim, LANES) // self.head_dim)

    @property
    def num_tiles(self) -> int:
        return pl.cdiv(self.num_kv, self.share)

    @property
    def width(self) -> int:
        return self.share * self.head_dim

    @property
    def block(self) -> int:
        fitting = _BLOCK_BYTES // (4 * self.num_kv * self.head_dim * self.itemsize)
        return min(_BLOCK_SLOTS, self.slots, max(_ROWS, 1 << fitting.bit_length() - 1))

    @property
    def num_steps(self) -> int:
        whole = pl.cdiv(self.slots, self.block)
        if self.window is None:
            return whole
        return min(whole, pl.cdiv(self.window + self.num_tokens, self.block) + 1)

    def first_block(self, length: Array) -> Any:
        return 0 if self.window is None else jnp.maximum(length - self.window + 1, 0) // self.block

    def last_block(self, length: Array) -> Array:
        return jnp.minimum(length + self.num_tokens - 1, self.slots - 1) // self.block


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
    return _call(query, keys, values, lengths, Sizes.of(query, keys, window), None, interpret=interpret)[0]


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
    out, masses = _call(query, keys, values, lengths, sizes, weighing, interpret=interpret)
    return out, weighing.by_heads(masses, sizes.num_kv)


def _call(query, keys, values, lengths, sizes: Sizes, weighing: Weighing | None, *, interpret: Any) -> list[Array]:
    """The kernel's results: attention and, where something weighs, masses."""
    batch = query.shape[0]

    def slot_block(b, s, lengths):
        return b, jnp.minimum(sizes.first_block(lengths[b]) + s, sizes.last_block(lengths[b])), 0

    def whole(*shape: int) -> pl.BlockSpec:
        return pl.BlockSpec((None, *shape), lambda b, s, lengths: (b, *(0 for _ in shape)))

    tiles = (sizes.num_tiles, sizes.share * sizes.padded)
    slot_spec = pl.BlockSpec((None, sizes.block, keys.shape[2]), slot_block)
    scratch = [pltpu.VMEM((*tiles, width), jnp.float32) for width in (LANES, LANES, sizes.width)]
    out_shapes: list[tuple[tuple[int, ...], Any]] = [((*tiles, sizes.width), query.dtype)]
    if weighing is not None:
        out_shapes.append((weighing.masses_shape, jnp.float32))
        scratch.append(pltpu.VMEM(weighing.sums_shape, jnp.float32))
    results: Any = pl.pallas_call(
        functools.partial(_kernel, sizes=sizes, weighing=weighing),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(batch, sizes.num_steps),
            in_specs=[whole(*tiles, sizes.width), slot_spec, slot_spec],
            out_specs=[whole(*shape) for shape, _ in out_shapes],
            scratch_shapes=scratch,
        ),
        out_shape=[jax.ShapeDtypeStruct((batch, *shape), dtype) for shape, dtype in out_shapes],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        interpret=interpret,
        name="decode_attention",
    )(lengths, to_tiles(query, sizes), keys, values)
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
    keys_ref,  # [block, W]
    values_ref,
    *refs,  # as the queries; masses; [tiles, share * padded, 128] f32, the same in all lanes: maxima and sums; totals
    sizes: Sizes,
    weighing: Weighing | None,
):
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

    @pl.when(block <= sizes.last_block(length))
    def _():
        belongs: Any = None if weighing is None else weighing.belongs(block)
        for tile in range(sizes.num_tiles):
            start = tile * sizes.width
            lanes = slice(start, min(start + sizes.width, keys_ref.shape[1]))
            state = max_ref.at[tile], sum_ref.at[tile], total_ref.at[tile]
            query = query_ref[tile][:, : lanes.stop - start]
            weights, kept = _add_block(state, query, keys_ref[:, lanes], values_ref[:, lanes], block, length, sizes)
            if weighing is not None:
                weighing.add(block_sums_ref[0].at[tile], weights, kept, belongs, block)

    @pl.when(step == pl.num_programs(1) - 1)
    def _():
        for tile in range(sizes.num_tiles):
            total = sum_ref[tile][:, :1]
            out_ref[tile] = (total_ref[tile] / total).astype(out_ref.dtype)
            if weighing is not None:
                weighing.finish(masses_ref[0].at[tile], block_sums_ref[0].at[tile], total)


def _add_block(state, query, keys, values, block, length, sizes: Sizes):
    """Adds a block of slots, those that are seen; returns what ``add_slots`` does."""
    shape = query.shape[0], keys.shape[0]
    slot = block * sizes.block + lax.broadcasted_iota(jnp.int32, shape, 1)
    token = lax.broadcasted_iota(jnp.int32, shape, 0) % sizes.padded // sizes.group
    seen = slot <= jnp.minimum(length + token, sizes.slots - 1)
    if sizes.window is not None:
        seen &= slot > length + token - sizes.window
    if sizes.slots % sizes.block:  # what is copied beyond the last slot may be anything, NaN too
        inside = block * sizes.block + lax.broadcasted_iota(jnp.int32, values.shape, 0) < sizes.slots
        values = jnp.where(inside, values.astype(jnp.float32), 0.0).astype(values.dtype)
    return add_slots(state, query, keys, values, seen, sizes)


def add_slots(state, query, keys, values, seen, sizes: Sizes) -> tuple[Array, Array]:
    """Adds slots to maxima, sums and totals of a tile's rows; values that are not seen must not be NaN.

    Returns:
        exponentials of the slots, relative to the largest logit so far, and what scales earlier ones to it.
    """
    max_ref, sum_ref, total_ref = state
    dot = functools.partial(
        lax.dot_general,
        precision=lax.Precision.HIGHEST if query.dtype == jnp.float32 else None,
        preferred_element_type=jnp.float32,
    )
    logits = dot(query, keys, (((1,), (1,)), ((), ()))) * jnp.float32(sizes.head_dim**-0.5)
    logits = jnp.where(seen, logits, UNSEEN)
    largest = max_ref[:, :1]
    new_largest = jnp.maximum(largest, jnp.max(logits, axis=1, keepdims=True))
    weights = jnp.where(seen, jnp.exp(logits - new_largest), 0.0)
    kept = jnp.exp(largest - new_largest)
    update = dot(weights.astype(values.dtype), values, (((1,), (0,)), ((), ())))
    total = kept * sum_ref[:, :1] + jnp.sum(weights, axis=1, keepdims=True)
    sum_ref[...] = jnp.broadcast_to(total, sum_ref.shape)
    max_ref[...] = jnp.broadcast_to(new_largest, max_ref.shape)
    total_ref[:, : values.shape[1]] = kept * total_ref[:, : values.shape[1]] + update
    return weights, kept
