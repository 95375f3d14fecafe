"""The gated unit of an MLP from integers to integers: an integer matmul, ``silu(gate) * up`` and its quantisation."""

from __future__ import annotations

import jax

from pallas_kernels.arrays.activation import QuantizedActivation
from pallas_kernels.arrays.arguments import checked
from pallas_kernels.arrays.weight import Layout, QuantizedWeight
from pallas_kernels.dispatch import MOSAIC, Implementations
from pallas_kernels.quantize_activations import checked_settings
from pallas_kernels.swiglu_quantize import swiglu_quantize
from pallas_kernels.w4a4_matmul import check_operands, w4a4_partial_sums

_OP = "w4a4_swiglu_quantize"
# A file has w4a4_swiglu_quantize, obstacle(x, weight, dtype), and FUSED, whether the kernel that multiplies gates too.
_IMPLEMENTATIONS = Implementations(__name__, {MOSAIC: "gpu_mosaic"})


@checked
def w4a4_swiglu_quantize(
    x: QuantizedActivation,
    weight: QuantizedWeight,
    *,
    dtype: jax.typing.DTypeLike,
    bits: int,
    clip_ratio: float = 1.0,
    layout: Layout = Layout.PLANES,
    implementation: str | None = None,
) -> QuantizedActivation:
    """``swiglu_quantize(w4a4_matmul(x, weight))`` with one symmetric scale per token, whose bits a kernel for both has.

    Args:
        x: ``[..., K]`` activations in 4 or 8 bits.
        weight: a ``[2 * F, K]`` weight, the gate's outputs and then those that it lets through, without leading axes.
        dtype: float32, bfloat16 or float16, of the product and of what is quantised.
        bits, clip_ratio, layout: of the result, as in ``quantize_activations``.
        implementation: a name of ``IMPLEMENTATIONS``; None for the kernel where :func:`w4a4_swiglu_quantize_is_fused`,
            else for the best of either operation.

    Returns:
        int8 codes ``[..., F]`` and float32 scales ``[..., 1]``.

    Raises:
        ValueError: shapes or groupings do not fit together, N is odd, an argument is out of its range, or the name of
            the implementation is unknown.
        NotImplementedError: the named implementation cannot serve this call.
    """
    check_operands(_OP, x, weight)
    if weight.num_outputs % 2:
        raise ValueError(f"{_OP}: the weight has {weight.num_outputs} outputs; use 2 * F, the gate's and then up's")
    of_result = {"bits": bits, "symmetric": True, "clip_ratio": clip_ratio, "outlier_groups": 0, "layout": layout}
    settings = checked_settings(_OP, dtype, weight.num_outputs // 2, group_size=None, **of_result)
    if implementation is None and not w4a4_swiglu_quantize_is_fused(x, weight, dtype=dtype):
        return swiglu_quantize(w4a4_partial_sums(x, weight, dtype=dtype), **settings)
    chosen = _IMPLEMENTATIONS.select(implementation, lambda module: module.obstacle(x, weight, dtype))
    return chosen.w4a4_swiglu_quantize(x, weight, dtype=dtype, **settings)


def w4a4_swiglu_quantize_is_fused(
    x: QuantizedActivation,
    weight: QuantizedWeight,
    *,
    dtype: jax.typing.DTypeLike,
    implementation: str | None = None,
) -> bool:
    """Whether the kernel that multiplies gates too in such a call of :func:`w4a4_swiglu_quantize`.

    Raises:
        ValueError: the name of the implementation is unknown.
    """
    found = _IMPLEMENTATIONS.serves(implementation, lambda module: module.obstacle(x, weight, dtype))
    return found is not None and found.FUSED
