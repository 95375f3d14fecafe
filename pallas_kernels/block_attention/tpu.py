"""``block_attention`` as a Pallas kernel for TPUs, compiled for v5e, v6e and 7x; no TPU has run it.

A program attends from the newest token of a sequence, one key/value head after the other. The cache stays in the
device's memory. The blocks that a table lists and the token sees are copied from there one by one, in chunks of up to
32. While a chunk is computed the next one is on its way: of the same head, of the next one, or of the next sequence.
Tables take the same way a sequence ahead. The softmax and the layout of queries are those of ``decode_attention``.

A copy brings the lanes of one head, or of the heads that share its tiles of 128 lanes. XLA chooses the blocks.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int32

from pallas_kernels.block_attention import reference
from pallas_kernels.block_attention.reference import EVERYTHING
from pallas_kernels.decode_attention import tpu as whole
from pallas_kernels.decode_attention.reference import BLOCK

_PLACES = 32  # of a chunk, at most: whether a block is seen is a bit of an int32
_CHUNK_SLOTS = 512
_BUFFER_BYTES = 8 * 2**20  # of both buffers; a kernel has 16 MiB on v5e
_BUFFERS = 2
_SEEN, _COUNT, _FIRST, _LAST = range(4)  # what is noted of a chunk when it is asked for

choose_blocks = reference.choose_blocks


def obstacle(num_tokens: int, head_dim: int, dtype: jnp.dtype | None = None, slots: int = BLOCK) -> str | None:
    """Why this kernel cannot serve a call, as the end of a sentence; None if it can."""
    if num_tokens > 1:
        return f"needs one token per sequence, as drafts have; these are {num_tokens}"
    if slots % BLOCK:
        return f"needs whole tiles of {BLOCK} slots; these are {slots}"
    return whole.obstacle(num_tokens, head_dim, dtype)


def block_attention(
    query: Float[Array, "B T H HD"],
    keys: Float[Array, "B S KH HD"],
    values: Float[Array, "B S KH HD"],
    lengths: Int32[Array, " B"],
    blocks: Int32[Array, "B L KH N"],
    layer: Int32[Array, ""],
    *,
    block_size: int,
    window: int | None,
    interpret: Any = False,
) -> Float[Array, "B T H HD"]:
    """See the public function."""
    flat = [array.reshape(*array.shape[:2], -1) for array in (keys, values)]
    return attend(query, *flat, lengths, blocks, layer, block_size=block_size, window=window, interpret=interpret)


@dataclasses.dataclass(frozen=True)
class _Sizes(whole.Sizes):
    """What the kernel is told.

    Attributes:
        entries: of a table.
        places: blocks of a chunk.
        stride: slots that are copied for a block: fewer where the cache has no more.
    """

    entries: int = 1
    block_size: int = BLOCK

    @property
    def share(self) -> int:
        """All heads where they do not fill tiles of lanes: no copy begins or ends within a tile."""
        share = super().share
        return share if self.num_kv % share == 0 else self.num_kv

    @property
    def stride(self) -> int:
        return min(self.block_size, self.slots)

    @property
    def places(self) -> int:
        block_bytes = 2 * _BUFFERS * self.stride * self.width * self.itemsize
        most = max(1, min(_PLACES, _CHUNK_SLOTS // self.stride, _BUFFER_BYTES // block_bytes))
        even = pl.cdiv(self.entries, pl.cdiv(self.entries, most))
        return min(most, pl.cdiv(even, 8) * 8)

    def start(self, block: Array) -> Array:
        """The first slot that is copied for a block: that of the last one may be before its own."""
        start = block * self.block_size
        if self.slots % self.block_size:
            start = jnp.minimum(start, self.slots - self.stride)
        return pl.multiple_of(start, BLOCK)

    def seen_slots(self, length: Array) -> tuple[Any, Array]:
        """The first and the last slot that the token sees."""
        first = 0 if self.window is None else jnp.maximum(length - self.window + 1, 0)
        return first, jnp.minimum(length, self.slots - 1)

    def seen_blocks(self, length: Array) -> tuple[Any, Array]:
        first, last = self.seen_slots(length)
        return first // self.block_size, last // self.block_size

    def num_chunks(self, table_begins: Array, length: Array) -> Array:
        first, last = self.seen_blocks(length)
        everything = jnp.maximum(last - first, 0) // self.places + 1
        return jnp.where(table_begins == EVERYTHING, everything, pl.cdiv(self.entries, self.places))


class _Refs(NamedTuple):
    """Where things are; from ``buffers`` on they are the kernel's own."""

    lengths: Any  # [B] int32
    layer: Any  # [1] int32
    blocks: Any  # [B, L, KH, N] int32, in the device's memory
    keys: Any  # [B, S, W], in the device's memory
    values: Any
    buffers: Any  # [2, 2, places * stride, width]: of two chunks, keys and values
    arrived: Any  # [2]: of two chunks
    notes: Any  # [3, 4] int32: of two chunks; and which buffer is next
    tables: Any  # [2, KH, N] int32: of two sequences
    table_arrived: Any

    @staticmethod
    def scratch(sizes: _Sizes, dtype: jnp.dtype) -> list[Any]:
        return [
            pltpu.VMEM((_BUFFERS, 2, sizes.places * sizes.stride, sizes.width), dtype),
            pltpu.SemaphoreType.DMA((_BUFFERS,)),
            pltpu.SMEM((_BUFFERS + 1, 4), jnp.int32),
            pltpu.SMEM((2, sizes.num_kv, sizes.entries), jnp.int32),
            pltpu.SemaphoreType.DMA,
        ]


