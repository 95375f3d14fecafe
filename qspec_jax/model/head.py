"""The LM head in 8 or 4 bits: how it is stored, and its product.

It is symmetric in groups of 64 inputs, or the largest that fit; or as a file has it (``IMPORTED_HEAD``). In 8 bits it
is nested, so that a draft may read a head of 4 bits in the same array. Its logits are float32, and a row has the same
bits whatever rows are beside it, as those of a head in floating point.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import jax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32

import pallas_kernels
from pallas_kernels import PartialSums, QuantizedWeight
from qspec_jax.model.config import ModelConfig, QuantConfig
from qspec_jax.model.linear import WeightFormat, empty_weight
from qspec_jax.model.parameters import HEAD

# That of a file in Q8_0: its scales are float32, and its zero points others than that of symmetric codes.
IMPORTED_HEAD = WeightFormat(32, symmetric=False, bits=8, wide=True)
_GROUP_SIZES = (64, 32)


def head_format(
    config: ModelConfig, quantization: QuantConfig | None, formats: Mapping[str, WeightFormat | None] | None = None
) -> WeightFormat | None:
    """How a quantised LM head is stored: as ``formats`` says of ``HEAD``, or as usual; None where there is none."""
    if quantization is None or not quantization.has_quantized_head:
        return None
    if (imported := (formats or {}).get(HEAD)) is not None:
        return imported
    group_size = next((size for size in _GROUP_SIZES if config.hidden_size % size == 0), None)
    return WeightFormat(group_size, symmetric=True, bits=quantization.head_bits or 4)


def empty_head(
    config: ModelConfig,
    quantization: QuantConfig | None,
    formats: Mapping[str, WeightFormat | None] | None,
    *,
    kernels: str | None,
    dtype: DTypeLike,
) -> QuantizedWeight | None:
    """Zeros in the order that the kernels read; None where there is no quantised head."""
    stored = head_format(config, quantization, formats)
    if stored is None:
        return None
    weight = empty_weight(config.hidden_size, config.vocab_size, stored, dtype, ())
    assert isinstance(weight, QuantizedWeight)
    return dataclasses.replace(weight, layout=pallas_kernels.best_layout(weight, dtype, implementation=kernels))


def head_product(
    head: Array | QuantizedWeight, rows: Float[Array, "*batch D"], *, implementation: str | None
) -> Float32[Array, "*batch V"] | PartialSums:
    """Float32 logits, or what is left to add."""
    if isinstance(head, jax.Array):
        return pallas_kernels.float_matmul(rows, head, implementation=implementation)
    return pallas_kernels.w4a16_partial_sums(rows, head, dtype="float32", implementation=implementation)
