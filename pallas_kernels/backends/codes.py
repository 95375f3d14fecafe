"""PTX that makes 16-bit floats of weight codes, for the Triton and the Mosaic GPU kernels.

A register holds two lanes of 16 bits, each with a code in some of its bits. ``lop3`` ((a & b) | c) makes a float of
known size of it, whose last bits the code is, and an addition that is exact centres it by 8 (:class:`Lanes`).

Where the result is scaled at once, bfloat16 needs neither that size nor that addition (:class:`SmallLanes`).
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
from jax.typing import DTypeLike

# Upper and lower nibbles of four nested codes of a plane as four bytes: ((a & c) | (b & ~c)). Takes the names of three
# registers: the bytes, the words with the upper nibbles and those with the lower ones.
JOIN = (
    "shl.b32 {0}, {1}, 4; lop3.b32 {0}, {0}, {2}, 0xF0F0F0F0, 0xE4;",
    "shr.u32 {0}, {2}, 4; lop3.b32 {0}, {1}, {0}, 0xF0F0F0F0, 0xE4;",
)


@dataclasses.dataclass(frozen=True)
class Lanes:
    """What becomes of a lane: ``((lane & mask) | magic) + centre``.

    Attributes:
        mask: the bits of the code.
        magic, centre: floats.
        choice: a bit that the float has no room for.
        unchosen: what the bits of the centre are more where that bit is not set.
    """

    mask: int
    magic: int
    centre: int
    choice: int = 0
    unchosen: int = 0

    def prepare(self, lane: str, centre: str) -> str:
        """PTX that leaves the two terms of the sum in registers of these names, of which the first holds lanes."""
        choose = f"mov.b32 {centre}, {_twice(self.centre)};"
        if self.choice and self.unchosen == self.choice:  # (~a & b) | c
            choose = f"lop3.b32 {centre}, {lane}, {_twice(self.choice)}, {_twice(self.centre)}, 0xAE;"
        elif self.choice:  # a 4 in each lane, or nothing, times a quarter of what is added
            choose = (
                f"lop3.b32 {centre}, {lane}, {_twice(self.choice)}, 0, 0x0C; shr.u32 {centre}, {centre}, 5; "
                f"mad.lo.u32 {centre}, {centre}, {self.unchosen // 4}, {_twice(self.centre)};"
            )
        return f"{choose} lop3.b32 {lane}, {lane}, {_twice(self.mask)}, {_twice(self.magic)}, 0xEA;"


_SMALLEST = 133  # the smallest bfloat16 is 2 ** -133, and up to 2 ** -125 each of its multiples is one
SMALLER = 24  # small lanes make weights smaller by this power of 2: no float16 is a scale too large then, or too small


@dataclasses.dataclass(frozen=True)
class SmallLanes:
    """Lanes of bfloat16 that are codes already: as multiples of the smallest number, whose bits are the multiple's.

    With a scale that is as much larger, one ``fma`` makes the weight of a code, exactly but for its one rounding::

        code * 2 ** (first - 133)  *  scale * 2 ** (133 - first - 24)  -  8 * scale * 2 ** -24

    The second term is the scale times a power of 2, so it is as exact as the scale. Weights and sums are smaller by
    ``2 ** -24``, which makes a scale as large as a float16 a bfloat16; a power of 2 rounds nothing.

    Attributes:
        first: the bit of a lane with the last bit of the code; bits before it are fractions.
        mask: bits of the code.
        half: a bit that is set, for half a step more; or 0.
    """

    first: int
    mask: int
    half: int = 0

    @property
    def larger(self) -> int:
        """The power of 2 that a scale is multiplied by."""
        return _SMALLEST - self.first - SMALLER

    def centre(self, zero_point: float) -> str:
        """A register whose lanes are the code of zero, negative."""
        return _twice(0x8000 | int(zero_point * 2**self.first))

    def prepare(self, lane: str) -> str:
        """PTX that leaves nothing but the code in the lanes of a register of this name."""
        return f"lop3.b32 {lane}, {lane}, {_twice(self.mask)}, {_twice(self.half)}, 0xEA;"


def small_lanes(plane: int, *, bits: int, truncated: bool = False) -> SmallLanes:
    """Of codes with so many bits in a plane of bytes, or of joined bytes; truncated ones stand for half a step more.

    Codes of a whole nibble stay where they are in their byte. A truncated one needs a bit below it.
    """
    if bits == 8:
        return SmallLanes(4, 0x00FF)
    first = 4 if plane else int(truncated)
    return SmallLanes(first, 0xF << first, 1 << first >> 1 if truncated else 0)


def _twice(lane: int) -> str:
    return f"0x{lane:04X}{lane:04X}"


NAMES = {jnp.dtype(jnp.bfloat16): "bf16", jnp.dtype(jnp.float16): "f16"}
ONE = {"bf16": "0x3F803F80", "f16": "0x3C003C00"}
# A nibble in the lowest bits: 128 + nibble - 136, and 1024 + nibble - 1032.
_WHOLE = {"bf16": Lanes(0x000F, 0x4300, 0xC308), "f16": Lanes(0x000F, 0x6400, 0xE408)}
# One bit higher, and half a step more: 64.5 + nibble - 72, and 512.5 + nibble - 520.
_TRUNCATED = {"bf16": Lanes(0x001E, 0x4281, 0xC290), "f16": Lanes(0x001E, 0x6001, 0xE010)}
# A byte u: 8 + (u mod 128) / 16 - (8 or, where u is below 128, 16), and 64 + u / 16 - 72.
_NESTED = {"bf16": Lanes(0x007F, 0x4100, 0xC100, 0x0080, 0x0080), "f16": Lanes(0x00FF, 0x5400, 0xD480)}
# The same less half a step: 8.5 or 16.5, and 72.5.
_CENTRED = {"bf16": Lanes(0x007F, 0x4100, 0xC108, 0x0080, 0x007C), "f16": Lanes(0x00FF, 0x5400, 0xD488)}


def lanes_of(dtype: DTypeLike, *, bits: int, truncated: bool = False, centred: bool = False) -> Lanes:
    """Of codes with so many bits; truncated ones stand for half a step more and lie one bit higher.

    Those of 8 bits are centred by 8, or, ``centred``, by 8.5.
    """
    return (_CENTRED if centred else _NESTED if bits == 8 else _TRUNCATED if truncated else _WHOLE)[
        NAMES[jnp.dtype(dtype)]
    ]


def shift_down(target: str, source: str, by: int) -> str:
    """PTX that shifts a register down, or up by a negative number of bits."""
    return f"shr.u32 {target}, {source}, {by};" if by >= 0 else f"shl.b32 {target}, {source}, {-by};"
