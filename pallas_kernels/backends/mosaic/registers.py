"""Registers and memory of one thread, for the Mosaic GPU kernels: what Pallas itself cannot say.

The functions that take :class:`Value` build MLIR and are called from inside :func:`inline`; those that take arrays
and refs are called from a kernel.

Raises ImportError on JAX versions whose Mosaic GPU interface differs from the one used here.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.backends import early_launch

try:
    from jax.experimental.mosaic.gpu import fragmented_array as fa
    from jax.experimental.mosaic.gpu import utils as mosaic
    from jax.experimental.pallas import mosaic_gpu as plgpu
    from jaxlib.mlir import ir
    from jaxlib.mlir.dialects import arith, llvm, vector

    WGMMA = plgpu.Layout.WGMMA
    accumulator: Any = vars(plgpu)["WGMMAAccumulatorRef"]
    _needed = (plgpu.inline_mgpu, plgpu.Layout.WGMMA_8BIT, fa.WGMMA_LAYOUT_8BIT, mosaic.memref_ptr, mosaic.thread_idx)
    _needed += (plgpu.griddepcontrol_wait,)
except (ImportError, AttributeError, KeyError) as error:
    raise ImportError(
        f"the Mosaic GPU interface of jax {jax.__version__} is not the one known here: {error}"
    ) from error

Ref = Any  # a block of memory inside a kernel; JAX publishes no type for it
Value = Any  # an MLIR value

TILE = 128  # bytes of a weight row in a tile, and inputs per plane
ROWS = 64  # outputs per warpgroup: the fixed side of wgmma
WEIGHT_TRANSFORMS = (plgpu.TilingTransform((8, TILE)), plgpu.SwizzleTransform(128))  # of a tile in shared memory


def inline(function: Callable[..., Any], *args: Any, types: Sequence[Any], returns: Any = None) -> Any:
    """Calls ``function(context, *args)``, which builds MLIR, from inside a kernel."""
    return plgpu.inline_mgpu(arg_types=tuple(types), return_type=returns)(function)(*args)


def start_next() -> None:
    """Lets the next kernel start, once every program has called this; see ``backends/early_launch.py``."""

    # What is traced names the instruction, so that early_launch.obstacle finds it.
    inline(functools.partial(_instruction, early_launch.SIGNAL), types=[])


def _instruction(ptx: str, context: Any) -> None:
    llvm.inline_asm(ir.Type.parse("!llvm.void"), [], f"{ptx};", "", has_side_effects=True)


def scaled_rows(product: jax.Array, factor: Ref, *, num_rows: jax.Array | None) -> jax.Array:
    """``product: [64, block_m]`` times ``factor: [block_m]`` float32, each product rounded by itself.

    Args:
        num_rows: how many of the rows have a factor, at least 1; None for all.
    """

    def build(context, product, factor, *limit):
        pairs = list(product.registers.flat)
        last = arith.subi(limit[0].registers.flat[0], i32(1)) if limit else None
        factors = [_load_pair(factor, column, last) for column in range(len(pairs) // 2)]
        registers = []
        for index, pair in enumerate(pairs):
            scaled = [_rounded_product(element(pair, i), element(factors[index // 2], i)) for i in range(2)]
            registers.append(vector.from_elements(pair.type, scaled))
        return fragmented(registers, product.shape)

    returns = plgpu.ShapeDtypeStruct(product.shape, jnp.float32, layout=WGMMA)
    types = [WGMMA, plgpu.RefType(), *_limit_types(num_rows)]
    return inline(build, product, factor, *_limits(num_rows), types=types, returns=returns)


def _load_pair(factor: Value, column: int, last: Value | None) -> Value:
    """Two neighbours of float32 ``[block_m]``: of the rows that a register pair holds, none beyond ``last``."""
    pair = ir.VectorType.get((2,), ir.F32Type.get())
    first = first_row(column)
    if last is None:
        return _load(factor, first, pair, of=ir.F32Type.get())
    rows = [arith.minsi(arith.addi(first, i32(odd)), last) for odd in range(2)]
    return vector.from_elements(pair, [_load(factor, row, ir.F32Type.get()) for row in rows])


def _rounded_product(a: Value, b: Value) -> Value:
    """Spelled in PTX, so that no compiler makes one operation of it and an addition that follows."""
    [product] = assembly("mul.rn.f32 $0, $1, $2;", "=f,f,f", [a, b], [ir.F32Type.get()])
    return product


def store(product: jax.Array, out: Ref, *, num_outputs: int, num_rows: jax.Array | None) -> None:
    """Writes the transpose of ``product: [64, block_m]``.

    Args:
        product: the float32 product.
        out: ``[block_m, 64]`` of an array with ``num_outputs`` columns.
        num_outputs: see ``out``.
        num_rows: how many of the rows exist, none where that is below 1; None for all.
    """

    def build(context, product, out, *limit):
        dtype = ir.MemRefType(out.type).element_type
        end = limit[0].registers.flat[0] if limit else None

        def put(value: Value, row: Value, output: Value) -> None:
            offset = arith.addi(arith.muli(row, i32(num_outputs)), output)
            address = mosaic.getelementptr(mosaic.memref_ptr(out), [offset], dtype)
            if end is None:
                llvm.store(value, address, alignment=4)
            else:
                store_if(less(row, end), value, address)

        for index, pair in enumerate(product.registers.flat):
            _store_pair(pair, dtype, index, put)

    inline(build, product, out, *_limits(num_rows), types=[WGMMA, plgpu.RefType(), *_limit_types(num_rows)])


def store_if(condition: Value, value: Value, address: Value) -> None:
    """A store of 32 bits under a predicate: a branch would let LLVM copy a warp-wide exchange into both of its arms."""
    word, wide = ir.IntegerType.get_signless(32), ir.IntegerType.get_signless(64)
    bits = value if value.type == word else llvm.bitcast(word, value)
    operands = [llvm.ptrtoint(wide, address), bits, arith.extui(word, condition)]
    ptx = "{.reg .pred p; setp.ne.b32 p, $2, 0; @p st.b32 [$0], $1;}"
    llvm.inline_asm(ir.Type.parse("!llvm.void"), operands, ptx, "l,r,r", has_side_effects=True)


def _store_pair(pair: Value, dtype: Any, index: int, put: Callable[[Value, Value, Value], None]) -> None:
    """Puts two rows of an output in float32, or, in 16 bits, two outputs of a row, which a warp exchanges first."""
    lane, (column, half) = Lane.here(), divmod(index, 2)
    if dtype == ir.F32Type.get():
        for odd in range(2):
            put(element(pair, odd), arith.addi(first_row(column), i32(odd)), lane.output(half))
        return
    word = ir.IntegerType.get_signless(32)
    rounded = llvm.bitcast(word, arith.truncf(ir.VectorType.get((2,), dtype), pair))
    transposed: Any = llvm.inline_asm(
        word, [rounded], "movmatrix.sync.aligned.m8n8.trans.b16 $0, $1;", "=r,r", has_side_effects=True
    )
    first_output = arith.addi(arith.muli(lane.warp, i32(16)), arith.muli(lane.in_group, i32(2)))
    put(transposed, arith.addi(lane.group, i32(column * 8)), arith.addi(first_output, i32(8 * half)))


def first_row(column: int) -> Value:
    """The first of the two rows whose products a thread holds in a register pair."""
    return arith.addi(arith.muli(Lane.here().in_group, i32(2)), i32(column * 8))


def less(a: Value, b: Value) -> Value:
    return arith.cmpi(arith.CmpIPredicate.slt, a, b)


def _limits(num_rows: jax.Array | None) -> tuple[jax.Array, ...]:
    return () if num_rows is None else (num_rows,)


def _limit_types(num_rows: jax.Array | None) -> list[Any]:
    return [] if num_rows is None else [plgpu.Layout.WG_SPLAT(())]


def element(pair: Value, index: int) -> Value:
    return vector.extract(pair, dynamic_position=[], static_position=_static(index))


def spill(product: jax.Array, ref: Ref) -> None:
    """Writes a warpgroup's registers to shared memory, thread by thread."""

    def build(context, product, ref):
        for index, pair in enumerate(product.registers.flat):
            llvm.store(pair, _own_pair(ref, index), alignment=8)

    inline(build, product, ref, types=[WGMMA, plgpu.RefType()])


