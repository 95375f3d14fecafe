"""Weight-only 4-bit matmul: floating-point activations times packed 4-bit weights."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from pallas_kernels.arrays.arguments import checked
from pallas_kernels.arrays.partial_sums import PartialSums, value_of
from pallas_kernels.arrays.weight import Layout, QuantizedWeight, check_weight
from pallas_kernels.dispatch import MOSAIC, TPU, TRITON, Implementations, order_of_trial

_OP = "w4a16_matmul"
# A file has w4a16_matmul, which may leave PartialSums, obstacle(dtype, weight), and LAYOUT, that of the weights it
# reads; ROWS_ALIKE, rows of a call that have the same bits whatever the others are, None for any number. Where more are
# alike in a call that asks for it, w4a16_matmul takes ``alike``, and ROWS_ALIKE_IF_ASKED is another number. With
# PREFILL_ALIKE it takes ``prefill``, and any rows of such calls are alike. With ``rows_read(num_rows)`` it pads rows.
# The reference reads all, and names that of checkpoints.
_IMPLEMENTATIONS = Implementations(__name__, {TRITON: "gpu_triton", MOSAIC: "gpu_mosaic", TPU: "tpu"})
_DTYPES = (jnp.float32, jnp.bfloat16, jnp.float16)


@checked
def w4a16_matmul(
    x: Float[Array, "*batch K"],
    weight: QuantizedWeight,
    *,
    dtype: DTypeLike | None = None,
    implementation: str | None = None,
) -> Float[Array, "*batch N"]:
    """``x @ dequantize(weight).T``, accumulated in float32 and rounded once.

    Args:
        x: ``[..., K]`` float32, bfloat16 or float16.
        weight: a ``[N, K]`` weight, without leading axes.
        dtype: of the result: float32, or that of ``x``, as None is.
        implementation: a name of ``IMPLEMENTATIONS``, or None for the best that works.

    Returns:
        ``[..., N]`` in that dtype.

    Raises:
        ValueError: shapes do not fit together, a dtype is not one of those above, or the name of the
            implementation is unknown.
        NotImplementedError: the named implementation cannot serve this call.
    """
    return value_of(w4a16_partial_sums(x, weight, dtype=dtype, implementation=implementation))


@checked
def w4a16_partial_sums(
    x: Float[Array, "*batch K"],
    weight: QuantizedWeight,
    *,
    dtype: DTypeLike | None = None,
    alike: bool = False,
    prefill: bool = False,
    implementation: str | None = None,
) -> Float[Array, "*batch N"] | PartialSums:
    """:func:`w4a16_matmul` for a reader that adds what is left to add, where the implementation leaves any.

    ``alike`` asks for the bits that a row has among few others, also where more rows would be faster otherwise; for how
    many rows it is granted says :func:`rows_alike`. ``prefill`` says that the rows are those of prompts: where an
    implementation has tiles for them, which give a row the same bits in any such call, it takes those.
    """
    check_operands(_OP, x, weight)
    dtype = x.dtype if dtype is None else jnp.dtype(dtype)
    if dtype not in (x.dtype, jnp.float32):
        raise ValueError(f"{_OP}: dtype={dtype} is not supported; use float32 or that of x, {x.dtype}")
    chosen = _IMPLEMENTATIONS.select(
        implementation,
        lambda module: module.obstacle(x.dtype, weight),
        order=order_of_trial(weight.num_outputs, weight.num_inputs),
    )
    asked = {"alike": True} if alike and chosen.ROWS_ALIKE_IF_ASKED != chosen.ROWS_ALIKE else {}
    asked = {"prefill": True} if prefill and chosen.PREFILL_ALIKE else asked
    return chosen.w4a16_matmul(x, weight, dtype=dtype, **asked)


def check_operands(op: str, x: Float[Array, "*batch K"], weight: QuantizedWeight) -> None:
    """Raises ValueError, for the operation ``op``, where shapes do not fit together or a dtype is not taken."""
    check_weight(weight, x.shape[-1], op=op)
    if x.dtype not in _DTYPES:
        raise ValueError(f"{op}: x is {x.dtype}; use float32, bfloat16 or float16")


def rows_alike(
    weight: QuantizedWeight,
    dtype: DTypeLike,
    *,
    asked: bool = False,
    prefill: bool = False,
    implementation: str | None = None,
) -> int | None:
    """How many rows a call may have for each of them to have the same bits whatever the others are.

    Args:
        weight: a ``[N, K]`` weight, with or without leading axes.
        dtype: of the rows.
        asked: whether the call is one of :func:`w4a16_partial_sums` with ``alike``.
        prefill: whether it is one with ``prefill``.
        implementation: as in the call.

    Returns:
        the number; None for any number of rows, 1 where a library multiplies (also of a prefill) or nothing serves.

    Raises:
        ValueError: the name of the implementation is unknown.
    """
    try:
        chosen = _IMPLEMENTATIONS.select(
            implementation,
            lambda module: module.obstacle(jnp.dtype(dtype), weight),
            order=order_of_trial(weight.num_outputs, weight.num_inputs),
        )
    except NotImplementedError:
        return 1
    if prefill and chosen.PREFILL_ALIKE:
        return None
    return chosen.ROWS_ALIKE_IF_ASKED if asked else chosen.ROWS_ALIKE


def rows_read(num_rows: int, weight: QuantizedWeight, dtype: DTypeLike, *, implementation: str | None = None) -> int:
    """How many rows a call reads: ``num_rows``, or more where it has to copy them to have whole tiles.

    A caller that has so many from the beginning saves the copy. It is the same where :func:`w4a4_matmul` reads the
    weight: an order of codes has the same readers.

    Args:
        num_rows: of the call.
        weight: a ``[N, K]`` weight, with or without leading axes.
        dtype: of the rows.
        implementation: as in the call.

    Raises:
        ValueError: the name of the implementation is unknown.
    """
    order = order_of_trial(weight.num_outputs, weight.num_inputs)
    found = _IMPLEMENTATIONS.serves(implementation, lambda one: one.obstacle(jnp.dtype(dtype), weight), order=order)
    padded = getattr(found, "rows_read", None)
    return num_rows if padded is None else padded(num_rows)


def best_layout(weight: QuantizedWeight, dtype: DTypeLike, *, implementation: str | None = None) -> Layout:
    """The layout that the implementation reads which would serve a weight, whatever its own is, and rows of ``dtype``.

    It is the same for all numbers of rows. ``Layout.PLANES`` where none would: the call will say why.

    Raises:
        ValueError: the name of the implementation is unknown.
    """
    try:
        chosen = _IMPLEMENTATIONS.select(
            implementation,
            lambda module: module.obstacle(jnp.dtype(dtype), dataclasses.replace(weight, layout=module.LAYOUT)),
            order=order_of_trial(weight.num_outputs, weight.num_inputs),
        )
    except NotImplementedError:
        return Layout.PLANES
    return chosen.LAYOUT
