"""The linear layer: the one place where a view decides which matmul runs.

A weight is either a float array ``[N, K]`` or a ``QuantizedWeight``. Every view reads the same
arrays; only the treatment of the activations and the kernel differ. A quantised linear may have its floats besides:
they are what a view without ``weight_bits`` reads then. A draft usually wants its inputs as
integers, and from the kernel that computes them: whoever computes them asks ``Linear.input_quantization``.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

import pallas_kernels
from pallas_kernels import Layout, PartialSums, QuantizedActivation, QuantizedWeight, value_of
from pallas_kernels.arrays.shown import shown
from pallas_kernels.dispatch import MOSAIC, REFERENCE, TPU
from pallas_kernels.float_matmul.reference import MAX_ROWS
from qspec_jax.errors import UsageError
from qspec_jax.model.collectives import add_up
from qspec_jax.model.config import ActivationQuantization, QuantConfig
from qspec_jax.model.precision import Precision
from qspec_jax.model.view import View


@dataclasses.dataclass(frozen=True)
class WeightFormat:
    """How one linear is stored: ``group_size`` inputs per scale (None: the whole row), with an offset or not, in 4 bits
    or nested in 8; ``wide`` is with scales and offsets in float32, where float16 would not hold those of a file.
    """

    group_size: int | None
    symmetric: bool
    bits: int = 4
    wide: bool = False

    @classmethod
    def of(cls, quantization: QuantConfig) -> WeightFormat:
        """What a configuration says of every linear."""
        return cls(quantization.group_size, quantization.symmetric, quantization.bits)


def complete_formats(
    paths: Iterable[str], quantization: QuantConfig | None, formats: Mapping[str, WeightFormat | None] | None
) -> dict[str, WeightFormat | None]:
    """How each linear is stored: as ``formats`` says of it, else as ``quantization`` does."""
    default = None if quantization is None else WeightFormat.of(quantization)
    return {path: (formats or {}).get(path, default) for path in paths}


def activation_quantization(quantization: QuantConfig, view: View) -> ActivationQuantization | None:
    """How a view makes activations integers; None where it reads them as floats."""
    return {4: quantization.w4a4, 8: quantization.w4a8, None: None}[view.activation_bits]


def other_kernels(kernels: str | None) -> str | None:
    """The implementation of what surrounds the matmuls of ``kernels``; some have not all operations."""
    return None if kernels in (MOSAIC, TPU) else kernels


# Tokens of each prompt where a pass reads pieces of several (``decoding/packing.py``).
PIECE = 32

# A new weight gets the order of codes that the kernels of these read fastest. A plan with another draft has the weights
# laid out anew (``layouts.py``).
_USUAL_VIEWS = (View.of(Precision.W4A16), View.of(Precision.W4A8))


class Linear(nnx.Module):
    """``y = x @ weight.T + bias`` with a weight in 4 or 8 bits, in floating point, or both.

    A leading ``layers`` shape stacks the arrays of several layers, for a scan over them. With ``sum_over``, the devices
    of that axis of a mesh have some inputs each, and the output is the sum over all of them.
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
        sum_over: str | None = None,
    ):
        self.sum_over = sum_over
        self.quantization = quantization
        self.kernels = kernels
        self.dtype = jnp.dtype(dtype)
        weight = empty_weight(num_inputs, num_outputs, weight_format, dtype, layers)
        if isinstance(weight, QuantizedWeight):  # who fills it keeps to the layout
            weight = dataclasses.replace(weight, layout=self.layout_for(weight, _USUAL_VIEWS))
        self.weight = nnx.Param(weight)
        keeps_floats = weight_format is not None and quantization is not None and quantization.keep_floats
        self.floats = nnx.Param(jnp.zeros((*layers, num_outputs, num_inputs), dtype)) if keeps_floats else None
        self.bias = nnx.Param(jnp.zeros((*layers, num_outputs), dtype)) if bias else None

    def __repr__(self) -> str:
        floats = "" if self.floats is None else f", floats {shown(self.floats.get_value())}"
        return f"Linear({shown(self.weight.get_value())}{floats})"

    def __call__(self, x: Float[Array, "*batch K"] | QuantizedActivation, *, view: View) -> Float[Array, "*batch N"]:
        """``x @ weight.T + bias``.

        Args:
            x: floats, which are quantised here where the view reads integers; or those integers.
            view: what is read of weight and activations.

        Raises:
            UsageError: 4 or 8 bits are asked of a floating-point weight.
        """
        return value_of(self.partial_sums(x, view=view))

    def partial_sums(
        self, x: Float[Array, "*batch K"] | QuantizedActivation, *, view: View
    ) -> Float[Array, "*batch N"] | PartialSums:
        """The same for a reader that adds what the kernel leaves to add, if it leaves any."""
        settings = self.input_quantization(view)
        if settings is not None and not isinstance(x, QuantizedActivation):
            x = pallas_kernels.quantize_activations(x, **settings)
        y = add_up(self._product(x, view), self.sum_over)
        return y if self.bias is None else value_of(y) + self.bias.get_value()

    def gated(
        self, x: Float[Array, "*batch K"] | QuantizedActivation, *, view: View, quantization: dict[str, Any] | None
    ) -> Float[Array, "*batch F"] | QuantizedActivation | None:
        """``silu(gate) * up`` of outputs that are gate and up side by side, where the kernel that multiplies gates too.

        Args:
            x: in the form that the view reads.
            view: what is read of weight and activations.
            quantization: how the result is made integers, of the linear that reads it; None for floats.

        Returns:
            the bits that ``swiglu`` of :meth:`partial_sums` has; None where that is to be computed.
        """
        weight = self.read_by(view)
        if not isinstance(weight, QuantizedWeight) or self.bias is not None or self.sum_over is not None:
            return None
        kernels: dict[str, Any] = {"implementation": self.kernels}
        if isinstance(x, QuantizedActivation):
            if quantization is None or not _is_one_scale(quantization):
                return None
            of_result = {name: quantization[name] for name in ("bits", "clip_ratio", "layout")}
            kernels["dtype"] = self.dtype
            is_fused = pallas_kernels.w4a4_swiglu_quantize_is_fused(x, weight, **kernels)
            return pallas_kernels.w4a4_swiglu_quantize(x, weight, **of_result, **kernels) if is_fused else None
        if quantization is not None or view.weight_bits is None or self.input_quantization(view) is not None:
            return None
        is_fused = pallas_kernels.w4a16_swiglu_is_fused(x, weight, **kernels)
        return pallas_kernels.w4a16_swiglu(x, weight, **kernels) if is_fused else None

    def input_quantization(self, view: View) -> dict[str, Any] | None:
        """How the inputs that a view reads are made integers: keyword arguments of ``quantize_activations``.

        None where it reads floating point.
        """
        weight = self.read_by(view)
        recipe = self._recipe(weight, view)
        if recipe is None:
            return None
        assert isinstance(weight, QuantizedWeight)
        num_groups = weight.num_inputs // (recipe.group_size or weight.num_inputs)
        return {
            "bits": view.activation_bits,
            "group_size": recipe.group_size,
            "symmetric": recipe.symmetric,
            "clip_ratio": recipe.clip_ratio,
            "outlier_groups": min(recipe.outlier_groups, num_groups),
            "layout": weight.layout,
            "implementation": other_kernels(self.kernels),
        }

    def read_by(self, view: View) -> Array | QuantizedWeight:
        """The array that a view reads, or the part of it."""
        beside = self.floats if view.weight_bits is None else None
        weight = (self.weight if beside is None else beside).get_value()
        if isinstance(weight, QuantizedWeight) and view.weight_bits == 4:
            return pallas_kernels.upper_nibbles(weight)
        return weight

    def rows_read(self, num_rows: int, *, view: View) -> int:
        """How many rows the product of so many reads: more where its kernel copies them first, to have whole tiles."""
        weight = self.read_by(view)
        if not isinstance(weight, QuantizedWeight) or view.weight_bits is None:
            return num_rows
        return pallas_kernels.rows_read(num_rows, weight, self.dtype, implementation=self.kernels)

    def layout_for(self, weight: QuantizedWeight, views: Iterable[View]) -> Layout:
        """The order of codes that the kernels of all views read: WGMMA where all of them can, otherwise PLANES.

        With ``kernels`` asked for by name, the order is that of their W4A16 matmul. A draft that these kernels cannot
        serve then says so itself, when it is called.
        """
        layouts = {pallas_kernels.best_layout(weight, self.dtype, implementation=self.kernels)}
        weight = pallas_kernels.upper_nibbles(weight)  # which alone meet integers
        for view in views if self.kernels is None else ():
            if (settings := self._recipe(weight, view)) is not None:
                num_groups = weight.num_inputs // (settings.group_size or weight.num_inputs)
                layouts.add(
                    pallas_kernels.best_layout_for_codes(weight, symmetric=settings.symmetric, num_groups=num_groups)
                )
        return Layout.PLANES if Layout.PLANES in layouts else layouts.pop()

    def _recipe(self, weight: Array | QuantizedWeight, view: View) -> ActivationQuantization | None:
        """How activations are made integers; None where floating point is read."""
        if view.activation_bits is None or not isinstance(weight, QuantizedWeight):
            return None
        assert self.quantization is not None
        return activation_quantization(self.quantization, view)

    def _product(
        self, x: Float[Array, "*batch K"] | QuantizedActivation, view: View
    ) -> Float[Array, "*batch N"] | PartialSums:
        """``x @ weight.T`` of inputs in the form that the view reads."""
        weight = self.read_by(view)
        if isinstance(x, QuantizedActivation):
            assert isinstance(weight, QuantizedWeight)
            if not x.symmetric and weight.group_sum is None:  # a plan's weights have them already (layouts.py)
                weight = pallas_kernels.with_group_sums(weight, x.group_size)
            return pallas_kernels.w4a4_partial_sums(x, weight, dtype=self.dtype, implementation=self.kernels)
        if isinstance(weight, QuantizedWeight):
            if view.weight_bits is not None:
                product = functools.partial(pallas_kernels.w4a16_partial_sums, implementation=self.kernels)
                if weight.layout is Layout.WGMMA and _is_prefill(x):  # any number of rows are alike there
                    return product(x, weight)
                if _is_piece(x) and self._rows_alike(x, weight, prefill=True) is None:
                    return product(x, weight, prefill=True)
                if _is_cut(x) and weight.layout is not Layout.WGMMA and self._rows_alike(x, weight, asked=True) is None:
                    return product(x, weight, alike=True)
                return in_pieces(lambda rows: product(rows, weight), x)
            x, weight = x.astype(jnp.float32), pallas_kernels.dequantize(weight)
        elif view.weight_bits is not None:
            raise UsageError(
                f"precision {view.precision.value} needs {view.weight_bits}-bit weights; this model was loaded in "
                "floating point"
            )
        elif self.floats is not None:
            if _is_piece(x) and self.reads_packed_floats:
                return pallas_kernels.float_partial_sums(x, weight, dtype=self.dtype, prefill=True)
            return in_pieces(lambda rows: self._float_product(rows, weight), x)
        # Left to XLA whatever the kernels: the yardstick for what 4 bits bring.
        return pallas_kernels.float_matmul(x, weight, implementation=REFERENCE).astype(self.dtype)

    @property
    def reads_packed_floats(self) -> bool:
        """Whether rows of packed prompts have the same bits beside any others, of floats that verify drafts."""
        return self.kernels != REFERENCE and pallas_kernels.float_prefill_is_alike(self.dtype)

    def _rows_alike(self, x: Float[Array, "*batch K"], weight: QuantizedWeight, **options: bool) -> int | None:
        """How many rows one call may multiply; None for what else would be multiplied in pieces."""
        return pallas_kernels.rows_alike(weight, x.dtype, implementation=self.kernels, **options)

    def _float_product(
        self, x: Float[Array, "*batch K"], weight: Float[Array, "N K"]
    ) -> Float[Array, "*batch N"] | PartialSums:
        """With floats that verify drafts: rows of new tokens have the same bits whatever is beside them.

        Kernels of another name do not serve every dtype and number of rows. A chunk of a prompt that has a pass to
        itself is left to XLA.
        """
        implementation = REFERENCE if _is_prefill(x) or self.kernels == REFERENCE else None
        return pallas_kernels.float_partial_sums(x, weight, dtype=self.dtype, implementation=implementation)