@functools.partial(jax.jit, static_argnames=("block_size", "window", "interpret"))
def attend(
    query: Float[Array, "B T H HD"],
    keys: Float[Array, "B S W"],
    values: Float[Array, "B S W"],
    lengths: Int32[Array, " B"],
    blocks: Int32[Array, "B L KH N"],
    layer: Int32[Array, ""],
    *,
    block_size: int,
    window: int | None,
    interpret: Any = False,
) -> Float[Array, "B T H HD"]:
    """Attention to blocks of caches whose heads lie side by side."""
    batch, entries = query.shape[0], blocks.shape[3]
    sizes = _Sizes.of(query, keys, window, entries=entries, block_size=block_size)
    heads = sizes.num_kv, sizes.padded
    head_spec = pl.BlockSpec((None, *heads, sizes.width), lambda b, lengths, layer: (b, 0, 0, 0))
    in_memory = pl.BlockSpec(memory_space=pl.ANY)
    rows = whole.to_tiles(query, sizes).reshape(batch, *heads, sizes.width)
    out = pl.pallas_call(
        functools.partial(_kernel, sizes=sizes),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(batch,),
            in_specs=[in_memory, head_spec, in_memory, in_memory],
            out_specs=head_spec,
            scratch_shapes=[
                *(pltpu.VMEM((sizes.padded, width), jnp.float32) for width in (whole.LANES, whole.LANES, sizes.width)),
                *_Refs.scratch(sizes, keys.dtype),
            ],
        ),
        out_shape=jax.ShapeDtypeStruct(rows.shape, query.dtype),
        # Checks would double the work for each block; none is copied that a token does not see.
        compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary",), disable_bounds_checks=True),
        interpret=interpret,
        name="block_attention",
    )(lengths, layer.reshape(1), blocks, rows, keys, values)
    return whole.from_tiles(out, sizes).reshape(query.shape)


