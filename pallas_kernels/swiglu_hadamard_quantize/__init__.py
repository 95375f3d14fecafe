"""The gated unit of an MLP, the Hadamard transform of its result and the quantisation of that in one operation."""

from __future__ import annotations

from jaxtyping import Array, Float

from pallas_kernels.arrays.activation import QuantizedActivation
from pallas_kernels.arrays.arguments import checked
from pallas_kernels.arrays.weight import Layout
from pallas_kernels.dispatch import TPU, TRITON, Implementations
from pallas_kernels.quantize_activations import checked_settings
from pallas_kernels.swiglu_hadamard import checked_sizes

_OP = "swiglu_hadamard_quantize"
# A file has swiglu_hadamard_quantize and obstacle(num_inputs, block, group_size, outlier_groups).
_IMPLEMENTATIONS = Implementations(__name__, {TRITON: "gpu_triton", TPU: "tpu"})


@checked
def swiglu_hadamard_quantize(
    gate_up: Float[Array, "*batch two_K"],
    *,
    block: int | None = None,
    bits: int,
    group_size: int | None = None,
    symmetric: bool = True,
    clip_ratio: float = 1.0,
    outlier_groups: int = 0,
    layout: Layout = Layout.PLANES,
    implementation: str | None = None,
) -> QuantizedActivation:
    """``quantize_activations(hadamard(swiglu(gate_up)))``; the equations stand in the reference.

    Args:
        gate_up: ``[..., 2 * K]`` float32, bfloat16 or float16: the gate, then what it lets through.
        block: consecutive values that are transformed together; None for all K.
        bits, group_size, symmetric, clip_ratio, outlier_groups, layout: as in ``quantize_activations``.
        implementation: a name of ``IMPLEMENTATIONS``, or None for the best that works.

    Returns:
        int8 codes ``[..., K]`` and float32 scales (and offsets) ``[..., K / group_size]``.

    Raises:
        ValueError: an argument is out of its range, the last axis of ``gate_up`` is odd, ``block`` or ``group_size``
            does not divide K, there is no Hadamard matrix of ``block``, or the name of the implementation is unknown.
        NotImplementedError: the named implementation cannot serve this call.
    """
    num_inputs, block = checked_sizes(_OP, gate_up, block)
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
        implementation, lambda module: module.obstacle(num_inputs, block, settings["group_size"], outlier_groups)
    )
    return chosen.swiglu_hadamard_quantize(gate_up, block=block, **settings)
