"""Sums of the devices that share a model, which each of them writes into the memory of the others (NVLink).

A library's message is a kernel that starts behind the one that has made what it sends, and ends before the one that
reads it: in a step of Llama-3-8B on two H200s 9.5 us with what it waits for, 64 times. Here one kernel adds up what
the programs of a matmul have left, writes it into a *mailbox* on each other device, waits for what they write into
its own, and adds that in the order of the devices. The bits are those of a gathered
:class:`~pallas_kernels.arrays.partial_sums.PartialSums`.

A mailbox is an array of a device::

    counts   [B] int32          how many letters each block has sent
    letters  [2, n, V] packets  of each device the values of an even letter and of an odd one

A packet is 16 bytes: 8 of values and, behind each half of them, the number of the letter. Memory takes halves of a
packet as a whole, so a thread that finds the number of the letter it waits for has the values as well: nobody waits
until what was written has arrived. (NCCL calls that protocol LL.) Two letters are enough: who writes letter ``k + 2``
has read letter ``k + 1`` of everybody, and each has sent that after the kernel that read letter ``k``. A block has the
same place in all letters, so letters may have different lengths.

Where the mailbox of another device lies, :meth:`Mailbox.meet` finds out. It waits for all devices, and so stands
behind whatever has filled the mailboxes with zeros. As letters go to an address, the array must stay where it is from
then on: loops carry it in place, branches might not. A kernel ends with a trap where it has moved.

Raises ImportError on JAX versions whose Mosaic GPU interface differs from the one used here.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Int32

from pallas_kernels.arrays.partial_sums import PartialSums, tree_sum
from pallas_kernels.backends.mosaic.registers import Ref, Value, arith, i32, inline, ir, llvm, mosaic, plgpu, vector

try:
    remote_ref: Any = vars(plgpu)["remote_ref"]
except KeyError as error:
    raise ImportError(f"jax {jax.__version__} has no references to the memory of other devices") from error

THREADS = 128  # of a warpgroup, which a block is
VALUES = 4  # of a thread
TILE = THREADS * VALUES
# A block waits for that of the other devices. An H100 runs so many at the same time if a thread has 64 registers. (With
# more, the first block that waits anywhere still runs everywhere, as GPUs start blocks in their order.)
_MOST_BLOCKS = 1024
# Tiles of a block times devices that it sends them to. With many more of them a thread has 255 registers. Where a
# library is faster, which sends half as many bytes, nobody has measured.
_MOST_SENT = 4
_PACKET = 16  # bytes
_SCALAR = plgpu.Layout.WG_SPLAT(())


@dataclasses.dataclass(frozen=True)
class Letters:
    """How the values of a letter lie.

    Attributes:
        num_devices: that write to each other.
        num_values: of the longest letter, a multiple of ``TILE``.
        dtype: of the values.
    """

    num_devices: int
    num_values: int
    dtype: Any

    @classmethod
    def of(cls, num_devices: int, num_values: int, dtype: Any) -> Letters:
        """For at most so many values; longer letters than ``_MOST_SENT`` allows are left to a library."""
        most = _MOST_BLOCKS * max(_MOST_SENT // (num_devices - 1), 1) * TILE
        return cls(num_devices, min(pl.cdiv(num_values, TILE) * TILE, most), jnp.dtype(dtype))

    @property
    def tiles_of_block(self) -> int:
        """Tiles that each block writes and reads; of all letters alike."""
        return pl.cdiv(self.num_values // TILE, _MOST_BLOCKS)

    @property
    def num_blocks(self) -> int:
        """Blocks of the longest letter."""
        return pl.cdiv(self.num_values, self.tiles_of_block * TILE)

    @property
    def packets_of_thread(self) -> int:
        """That its values of a tile fill."""
        return VALUES * jnp.dtype(self.dtype).itemsize // 8

    @property
    def words_of_tile(self) -> int:
        """Words of 32 bits that the values of a tile fill."""
        return TILE * jnp.dtype(self.dtype).itemsize // 4

    @property
    def bytes_of_counts(self) -> int:
        """Before the letters, in whole cache lines."""
        return pl.cdiv(4 * self.num_blocks, 128) * 128

    @property
    def bytes_of_letter(self) -> int:
        """Of one device."""
        return self.num_blocks * self.tiles_of_block * THREADS * self.packets_of_thread * _PACKET

    @property
    def num_bytes(self) -> int:
        """Of a mailbox."""
        return self.bytes_of_counts + 2 * self.num_devices * self.bytes_of_letter


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Mailbox:
    """A mailbox of each device along an axis, in the program that they run.

    Attributes:
        axis: of the mesh.
        letters: how they lie.
        memory: reference to the mailbox of this device.
        addresses: reference to those of all, as :meth:`meet` has found them, and the number of this device along the
            axis: ``[n + 1, 2]`` int32. A kernel that asks JAX for that number waits for all devices before it starts.
    """

    axis: str = dataclasses.field(metadata={"static": True})
    letters: Letters = dataclasses.field(metadata={"static": True})
    memory: Ref
    addresses: Ref

    @classmethod
    def empty(cls, axis: str, num_values: int, dtype: Any) -> Mailbox:
        """A new one, for letters of at most so many values; before the first letter everybody has to meet."""
        letters = Letters.of(lax.axis_size(axis), num_values, dtype)
        memory = jax.new_ref(jnp.zeros((letters.num_bytes // 4,), jnp.int32))
        return cls(axis, letters, memory, jax.new_ref(jnp.zeros((letters.num_devices + 1, 2), jnp.int32)))

    def meet(self) -> None:
        """Waits until all devices are here, and finds out where their mailboxes are."""

        def mailbox_meet(memory, addresses):
            everywhere = [remote_ref(memory, {self.axis: device}) for device in range(self.letters.num_devices)]
            types = [_SCALAR, plgpu.RefType(), *[plgpu.RefType()] * len(everywhere)]
            inline(_write_addresses, lax.axis_index(self.axis), addresses, *everywhere, types=types)

        plgpu.kernel(mailbox_meet, grid=(1,), grid_names=("block",), compiler_params=_lanes())(
            self.memory, self.addresses
        )

    def takes(self, y: Float[Array, "*batch N"] | PartialSums) -> bool:
        """Whether sums of such a shape can be sent."""
        size = _size(y)
        return jnp.dtype(y.dtype) == self.letters.dtype and size % TILE == 0 and size <= self.letters.num_values

    def add_up(self, y: Float[Array, "*batch N"] | PartialSums) -> Float[Array, "*batch N"]:
        """The sums over all devices, of what each has; a device's own is rounded to its dtype before it is sent.

        Args:
            y: sums of this device, which :meth:`takes` allows; of the same shape on all devices.
        """
        parts = y.parts if isinstance(y, PartialSums) else y[None]
        size, letters = _size(y), self.letters

        def all_reduce(parts, memory, addresses, out):
            build = functools.partial(_send_and_add, letters, size)
            types = [_SCALAR, *[plgpu.RefType()] * 4]
            inline(build, lax.axis_index("block"), parts, memory, addresses, out, types=types)

        num_blocks = pl.cdiv(size, letters.tiles_of_block * TILE)
        summed = plgpu.kernel(
            all_reduce,
            out_type=jax.ShapeDtypeStruct((size,), letters.dtype),
            grid=(num_blocks,),
            grid_names=("block",),
            compiler_params=_lanes(),
        )(parts.reshape(len(parts), size), self.memory, self.addresses)
        return summed.reshape(y.shape)

    def gather(self, words: Int32[Array, "*batch"]) -> Int32[Array, "n ..."] | None:
        """The words of all devices, which have as many each; None where they do not fit into a letter."""
        letters, size = self.letters, words.size
        padded = pl.cdiv(size, letters.words_of_tile) * letters.words_of_tile
        if padded > letters.num_values // TILE * letters.words_of_tile:
            return None

        def all_gather(own, memory, addresses, out):
            build = functools.partial(_send_and_keep, letters)
            types = [_SCALAR, *[plgpu.RefType()] * 4]
            inline(build, lax.axis_index("block"), own, memory, addresses, out, types=types)

        gathered = plgpu.kernel(
            all_gather,
            out_type=jax.ShapeDtypeStruct((letters.num_devices, padded), jnp.int32),
            grid=(pl.cdiv(padded, letters.tiles_of_block * letters.words_of_tile),),
            grid_names=("block",),
            compiler_params=_lanes(),
        )(jnp.pad(words.reshape(-1), (0, padded - size)), self.memory, self.addresses)
        return gathered[:, :size].reshape(letters.num_devices, *words.shape)


def _size(y: Float[Array, "*batch N"] | PartialSums) -> int:
    return math.prod(y.shape)


def _lanes() -> Any:
    return plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane, unsafe_no_auto_barriers=True)


def _write_addresses(context: Any, device: Any, addresses: Value, *mailboxes: Value) -> None:
    for index, mailbox in enumerate(mailboxes):
        place = mosaic.getelementptr(mosaic.memref_ptr(addresses), [2 * index], _word())
        llvm.store(_as_number(mosaic.memref_ptr(mailbox)), place)
    last = mosaic.getelementptr(mosaic.memref_ptr(addresses), [2 * len(mailboxes)], _word())
    llvm.store(device.registers.flat[0], last)


class _Exchange:
    """What a thread sends and receives with the tiles of its block; made before anything that has effects."""

    def __init__(self, letters: Letters, block: Value, memory: Value, addresses: Value):
        self.letters, count = letters, i32(letters.num_devices)
        self.thread = arith.remui(mosaic.thread_idx(), i32(THREADS))
        first = arith.muli(block, i32(letters.tiles_of_block))
        self.tiles = [arith.addi(first, i32(index)) for index in range(letters.tiles_of_block)]
        self._here = _as_number(mosaic.memref_ptr(memory))
        self._count = mosaic.getelementptr(mosaic.memref_ptr(memory), [block], _word())
        self._number = arith.addi(llvm.load(_word(), self._count), i32(1))
        last = mosaic.getelementptr(mosaic.memref_ptr(addresses), [2 * letters.num_devices], _word())
        self.device = llvm.load(_word(), last)
        steps = range(1, letters.num_devices)
        self.others = [arith.remui(arith.addi(self.device, i32(step)), count) for step in steps]
        self._known = _address_of(addresses, self.device)
        self._there = [_address_of(addresses, other) for other in self.others]

    def send(self, words_of_tiles: Sequence[Sequence[Value]]) -> None:
        """Writes this thread's words of each tile to all other devices."""
        _do("{.reg .pred p; setp.ne.b64 p, $0, $1; @p trap;}", "l,l", [self._here, self._known])
        for tile, words in zip(self.tiles, words_of_tiles, strict=True):
            for base in self._there:
                _send(self._place(base, self.device, tile), words, self._number)

    def receive(self, tile: Value) -> list[list[Value]]:
        """The same thread's words of a tile, of each other device, once they are here."""
        packets = self.letters.packets_of_thread
        return [_receive(self._place(self._here, other, tile), packets, self._number) for other in self.others]

    def end(self) -> None:
        """Counts the letter."""
        mosaic.warpgroup_barrier()  # all have read the count
        first = arith.cmpi(arith.CmpIPredicate.eq, self.thread, i32(0))
        store = "{.reg .pred p; setp.ne.b32 p, $2, 0; @p st.global.u32 [$0], $1;}"
        _do(store, "l,r,r", [_as_number(self._count), self._number, arith.extui(_word(), first)])

    def _place(self, base: Value, of: Value, tile: Value) -> Value:
        """Where this thread's packets of a tile lie in the letter of a device."""
        letter = arith.addi(arith.muli(arith.andi(self._number, i32(1)), i32(self.letters.num_devices)), of)
        packet = arith.addi(arith.muli(tile, i32(THREADS)), self.thread)
        inside = arith.muli(_wide(packet), i64(self.letters.packets_of_thread * _PACKET))
        offset = arith.addi(arith.muli(_wide(letter), i64(self.letters.bytes_of_letter)), inside)
        return arith.addi(base, arith.addi(offset, i64(self.letters.bytes_of_counts)))


