"""Integer matmul: 4- or 8-bit activations times packed 4-bit weights (W4A4 and W4A8)."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels import dispatch
from pallas_kernels.arrays.activation import QuantizedActivation
from pallas_kernels.arrays.partial_sums import PartialSums, value_of
from pallas_kernels.arrays.weight import Layout, QuantizedWeight, check_weight
from pallas_kernels.w4a4_matmul import reference

_OP = "w4a4_matmul"


def w4a4_matmul(
    x: QuantizedActivation, weight: QuantizedWeight, *, dtype: jax.typing.DTypeLike, implementation: str | None = None
) -> Float[Array, "*batch N"]:
    """``dequantize_activation(x) @ dequantize(weight).T`` from sums of products of integers.

    Activations may be grouped finer than the weight, like it, or coarser. Asymmetric ones need
    ``weight.group_sum`` over groups no coarser than theirs.

    Args:
        x: ``[..., K]`` activations in 4 or 8 bits.
        weight: a ``[N, K]`` weight, without leading axes.
        dtype: floating-point dtype of the result; sums are float32 or int32 until the end.
        implementation: ``"reference"``, ``"triton"``, ``"mosaic"``, or None for the best that works.

    Returns:
        ``[..., N]`` in ``dtype``.

    Raises:
        ValueError: shapes or groupings do not fit together, ``group_sum`` is missing, or the name of
            the implementation is unknown.
        NotImplementedError: the named implementation cannot serve this call.
    """
    return value_of(w4a4_partial_sums(x, weight, dtype=dtype, implementation=implementation))


def w4a4_partial_sums(
    x: QuantizedActivation, weight: QuantizedWeight, *, dtype: jax.typing.DTypeLike, implementation: str | None = None
) -> Float[Array, "*batch N"] | PartialSums:
    """:func:`w4a4_matmul` for a reader that adds what is left to add, where the implementation leaves any."""
    check_weight(weight, x.num_inputs, op=_OP)
    _check_groupings(x, weight)
    chosen = dispatch.select_implementation(
        _OP,
        implementation,
        triton_obstacle=lambda: _triton().obstacle(x, weight),
        mosaic_obstacle=lambda: _mosaic().obstacle(x, weight),
        order=dispatch.order_of_trial(weight.num_outputs, weight.num_inputs),
    )
    if chosen == dispatch.MOSAIC:
        return _mosaic().w4a4_matmul(x, weight, dtype=dtype)
    if chosen == dispatch.TRITON:
        return _triton().w4a4_matmul(x, weight, dtype=dtype)
    return reference.w4a4_matmul(x, weight, dtype=dtype)


def best_layout_for_codes(
    weight: QuantizedWeight, *, symmetric: bool, num_groups: int, implementation: str | None = None
) -> Layout:
    """The layout that the implementation reads which would serve a weight, whatever its own is, and such activations.

    ``Layout.PLANES`` where none would: the call will say why.

    Args:
        weight: the weight.
        symmetric, num_groups: of the activations.
        implementation: None for the best that works.

    Raises:
        ValueError: the name of the implementation is unknown.
    """
    codes: Any = jax.ShapeDtypeStruct((1, weight.num_inputs), jnp.int8)
    per_group: Any = jax.ShapeDtypeStruct((1, num_groups), jnp.float32)
    x = QuantizedActivation(codes, per_group, None if symmetric else per_group, bits=8)
    planes, wgmma = (dataclasses.replace(weight, layout=layout) for layout in (Layout.PLANES, Layout.WGMMA))
    reads_wgmma = dispatch.would_select(
        dispatch.MOSAIC,
        _OP,
        implementation,
        triton_obstacle=lambda: _triton().obstacle(x, planes),
        mosaic_obstacle=lambda: _mosaic().obstacle(x, wgmma),
        order=dispatch.order_of_trial(weight.num_outputs, weight.num_inputs),
    )
    return Layout.WGMMA if reads_wgmma else Layout.PLANES


def _check_groupings(x: QuantizedActivation, weight: QuantizedWeight) -> None:
    finer, coarser = sorted((x.group_size, weight.group_size))
    if coarser % finer:
        raise ValueError(
            f"{_OP}: activation groups of {x.group_size} and weight groups of {weight.group_size} do not nest; "
            f"quantize the activations with group_size={weight.group_size} or None"
        )
    if x.symmetric:
        return
    if weight.group_sum is None:
        raise ValueError(
            f"{_OP}: asymmetric activations need the sums of the weight's groups; "
            f"call with_group_sums(weight, {x.group_size}) once, when the weight is loaded"
        )
    if weight.group_sum.shape[0] % x.num_groups:
        raise ValueError(
            f"{_OP}: asymmetric activations in {x.num_groups} groups need the sums of as many groups of the weight, "
            f"or of a multiple; weight.group_sum has {weight.group_sum.shape[0]}: "
            f"call with_group_sums(weight, {x.group_size})"
        )


def _triton():
    from pallas_kernels.w4a4_matmul import gpu_triton  # imported only where it can run

    return gpu_triton


def _mosaic():
    from pallas_kernels.w4a4_matmul import gpu_mosaic

    return gpu_mosaic