def _is_one_scale(quantization: dict[str, Any]) -> bool:
    """Whether each token gets one symmetric scale."""
    return quantization["group_size"] is None and quantization["symmetric"] and not quantization["outlier_groups"]


def _is_prefill(x: Float[Array, "*batch K"]) -> bool:
    return x.ndim == 3 and x.shape[1] > pallas_kernels.MAX_DECODE_TOKENS


def _is_piece(x: Float[Array, "*batch K"]) -> bool:
    """Whether these are rows of packed prompts, and not a short chunk that has a pass to itself."""
    return x.ndim == 3 and x.shape[0] > 1 and x.shape[1] == PIECE


def _is_cut(x: Float[Array, "*batch K"]) -> bool:
    """Whether these are rows of new tokens or of packed prompts, and more than have the same bits in any call."""
    return x.ndim == 3 and x.shape[1] <= PIECE and x.shape[0] * x.shape[1] > MAX_ROWS


def in_pieces(
    product: Callable[[Float[Array, "*batch K"]], Float[Array, "*batch N"] | PartialSums], x: Float[Array, "*batch K"]
) -> Float[Array, "*batch N"] | PartialSums:
    """The product of rows of new tokens, of no more rows at a time than have the same bits whatever is beside them.

    Kernels promise that for ``MAX_ROWS`` rows; more are left to a library, whose sums depend on their number. A batch
    of many sequences that verifies many tokens has more, and so has a pass that reads :data:`PIECE` tokens of each of
    many prompts: they are multiplied in pieces of whole sequences. A longer chunk of a prompt, which has a pass to
    itself, is not.
    """
    if not _is_cut(x):
        return product(x)
    batch = x.shape[0]
    count = -(-batch // (MAX_ROWS // x.shape[1]))
    size = -(-batch // count)
    pieces = [product(x[start : start + size]) for start in range(0, batch, size)]
    if len({len(piece.parts) if isinstance(piece, PartialSums) else 0 for piece in pieces}) > 1:
        pieces = [value_of(piece) for piece in pieces]
    # Partial sums have an axis of parts in front of that of the batch.
    return jax.tree.map(lambda *some: jnp.concatenate(some, axis=-3), *pieces)


def empty_weight(
    num_inputs: int, num_outputs: int, weight_format: WeightFormat | None, dtype: DTypeLike, layers: tuple[int, ...]
) -> Array | QuantizedWeight:
    """Zeros, in ``Layout.PLANES`` where they are codes."""
    if weight_format is None:
        return jnp.zeros((*layers, num_outputs, num_inputs), dtype)
    group_size = weight_format.group_size or num_inputs
    pallas_kernels.check_group_size(num_inputs, group_size)
    per_group = (*layers, num_inputs // group_size, num_outputs)
    codes = jnp.zeros((*layers, num_outputs, num_inputs // 2), jnp.uint8)
    scales = jnp.zeros(per_group, jnp.float32 if weight_format.wide else jnp.float16)
    return QuantizedWeight(
        packed=codes,
        scale=scales,
        offset=None if weight_format.symmetric else jnp.zeros_like(scales),
        low=jnp.zeros_like(codes) if weight_format.bits == 8 else None,
    )
