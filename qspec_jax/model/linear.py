"""The linear layer: the one place where ``Precision`` decides what is computed.

A weight is either a float array ``[N, K]`` or a ``QuantizedWeight``. Every precision reads the same
arrays; only the treatment of the activations and the kernel differ. A draft precision wants its inputs as
integers, and from the kernel that computes them: whoever computes them asks ``Linear.input_quantization``.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

import pallas_kernels
from pallas_kernels import Layout, PartialSums, QuantizedActivation, QuantizedWeight, value_of
from pallas_kernels.dispatch import MOSAIC, REFERENCE
from qspec_jax.errors import UsageError
from qspec_jax.model.config import ActivationQuantization, QuantConfig
from qspec_jax.model.precision import Precision


@dataclasses.dataclass(frozen=True)
class WeightFormat:
    """How one linear is stored: ``group_size`` inputs per scale (None: the whole row), with an offset or not."""

    group_size: int | None
    symmetric: bool


def activation_quantization(quantization: QuantConfig, precision: Precision) -> ActivationQuantization:
    """The recipe for the activations of a draft precision."""
    return quantization.w4a4 if precision is Precision.W4A4 else quantization.w4a8


def other_kernels(kernels: str | None) -> str | None:
    """The implementation of what surrounds the matmuls of ``kernels``; Mosaic has matmuls only."""
    return None if kernels == MOSAIC else kernels


# On the GPUs that have a layout of their own; a plan with another draft has the weights laid out anew.
_USUAL_PRECISIONS = (Precision.W4A16, Precision.W4A8)


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
        self.dtype = jnp.dtype(dtype)
        weight = _empty_weight(num_inputs, num_outputs, weight_format, dtype, layers)
        if isinstance(weight, QuantizedWeight):  # who fills it keeps to the layout
            weight = dataclasses.replace(weight, layout=self._layout_for(weight, _USUAL_PRECISIONS))
        self.weight = nnx.Param(weight)
        self.bias = nnx.Param(jnp.zeros((*layers, num_outputs), dtype)) if bias else None

    def __call__(
        self, x: Float[Array, "*batch K"] | QuantizedActivation, *, precision: Precision
    ) -> Float[Array, "*batch N"]:
        """``x @ weight.T + bias``.

        Args:
            x: floats, which are quantised here where the precision reads integers; or those integers.
            precision: what is computed.

        Raises:
            UsageError: a 4-bit precision is asked of a floating-point weight.
        """
        return value_of(self.partial_sums(x, precision=precision))

    def partial_sums(
        self, x: Float[Array, "*batch K"] | QuantizedActivation, *, precision: Precision
    ) -> Float[Array, "*batch N"] | PartialSums:
        """The same for a reader that adds what the kernel leaves to add, if it leaves any."""
        settings = self.input_quantization(precision)
        if settings is not None and not isinstance(x, QuantizedActivation):
            x = pallas_kernels.quantize_activations(x, **settings)
        y = self._product(x, precision)
        return y if self.bias is None else value_of(y) + self.bias.get_value()

    def input_quantization(self, precision: Precision) -> dict[str, Any] | None:
        """How the inputs that ``precision`` reads are made integers: keyword arguments of ``quantize_activations``.

        None where it reads floating point.
        """
        weight = self.weight.get_value()
        recipe = self._recipe(weight, precision)
        if recipe is None:
            return None
        assert isinstance(weight, QuantizedWeight)
        num_groups = weight.num_inputs // (recipe.group_size or weight.num_inputs)
        return {
            "bits": precision.activation_bits,
            "group_size": recipe.group_size,
            "symmetric": recipe.symmetric,
            "clip_ratio": recipe.clip_ratio,
            "outlier_groups": min(recipe.outlier_groups, num_groups),
            "layout": weight.layout,
            "implementation": other_kernels(self.kernels),
        }

    def lay_out_for(self, precisions: Iterable[Precision]) -> bool:
        """Gives up a layout whose kernels do not serve all of the precisions; True if that changed the weight."""
        weight = self.weight.get_value()
        if not isinstance(weight, QuantizedWeight) or weight.layout is Layout.PLANES:
            return False  # which serves all of them, and for good: plans that alternate keep their programs
        layout = self._layout_for(weight, precisions)
        if layout is weight.layout:
            return False
        self.weight.set_value(_with_layout(weight, layout))
        return True

    def _layout_for(self, weight: QuantizedWeight, precisions: Iterable[Precision]) -> Layout:
        """Kernels asked for by name are those of W4A16, and say themselves what they cannot serve."""
        layouts = {pallas_kernels.best_layout(weight, self.dtype, implementation=self.kernels)}
        for precision in precisions if self.kernels is None else ():
            if (settings := self._recipe(weight, precision)) is not None:
                num_groups = weight.num_inputs // (settings.group_size or weight.num_inputs)
                layouts.add(
                    pallas_kernels.best_layout_for_codes(weight, symmetric=settings.symmetric, num_groups=num_groups)
                )
        return Layout.PLANES if Layout.PLANES in layouts else layouts.pop()

    def _recipe(self, weight: Array | QuantizedWeight, precision: Precision) -> ActivationQuantization | None:
        """How activations are made integers; None where floating point is read."""
        if precision.activation_bits is None or not isinstance(weight, QuantizedWeight):
            return None
        assert self.quantization is not None
        return activation_quantization(self.quantization, precision)

    def _product(
        self, x: Float[Array, "*batch K"] | QuantizedActivation, precision: Precision
    ) -> Float[Array, "*batch N"] | PartialSums:
        """``x @ weight.T`` of inputs in the form that the precision reads."""
        weight = self.weight.get_value()
        if isinstance(x, QuantizedActivation):
            assert isinstance(weight, QuantizedWeight)
            return pallas_kernels.w4a4_partial_sums(x, weight, dtype=self.dtype, implementation=self.kernels)
        if isinstance(weight, QuantizedWeight):
            if precision is Precision.W4A16:
                return pallas_kernels.w4a16_partial_sums(x, weight, implementation=self.kernels)
            x, weight = x.astype(jnp.float32), pallas_kernels.dequantize(weight)
        elif precision is not Precision.FLOAT:
            raise UsageError(
                f"precision {precision.value} needs 4-bit weights; this model was loaded in floating point"
            )
        # Left to XLA whatever the kernels: the yardstick for what 4 bits bring.
        return pallas_kernels.float_matmul(x, weight, implementation=REFERENCE).astype(self.dtype)


@functools.partial(jax.jit, static_argnums=1, donate_argnums=0)
def _with_layout(weight: QuantizedWeight, layout: Layout) -> QuantizedWeight:
    return pallas_kernels.with_layout(weight, layout)


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