def _kernel(
    lengths_ref,
    layer_ref,
    blocks_ref,
    query_ref,  # [KH, padded, width]
    keys_ref,
    values_ref,
    out_ref,  # as the queries
    max_ref,  # [padded, 128] f32, the same in all lanes
    sum_ref,
    total_ref,  # [padded, width] f32
    *scratch,
    sizes: _Sizes,
):
    refs = _Refs(lengths_ref, layer_ref, blocks_ref, keys_ref, values_ref, *scratch)
    row, num_rows = pl.program_id(0), pl.num_programs(0)

    @pl.when(row == 0)
    def _():
        refs.notes[_BUFFERS, 0] = 0
        _table_copy(refs, row).start()
        _table_copy(refs, row).wait()
        _ask_for(refs, row, 0, 0, 0, sizes)

    @pl.when(row + 1 < num_rows)
    def _():
        _table_copy(refs, row + 1).start()

    def attend_from(head: Array, buffer: Array) -> Array:
        max_ref[...] = jnp.full_like(max_ref, whole.UNSEEN)
        sum_ref[...] = jnp.zeros_like(sum_ref)
        total_ref[...] = jnp.zeros_like(total_ref)
        chunks = sizes.num_chunks(refs.tables[row % 2, head, 0], lengths_ref[row])

        def add_chunk(chunk: Array, buffer: Array) -> Array:
            _ask_for_next(refs, (row, num_rows), head, (chunk, chunks), 1 - buffer, sizes)
            _wait_for(refs, buffer, sizes)
            keys, values = refs.buffers[buffer, 0], _copied(refs, buffer, sizes)
            seen = _seen_slots(refs, row, buffer, (sizes.padded, keys.shape[0]), sizes)
            whole.add_slots((max_ref, sum_ref, total_ref), query_ref[head], keys, values, seen, sizes)
            return 1 - buffer

        buffer = lax.fori_loop(0, chunks, add_chunk, buffer)
        total = sum_ref[:, :1]
        out_ref[head] = (total_ref[...] / jnp.where(total > 0, total, 1.0)).astype(out_ref.dtype)
        return buffer

    refs.notes[_BUFFERS, 0] = lax.fori_loop(0, sizes.num_kv, attend_from, refs.notes[_BUFFERS, 0])


def _table_copy(refs: _Refs, row: Array) -> Any:
    """The copy of a sequence's table to where scalars are."""
    return pltpu.make_async_copy(refs.blocks.at[row, refs.layer[0]], refs.tables.at[row % 2], refs.table_arrived)


def _ask_for_next(refs: _Refs, rows, head: Array, chunks, buffer: Array, sizes: _Sizes) -> None:
    """Asks for what is computed after a chunk; ``rows`` and ``chunks`` are a number and how many there are."""
    (row, num_rows), (chunk, num_chunks) = rows, chunks
    is_last_chunk = chunk + 1 == num_chunks
    is_last = is_last_chunk & (head + 1 == sizes.num_kv)
    is_followed = row + 1 < num_rows

    @pl.when(is_last & is_followed)
    def _():
        _table_copy(refs, row + 1).wait()

    @pl.when(~is_last | is_followed)
    def _():
        next_head = jnp.where(is_last, 0, head + is_last_chunk.astype(jnp.int32))
        next_chunk = jnp.where(is_last_chunk, 0, chunk + 1)
        _ask_for(refs, row + is_last.astype(jnp.int32), next_head, next_chunk, buffer, sizes)


