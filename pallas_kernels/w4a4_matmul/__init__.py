"""Integer matmul, W4A8 and W4A4: activations in 8 or 4 bits times packed 4-bit weights."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.arrays.activation import QuantizedActivation
from pallas_kernels.arrays.arguments import checked
from pallas_kernels.arrays.partial_sums import PartialSums, value_of
from pallas_kernels.arrays.weight import Layout, QuantizedWeight, check_weight
from pallas_kernels.dispatch import MOSAIC, TPU, TRITON, Implementations, order_of_trial

_OP = "w4a4_matmul"
# A file has w4a4_matmul, which may leave PartialSums, obstacle(x, weight), and LAYOUT, that of the weights it
# reads. The reference reads all, and names that of checkpoints.
_IMPLEMENTATIONS = Implementations(__name__, {TRITON: "gpu_triton", MOSAIC: "gpu_mosaic", TPU: "tpu"})


@checked
def w4a4_matmul(
    x: QuantizedActivation, weight: QuantizedWeight, *, dtype: jax.typing.DTypeLike, implementation: str | None = None
) -> Float[Array, "*batch N"]:
    """Integer matmul, W4A8 and W4A4: ``x.bits`` says which.

    It is ``dequantize_activation(x) @ dequantize(weight).T`` from sums of products of integers.
    Activations may be grouped finer than the weight, like it, or coarser. Asymmetric ones need
    ``weight.group_sum`` over groups no coarser than theirs.

    Args:
        x: ``[..., K]`` activations in 4 or 8 bits.
        weight: a ``[N, K]`` weight, without leading axes.
        dtype: floating-point dtype of the result; sums are float32 or int32 until the end.
        implementation: a name of ``IMPLEMENTATIONS``, or None for the best that works.

    Returns:
        ``[..., N]`` in ``dtype``.

    Raises:
        ValueError: shapes or groupings do not fit together, ``group_sum`` is missing, or the name of
            the implementation is unknown.
        NotImplementedError: the named implementation cannot serve this call.
    """
    return value_of(w4a4_partial_sums(x, weight, dtype=dtype, implementation=implementation))


@checked
def w4a4_partial_sums(
    x: QuantizedActivation, weight: QuantizedWeight, *, dtype: jax.typing.DTypeLike, implementation: str | None = None
) -> Float[Array, "*batch N"] | PartialSums:
    """:func:`w4a4_matmul` for a reader that adds what is left to add, where the implementation leaves any."""
    check_operands(_OP, x, weight)
    chosen = _IMPLEMENTATIONS.select(
        implementation,
        lambda module: module.obstacle(x, weight),
        order=order_of_trial(weight.num_outputs, weight.num_inputs),
    )
    return chosen.w4a4_matmul(x, weight, dtype=dtype)


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
    try:
        chosen = _IMPLEMENTATIONS.select(
            implementation,
            lambda module: module.obstacle(x, dataclasses.replace(weight, layout=module.LAYOUT)),
            order=order_of_trial(weight.num_outputs, weight.num_inputs),
        )
    except NotImplementedError:
        return Layout.PLANES
    return chosen.LAYOUT


def check_operands(op: str, x: QuantizedActivation, weight: QuantizedWeight) -> None:
    """Raises ValueError, for the operation ``op``, where shapes or groupings do not fit together."""
    check_weight(weight, x.num_inputs, op=op)
    if weight.low is not None:
        raise ValueError(f"{op}: integers meet 4-bit codes; give upper_nibbles(weight) of an 8-bit weight")
    _check_groupings(op, x, weight)


def _check_groupings(op: str, x: QuantizedActivation, weight: QuantizedWeight) -> None:
    finer, coarser = sorted((x.group_size, weight.group_size))
    if coarser % finer:
        raise ValueError(
            f"{op}: activation groups of {x.group_size} and weight groups of {weight.group_size} do not nest; "
            f"quantize the activations with group_size={weight.group_size} or None"
        )
    if x.symmetric:
        return
    if weight.group_sum is None:
        raise ValueError(
            f"{op}: asymmetric activations need the sums of the weight's groups; "
            f"call with_group_sums(weight, {x.group_size}) once, when the weight is loaded"
        )
    if weight.group_sum.shape[0] % x.num_groups:
        raise ValueError(
            f"{op}: asymmetric activations in {x.num_groups} groups need the sums of as many groups of the weight, "
            f"or of a multiple; weight.group_sum has {weight.group_sum.shape[0]}: "
            f"call with_group_sums(weight, {x.group_size})"
        )
