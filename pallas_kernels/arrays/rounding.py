"""The formula by which every quantiser of activations rounds, kernels included.

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

Outlier groups: the ``n`` groups of a token with the widest range (``max|x|``, or ``max x - min x``) take 8 bits
whatever ``bits`` is; groups that tie for a place all do. A few channels of a transformer are far louder than the
rest (Dettmers et al., arXiv 2208.07339; Atom, arXiv 2310.19102, keeps them in 8 bits too, chosen offline where
this choice is made per token). Codes have a byte each, so an integer matmul does not notice.
"""

from __future__ import annotations

from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

# Far below any scale that matters, and far enough above the smallest normal float32 that GPUs, which
# may flush subnormal numbers, and CPUs agree on every quotient.
SMALLEST_SCALE = 1e-30
OUTLIER_BITS = 8

Rounding = Callable[[Array], Array]  # kernels spell it in their own instructions


def quantize_groups(
    x: Float[Array, "*batch G group"],
    *,
    bits: int,
    symmetric: bool,
    clip_ratio: float,
    outlier_groups: int,
    reciprocal: Callable[[Array], Array],
    rounding: Rounding,
    exists: Bool[Array, "*batch G group"] | None = None,
    magnitude: Float[Array, "*batch G"] | None = None,
) -> tuple[Array, ...]:
    """Codes ``[..., G, group]``, scale ``[..., G]`` and, if asymmetric, offset ``[..., G]`` of float32 groups.

    Args:
        x: the groups; zero where ``exists`` is False, which changes no largest magnitude.
        reciprocal, rounding: ``1 / x`` and round half to even, which kernels spell in their own instructions.
        exists: False for the padding of a block; None where there is none.
        magnitude: the largest magnitude of each group where ``x`` is but a piece of them (symmetric only).
    """
    bounds = None if symmetric else _range(x, exists, clip_ratio)
    if bounds is not None:
        spread = bounds[1] - bounds[0]
    else:
        spread = jnp.max(jnp.abs(x), axis=-1) if magnitude is None else magnitude
    outlier = _widest(spread, outlier_groups) if outlier_groups else None
    if bounds is None:
        scale = _at_least(spread * _of_bits(lambda b: clip_ratio / _largest_code(b), bits, outlier), SMALLEST_SCALE)
        lowest = _of_bits(lambda b: -_largest_code(b), bits, outlier, per_value=True)
        largest = _of_bits(_largest_code, bits, outlier, per_value=True)
        codes = jnp.clip(rounding(x * reciprocal(scale)[..., None]), lowest, largest)
        return codes.astype(jnp.int8), scale
    low, high = bounds
    # A group far from zero with hardly any spread takes a step that keeps its zero point an exact float32.
    exact = _at_least(jnp.maximum(jnp.abs(low), jnp.abs(high)) * jnp.float32(2**-22), SMALLEST_SCALE)
    scale = jnp.maximum(spread * _of_bits(lambda b: 1 / (2**b - 1), bits, outlier), exact)
    inverse = reciprocal(scale)
    zero = rounding(low * inverse)
    levels = _of_bits(lambda b: 2**b - 1, bits, outlier, per_value=True)
    unsigned = jnp.clip(rounding(x * inverse[..., None]) - zero[..., None], jnp.float32(0), levels)
    codes = (unsigned - _of_bits(_half, bits, outlier, per_value=True)).astype(jnp.int8)
    return codes, scale, -(zero + _of_bits(_half, bits, outlier)) * scale


def _range(x: Array, exists: Array | None, clip_ratio: float) -> tuple[Array, Array]:
    """Clipped minimum and maximum of each group."""
    lowest = x if exists is None else jnp.where(exists, x, jnp.inf)
    highest = x if exists is None else jnp.where(exists, x, -jnp.inf)
    return jnp.float32(clip_ratio) * jnp.min(lowest, axis=-1), jnp.float32(clip_ratio) * jnp.max(highest, axis=-1)


def _widest(spread: Array, count: int) -> Array:
    """True for the groups whose spread is among the ``count`` largest values of their token."""
    threshold = jnp.max(spread, axis=-1, keepdims=True)
    for _ in range(count - 1):
        threshold = jnp.max(jnp.where(spread < threshold, spread, -jnp.inf), axis=-1, keepdims=True)
    return spread >= threshold


def _of_bits(function: Callable[[int], float], bits: int, outlier: Array | None, *, per_value: bool = False) -> Array:
    """A constant of the code width as float32: a scalar, or ``[..., G]`` (or ``[..., G, 1]``) where outliers differ."""
    if outlier is None:
        return jnp.float32(function(bits))
    values = jnp.where(outlier, jnp.float32(function(OUTLIER_BITS)), jnp.float32(function(bits)))
    return values[..., None] if per_value else values


def _at_least(x: Array, smallest: float) -> Array:
    return jnp.maximum(x, jnp.float32(smallest))


def _half(bits: int) -> int:
    return 2 ** (bits - 1)


def _largest_code(bits: int) -> int:
    return 2 ** (bits - 1) - 1
