"""Nibbles and float16 in words of 32 bits, in kernels for TPUs.

No element type of 4, 8 or 16 bits has integer arithmetic on every TPU, and float16 none at all: kernels do not even
take it as an argument. So bits are handled in words: ``pltpu.bitcast`` turns rows ``4 i .. 4 i + 3`` of bytes into row
``i`` of words, and back.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array

CODE_FACTOR = 16  # kernels multiply by 16 * (code - 8)


def half_bits(array: Array) -> Array:
    """Values in float16 as their bits, which a kernel decodes; others as they are."""
    return lax.bitcast_convert_type(array, jnp.int16) if array.dtype == jnp.float16 else array


def as_float32(values: Array) -> Array:
    """In a kernel: the float32 of :func:`half_bits`, exact for every float16 but infinities and NaN."""
    if values.dtype != jnp.int16:
        return values.astype(jnp.float32)
    bits = values.astype(jnp.int32)
    magnitude = bits & 0x7FFF
    normal = lax.bitcast_convert_type(magnitude << 13, jnp.float32) * jnp.float32(2.0**112)
    small = magnitude.astype(jnp.float32) * jnp.float32(2.0**-24)
    unsigned = jnp.where(magnitude < 0x400, small, normal)
    return jnp.where(bits < 0, -unsigned, unsigned)


def decode_planes(packed: Array, low: Array | None = None) -> tuple[Array, Array]:
    """In a kernel: ``CODE_FACTOR * (code - 8)`` of both planes as int8, four codes at a time.

    Flipping the highest bit of a nibble makes ``code - 8`` of it, in two's complement. As the upper half of a byte it
    is 16 times that, so that four operations decode a word of eight codes, and none extends a sign. The lower half is
    that of a nested code, which is a whole number of sixteenths: the byte is the code of 8 bits less 128.
    """
    flipped = pltpu.bitcast(packed, jnp.int32) ^ jnp.int32(-0x77777778)
    upper: Any = jnp.int32(-0x0F0F0F10)
    planes = (flipped << 4) & upper, flipped & upper
    if low is not None:
        lower, nibbles = jnp.int32(0x0F0F0F0F), pltpu.bitcast(low, jnp.int32)
        planes = planes[0] | (nibbles & lower), planes[1] | ((nibbles >> 4) & lower)
    return pltpu.bitcast(planes[0], jnp.int8), pltpu.bitcast(planes[1], jnp.int8)


def int8_where(mask: Array, codes: Array) -> Array:
    """In a kernel: int8 ``[M, W]`` with zeros where ``mask: [M / 4, W]`` is False; a row of it covers four of codes."""
    return pltpu.bitcast(jnp.where(mask, pltpu.bitcast(codes, jnp.int32), 0), jnp.int8)


def bfloat16_pieces(x: Array) -> list[Array]:
    """bfloat16 arrays whose sum is ``x``: itself, or the 24 bits of float32 (11 of float16) in runs of eight."""
    if x.dtype == jnp.bfloat16:
        return [x]
    rest, pieces = x.astype(jnp.float32), []
    for _ in range(2 if x.dtype == jnp.float16 else 3):
        bits = lax.bitcast_convert_type(rest, jnp.uint32) & jnp.uint32(0xFFFF0000)
        piece = lax.bitcast_convert_type(bits, jnp.float32)
        pieces.append(piece.astype(jnp.bfloat16))
        rest = rest - piece
    return pieces