def _ask_for(refs: _Refs, row, head, chunk, buffer, sizes: _Sizes) -> None:
    """Has the blocks of a chunk copied that are seen, and notes which they are."""
    first, last = sizes.seen_blocks(refs.lengths[row])
    table = refs.tables.at[row % 2, head]
    everything = table[0] == EVERYTHING

    def ask(place: Array, noted: tuple[Array, ...]) -> tuple[Array, ...]:
        index = chunk * sizes.places + place
        listed = table[jnp.minimum(index, sizes.entries - 1) if sizes.entries % sizes.places else index]
        if sizes.entries % sizes.places:
            listed = jnp.where(index < sizes.entries, listed, -1)
        block = jnp.where(everything, first + index, listed)
        is_seen = (block >= first) & (block <= last)
        slots = pl.ds(pl.multiple_of(place * sizes.stride, BLOCK), sizes.stride)

        @pl.when(is_seen)
        def _():
            lanes = _lanes(head, sizes)
            for which, cache in enumerate((refs.keys, refs.values)):
                source = cache.at[row, pl.ds(sizes.start(block), sizes.stride), lanes]
                pltpu.make_async_copy(source, refs.buffers.at[buffer, which, slots], refs.arrived.at[buffer]).start()

        seen, count, first_place, last_place = noted
        one = is_seen.astype(jnp.int32)
        if sizes.window is not None:
            first_place = jnp.where(block == first, place, first_place)
        return seen | (one << place), count + one, first_place, jnp.where(block == last, place, last_place)

    nothing = jnp.int32(0), jnp.int32(0), jnp.int32(-1), jnp.int32(-1)
    for what, number in enumerate(lax.fori_loop(0, sizes.places, ask, nothing, unroll=True)):
        refs.notes[buffer, what] = number


def _lanes(head: Any, sizes: _Sizes) -> Any:
    """Those of a head's keys, and of the heads in the same tiles."""
    if sizes.num_tiles == 1:
        return slice(None)
    start = head // sizes.share * sizes.width
    return pl.ds(pl.multiple_of(start, whole.LANES), sizes.width)


def _wait_for(refs: _Refs, buffer: Array, sizes: _Sizes) -> None:
    """Until all of a chunk is there: a semaphore counts bytes, so that one wait serves for many copies."""
    count, power = refs.notes[buffer, _COUNT], 1
    while power <= sizes.places:
        blocks = refs.buffers.at[buffer, :, pl.ds(0, power * sizes.stride)]

        @pl.when(count & power != 0)
        def _(blocks=blocks):
            pltpu.make_async_copy(blocks, blocks, refs.arrived.at[buffer]).wait()

        power *= 2


def _are_seen(refs: _Refs, buffer: Array, places: Array) -> Array:
    """Whether anything was copied to places, by the bits of the chunk's note."""
    bits = jnp.full(places.shape, refs.notes[buffer, _SEEN])
    return lax.shift_right_logical(bits, places) & 1 == 1


def _copied(refs: _Refs, buffer: Array, sizes: _Sizes) -> Array:
    """Values of a chunk, with zeros in places that nothing was copied to: whatever is there may be NaN."""
    values = refs.buffers[buffer, 1]
    words = values if values.dtype.itemsize == 4 else pltpu.bitcast(values, jnp.int32)  # of two slots
    places = lax.broadcasted_iota(jnp.int32, words.shape, 0) // (words.shape[0] // sizes.places)
    words = jnp.where(_are_seen(refs, buffer, places), words, jnp.zeros((), words.dtype))
    return words if words.dtype == values.dtype else pltpu.bitcast(words, values.dtype)


def _seen_slots(refs: _Refs, row: Array, buffer: Array, shape: tuple[int, int], sizes: _Sizes) -> Array:
    """Which slots of a chunk the token sees: those of its blocks, but for parts of the first and the last one."""
    at, length = lax.broadcasted_iota(jnp.int32, shape, 1), refs.lengths[row]
    seen = _are_seen(refs, buffer, at // sizes.stride)
    first_slot, last_slot = sizes.seen_slots(length)
    first, last = sizes.seen_blocks(length)
    last_begins = refs.notes[buffer, _LAST] * sizes.stride
    seen &= (at <= last_begins + last_slot - sizes.start(last)) | (at >= last_begins + sizes.stride)
    if sizes.slots % sizes.block_size:  # the last block is copied with slots before its own
        own = last_begins + last * sizes.block_size - sizes.start(last)
        seen &= (at < last_begins) | (at >= own)
    if sizes.window is not None:
        first_begins = refs.notes[buffer, _FIRST] * sizes.stride
        seen &= (at < first_begins) | (at >= first_begins + first_slot - sizes.start(first))
    return seen
