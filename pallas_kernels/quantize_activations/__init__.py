"""Activations to 4- or 8-bit integers, with one scale per token or per token and group."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from pallas_kernels.arrays.activation import QuantizedActivation
from pallas_kernels.arrays.arguments import checked
from pallas_kernels.arrays.weight import WGMMA_CODES, Layout, check_group_size
from pallas_kernels.dispatch import TRITON, Implementations

_OP = "quantize_activations"
# A file has quantize_activations and obstacle(num_inputs, group_size, outlier_groups).
_IMPLEMENTATIONS = Implementations(__name__, {TRITON: "gpu_triton"})
_DTYPES = (jnp.float32, jnp.bfloat16, jnp.float16)


@checked
def quantize_activations(
    x: Float[Array, "*batch K"],
    *,
    bits: int,
    group_size: int | None = None,
    symmetric: bool = True,
    clip_ratio: float = 1.0,
    outlier_groups: int = 0,
    layout: Layout = Layout.PLANES,
    implementation: str | None = None,
) -> QuantizedActivation:
    """Rounds activations to the nearest code; the equations stand in the reference.

    Args:
        x: ``[..., K]`` float32, bfloat16 or float16.
        bits: 4 or 8.
        group_size: consecutive inputs that share a scale; None for one scale per token.
        symmetric: scale from the largest magnitude and no offset; otherwise from the range.
        clip_ratio: in (0, 1], shrinks the range, and codes beyond it saturate.
        outlier_groups: groups of each token, those with the widest range, that take 8 bits instead of ``bits``.
        layout: the order of the codes, that of the weight they are to meet.
        implementation: a name of ``IMPLEMENTATIONS``, or None for the best that works.

    Returns:
        int8 codes ``[..., K]`` and float32 scales (and offsets) ``[..., K / group_size]``.

    Raises:
        ValueError: an argument is out of its range, ``group_size`` does not divide K, or the name of
            the implementation is unknown.
        NotImplementedError: the named implementation cannot serve this call.
    """
    settings = checked_settings(
        _OP,
        x.dtype,
        x.shape[-1],
        bits=bits,
        group_size=group_size,
        symmetric=symmetric,
        clip_ratio=clip_ratio,
        outlier_groups=outlier_groups,
        layout=layout,
    )
    chosen = _IMPLEMENTATIONS.select(
        implementation, lambda module: module.obstacle(x.shape[-1], settings["group_size"], outlier_groups)
    )
    return chosen.quantize_activations(x, **settings)


def checked_settings(
    op: str,
    dtype: DTypeLike,
    num_inputs: int,
    *,
    bits: int,
    group_size: int | None,
    symmetric: bool,
    clip_ratio: float,
    outlier_groups: int,
    layout: Layout,
) -> dict[str, Any]:
    """The keyword arguments of an implementation: these, with the group size filled in.

    Raises:
        ValueError: one of them is out of its range; the message begins with ``op``.
    """
    group_size = num_inputs if group_size is None else group_size
    check_group_size(num_inputs, group_size, what=op)
    if dtype not in _DTYPES:
        raise ValueError(f"{op}: x is {dtype}; use float32, bfloat16 or float16")
    if bits not in (4, 8):
        raise ValueError(f"{op}: bits={bits}; use 4 or 8")
    if not 0.0 < clip_ratio <= 1.0:
        raise ValueError(f"{op}: clip_ratio={clip_ratio}; use a number in (0, 1]")
    num_groups = num_inputs // group_size
    if not 0 <= outlier_groups <= num_groups:
        raise ValueError(f"{op}: outlier_groups={outlier_groups}; x has {num_groups} groups, use 0 to {num_groups}")
    if layout is Layout.WGMMA and group_size % WGMMA_CODES:
        raise ValueError(f"{op}: layout {layout.value} needs groups of a multiple of {WGMMA_CODES}, not {group_size}")
    return {
        "bits": bits,
        "group_size": group_size,
        "symmetric": symmetric,
        "clip_ratio": clip_ratio,
        "outlier_groups": outlier_groups,
        "layout": layout,
    }
