"""``quantize_activations`` in ``jax.numpy``, and its implementation on the CPU; its formula: ``arrays/rounding.py``."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.arrays.activation import QuantizedActivation
from pallas_kernels.arrays.rounding import quantize_groups
from pallas_kernels.arrays.weight import Layout, order_activation_codes


def quantize_activations(
    x: Float[Array, "*batch K"],
    *,
    bits: int,
    group_size: int,
    symmetric: bool,
    clip_ratio: float,
    outlier_groups: int = 0,
    layout: Layout = Layout.PLANES,
) -> QuantizedActivation:
    """Rounds activations to the nearest code; see the public function."""
    groups = x.astype(jnp.float32).reshape(*x.shape[:-1], x.shape[-1] // group_size, group_size)
    settings = {"bits": bits, "symmetric": symmetric, "clip_ratio": clip_ratio, "outlier_groups": outlier_groups}
    codes, scale, *offset = quantize_groups(groups, **settings, reciprocal=lambda a: 1 / a, rounding=jnp.round)
    codes = order_activation_codes(codes.reshape(x.shape), layout)
    return QuantizedActivation(codes, scale, offset[0] if offset else None, bits, layout)