def unspill(ref: Ref, block_m: int) -> jax.Array:
    """The inverse of :func:`spill`, in another warpgroup."""

    def build(context, ref):
        pair = ir.VectorType.get((2,), ir.F32Type.get())
        count = ROWS * block_m // 256
        return fragmented([llvm.load(pair, _own_pair(ref, i), alignment=8) for i in range(count)], (ROWS, block_m))

    returns = plgpu.ShapeDtypeStruct((ROWS, block_m), jnp.float32, layout=WGMMA)
    return inline(build, ref, types=[plgpu.RefType()], returns=returns)


def _own_pair(ref: Value, index: int) -> Value:
    offset = arith.addi(arith.muli(Lane.here().thread, i32(2)), i32(256 * index))
    return mosaic.getelementptr(mosaic.memref_ptr(ref), [offset], ir.F32Type.get())


@dataclasses.dataclass(frozen=True)
class Lane:
    """Where a thread stands in its warpgroup: thread 0..127, warp, group of four, place in the group."""

    thread: Value
    warp: Value
    group: Value
    in_group: Value

    @classmethod
    def here(cls) -> Lane:
        thread = arith.remui(mosaic.thread_idx(), i32(128))
        lane = arith.remui(thread, i32(32))
        return cls(thread, arith.divui(thread, i32(32)), arith.divui(lane, i32(4)), arith.remui(lane, i32(4)))

    def output(self, half: int) -> Value:
        """One of the two outputs among 64 that the thread holds: 0 for the upper, 1 for the lower eight."""
        return arith.addi(arith.addi(arith.muli(self.warp, i32(16)), self.group), i32(8 * half))