def _send_and_add(
    letters: Letters, size: int, context: Any, block: Any, parts: Value, memory: Value, addresses: Value, out: Value
) -> None:
    exchange = _Exchange(letters, block.registers.flat[0], memory, addresses)
    inside = arith.muli(exchange.thread, i32(VALUES))
    positions = [arith.addi(arith.muli(tile, i32(TILE)), inside) for tile in exchange.tiles]
    owns = [_own_sum(parts, size, position, letters) for position in positions]
    exchange.send([_words_of(own) for own in owns])
    for tile, own, position in zip(exchange.tiles, owns, positions, strict=True):
        theirs = [_to_float(_of_words(words, own.type)) for words in exchange.receive(tile)]
        total = tree_sum([_Sum(value) for value in _in_order(exchange.device, _to_float(own), theirs)])
        place = mosaic.getelementptr(mosaic.memref_ptr(out), [position], own.type.element_type)
        exists = arith.cmpi(arith.CmpIPredicate.ult, position, i32(size))
        _store_words(place, _words_of(_to(own.type, total.value)), exists)
    exchange.end()


def _send_and_keep(
    letters: Letters, context: Any, block: Any, own: Value, memory: Value, addresses: Value, out: Value
) -> None:
    exchange = _Exchange(letters, block.registers.flat[0], memory, addresses)
    count = 2 * letters.packets_of_thread
    size = ir.MemRefType(own.type).shape[0]
    inside = arith.muli(exchange.thread, i32(count))
    positions = [arith.addi(arith.muli(tile, i32(letters.words_of_tile)), inside) for tile in exchange.tiles]
    owns = []
    for position in positions:
        safe = arith.minui(position, i32(size - count))
        places = [
            mosaic.getelementptr(mosaic.memref_ptr(own), [arith.addi(safe, i32(i))], _word()) for i in range(count)
        ]
        owns.append([llvm.load(_word(), place) for place in places])
    exchange.send(owns)
    for tile, words, position in zip(exchange.tiles, owns, positions, strict=True):
        exists = arith.cmpi(arith.CmpIPredicate.ult, position, i32(size))
        devices = [exchange.device, *exchange.others]
        for device, theirs in zip(devices, [words, *exchange.receive(tile)], strict=True):
            row = arith.addi(arith.muli(device, i32(size)), position)
            _store_words(mosaic.getelementptr(mosaic.memref_ptr(out), [row], _word()), theirs, exists)
    exchange.end()


