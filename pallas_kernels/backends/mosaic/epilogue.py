"""The end of a program of a Mosaic GPU matmul: slices of the sum are added, gate and up meet, the result is written.

Products are ``[64, block_m]`` in the WGMMA layout. Where outputs are gate and up, one warpgroup hands up over and
another gates it. Both are rounded to the dtype of the result before they meet, and the instructions are those of every
kernel that gates, so that the bits are those of the matmul and ``swiglu`` after it.
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
from jax.typing import DTypeLike

from pallas_kernels.arrays.partial_sums import tree_sum
from pallas_kernels.backends import gating
from pallas_kernels.backends.mosaic import registers as lanes
from pallas_kernels.backends.mosaic.matmul import Epilogue, MosaicConfig, Problem
from pallas_kernels.backends.mosaic.registers import ROWS, TILE, Lane, Ref, Value, arith, i32, ir, llvm, mosaic, plgpu

_PER_WARP = ROWS * TILE // 4  # bytes
_TILE = plgpu.RefType(lanes.WEIGHT_TRANSFORMS)
_NO_SIGN = 0x7FFFFFFF


@dataclasses.dataclass(frozen=True)
class End:
    """Where the product of a warpgroup goes.

    Attributes:
        problem, config: of the matmul.
        scratch: shared memory and barriers of the program.
        factors: ``[M]`` float32 that multiplies a slice of the sum, or nothing.
        outputs: ``[split, M, values written]``, and maybe magnitudes ``[M, blocks]`` float32.
        first_row: of the program.
        first_column: of those that it writes.
        column, in_program: of the warpgroup: which block of 64 outputs, and which slice of the sum.
    """

    problem: Problem
    config: MosaicConfig
    scratch: dict[str, Any]
    factors: tuple[Ref, ...]
    outputs: tuple[Ref, ...]
    first_row: jax.Array
    first_column: jax.Array
    column: jax.Array
    in_program: jax.Array

    @property
    def rows(self) -> Any:
        return pl.ds(self.first_row, self.config.block_m)

    @property
    def num_rows(self) -> jax.Array | None:
        """Rows of this block that exist, where there may be fewer than its height."""
        return None if self.problem.m % self.config.block_m == 0 else self.problem.m - self.first_row


def sum_in_turn(product_of: Callable[[int], jax.Array], num_turns: int, *, first: int = 0) -> jax.Array:
    """The sum of the slices that a warpgroup computes: of the products of turns, added as ``tree_sum`` adds them.

    What can be added is, before the next turn begins, so that few sums are in registers. The turns are a power of two.
    """
    if num_turns == 1:
        return product_of(first)
    half = num_turns // 2
    before = sum_in_turn(product_of, half, first=first)
    return lanes.pinned(before + sum_in_turn(product_of, half, first=first + half))


def scaled(product: jax.Array, end: End) -> jax.Array:
    """With its factors: before any addition, so that a slice has the bits that it has in a program of its own."""
    for factor in end.factors:
        product = lanes.scaled_rows(product, factor.at[end.rows], num_rows=end.num_rows)
    return product


def finish(product: jax.Array, end: End) -> None:
    """Adds what the warpgroups of a program share, or gates its outputs, and writes the result."""
    problem, config = end.problem, end.config
    out = end.outputs[0].at[lax.axis_index("split"), end.rows, pl.ds(end.first_column + end.column * ROWS, ROWS)]
    write = functools.partial(lanes.store, out=out, num_outputs=problem.num_written, num_rows=end.num_rows)
    if problem.epilogue is not Epilogue.NONE:
        _gate(product, end, write)
    elif config.warpgroups_k == 1:
        write(product)
    else:
        _add_up(product, end, write)


def _add_up(product: jax.Array, end: End, write: Callable[[jax.Array], None]) -> None:
    partial, full, others = end.scratch["partial"], end.scratch["partial_full"], end.config.warpgroups_k - 1

    @pl.when(end.in_program > 0)
    def _hand_over():
        lanes.spill(product, partial.at[end.column, end.in_program - 1])
        plgpu.barrier_arrive(full)  # there is one sum per program: the barrier is never used again

    @pl.when(end.in_program == 0)
    def _add():
        plgpu.barrier_wait(full)
        # The tree over the slices of a program; what reads the result goes on with it over programs.
        parts = [lanes.unspill(partial.at[end.column, i], end.config.block_m) for i in range(others)]
        write(tree_sum([product, *parts]))


def _gate(product: jax.Array, end: End, write: Callable[[jax.Array], None]) -> None:
    """Hands over up, or waits for it, gates it and writes the result.

    Up goes where a tile of its own warpgroup's weight was, which costs no shared memory. Nobody else reads that, the
    warpgroup has read it into registers before its last product, which has ended, and no copy is under way: it has
    waited for each. As one warp may be ahead of the others, each keeps to the 16 outputs that it has read itself.
    """
    in_half, handed_over = end.config.warpgroups_n // 2, end.scratch["handed_over"]
    problem, column = end.problem, end.column

    def tile_of(column: jax.Array) -> Ref:
        return end.scratch["weight"][0].at[0, 0, pl.ds(column * ROWS, ROWS)]

    @pl.when(column >= in_half)
    def _hand_over():
        _spill_rounded(product, tile_of(column), problem.out_dtype)
        plgpu.barrier_arrive(handed_over.at[column - in_half])  # used once

    @pl.when(column < in_half)
    def _multiply():
        plgpu.barrier_wait(handed_over.at[column])
        gated = _gated(product, tile_of(column + in_half), problem.out_dtype)
        write(gated)
        if problem.epilogue is Epilogue.GATED_WITH_MAGNITUDES:
            out = end.outputs[1].at[end.rows, pl.ds(lax.div(end.first_column, ROWS) + column, 1)]
            num_rows = jnp.minimum(problem.m - end.first_row, end.config.block_m)
            num_parts = problem.num_written // ROWS
            _store_magnitudes(gated, tile_of(column), out, num_parts=num_parts, num_rows=num_rows)


def _spill_rounded(product: jax.Array, tile: Ref, dtype: DTypeLike) -> None:
    """Writes a warpgroup's product, rounded to ``dtype`` of 16 bits, to where a tile of its weight was."""

    def build(context, product, tile):
        for index, pair in enumerate(product.registers.flat):
            word = llvm.bitcast(_word(), _rounded(pair, dtype))
            llvm.store(word, _own_word(tile, index), alignment=4)

    lanes.inline(build, product, tile, types=[lanes.WGMMA, _TILE])


