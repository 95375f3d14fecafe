"""Weight-only 4-bit matmul: floating-point activations times packed 4-bit weights."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels import dispatch
from pallas_kernels.arrays.partial_sums import PartialSums, value_of
from pallas_kernels.arrays.weight import Layout, QuantizedWeight, check_weight
from pallas_kernels.w4a16_matmul import reference

_OP = "w4a16_matmul"
_DTYPES = (jnp.float32, jnp.bfloat16, jnp.float16)


def w4a16_matmul(
    x: Float[Array, "*batch K"], weight: QuantizedWeight, *, implementation: str | None = None
) -> Float[Array, "*batch N"]:
    """``x @ dequantize(weight).T``, accumulated in float32 and rounded once to the dtype of ``x``.

    Args:
        x: ``[..., K]`` float32, bfloat16 or float16.
        weight: a ``[N, K]`` weight, without leading axes.
        implementation: ``"reference"``, ``"triton"``, ``"mosaic"``, or None for the best that works.

    Returns:
        ``[..., N]`` in the dtype of ``x``.

    Raises:
        ValueError: shapes do not fit together, the dtype is not one of the three, or the name of the
            implementation is unknown.
        NotImplementedError: the named implementation cannot serve this call.
    """
    return value_of(w4a16_partial_sums(x, weight, implementation=implementation))


def w4a16_partial_sums(
    x: Float[Array, "*batch K"], weight: QuantizedWeight, *, implementation: str | None = None
) -> Float[Array, "*batch N"] | PartialSums:
    """:func:`w4a16_matmul` for a reader that adds what is left to add, where the implementation leaves any."""
    check_weight(weight, x.shape[-1], op=_OP)
    if x.dtype not in _DTYPES:
        raise ValueError(f"{_OP}: x is {x.dtype}; use float32, bfloat16 or float16")
    chosen = dispatch.select_implementation(
        _OP,
        implementation,
        triton_obstacle=lambda: _triton().obstacle(x.dtype, weight),
        mosaic_obstacle=lambda: _mosaic().obstacle(x.dtype, weight),
        order=dispatch.order_of_trial(weight.num_outputs, weight.num_inputs),
    )
    if chosen == dispatch.MOSAIC:
        return _mosaic().w4a16_matmul(x, weight)
    if chosen == dispatch.TRITON:
        return _triton().w4a16_matmul(x, weight)
    return reference.w4a16_matmul(x, weight)


def best_layout(weight: QuantizedWeight, dtype: jax.typing.DTypeLike, *, implementation: str | None = None) -> Layout:
    """The layout that the implementation reads which would serve a weight, whatever its own is, and rows of ``dtype``.

    It is the same for all numbers of rows. ``Layout.PLANES`` where none would: the call will say why.

    Raises:
        ValueError: the name of the implementation is unknown.
    """
    planes = dataclasses.replace(weight, layout=Layout.PLANES)
    reads_wgmma = dispatch.would_select(
        dispatch.MOSAIC,
        _OP,
        implementation,
        triton_obstacle=lambda: _triton().obstacle(jnp.dtype(dtype), planes),
        mosaic_obstacle=lambda: _mosaic().obstacle_in_any_layout(jnp.dtype(dtype), planes),
        order=dispatch.order_of_trial(weight.num_outputs, weight.num_inputs),
    )
    return Layout.WGMMA if reads_wgmma else Layout.PLANES


def _triton():
    from pallas_kernels.w4a16_matmul import gpu_triton  # imported only where it can run

    return gpu_triton


def _mosaic():
    from pallas_kernels.w4a16_matmul import gpu_mosaic

    return gpu_mosaic
