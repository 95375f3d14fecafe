"""Round-to-nearest: each group of a weight gets the grid that spans it, each weight its nearest point.

No calibration data and no error compensation.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float16, Float32

from pallas_kernels.arrays.weight import (
    NESTED_ZERO_POINT,
    SYMMETRIC_ZERO_POINT,
    QuantizedWeight,
    check_group_size,
    pack_codes,
    pack_nested,
)
from qspec_jax.errors import UsageError


def quantize_rtn(
    weight: Float[Array, "N K"], *, group_size: int | None = None, symmetric: bool = False, bits: int = 4
) -> QuantizedWeight:
    """Rounds a weight to 4 bits, or to a nested weight of 8.

    Symmetric: codes ``8 + round(w / scale)``, which reach 8 steps on one side of zero and 7 on the other. That is the
    side of the smaller weights, so a scale may be negative; it is the smallest that spans the group. Asymmetric: the
    grid runs from the minimum to the maximum of the group. Codes are rounded against the float16 scale and offset that
    are stored, so the error is at most half a step. In 8 bits a step is a 16th of the scale, and a symmetric grid has
    136 steps on one side of zero and 119 on the other.

    Args:
        weight: ``[N, K]``, any float dtype.
        group_size: inputs per scale, None for the whole row.
        symmetric: no offset.
        bits: 4 or 8.

    Raises:
        ValueError: ``group_size`` does not divide ``K``; the message names sizes that do. Or ``bits`` are others, or
            the weight has another number of axes.
        UsageError: a value is not finite, or a group is too large for its scale and offset. Within a transformation of
            JAX nobody can tell, and such a group gets a scale or an offset that is not finite.
    """
    if bits not in (4, 8):
        raise ValueError(f"bits={bits} is not supported; use 4 or 8")
    if getattr(weight, "ndim", None) != 2:
        what = f"has shape {weight.shape}" if hasattr(weight, "shape") else f"is of type {type(weight).__name__}"
        raise ValueError(f"weight {what}; use an array [N, K], a stack of them with jax.vmap")
    rounded, fits = _quantize_rtn(weight, group_size=group_size, symmetric=symmetric, bits=bits)
    if not isinstance(fits, jax.core.Tracer):
        check_grid(fits)
    return rounded


def check_grid(fits: Bool[Array, ""]) -> None:
    """Raises UsageError if :func:`is_finite` says no."""
    if not jax.device_get(fits):
        raise UsageError(
            "its values are not all finite numbers, or too large: a scale or an offset does not fit float16, which "
            "ends at 65504; mend the weights, or keep them in floating point"
        )


@functools.partial(jax.jit, static_argnames=("group_size", "symmetric", "bits"))
def _quantize_rtn(
    weight: Float[Array, "N K"], *, group_size: int | None, symmetric: bool, bits: int
) -> tuple[QuantizedWeight, Bool[Array, ""]]:
    """The rounded weight, and whether its grid is finite: in one program, so that asking costs next to nothing."""
    num_outputs, num_inputs = weight.shape
    group_size = num_inputs if group_size is None else group_size
    check_group_size(num_inputs, group_size)
    groups = weight.astype(jnp.float32).reshape(num_outputs, num_inputs // group_size, group_size)
    scale, offset = spanning_grid(groups, symmetric=symmetric, bits=bits)
    codes = nearest_codes(groups, scale[..., None], offset[..., None], bits=bits)
    codes = codes.astype(jnp.uint8).reshape(num_outputs, num_inputs)
    packed, low = (pack_codes(codes), None) if bits == 4 else pack_nested(codes)
    rounded = QuantizedWeight(packed, scale.T, None if symmetric else offset.T, low=low)
    return rounded, is_finite(weight, rounded)


def is_finite(weight: Float[Array, "N K"], rounded: QuantizedWeight) -> Bool[Array, ""]:
    """Whether a weight and the grid that it was rounded to are finite.

    The grid alone does not tell: a minimum of XLA's for CPUs may pass over a NaN. What is not finite is no zero when
    it is multiplied by zero; a sum is what XLA looks for it with the fastest.
    """
    arrays = [array for array in (weight, rounded.scale, rounded.offset) if array is not None]
    return jnp.stack([(array.astype(jnp.float32) * 0).sum() for array in arrays]).sum() == 0


def spanning_grid(
    groups: Float32[Array, "*batch group"],
    *,
    symmetric: bool,
    clip_ratio: float | Float32[Array, ""] = 1.0,
    bits: int = 4,
) -> tuple[Float16[Array, "*batch"], Float[Array, "*batch"]]:
    """Scale and offset of the grid that spans each group, or ``clip_ratio`` of what it spans.

    The scale is the distance of two 4-bit codes, whatever ``bits`` are: 16 steps of 8-bit ones.

    Returns:
        the scale in float16, and the offset: float16 as it is stored, or of a symmetric grid ``8 * scale`` (8.5 in 8
        bits) in float32, which is not.
    """
    low, high = clip_ratio * groups.min(-1), clip_ratio * groups.max(-1)
    if symmetric:
        return _symmetric_grid(low, high, bits)
    return ((high - low) / max_code(bits)).astype(jnp.float16), (-low).astype(jnp.float16)


def _symmetric_grid(
    low: Float32[Array, "*batch"], high: Float32[Array, "*batch"], bits: int
) -> tuple[Float16[Array, "*batch"], Float32[Array, "*batch"]]:
    """The symmetric grid that spans two values: its zero point is no middle, so scales may be negative."""
    zero_point = NESTED_ZERO_POINT if bits == 8 else SYMMETRIC_ZERO_POINT
    below, above = zero_point, max_code(bits) - zero_point
    upright = jnp.maximum(-low / below, high / above)
    upside_down = jnp.maximum(high / below, -low / above)
    scale = jnp.where(upright <= upside_down, upright, -upside_down).astype(jnp.float16)
    return scale, zero_point * scale.astype(jnp.float32)


def max_code(bits: int) -> float:
    """The largest code in units of 4-bit ones: 15, or 255 / 16."""
    return (2**bits - 1) / 2 ** (bits - 4)


def nearest_codes(
    weight: Float32[Array, "*shape"],
    scale: Float16[Array, "*#shape"],
    offset: Float[Array, "*#shape"],
    *,
    bits: int = 4,
) -> Float32[Array, "*shape"]:
    """The code of the grid point nearest to each weight: 0 to 15, or to 255 in 8 bits, of which 16 are a scale."""
    # A constant group has no step; any positive one gives it the code of its offset.
    step = jnp.where(scale == 0, jnp.float32(1.0), scale.astype(jnp.float32))
    steps = (weight + offset.astype(jnp.float32)) / step * 2 ** (bits - 4)
    return jnp.clip(jnp.round(steps), 0, 2**bits - 1)
