"""Calls of the matmuls: every form of weight that a model can have, and every form of activation that drafts make."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

import pallas_kernels
from pallas_kernels import QuantizedWeight, pack_codes, pack_nested, upper_nibbles, with_group_sums
from qspec_jax.inspection.kernel_case import ROWS, KernelCase, Widths, random_rows
from qspec_jax.model.head import IMPORTED_HEAD
from qspec_jax.model.linear import WeightFormat

# Beside the usual weight of a model, at small widths; the last two are those of 8 bits, in two planes of nibbles.
_FORMATS = (
    WeightFormat(64, symmetric=True),
    WeightFormat(128, symmetric=False),
    WeightFormat(None, symmetric=True),
    WeightFormat(32, symmetric=False, wide=True),
    WeightFormat(None, symmetric=True, bits=8),
    IMPORTED_HEAD,
)
LARGE = 4096  # hidden size, from which one form takes seconds on a CPU
PER_TOKEN: dict[str, Any] = {"bits": 8}
BY_GROUP: dict[str, Any] = {"bits": 4, "group_size": 32, "symmetric": False, "outlier_groups": 1}


def matmul_cases(widths: Widths, dtype: str) -> Iterator[KernelCase]:
    """Those of matmuls: with the usual weight of a model at two shapes, and with all others at one."""
    hidden, mlp = widths.hidden, widths.mlp
    heads = (widths.num_heads + 2 * widths.num_kv_heads) * widths.head_dim
    usual = WeightFormat(*widths.weight)
    yield from _cases(hidden, heads, usual, dtype, usual_activations(usual, hidden))
    yield from _cases(mlp, hidden, usual, dtype, usual_activations(usual, mlp))
    if hidden >= LARGE:
        yield from _cases(hidden, heads, WeightFormat(usual.group_size, usual.symmetric, bits=8), dtype, [PER_TOKEN])
    else:
        for stored, codes in other_forms(usual):
            yield from _cases(mlp, hidden, stored, dtype, codes, in_float32=PER_TOKEN not in codes)
    yield KernelCase(
        *("float_matmul", "float_matmul", f"{ROWS}x{hidden} by 4096x{hidden}", dtype),
        num_inputs=hidden,
        operands=lambda: (random_rows(ROWS, hidden, dtype=dtype), random_rows(4096, hidden, dtype=dtype, seed=2)),
        wide=True,
    )


def usual_activations(stored: WeightFormat, inputs: int) -> list[Mapping[str, Any]]:
    """What the drafts of a model make of them."""
    return [PER_TOKEN, {"bits": 4, "group_size": stored.group_size or inputs}]


def other_forms(usual: WeightFormat) -> Iterator[tuple[WeightFormat, list[Mapping[str, Any]]]]:
    """Of a weight, each with activations to meet it."""
    for stored in _FORMATS:
        yield stored, [PER_TOKEN]
    # The reference needs no sums of groups; in the float16 of narrow scales they are no exact ones.
    yield dataclasses.replace(usual, wide=True), [BY_GROUP, {**BY_GROUP, "bits": 8}]


def _cases(
    inputs: int,
    outputs: int,
    stored: WeightFormat,
    dtype: str,
    settings: Sequence[Mapping[str, Any]],
    *,
    in_float32: bool = False,
) -> Iterator[KernelCase]:
    """A weight in some form with floats, and with activations in some forms, which meet its upper four bits."""
    weight = functools.partial(random_weight, outputs, inputs, stored)
    shape = f"{ROWS}x{inputs} by {outputs}x{inputs}, {weight_name(stored, inputs)}"
    case = functools.partial(KernelCase, dtype=dtype, num_inputs=inputs, wide=True)
    yield case(
        *("w4a16_matmul", "w4a16_matmul", f"{shape}, float32 result" if in_float32 else shape),
        operands=lambda: (random_rows(ROWS, inputs, dtype=dtype), weight()),
        options={"dtype": jnp.float32} if in_float32 else {},
    )
    for codes in settings:
        yield case(
            *("w4a4_matmul", "w4a4_matmul", f"{shape}, {activation_name(codes)}"),
            options={"dtype": jnp.float32},
            operands=lambda codes=codes: (codes_of(inputs, dtype, codes), for_codes(weight(), codes)),
        )


def weight_name(stored: WeightFormat, inputs: int) -> str:
    """For people."""
    groups = f"groups of {stored.group_size or inputs}"
    kind = "" if stored.symmetric else ", zero points"
    return f"{groups}{kind}{', float32 scales' if stored.wide else ''}{', 8 bits' if stored.bits == 8 else ''}"


def activation_name(settings: Mapping[str, Any]) -> str:
    """For people."""
    offsets = "" if settings.get("symmetric", True) else " with offsets"
    return f"{settings['bits']} bits{offsets}"


def random_weight(n: int, k: int, stored: WeightFormat) -> QuantizedWeight:
    """A weight whose codes use all their values and whose entries are about 1 / sqrt(K).

    Of a symmetric one half of the scales are negative: where a group has its larger weights above zero.
    """
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 2**stored.bits, (n, k), dtype=np.uint8)
    scale = rng.uniform(0.5, 1.5, (k // (stored.group_size or k), n)) / np.sqrt(k) / 4
    if stored.symmetric:
        scale *= rng.choice([-1, 1], scale.shape)
    kind = jnp.float32 if stored.wide else jnp.float16
    offset = None if stored.symmetric else jnp.asarray(scale * rng.uniform(5, 10, scale.shape), kind)
    packed, low = (pack_codes(jnp.asarray(codes)), None) if stored.bits == 4 else pack_nested(jnp.asarray(codes))
    return QuantizedWeight(packed, jnp.asarray(scale, kind), offset, low=low)


def for_codes(weight: QuantizedWeight, settings: Mapping[str, Any]) -> QuantizedWeight:
    """What integers meet of a weight; with the sums of its groups where activations have offsets."""
    weight = upper_nibbles(weight)
    return weight if settings.get("symmetric", True) else with_group_sums(weight, settings["group_size"])


def codes_of(k: int, dtype: str, settings: Mapping[str, Any]) -> Any:
    """Random rows of ``k`` values as a draft reads them."""
    return pallas_kernels.quantize_activations(
        random_rows(ROWS, k, dtype=dtype), **settings, implementation="reference"
    )