def load_words(weight: Value, chunks: Sequence[int]) -> list[list[Value]]:
    """This thread's bytes of a tile: for both of its outputs, four 32-bit words for each of ``chunks`` (0, 1)."""
    lane, byte = Lane.here(), ir.IntegerType.get_signless(8)
    quad = ir.VectorType.get((4,), ir.IntegerType.get_signless(32))
    base = mosaic.memref_ptr(weight)
    words: list[list[Value]] = [[], []]
    for half in range(2):
        # Eight rows of 128 bytes lie together; within a row, the swizzle permutes pieces of 16 bytes.
        eight = arith.muli(arith.addi(arith.muli(lane.warp, i32(2)), i32(half)), i32(8 * TILE))
        row = arith.addi(eight, arith.muli(lane.group, i32(TILE)))
        for chunk in chunks:
            piece = arith.xori(arith.addi(arith.muli(lane.in_group, i32(2)), i32(chunk)), lane.group)
            offset = arith.addi(row, arith.muli(piece, i32(16)))
            loaded = llvm.load(quad, mosaic.getelementptr(base, [offset], byte), alignment=16)
            words[half] += [llvm.extractelement(loaded, i32(word)) for word in range(4)]
    return words


def load_column(columns: Value, plane: int, group: int, half: int) -> Value:
    """This thread's float16 of ``[planes, groups, 64]``: of a plane, a group and one of its outputs."""
    shape = ir.MemRefType(columns.type).shape
    strides, _ = ir.MemRefType(columns.type).get_strides_and_offset()
    start = min(plane, shape[0] - 1) * strides[0] + group * strides[1]
    return _load(columns, arith.addi(i32(start), Lane.here().output(half)), ir.F16Type.get())


