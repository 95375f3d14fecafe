"""The gated unit of an MLP from its inputs: a weight-only 4-bit matmul and ``silu(gate) * up`` in one operation."""

from __future__ import annotations

import math
from typing import Any

from jaxtyping import Array, Float

from pallas_kernels.arrays.arguments import checked
from pallas_kernels.arrays.weight import QuantizedWeight
from pallas_kernels.dispatch import MOSAIC, Implementations
from pallas_kernels.swiglu import swiglu
from pallas_kernels.w4a16_matmul import check_operands, w4a16_partial_sums

_OP = "w4a16_swiglu"
# A file has w4a16_swiglu, obstacle(num_rows, dtype, weight), and FUSED, whether one kernel multiplies and gates.
_IMPLEMENTATIONS = Implementations(__name__, {MOSAIC: "gpu_mosaic"})


@checked
def w4a16_swiglu(
    x: Float[Array, "*batch K"], weight: QuantizedWeight, *, implementation: str | None = None
) -> Float[Array, "*batch F"]:
    """``swiglu(w4a16_matmul(x, weight))``, whose bits a kernel for both has too.

    Args:
        x: ``[..., K]`` float32, bfloat16 or float16.
        weight: a ``[2 * F, K]`` weight, the gate's outputs and then those that it lets through, without leading axes.
        implementation: a name of ``IMPLEMENTATIONS``; None for the kernel where :func:`w4a16_swiglu_is_fused`, else for
            the best of either operation.

    Returns:
        ``[..., F]`` in the dtype of ``x``.

    Raises:
        ValueError: shapes do not fit together, N is odd, a dtype is not one of those above, or the name of the
            implementation is unknown.
        NotImplementedError: the named implementation cannot serve this call.
    """
    check_operands(_OP, x, weight)
    if weight.num_outputs % 2:
        raise ValueError(f"{_OP}: the weight has {weight.num_outputs} outputs; use 2 * F, the gate's and then up's")
    if implementation is None and not w4a16_swiglu_is_fused(x, weight):
        return swiglu(w4a16_partial_sums(x, weight))
    chosen = _IMPLEMENTATIONS.select(implementation, lambda module: _obstacle(module, x, weight))
    return chosen.w4a16_swiglu(x, weight)


def w4a16_swiglu_is_fused(
    x: Float[Array, "*batch K"], weight: QuantizedWeight, *, implementation: str | None = None
) -> bool:
    """Whether :func:`w4a16_swiglu` is one kernel for such a call.

    Raises:
        ValueError: the name of the implementation is unknown.
    """
    found = _IMPLEMENTATIONS.serves(implementation, lambda module: _obstacle(module, x, weight))
    return found is not None and found.FUSED


def _obstacle(module: Any, x: Float[Array, "*batch K"], weight: QuantizedWeight) -> str | None:
    return module.obstacle(math.prod(x.shape[:-1]), x.dtype, weight)
