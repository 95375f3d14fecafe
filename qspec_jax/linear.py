"""The linear layer: the one place where ``Precision`` decides what is computed.

A weight is either a float array ``[N, K]`` or a ``QuantizedWeight``. Every precision reads the same
arrays; only the treatment of the activations and the kernel differ. A draft precision wants its inputs as
integers, and from the kernel that computes them: a linear is told which operation that is (``Producer``).
"""

from __future__ import annotations

import dataclasses
from typing import Any, Protocol, runtime_checkable

import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float

import pallas_kernels
from pallas_kernels import QuantizedActivation, QuantizedWeight
from pallas_kernels.dispatch import MOSAIC
from qspec_jax.config import ActivationQuantization, QuantConfig
from qspec_jax.errors import UsageError
from qspec_jax.types import Precision


@dataclasses.dataclass(frozen=True)
class WeightFormat:
    """How one linear is stored: ``group_size`` inputs per scale (None: the whole row), with an offset or not."""

    group_size: int | None
    symmetric: bool


@runtime_checkable
class Producer(Protocol):
    """The operation before a linear, in the two forms that precisions want of its result."""

    def __call__(self, x: Float[Array, "*batch inputs"], /) -> Float[Array, "*batch K"]:
        """The inputs of the linear in the dtype of ``x``."""
        ...

    def quantize(self, x: Float[Array, "*batch inputs"], /, **settings: Any) -> QuantizedActivation:
        """The same as integers, never written in floating point; ``settings`` as in ``quantize_activations``."""
        ...


class _Given:
    """The producer of inputs that are there already."""

    def __call__(self, x: Float[Array, "*batch K"]) -> Float[Array, "*batch K"]:
        return x

    def quantize(self, x: Float[Array, "*batch K"], **settings: Any) -> QuantizedActivation:
        return pallas_kernels.quantize_activations(x, **settings)


GIVEN = _Given()


def float_matmul(x: Float[Array, "*batch K"], weight: Float[Array, "N K"]) -> Float[Array, "*batch N"]:
    """``x @ weight.T``, accumulated in float32 and returned as float32."""
    precision = lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    contract_last = (((x.ndim - 1,), (1,)), ((), ()))
    return lax.dot_general(x, weight, contract_last, precision=precision, preferred_element_type=jnp.float32)


def matmul(
    x: Float[Array, "*batch inputs"],
    weight: Float[Array, "N K"] | QuantizedWeight,
    *,
    after: Producer = GIVEN,
    precision: Precision,
    quantization: QuantConfig | None,
    kernels: str | None,
) -> Float[Array, "*batch N"]:
    """``after(x) @ weight.T`` at a precision, in the dtype of ``x``.

    Raises:
        UsageError: a 4-bit precision is asked of a floating-point weight.
    """
    if not isinstance(weight, QuantizedWeight):
        if precision is not Precision.FLOAT:
            raise UsageError(
                f"precision {precision.value} needs 4-bit weights; this model was loaded in floating point"
            )
        return float_matmul(after(x), weight).astype(x.dtype)
    if precision is Precision.FLOAT:
        return float_matmul(after(x).astype(jnp.float32), pallas_kernels.dequantize(weight)).astype(x.dtype)
    if precision is Precision.W4A16:
        return pallas_kernels.w4a16_matmul(after(x), weight, implementation=kernels)
    assert quantization is not None
    recipe = activation_quantization(quantization, precision)
    num_groups = weight.num_inputs // (recipe.group_size or weight.num_inputs)
    codes = after.quantize(
        x,
        bits=precision.activation_bits,
        group_size=recipe.group_size,
        symmetric=recipe.symmetric,
        clip_ratio=recipe.clip_ratio,
        outlier_groups=min(recipe.outlier_groups, num_groups),
        implementation=None if kernels == MOSAIC else kernels,  # which has matmuls only
    )
    return pallas_kernels.w4a4_matmul(codes, weight, dtype=x.dtype, implementation=kernels)


def activation_quantization(quantization: QuantConfig, precision: Precision) -> ActivationQuantization:
    """The recipe for the activations of a draft precision."""
    return quantization.w4a4 if precision is Precision.W4A4 else quantization.w4a8


class Linear(nnx.Module):
    """``y = x @ weight.T + bias`` with a weight in 4 bits or in floating point.

    A leading ``layers`` shape stacks the arrays of several layers, for a scan over them.
    """

    def __init__(
        self,
        num_inputs: int,
        num_outputs: int,
        *,
        bias: bool,
        weight_format: WeightFormat | None,
        quantization: QuantConfig | None,
        kernels: str | None,
        dtype: DTypeLike,
        layers: tuple[int, ...] = (),
    ):
        self.quantization = quantization
        self.kernels = kernels
        self.weight = nnx.Param(_empty_weight(num_inputs, num_outputs, weight_format, dtype, layers))
        self.bias = nnx.Param(jnp.zeros((*layers, num_outputs), dtype)) if bias else None

    def __call__(
        self, x: Float[Array, "*batch inputs"], *, after: Producer = GIVEN, precision: Precision
    ) -> Float[Array, "*batch N"]:
        """``after(x) @ weight.T + bias``."""
        weight = self.weight.get_value()
        y = matmul(x, weight, after=after, precision=precision, quantization=self.quantization, kernels=self.kernels)
        return y if self.bias is None else y + self.bias.get_value()


def _empty_weight(
    num_inputs: int, num_outputs: int, weight_format: WeightFormat | None, dtype: DTypeLike, layers: tuple[int, ...]
) -> Array | QuantizedWeight:
    if weight_format is None:
        return jnp.zeros((*layers, num_outputs, num_inputs), dtype)
    group_size = weight_format.group_size or num_inputs
    pallas_kernels.check_group_size(num_inputs, group_size)
    per_group = (*layers, num_inputs // group_size, num_outputs)
    return QuantizedWeight(
        packed=jnp.zeros((*layers, num_outputs, num_inputs // 2), jnp.uint8),
        scale=jnp.zeros(per_group, jnp.float16),
        offset=None if weight_format.symmetric else jnp.zeros(per_group, jnp.float16),
    )
