"""Calls of the matmuls that gate their outputs, and what the gated unit of a product is, rounded once."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax.numpy as jnp

import pallas_kernels
from pallas_kernels import Layout
from qspec_jax.inspection.kernel_case import ROWS, KernelCase, Widths, random_rows
from qspec_jax.inspection.matmul_cases import (
    LARGE,
    PER_TOKEN,
    activation_name,
    codes_of,
    for_codes,
    other_forms,
    random_weight,
    usual_activations,
    weight_name,
)
from qspec_jax.model.linear import WeightFormat

_CLIPPED: dict[str, Any] = {"bits": 4, "clip_ratio": 0.9, "layout": Layout.WGMMA}


def gated_cases(widths: Widths, dtype: str) -> Iterator[KernelCase]:
    """Those with gate and up of a model, and at small widths with all other forms of weight."""
    usual = WeightFormat(*widths.weight)
    yield from _cases(widths.hidden, 2 * widths.mlp, usual, dtype, usual_activations(usual, widths.hidden))
    for stored, activations in other_forms(usual) if widths.hidden < LARGE else ():
        yield from _cases(widths.mlp, widths.hidden, stored, dtype, activations)


def _cases(
    inputs: int, outputs: int, stored: WeightFormat, dtype: str, activations: Sequence[Mapping[str, Any]]
) -> Iterator[KernelCase]:
    """A weight in some form with floats, and with activations in some forms, which meet its upper four bits."""
    weight = functools.partial(random_weight, outputs, inputs, stored)
    shape = f"{ROWS}x{inputs} by {outputs}x{inputs}, {weight_name(stored, inputs)}"
    case = functools.partial(KernelCase, dtype=dtype, num_inputs=inputs)
    operands = lambda: (random_rows(ROWS, inputs, dtype=dtype), weight())  # noqa: E731
    yield case("w4a16_swiglu", "w4a16_swiglu", shape, operands=operands, wide=True)
    for codes in activations:
        settings = PER_TOKEN if codes is PER_TOKEN else _CLIPPED
        yield case(
            *("w4a4_swiglu_quantize", "w4a4_swiglu_quantize", f"{shape}, {activation_name(codes)}"),
            options={"dtype": jnp.dtype(dtype), **settings},
            operands=lambda codes=codes: (codes_of(inputs, dtype, codes), for_codes(weight(), codes)),
            expected=functools.partial(_quantized, dtype=dtype, settings=settings),
            measure="codes",
        )


def _quantized(operands: tuple[Any, ...], *, dtype: str, settings: Mapping[str, Any]) -> Any:
    """The product rounded once, gated and rounded once, then quantised."""
    product = pallas_kernels.w4a4_matmul(*operands, dtype=jnp.dtype(dtype), implementation="reference")
    return gated_value((product,), transform=None, dtype=dtype, settings=settings)


def gated_value(
    operands: tuple[Any, ...], *, transform: int | None, dtype: str, settings: Mapping[str, Any] | None = None
) -> Any:
    """The gated unit in float32, rounded once, and what follows: XLA may round after every operation of a silu.

    Args:
        operands: of the case.
        transform: how many values are transformed together; None for none.
        dtype: of what is transformed.
        settings: of codes; None for floats.
    """
    gate_up = pallas_kernels.value_of(operands[0])
    options: dict[str, Any] = {"implementation": "reference"}
    out = pallas_kernels.swiglu(gate_up.astype(jnp.float32), **options).astype(gate_up.dtype)
    if transform is not None:
        blocks = out.astype(jnp.float32).reshape(len(out), -1, transform)
        out = pallas_kernels.hadamard(blocks, **options).reshape(out.shape).astype(jnp.dtype(dtype))
    return out if settings is None else pallas_kernels.quantize_activations(out, **settings, **options)