@dataclasses.dataclass(frozen=True)
class _Sum:
    """An MLIR value that ``tree_sum`` adds to others."""

    value: Value

    def __add__(self, other: _Sum) -> _Sum:
        return _Sum(arith.addf(self.value, other.value))


def _own_sum(parts: Value, size: int, position: Value, letters: Letters) -> Value:
    """A thread's values from a position on, of what the programs of this device have left, rounded as they are sent."""
    kind, (count, _) = ir.MemRefType(parts.type), ir.MemRefType(parts.type).shape
    # Of a block that the end cuts off, values before it once more: nobody reads where they are written.
    position = arith.minui(position, i32(size - VALUES))
    values = []
    for part in range(count):
        place = mosaic.getelementptr(
            mosaic.memref_ptr(parts), [arith.addi(position, i32(part * size))], kind.element_type
        )
        loaded = llvm.load(
            ir.VectorType.get((VALUES,), kind.element_type), place, alignment=_bytes_of(kind.element_type)
        )
        values.append(_Sum(_to_float(loaded)))
    element = mosaic.dtype_to_ir_type(letters.dtype)
    return _to(ir.VectorType.get((VALUES,), element), tree_sum(values).value)


def _in_order(device: Value, own: Value, others: Sequence[Value]) -> list[Value]:
    """The values of all devices, of a device's own and those of the ones after it, around in a circle."""
    count = len(others) + 1
    circle = [own, *others]
    ordered = []
    for index in range(count):
        chosen = circle[index]  # of device 0
        for is_device in range(1, count):
            same = arith.cmpi(arith.CmpIPredicate.eq, device, i32(is_device))
            chosen = arith.select(same, circle[(index - is_device) % count], chosen)
        ordered.append(chosen)
    return ordered


