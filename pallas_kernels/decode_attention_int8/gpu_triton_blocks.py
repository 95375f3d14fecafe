"""``block_attention_int8`` as a Pallas Triton kernel, whose results the second kernel of ``block_attention`` joins.

A program is one warp and goes through its entries of the table 16 slots at a time. These lie in one block of keys, so
that scales multiply the queries here too, and whether they are seen as int8 or from the ring is one for all of them.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, Int32

from pallas_kernels.arrays.int8_cache import KEY_BLOCK, RING, Int8Cache
from pallas_kernels.backends.triton import registers
from pallas_kernels.block_attention import gpu_triton as blockwise
from pallas_kernels.block_attention.reference import EVERYTHING
from pallas_kernels.decode_attention import gpu_triton as whole
from pallas_kernels.decode_attention_int8.triton_arrays import (
    arrays_read,
    by_heads,
    codes_as_floats,
    values_as_floats,
)
from pallas_kernels.decode_attention_int8.triton_tiles import (
    GROUP,
    Carry,
    Rows,
    Values,
    half_of,
    nothing,
    results_of,
)

_TILE = 16  # slots: the fewest that a tensor core takes, and a divisor of every block that is listed


@dataclasses.dataclass(frozen=True)
class BlockTuning:
    """How the work is cut."""

    share: int = 64  # slots of a table that a program reads
    num_warps: int = 1
    num_stages: int = 3


@dataclasses.dataclass(frozen=True)
class _Problem(blockwise.BlockProblem):
    """What both kernels know of the call."""

    interpret: bool = False
    tuning: BlockTuning = BlockTuning()

    @property
    def block_slots(self) -> int:
        return _TILE

    @property
    def slots_of_share(self) -> int:
        return self.tuning.share

    @property
    def groups(self) -> int:
        """Of 8 rows, that a program has."""
        return min(2, pl.cdiv(self.num_rows, GROUP))

    @property
    def rows(self) -> int:
        return self.groups * GROUP


@functools.partial(jax.jit, static_argnames=("block_size", "window", "interpret", "tuning"))
def block_attention_int8(
    query: Float[Array, "B_all T H HD"],
    cache: Int8Cache,
    lengths: Int32[Array, " B"],
    blocks: Int32[Array, "B L KH N"],
    layer: Int32[Array, ""],
    *,
    block_size: int,
    window: int | None,
    interpret: bool = False,
    tuning: BlockTuning = BlockTuning(),
) -> Float[Array, "B_all T H HD"]:
    """See the public function."""
    _, num_tokens, num_heads, head_dim = query.shape
    sizes = num_tokens, num_heads, cache.num_kv_heads, head_dim, cache.keys.shape[1], window
    table: Any = {"layers": blocks.shape[1], "entries": blocks.shape[3], "block_size": block_size}
    problem = _Problem(*sizes, **table, interpret=interpret, tuning=tuning)
    batch, row_blocks, layer = lengths.shape[0], problem.row_blocks, layer.reshape(1)
    out_specs, out_shape = whole.parts_of(problem, batch, problem.shares)
    shares = pl.pallas_call(
        functools.partial(_share_kernel, problem=problem),
        grid=(problem.num_kv_heads * row_blocks, problem.shares, batch),
        in_specs=[
            pl.BlockSpec((None,), lambda program, share, sequence: (sequence,)),
            blockwise.table_spec(
                problem, lambda program, share, sequence: (sequence, 0, lax.div(program, row_blocks), 0)
            ),
            pl.BlockSpec((None,), lambda program, share, sequence: (0,)),
            *arrays_read(problem),
        ],
        out_specs=out_specs,
        out_shape=out_shape,
        compiler_params=plgpu.CompilerParams(num_warps=tuning.num_warps, num_stages=tuning.num_stages),
        interpret=interpret,
        name="block_attention_int8_shares",
    )(lengths, blocks, layer, query, *by_heads(cache))
    joined = {"problem": problem, "query": query, "interpret": interpret}
    return blockwise.join_shares(lengths, blocks, layer, *shares, **joined)


def _share_kernel(
    length_ref,  # [] int32
    table_ref,  # [L, N] int32
    layer_ref,  # [] int32
    query_ref,  # [T, H, HD]
    keys_ref,  # [S, block_dim] int8
    scales_ref,  # [NB, block_dim] f32
    recent_ref,  # [RING, block_dim]
    values_ref,  # [S, block_dim] int8
    value_scales_ref,  # [S] f32
    *result_refs,  # largest logits and sums [rows], weighted values [rows, block_dim], f32
    problem: _Problem,
):
    length, layer, program = length_ref[...], layer_ref[...], pl.program_id(0)
    kv_head, row_block = (part(program, problem.row_blocks) for part in (lax.div, lax.rem))
    end = problem.end_of_seen(length)
    begins = table_ref[layer, 0]
    listed, per_share = problem.share_of(begins, end)
    first = pl.program_id(1) * per_share
    num_tiles = lax.div(jnp.minimum(per_share, listed - first) + (_TILE - 1), _TILE)

    @pl.when(first < listed)
    def _():
        places = [row_block * problem.rows + group * GROUP for group in range(problem.groups)]
        groups = [Rows.load(query_ref, place, length, kv_head, problem) for place in places]
        refs = keys_ref, scales_ref, recent_ref, values_ref, value_scales_ref
        entries = _Entries(table_ref, *refs, layer, begins, first, length, end, groups, problem)
        carry = lax.fori_loop(0, num_tiles, entries.attend, [nothing(_TILE, problem)] * problem.groups)
        for number, (rows, one) in enumerate(zip(groups, carry, strict=True)):
            for ref, result in zip(result_refs, results_of(one), strict=True):
                mask = rows.exist if result.ndim == 1 else jnp.broadcast_to(rows.exist[:, None], result.shape)
                plgpu.store(ref.at[pl.ds(number * GROUP, GROUP)], result, mask=mask)


@dataclasses.dataclass(frozen=True)
class _Entries:
    """What the rows of a program make of the slots that the table lists."""

    table_ref: registers.Ref
    keys_ref: registers.Ref
    scales_ref: registers.Ref
    recent_ref: registers.Ref
    values_ref: registers.Ref
    value_scales_ref: registers.Ref
    layer: Array
    begins: Array  # the first entry of the table
    first: Array  # place in the table
    length: Array
    end: Array  # from where on no row sees any more
    groups: list[Rows]
    problem: _Problem

    def attend(self, tile: Array, carry: list[Carry]) -> list[Carry]:
        """To 16 slots."""
        problem, interpret = self.problem, self.problem.interpret
        half = half_of(self.groups[0].query.dtype)
        start = self._slot(self.first + tile * _TILE)
        there, is_listed = jnp.maximum(start, 0), start >= 0
        slots = there + lax.broadcasted_iota(jnp.int32, (_TILE,), 0)
        exist = (slots < self.end) & is_listed
        is_int8 = start < lax.div(self.length, KEY_BLOCK) * KEY_BLOCK  # of whole blocks of keys
        codes = self._rows(self.keys_ref, there, is_listed & is_int8)
        newest = self._rows(self.recent_ref, lax.rem(there, RING), is_listed & ~is_int8)
        scales = self._scales(lax.div(there, KEY_BLOCK), is_int8)

        def of_codes() -> list[Array]:
            keys = codes_as_floats(codes, half, interpret=interpret)
            return [rows.logits_of_codes(keys, scales) for rows in self.groups]

        logits = lax.cond(is_int8, of_codes, lambda: [rows.logits(newest) for rows in self.groups])
        seen = (exist & (slots >= problem.first_seen(self.length)) & (slots <= self.length))[:, None]
        values = self._rows(self.values_ref, there, is_listed)
        floats = values_as_floats(values, half, always=self.end > 0, interpret=interpret)
        value_scales = plgpu.load(self.value_scales_ref.at[pl.ds(there, _TILE)], mask=exist, other=1.0)
        values = Values.of(floats, value_scales, interpret=interpret)
        logits = [jnp.where(seen, one, -jnp.inf) for one in logits]
        return [values.add_to(before, one)[0] for before, one in zip(carry, logits, strict=True)]

    def _slot(self, place: Array) -> Array:
        """The slot that the table lists at a place, or -1."""
        problem = self.problem
        entry, within = lax.div(place, problem.block_size), lax.rem(place, problem.block_size)
        everything = self.begins == EVERYTHING
        in_table = (entry < problem.entries) & ~everything
        number = plgpu.load(self.table_ref.at[self.layer, entry], mask=in_table, other=jnp.int32(-1))
        slot = jnp.where(number < 0, -1, number * problem.block_size + within)
        return jnp.where(everything, place, slot)

    def _rows(self, ref: registers.Ref, start: Array, exist: Array) -> Array:
        """16 rows of an array ``[16, block_dim]``, with zeros where there are none.

        Of slots past the last one seen, what they hold: they have no weight.
        """
        problem, shape = self.problem, (_TILE, self.problem.block_dim)
        mask = jnp.broadcast_to(exist, shape)
        if problem.block_dim != problem.head_dim:
            mask &= lax.broadcasted_iota(jnp.int32, shape, 1) < problem.head_dim
        if ref.shape[0] % _TILE:
            mask &= start + lax.broadcasted_iota(jnp.int32, shape, 0) < ref.shape[0]
        return plgpu.load(ref.at[pl.ds(start, _TILE), :], mask=mask, other=jnp.zeros((), ref.dtype))

    def _scales(self, block: Array, exist: Array) -> Array:
        """Those of a block of keys ``[block_dim]``."""
        dims = lax.broadcasted_iota(jnp.int32, (self.problem.block_dim,), 0)
        mask = exist & (dims < self.problem.head_dim)
        return plgpu.load(self.scales_ref.at[block, :], mask=mask, other=0.0)
