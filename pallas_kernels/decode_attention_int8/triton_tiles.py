"""What the Triton kernels for attention over a cache of int8 do with a tile of slots.

A tile of codes becomes floats in registers: float16, of which a byte and two constants are one without arithmetic. Keys
stand on the long side of a product and eight queries on the short one, ``logits [slots, 8]``, as tensor cores take 16
of the one and 8 of the other. Scales of keys multiply the queries, and those of values the weights, in float32.

So that float16 holds them, queries are divided by a power of two first, and the maximum that weights are relative to is
that of weight times scale. Keys may be as large as 2^17, beyond those of any float16 model.

Row invariance: whatever the number of rows, eight are multiplied at a time.
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array

from pallas_kernels.backends.triton import registers
from pallas_kernels.backends.triton.registers import LN_2, LOG2_E, exp2, log2
from pallas_kernels.decode_attention import gpu_triton as whole

GROUP = 8  # rows
# Powers of two that bring scaled queries, and weights times scales, to the middle of what float16 holds.
KEY_UNIT, VALUE_UNIT = 2.0**5, 2.0**10
_EXPONENT, _BIASES = 0x7F800000, 254 << 23  # of float32: its bits, and those of two

Carry = tuple[Array, Array, Array]  # maximum [8], weights [tile, 8], mixed [block_dim, 8] of the tiles before


def nothing(tile: int, problem: whole.Problem) -> Carry:
    """That of no slots."""
    shapes = (tile, GROUP), (problem.block_dim, GROUP)
    total, mixed = (jnp.zeros(shape, jnp.float32) for shape in shapes)
    return jnp.full((GROUP,), -jnp.inf, jnp.float32), total, mixed


def results_of(carry: Carry) -> Carry:
    """Largest logits and sums ``[8]``, and weighted values ``[8, block_dim]``, as ``decode_attention`` leaves them."""
    maximum, total, mixed = carry
    return maximum * jnp.float32(LN_2), jnp.sum(total, axis=0), mixed.T * jnp.float32(1 / VALUE_UNIT)


@dataclasses.dataclass(frozen=True)
class Rows:
    """Eight rows."""

    exist: Array  # [8]
    positions: Array  # [8]
    query: Array  # [8, block_dim]
    normal: Array  # [8, block_dim] f32, the same divided by powers of two
    unit: Array  # [] f32, what products with `query` are multiplied by
    units: Array  # [8] f32, and those with `normal` and scales

    @classmethod
    def load(cls, ref: registers.Ref, first: Array, length: Array, kv_head: Array, problem: whole.Problem) -> Rows:
        """Those from a row on."""
        rows = first + lax.broadcasted_iota(jnp.int32, (GROUP,), 0)
        exist = rows < problem.num_rows
        query = whole.load_rows(ref, rows, exist, kv_head, problem)
        wide = query.astype(jnp.float32)
        power, inverse = power_of_two(jnp.max(jnp.abs(wide), axis=1))
        unit = jnp.float32(problem.head_dim**-0.5 * LOG2_E)  # exponentials are powers of two here
        units = power * (unit * jnp.float32(1 / KEY_UNIT))
        return cls(exist, length + lax.div(rows, problem.group), query, wide * inverse[:, None], unit, units)

    def logits_of_codes(self, keys: Array, scales: Array) -> Array:
        """Times log2(e) ``[slots, 8]``, of codes as floats ``[slots, block_dim]`` and their scales ``[block_dim]``."""
        query = (self.normal * (scales * jnp.float32(KEY_UNIT))[None, :]).astype(keys.dtype)
        return whole.dot(keys, query, contract=(1, 1)) * self.units[None, :]

    def logits(self, keys: Array) -> Array:
        """The same of keys as they are."""
        return whole.dot(keys, self.query, contract=(1, 1)) * self.unit


@dataclasses.dataclass(frozen=True)
class Values:
    """Those of a tile."""

    floats: Array  # [slots, block_dim], codes
    logarithms: Array  # [slots] f32, of the scales
    units: Array  # [slots] f32, multiples of the scales
    interpret: bool

    @classmethod
    def of(cls, floats: Array, scales: Array, *, interpret: bool) -> Values:
        return cls(floats, log2(scales, interpret=interpret), scales * jnp.float32(VALUE_UNIT), interpret)

    def add_to(self, carry: Carry, logits: Array) -> tuple[Carry, Array, Array]:
        """What is carried on, the weights ``[slots, 8]``, and the logarithms to base 2 of their unit ``[8]``."""
        before, total, mixed = carry
        maximum = jnp.maximum(before, jnp.max(logits + self.logarithms[:, None], axis=0))
        shift = jnp.where(maximum == -jnp.inf, 0.0, maximum)  # nothing seen yet: -inf - -inf is not a number
        kept = exp2(before - shift, interpret=self.interpret)
        weights = exp2(logits - shift[None, :], interpret=self.interpret)
        scaled = (weights * self.units[:, None]).astype(self.floats.dtype)
        # Sums across the threads of a program are left for the end.
        total = total * kept[None, :] + weights
        mixed = mixed * kept[None, :] + whole.dot(self.floats, scaled, contract=(0, 0))
        return (maximum, total, mixed), weights, shift


def power_of_two(x: Array) -> tuple[Array, Array]:
    """The largest powers of two that are no more than float32 numbers, and the inverse of each."""
    power = lax.bitcast_convert_type(x, jnp.int32) & jnp.int32(_EXPONENT)
    inverse = lax.bitcast_convert_type(jnp.int32(_BIASES) - power, jnp.float32)
    return lax.bitcast_convert_type(power, jnp.float32), inverse


def half_of(dtype: DTypeLike) -> DTypeLike:
    """What codes, and what they are multiplied with, become for queries of a dtype."""
    return jnp.dtype(dtype) if jnp.dtype(dtype) == jnp.float32 else jnp.dtype(jnp.float16)