def _send(place: Value, words: Sequence[Value], number: Value) -> None:
    for index in range(0, len(words), 2):
        packet = arith.addi(place, i64(index // 2 * _PACKET))
        arguments = [packet, words[index], number, words[index + 1]]
        _do("st.volatile.global.v4.u32 [$0], {$1, $2, $3, $2};", "l,r,r,r", arguments)


_UNTIL_HERE = """{.reg .pred p; .reg .u32 first, second;
again: ld.volatile.global.v4.u32 {$0, first, $1, second}, [$2];
setp.ne.u32 p, first, $3; @p bra again; setp.ne.u32 p, second, $3; @p bra again;}"""


def _receive(place: Value, num_packets: int, number: Value) -> list[Value]:
    words = []
    for index in range(num_packets):
        arguments = [arith.addi(place, i64(index * _PACKET)), number]
        both = llvm.StructType.get_literal([_word()] * 2)
        found: Any = llvm.inline_asm(both, arguments, _UNTIL_HERE, "=&r,=&r,l,r,~{memory}", has_side_effects=True)
        words += [llvm.extractvalue(_word(), found, [position]) for position in range(2)]
    return words


def _words_of(value: Value) -> list[Value]:
    kind = ir.VectorType.get((_bytes_of(value.type.element_type) // 4,), _word())
    cast = vector.bitcast(kind, value)
    return [vector.extract(cast, [], [index]) for index in range(kind.shape[0])]


def _of_words(words: Sequence[Value], kind: Any) -> Value:
    return vector.bitcast(kind, vector.from_elements(ir.VectorType.get((len(words),), _word()), words))


def _bytes_of(element: Any) -> int:
    """Of ``VALUES`` values."""
    return VALUES * (4 if element == ir.F32Type.get() else 2)


def _store_words(place: Value, words: Sequence[Value], condition: Value) -> None:
    given = ", ".join(f"${index + 2}" for index in range(len(words)))
    ptx = "{.reg .pred p; setp.ne.b32 p, $1, 0; @p st.global.v" + f"{len(words)}.b32 [$0], {{{given}}};" + "}"
    _do(ptx, "l,r" + ",r" * len(words), [_as_number(place), arith.extui(_word(), condition), *words])


def _to_float(value: Value) -> Value:
    kind = ir.VectorType.get((VALUES,), ir.F32Type.get())
    return value if value.type == kind else arith.extf(kind, value)


def _to(kind: Any, value: Value) -> Value:
    return value if value.type == kind else arith.truncf(kind, value)


def _address_of(addresses: Value, device: Value) -> Value:
    place = mosaic.getelementptr(mosaic.memref_ptr(addresses), [arith.muli(device, i32(2))], _word())
    return llvm.load(_long(), place)


def i64(value: int) -> Value:
    """A 64-bit constant."""
    return arith.constant(_long(), ir.IntegerAttr.get(_long(), value))


def _wide(value: Value) -> Value:
    return arith.extui(_long(), value)


def _as_number(pointer: Value) -> Value:
    return llvm.ptrtoint(_long(), pointer)


def _word() -> Any:
    return ir.IntegerType.get_signless(32)


def _long() -> Any:
    return ir.IntegerType.get_signless(64)


def _do(ptx: str, constraints: str, arguments: Sequence[Value]) -> None:
    """PTX that no read or write of memory is moved across."""
    void = ir.Type.parse("!llvm.void")
    llvm.inline_asm(void, arguments, ptx, f"{constraints},~{{memory}}", has_side_effects=True)
