"""The specification of ``quantize_activations`` in ``jax.numpy``, and its implementation on the CPU.

For each token and group, in float32, with ``q = 7`` or ``127`` (symmetric) and ``levels = 15`` or ``255``::

    symmetric     scale = clip * max|x| / q                 codes = round(x / scale)
    asymmetric    scale = clip * (max x - min x) / levels   codes = round(x / scale) - zero - half
                  zero = round(clip * min x / scale)        offset = -(zero + half) * scale,  half = 8 or 128

so that ``x = scale * codes - offset``. The zero point is an integer: an input of 0 stays 0, where a grid that
began exactly at the minimum would move all the small inputs beside an outlier the same way. On SmolLM2-135M
that cost 2 to 4 points of acceptance on two sets of 24 prompts. Ties round to even, codes saturate, and a group
without spread takes a tiny scale instead of a division by zero. ``x / scale`` is ``x`` times the rounded
reciprocal of ``scale``: XLA turns it into that on some platforms, and spelled out it gives every implementation
the same codes.
"""

from __future__ import annotations

from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.activations import QuantizedActivation

# Far below any scale that matters, and far enough above the smallest normal float32 that GPUs, which
# may flush subnormal numbers, and CPUs agree on every quotient.
SMALLEST_SCALE = 1e-30


Rounding = Callable[[Array], Array]  # kernels spell it in their own instructions


def quantize_activations(
    x: Float[Array, "*batch K"], *, bits: int, group_size: int, symmetric: bool, clip_ratio: float
) -> QuantizedActivation:
    """Rounds activations to the nearest code; see the public function."""
    groups = x.astype(jnp.float32).reshape(*x.shape[:-1], x.shape[-1] // group_size, group_size)
    if symmetric:
        scale = symmetric_scale(jnp.max(jnp.abs(groups), axis=-1), bits=bits, clip_ratio=clip_ratio)
        codes = symmetric_codes(groups, (1 / scale)[..., None], bits=bits, rounding=jnp.round)
        offset = None
    else:
        low = jnp.float32(clip_ratio) * jnp.min(groups, axis=-1)
        high = jnp.float32(clip_ratio) * jnp.max(groups, axis=-1)
        scale = asymmetric_scale(low, high, bits=bits)
        zero = jnp.round(low * (1 / scale))
        codes = asymmetric_codes(groups, zero[..., None], (1 / scale)[..., None], bits=bits, rounding=jnp.round)
        offset = asymmetric_offset(zero, scale, bits=bits)
    return QuantizedActivation(codes.reshape(x.shape), scale, offset, bits)


def symmetric_scale(largest: Array, *, bits: int, clip_ratio: float) -> Array:
    """Step of the codes for a group whose largest magnitude is ``largest``."""
    return jnp.maximum(largest * jnp.float32(clip_ratio / _largest_code(bits)), jnp.float32(SMALLEST_SCALE))


def symmetric_codes(x: Array, inverse_scale: Array, *, bits: int, rounding: Rounding) -> Array:
    """Codes in ``-q..q``."""
    largest = _largest_code(bits)
    return jnp.clip(rounding(x * inverse_scale), jnp.float32(-largest), jnp.float32(largest)).astype(jnp.int8)


def asymmetric_scale(low: Array, high: Array, *, bits: int) -> Array:
    """Step of the codes for a group whose clipped range is ``[low, high]``.

    A group far from zero with hardly any spread takes a step that keeps its zero point an exact float32.
    """
    smallest = jnp.maximum(jnp.maximum(jnp.abs(low), jnp.abs(high)) * jnp.float32(2**-22), jnp.float32(SMALLEST_SCALE))
    return jnp.maximum((high - low) * jnp.float32(1 / (2**bits - 1)), smallest)


def asymmetric_offset(zero: Array, scale: Array, *, bits: int) -> Array:
    """What ``scale * codes`` exceeds the input by."""
    return -(zero + jnp.float32(2 ** (bits - 1))) * scale


def asymmetric_codes(x: Array, zero: Array, inverse_scale: Array, *, bits: int, rounding: Rounding) -> Array:
    """Codes in ``-half..half-1``; ``zero`` is the integer that the lowest code stands for."""
    unsigned = jnp.clip(rounding(x * inverse_scale) - zero, jnp.float32(0), jnp.float32(2**bits - 1))
    return (unsigned - jnp.float32(2 ** (bits - 1))).astype(jnp.int8)


def _largest_code(bits: int) -> int:
    return 2 ** (bits - 1) - 1