def _gated(gate: jax.Array, tile: Ref, dtype: DTypeLike) -> jax.Array:
    """``silu(gate) * up`` as an array of ``dtype`` would hold it, in float32.

    Args:
        gate: float32 product, which is rounded to ``dtype`` first.
        tile: where another warpgroup has spilled up.
        dtype: bfloat16 or float16.
    """

    def build(context, gate, tile):
        registers = []
        for index, pair in enumerate(gate.registers.flat):
            up = llvm.load(_word(), _own_word(tile, index), alignment=4)
            up = arith.extf(pair.type, llvm.bitcast(_pair(dtype), up))
            pair = arith.extf(pair.type, _rounded(pair, dtype))
            product = lanes.vector.from_elements(pair.type, [_gated_element(pair, up, index) for index in range(2)])
            registers.append(arith.extf(pair.type, _rounded(product, dtype)))
        return lanes.fragmented(registers, gate.shape)

    returns = plgpu.ShapeDtypeStruct(gate.shape, jnp.float32, layout=lanes.WGMMA)
    return lanes.inline(build, gate, tile, types=[lanes.WGMMA, _TILE], returns=returns)


def _store_magnitudes(product: jax.Array, tile: Ref, out: Ref, *, num_parts: int, num_rows: jax.Array) -> None:
    """Writes the largest magnitude of each row of ``product: [64, block_m]`` among its 64 outputs.

    Args:
        product: float32.
        tile: where the warpgroup's own weight was.
        out: ``[block_m, 1]`` of an array with ``num_parts`` columns.
        num_parts: see ``out``.
        num_rows: how many of the rows exist.
    """
    block_m = product.shape[1]

    def build(context, product, tile, out, num_rows):
        lane, end = Lane.here(), num_rows.registers.flat[0]
        for column in range(block_m // 8):
            for odd in range(2):
                of_warp = _largest_of_warp(
                    [lanes.element(product.registers.flat[2 * column + half], odd) for half in range(2)]
                )
                row = arith.addi(lanes.first_row(column), i32(odd))
                llvm.store(of_warp, _word_of_warp(tile, lane.warp, row), alignment=4)
        mosaic.warpgroup_barrier()
        largest = None
        row = arith.minsi(lane.thread, i32(block_m - 1))
        for warp in range(4):
            of_warp = llvm.load(_word(), _word_of_warp(tile, i32(warp), row), alignment=4)
            largest = of_warp if largest is None else arith.maxsi(largest, of_warp)
        address = mosaic.getelementptr(mosaic.memref_ptr(out), [arith.muli(row, i32(num_parts))], _word())
        lanes.store_if(lanes.less(lane.thread, end), largest, address)

    types = [lanes.WGMMA, _TILE, plgpu.RefType(), plgpu.Layout.WG_SPLAT(())]
    lanes.inline(build, product, tile, out, num_rows, types=types)


def _gated_element(gate: Value, up: Value, index: int) -> Value:
    """Of one element of two pairs."""
    operands = [lanes.element(gate, index), lanes.element(up, index)]
    [product] = lanes.assembly(gating.GATED, gating.CONSTRAINTS, operands, [ir.F32Type.get()])
    return product


def _largest_of_warp(values: list[Value]) -> Value:
    """The bits of the largest magnitude of the same row that a warp holds: of numbers without sign they order alike."""
    bits = [arith.andi(llvm.bitcast(_word(), value), i32(_NO_SIGN)) for value in values]
    largest = arith.maxsi(*bits)
    for distance in (4, 8, 16):  # lanes that hold other outputs of the row
        largest = arith.maxsi(largest, mosaic.shfl_bfly(largest, distance))
    return largest


def _own_word(tile: Value, index: int) -> Value:
    """Of a thread, its word of 32 bits for a register pair."""
    lane = Lane.here()
    in_warp = arith.addi(arith.muli(lane.group, i32(4)), lane.in_group)
    return _word_of_warp(tile, lane.warp, arith.addi(in_warp, i32(32 * index)))


def _word_of_warp(tile: Value, warp: Value, index: Value) -> Value:
    offset = arith.addi(arith.muli(warp, i32(_PER_WARP // 4)), index)
    return mosaic.getelementptr(mosaic.memref_ptr(tile), [offset], _word())


def _rounded(pair: Value, dtype: DTypeLike) -> Value:
    return arith.truncf(_pair(dtype), pair)


def _pair(dtype: DTypeLike) -> Any:
    element = {"bfloat16": ir.BF16Type, "float16": ir.F16Type}[jnp.dtype(dtype).name]
    return ir.VectorType.get((2,), element.get())


def _word() -> Any:
    return ir.IntegerType.get_signless(32)