def load_row_pair(rows: Value, plane: int, column: int) -> Value:
    """Two neighbours of float32 ``[planes, 1, block_m]``: those whose products the thread holds in a register pair."""
    shape = ir.MemRefType(rows.type).shape
    strides, _ = ir.MemRefType(rows.type).get_strides_and_offset()
    start = i32(min(plane, shape[0] - 1) * strides[0] + 8 * column)
    offset = arith.addi(start, arith.muli(Lane.here().in_group, i32(2)))
    return _load(rows, offset, ir.VectorType.get((2,), ir.F32Type.get()), of=ir.F32Type.get())


def zeros(shape: tuple[int, int]) -> jax.Array:
    """Float32 zeros in the WGMMA layout."""
    return plgpu.layout_cast(jnp.zeros(shape, jnp.float32), WGMMA)


def scalars(array: Any) -> list[Value]:
    """The elements that this thread holds of an array of pairs."""
    return [element(pair, index) for pair in array.registers.flat for index in range(2)]


def pinned(array: jax.Array) -> jax.Array:
    """A float32 array in the WGMMA layout, computed before the waits that follow and read after those before.

    Arithmetic has no effects that would keep a compiler from moving it over a wait.
    """

    def build(context, array):
        values = scalars(array)
        kinds = [value.type for value in values]
        constraints = ",".join(["=f"] * len(values) + [str(i) for i in range(len(values))])
        struct: Any = llvm.inline_asm(
            llvm.StructType.get_literal(kinds), values, "", constraints, has_side_effects=True
        )
        held = [llvm.extractvalue(kind, struct, [i]) for i, kind in enumerate(kinds)]
        registers = [
            vector.from_elements(pair.type, held[2 * i : 2 * i + 2]) for i, pair in enumerate(array.registers.flat)
        ]
        return fragmented(registers, array.shape)

    returns = plgpu.ShapeDtypeStruct(array.shape, jnp.float32, layout=WGMMA)
    return inline(build, array, types=[WGMMA], returns=returns)


def splat(kind: Any, value: Value) -> Value:
    """A vector of equal elements."""
    return vector.broadcast(kind, value)


def f32(value: float) -> Value:
    """A float32 constant."""
    return arith.constant(ir.F32Type.get(), ir.FloatAttr.get(ir.F32Type.get(), value))


def fragmented(registers: Sequence[Value], shape: tuple[int, ...]) -> Any:
    """Registers in the order of the instruction as an array in a WGMMA layout."""
    element = ir.VectorType(registers[0].type).element_type
    is_byte = element == ir.IntegerType.get_signless(8)
    is_signed = True if isinstance(element, ir.IntegerType) else None
    layout = fa.WGMMA_LAYOUT_8BIT if is_byte else fa.WGMMA_LAYOUT
    array = np.empty(layout.registers_shape(shape), dtype=object)
    for index, register in enumerate(registers):
        array.flat[index] = register
    return fa.FragmentedArray(_registers=array, _layout=layout, _is_signed=is_signed)


def assembly(ptx: str, constraints: str, args: Sequence[Value], results: Sequence[Any]) -> list[Value]:
    """PTX with one or several results."""
    if len(results) == 1:
        return [llvm.inline_asm(results[0], args, ptx, constraints)]
    struct: Any = llvm.inline_asm(llvm.StructType.get_literal(results), args, ptx, constraints)
    return [llvm.extractvalue(result, struct, [index]) for index, result in enumerate(results)]


def i32(value: int) -> Value:
    """A 32-bit constant."""
    kind = ir.IntegerType.get_signless(32)
    return arith.constant(kind, ir.IntegerAttr.get(kind, value))


def _load(ref: Value, offset: Value, dtype: Any, of: Any = None) -> Value:
    """``dtype`` at the element ``offset``, counted in ``of`` where ``dtype`` is a vector of it."""
    return llvm.load(dtype, mosaic.getelementptr(mosaic.memref_ptr(ref), [offset], of or dtype))


def _static(position: int) -> Any:
    return ir.DenseI64ArrayAttr.get([position])
