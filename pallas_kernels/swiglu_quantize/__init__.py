"""The gated unit of an MLP, ``silu(gate) * up``, and the quantisation of its result in one operation."""

from __future__ import annotations

from jaxtyping import Array, Float

from pallas_kernels.arrays.activation import QuantizedActivation
from pallas_kernels.arrays.arguments import checked
from pallas_kernels.arrays.partial_sums import PartialSums
from pallas_kernels.arrays.weight import Layout
from pallas_kernels.dispatch import TRITON, Implementations
from pallas_kernels.quantize_activations import checked_settings

_OP = "swiglu_quantize"
# A file has swiglu_quantize and obstacle(num_inputs, group_size, outlier_groups).
_IMPLEMENTATIONS = Implementations(__name__, {TRITON: "gpu_triton"})


@checked
def swiglu_quantize(
    gate_up: Float[Array, "*batch two_K"] | PartialSums,
    *,
    bits: int,
    group_size: int | None = None,
    symmetric: bool = True,
    clip_ratio: float = 1.0,
    outlier_groups: int = 0,
    layout: Layout = Layout.PLANES,
    implementation: str | None = None,
) -> QuantizedActivation:
    """``quantize_activations(swiglu(gate_up))``; the equations stand in the reference.

    Args:
        gate_up: ``[..., 2 * K]`` float32, bfloat16 or float16: the gate, then what it lets
            through; or its partial sums.
        bits, group_size, symmetric, clip_ratio, outlier_groups, layout: as in ``quantize_activations``.
        implementation: a name of ``IMPLEMENTATIONS``, or None for the best that works.

    Returns:
        int8 codes ``[..., K]`` and float32 scales (and offsets) ``[..., K / group_size]``.

    Raises:
        ValueError: an argument is out of its range, the last axis of ``gate_up`` is odd, ``group_size`` does
            not divide K, or the name of the implementation is unknown.
        NotImplementedError: the named implementation cannot serve this call.
    """
    if gate_up.shape[-1] % 2:
        raise ValueError(f"{_OP}: gate_up has a last axis of {gate_up.shape[-1]}; use 2 * K, the gate and then up")
    num_inputs = gate_up.shape[-1] // 2
    settings = checked_settings(
        _OP,
        gate_up.dtype,
        num_inputs,
        bits=bits,
        group_size=group_size,
        symmetric=symmetric,
        clip_ratio=clip_ratio,
        outlier_groups=outlier_groups,
        layout=layout,
    )
    chosen = _IMPLEMENTATIONS.select(
        implementation, lambda module: module.obstacle(num_inputs, settings["group_size"], outlier_groups)
    )
    return chosen.swiglu_quantize(gate_up, **settings)
