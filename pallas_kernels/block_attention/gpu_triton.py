"""``block_attention`` and ``choose_blocks`` as Pallas Triton kernels (compute capability 8.0 and newer).

Attention to blocks is split like attention to all slots (``decode_attention``), but along the table: a program attends
from 16 rows, the queries of one key/value head, to its share of the entries, and a second kernel puts the shares of a
query together. The number of shares depends on the length of the table alone.

The choice needs no sort. A program has the masses of one key/value head in its registers and finds the mass of the last
block that is chosen by bisection over the bits of a float, which are in the order of the numbers.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32, Int32

from pallas_kernels.backends.triton import registers
from pallas_kernels.block_attention import reference
from pallas_kernels.block_attention.reference import EVERYTHING, forced_blocks
from pallas_kernels.decode_attention import gpu_triton as whole
from pallas_kernels.decode_attention.gpu_triton_tiles import raise_maximum

_ROWS = 16
_TILE_BYTES = 16384  # of keys, and of values, that a program holds
_SHARE = 128  # slots of the table that a program reads
_MAX_SHARES = 64
_FLOAT_BITS = 31  # of a float that is not negative
FURTHER_SEQUENCES = True


@dataclasses.dataclass(frozen=True)
class BlockProblem(whole.Problem):
    """What both kernels know of the call."""

    layers: int = 1
    entries: int = 1  # of the table
    block_size: int = 16
    itemsize: int = 2

    @property
    def block_slots(self) -> int:
        """Slots of a tile: whole blocks, or a part of one."""
        return min(64, _TILE_BYTES // (self.block_dim * self.itemsize))

    @property
    def slots_of_share(self) -> int:
        """Slots of the table that a program reads, unless these are more programs than there may be."""
        return _SHARE

    @property
    def shares(self) -> int:
        """Programs that share a table: a power of two, as whoever puts their results together loads all of them."""
        return min(_MAX_SHARES, pl.next_power_of_2(pl.cdiv(self.entries * self.block_size, self.slots_of_share)))

    def share_of(self, table_begins: Array, end: Array) -> tuple[Array, Array]:
        """Slots that are listed in all, where ``end`` is after the last one seen, and those of a share."""
        listed = jnp.where(table_begins == EVERYTHING, end, self.entries * self.block_size)
        tiles = lax.div(listed + (self.block_slots * self.shares - 1), self.block_slots * self.shares)
        return listed, tiles * self.block_slots


def obstacle(num_tokens: int, head_dim: int, dtype: DTypeLike | None = None, slots: int = 0) -> str | None:
    """Why these kernels cannot serve a call, as the end of a sentence; None if they can."""
    del dtype, slots  # all that the public function takes
    if num_tokens > 1:
        return f"needs one token per sequence, as drafts have; these are {num_tokens}"
    return whole.obstacle(num_tokens, head_dim)


def block_attention(
    query: Float[Array, "B_all T H HD"],
    keys: Float[Array, "B S KH HD"],
    values: Float[Array, "B S KH HD"],
    lengths: Int32[Array, " B"],
    blocks: Int32[Array, "B L KH N"],
    layer: Int32[Array, ""],
    *,
    block_size: int,
    window: int | None,
    interpret: bool = False,
) -> Float[Array, "B_all T H HD"]:
    """See the public function."""
    registers.ignore_triton_deprecation()
    return _attend(
        query, keys, values, lengths, blocks, layer, block_size=block_size, window=window, interpret=interpret
    )


@functools.partial(jax.jit, static_argnames=("block_size", "window", "interpret"))
def _attend(
    query: Array,
    keys: Array,
    values: Array,
    lengths: Array,
    blocks: Array,
    layer: Array,
    *,
    block_size: int,
    window: int | None,
    interpret: bool,
) -> Array:
    _, slots, num_kv_heads, _ = keys.shape
    problem = problem_of(query, blocks, slots=slots, num_kv_heads=num_kv_heads, block_size=block_size, window=window)
    layer = layer.reshape(1)
    shares = _attend_to_shares(query, keys, values, lengths, blocks, layer, problem=problem, interpret=interpret)
    return join_shares(lengths, blocks, layer, *shares, problem=problem, query=query, interpret=interpret)


def problem_of(
    query: Array, blocks: Array, *, slots: int, num_kv_heads: int, block_size: int, window: int | None
) -> BlockProblem:
    _, num_tokens, num_heads, head_dim = query.shape
    _, layers, _, entries = blocks.shape
    table: Any = {"layers": layers, "entries": entries, "block_size": block_size, "itemsize": query.dtype.itemsize}
    return BlockProblem(num_tokens, num_heads, num_kv_heads, head_dim, slots, window, **table)


def _attend_to_shares(
    query: Array,
    keys: Array,
    values: Array,
    lengths: Array,
    blocks: Array,
    layer: Array,
    *,
    problem: BlockProblem,
    interpret: bool,
) -> tuple[Array, ...]:
    batch, row_blocks = lengths.shape[0], problem.row_blocks
    out_specs, out_shape = whole.parts_of(problem, batch, problem.shares)
    return pl.pallas_call(
        functools.partial(_share_kernel, problem=problem, interpret=interpret),
        grid=(problem.num_kv_heads * row_blocks, problem.shares, batch),
        in_specs=[
            pl.BlockSpec((None,), lambda program, share, sequence: (sequence,)),
            table_spec(problem, lambda program, share, sequence: (sequence, 0, lax.div(program, row_blocks), 0)),
            pl.BlockSpec((None,), lambda program, share, sequence: (0,)),
            *whole.arrays_read(problem),
        ],
        out_specs=out_specs,
        out_shape=out_shape,
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=2),
        interpret=interpret,
        name="block_attention_shares",
    )(lengths, blocks, layer, query, keys, values)


def table_spec(problem: BlockProblem, index_map) -> pl.BlockSpec:
    return pl.BlockSpec((None, problem.layers, None, problem.entries), index_map)


def _share_kernel(
    length_ref,  # [] int32
    table_ref,  # [L, N] int32
    layer_ref,  # [] int32
    query_ref,  # [T, H, HD]
    keys_ref,  # [S, block_dim]
    values_ref,  # [S, block_dim]
    maximum_ref,  # [16] f32
    total_ref,  # [16] f32
    mixed_ref,  # [16, block_dim] f32
    *,
    problem: BlockProblem,
    interpret: bool,
):
    def load(slots: Array, end: Array) -> tuple[Array, Array, None]:
        keys, values = (load_slots(ref, slots, (slots >= 0) & (slots < end), problem) for ref in (keys_ref, values_ref))
        return keys, values, None

    results = maximum_ref, total_ref, mixed_ref
    where = length_ref[...], table_ref, layer_ref[...]
    attend_to_share(*where, query_ref, results, load=load, problem=problem, interpret=interpret)


def attend_to_share(
    length: Array,
    table_ref: registers.Ref,
    layer: Array,
    query_ref: registers.Ref,
    result_refs: tuple[registers.Ref, ...],
    *,
    load: Callable[[Array, Array], tuple[Array, Array, Array | None]],
    problem: BlockProblem,
    interpret: bool,
) -> None:
    """What a program does.

    Args:
        length, layer: of the sequence, and which of the tables.
        table_ref, query_ref: as the kernel has them.
        result_refs: largest logits, sums and weighted values.
        load: for some slots, and where no row sees any more, their keys and values ``[block_slots, block_dim]``, and
            None or what the values are to be multiplied by ``[block_slots]``.
        problem: the call.
    """
    program, share = pl.program_id(0), pl.program_id(1)
    kv_head, row_block = (part(program, problem.row_blocks) for part in (lax.div, lax.rem))
    rows = row_block * _ROWS + lax.broadcasted_iota(jnp.int32, (_ROWS,), 0)
    exists = rows < problem.num_rows
    end = problem.end_of_seen(length + (problem.num_tokens - 1))
    begins = table_ref[layer, 0]
    listed, per_share = problem.share_of(begins, end)
    first = share * per_share
    num_tiles = lax.div(jnp.minimum(per_share, listed - first) + (problem.block_slots - 1), problem.block_slots)

    @pl.when(first < listed)
    def _():
        query = whole.load_rows(query_ref, rows, exists, kv_head, problem)
        positions = length + lax.div(rows, problem.group)
        scale = problem.head_dim**-0.5
        limits = jnp.broadcast_to(jnp.minimum(positions + 1, end)[:, None], (_ROWS, problem.block_slots))

        def attend_to_tile(tile: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            maximum, total, mixed = carry
            start = first + tile * problem.block_slots
            slots = listed_slots(table_ref, layer, begins, start, problem)
            keys, values, scales = load(slots, end)
            shape = (_ROWS, problem.block_slots)
            across, at = jnp.broadcast_to(slots[None, :], shape), jnp.broadcast_to(positions[:, None], shape)
            seen = (across >= problem.first_seen(at)) & (across < limits) & (across >= 0)
            products = jnp.where(seen, whole.dot(query, keys, contract=(1, 1)), -jnp.inf)
            maximum, kept, weights = raise_maximum(maximum, products, scale=scale, interpret=interpret)
            total = total * kept + jnp.sum(weights, axis=1)
            weights = weights if scales is None else weights * scales[None, :]
            mixed = mixed * kept[:, None] + whole.dot(weights.astype(values.dtype), values, contract=(1, 0))
            return maximum, total, mixed

        maximum, total, mixed = lax.fori_loop(0, num_tiles, attend_to_tile, whole.nothing((_ROWS,), problem))
        results = maximum * jnp.float32(scale), total, mixed
        for ref, result in zip(result_refs, results, strict=True):
            mask = exists if result.ndim == 1 else jnp.broadcast_to(exists[:, None], result.shape)
            plgpu.store(ref, result, mask=mask)


def listed_slots(table_ref: registers.Ref, layer: Array, begins: Array, start: Array, problem: BlockProblem) -> Array:
    """The slots that the table lists from a place on ``[block_slots]``; past its end -1."""
    place = start + lax.broadcasted_iota(jnp.int32, (problem.block_slots,), 0)
    entry, within = lax.div(place, problem.block_size), lax.rem(place, problem.block_size)
    everything = begins == EVERYTHING
    in_table = (entry < problem.entries) & ~everything
    numbers = plgpu.load(table_ref.at[jnp.broadcast_to(layer, entry.shape), entry], mask=in_table, other=jnp.int32(-1))
    slots = jnp.where(numbers < 0, -1, numbers * problem.block_size + within)
    return jnp.where(everything, place, slots)


def load_slots(ref: registers.Ref, slots: Array, exist: Array, problem: BlockProblem) -> Array:
    """Rows of some slots ``[block_slots, block_dim]``, with zeros where there are none."""
    shape = (problem.block_slots, problem.block_dim)
    dims, mask = lax.broadcasted_iota(jnp.int32, shape, 1), jnp.broadcast_to(exist[:, None], shape)
    if problem.block_dim != problem.head_dim:
        mask &= dims < problem.head_dim
    here = ref.at[jnp.broadcast_to(slots[:, None], shape), dims]
    return plgpu.load(here, mask=mask, other=jnp.zeros((), ref.dtype))


def join_shares(
    lengths: Array,
    blocks: Array,
    layer: Array,
    maximum: Array,
    total: Array,
    mixed: Array,
    *,
    problem: BlockProblem,
    query: Array,
    interpret: bool,
) -> Array:
    batch, group = lengths.shape[0], problem.group
    out_spec, out_shape = whole.result_of(problem, query)
    return pl.pallas_call(
        functools.partial(_join_kernel, problem=problem, interpret=interpret),
        grid=(problem.num_heads, problem.num_tokens, batch),
        in_specs=[
            pl.BlockSpec((None,), lambda head, token, sequence: (sequence,)),
            table_spec(problem, lambda head, token, sequence: (sequence, 0, lax.div(head, group), 0)),
            pl.BlockSpec((None,), lambda head, token, sequence: (0,)),
            *whole.parts_joined(problem, problem.shares),
        ],
        out_specs=out_spec,
        out_shape=out_shape,
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=1),
        interpret=interpret,
        name="block_attention_join",
    )(lengths, blocks, layer, maximum, total, mixed)


def _join_kernel(
    length_ref,  # [] int32
    table_ref,  # [L, N] int32
    layer_ref,  # [] int32
    maximum_ref,  # [shares] f32
    total_ref,  # [shares] f32
    mixed_ref,  # [shares, block_dim] f32
    out_ref,  # [block_dim]
    *,
    problem: BlockProblem,
    interpret: bool,
):
    end = problem.end_of_seen(length_ref[...] + (problem.num_tokens - 1))
    begins = table_ref[registers.start_next(layer_ref[...], interpret=interpret), 0]
    listed, per_share = problem.share_of(begins, end)
    count = maximum_ref.shape[0]
    written = lax.broadcasted_iota(jnp.int32, (count,), 0) * per_share < listed
    wide = jnp.broadcast_to(written[:, None], (count, problem.block_dim))
    maxima = plgpu.load(maximum_ref, mask=written, other=-jnp.inf)
    totals = plgpu.load(total_ref, mask=written, other=0.0)
    mixtures = plgpu.load(mixed_ref, mask=wide, other=0.0)
    largest = jnp.max(maxima)
    less = jnp.where(largest == -jnp.inf, 0.0, largest)  # -inf - -inf is not a number
    weights = registers.exp2((maxima - less) * jnp.float32(registers.LOG2_E), interpret=interpret)
    total = jnp.sum(weights * totals, axis=0)
    mixed = jnp.sum(weights[:, None] * mixtures, axis=0)
    out = mixed / jnp.where(total > 0, total, 1.0)
    exists = lax.broadcasted_iota(jnp.int32, out.shape, 0) < problem.head_dim
    plgpu.store(out_ref, out.astype(out_ref.dtype), mask=exists)


@functools.partial(jax.jit, static_argnames=("num_blocks", "block_size", "recent", "ahead", "interpret"))
def choose_blocks(
    masses: Float32[Array, "B L KH NB"],
    lengths: Int32[Array, " B"],
    *,
    num_blocks: int,
    block_size: int,
    recent: int,
    ahead: int,
    interpret: bool = False,
) -> Int32[Array, "B L KH N"]:
    """See the public function."""
    registers.ignore_triton_deprecation()
    batch, layers, heads, there = masses.shape
    if num_blocks >= there:  # nothing to choose
        return reference.choose_blocks(
            masses, lengths, num_blocks=num_blocks, block_size=block_size, recent=recent, ahead=ahead
        )
    padded = pl.next_power_of_2(there)

    def spec(size: int) -> pl.BlockSpec:
        return pl.BlockSpec((None, None, None, size), lambda head, layer, sequence: (sequence, layer, head, 0))

    return pl.pallas_call(
        functools.partial(
            _choose_kernel, there=there, num_blocks=num_blocks, block_size=block_size, recent=recent, ahead=ahead
        ),
        grid=(heads, layers, batch),
        in_specs=[pl.BlockSpec((None,), lambda head, layer, sequence: (sequence,)), spec(padded)],
        out_specs=spec(num_blocks),
        out_shape=jax.ShapeDtypeStruct((batch, layers, heads, num_blocks), jnp.int32),
        compiler_params=plgpu.CompilerParams(num_warps=max(1, min(8, padded // 256)), num_stages=1),
        interpret=interpret,
        name="choose_blocks",
    )(lengths, masses)


def _choose_kernel(
    length_ref,  # [] int32
    masses_ref,  # [padded] f32
    table_ref,  # [N] int32
    *,
    there: int,
    num_blocks: int,
    block_size: int,
    recent: int,
    ahead: int,
):
    index = lax.broadcasted_iota(jnp.int32, masses_ref.shape, 0)
    masses = plgpu.load(masses_ref, mask=index < there, other=0.0)
    forced = forced_blocks(index, length_ref[...], block_size=block_size, recent=recent, ahead=ahead)
    masses = jnp.where(forced, jnp.inf, masses)
    # Those that do not exist come after all others, and are listed only where more are asked for than there are.
    keys = jnp.where(index < there, lax.bitcast_convert_type(masses, jnp.int32), -1)

    # The largest key that at least `num_blocks` keys reach: from the highest bit down.
    def set_bit(step: Array, key: Array) -> Array:
        higher = key | lax.shift_left(jnp.int32(1), jnp.int32(_FLOAT_BITS - 1) - step)
        return jnp.where(jnp.sum((keys >= higher).astype(jnp.int32)) >= num_blocks, higher, key)

    last = lax.fori_loop(0, _FLOAT_BITS, set_bit, jnp.int32(0))
    above, equal = keys > last, keys == last
    room = num_blocks - jnp.sum(above.astype(jnp.int32))
    chosen = above | (equal & (jnp.cumsum(equal.astype(jnp.int32)) <= room))
    # What is not chosen goes past the end, where the interpreter drops it; the mask does in a kernel.
    place = jnp.where(chosen, jnp.cumsum(chosen.astype(jnp.int32)) - 1, num_blocks)
    plgpu.store(table_ref.at[place], index, mask=chosen)
