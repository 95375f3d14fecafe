"""RMS norm and the quantisation of its result in one operation."""

from __future__ import annotations

from typing import overload

from jaxtyping import Array, Float

from pallas_kernels.arrays.activation import QuantizedActivation
from pallas_kernels.arrays.arguments import checked
from pallas_kernels.arrays.partial_sums import PartialSums
from pallas_kernels.arrays.weight import Layout
from pallas_kernels.dispatch import TRITON, Implementations
from pallas_kernels.quantize_activations import checked_settings
from pallas_kernels.rms_norm import check_operands

_OP = "rms_norm_quantize"
# A file has rms_norm_quantize, add_rms_norm_quantize and obstacle(num_inputs, group_size).
_IMPLEMENTATIONS = Implementations(__name__, {TRITON: "gpu_triton"})


@overload
def rms_norm_quantize(
    x: Float[Array, "*batch K"],
    gain: Float[Array, " K"],
    *,
    epsilon: float,
    update: None = None,
    bits: int,
    group_size: int | None = None,
    symmetric: bool = True,
    clip_ratio: float = 1.0,
    outlier_groups: int = 0,
    layout: Layout = Layout.PLANES,
    implementation: str | None = None,
) -> QuantizedActivation: ...


@overload
def rms_norm_quantize(
    x: Float[Array, "*batch K"],
    gain: Float[Array, " K"],
    *,
    epsilon: float,
    update: Float[Array, "*batch K"] | PartialSums,
    bits: int,
    group_size: int | None = None,
    symmetric: bool = True,
    clip_ratio: float = 1.0,
    outlier_groups: int = 0,
    layout: Layout = Layout.PLANES,
    implementation: str | None = None,
) -> tuple[Float[Array, "*batch K"], QuantizedActivation]: ...


@checked
def rms_norm_quantize(
    x: Float[Array, "*batch K"],
    gain: Float[Array, " K"],
    *,
    epsilon: float,
    update: Float[Array, "*batch K"] | PartialSums | None = None,
    bits: int,
    group_size: int | None = None,
    symmetric: bool = True,
    clip_ratio: float = 1.0,
    outlier_groups: int = 0,
    layout: Layout = Layout.PLANES,
    implementation: str | None = None,
) -> QuantizedActivation | tuple[Float[Array, "*batch K"], QuantizedActivation]:
    """``quantize_activations(rms_norm(x, gain))``, which never writes the norm; the equations stand in the reference.

    Args:
        x: ``[..., K]`` float32, bfloat16 or float16.
        gain: ``[K]`` in the dtype of ``x``.
        epsilon: added to the mean of squares; positive.
        update: ``[..., K]`` in the dtype of ``x``, or its partial sums; what is normalised is then ``x + update``.
        bits, group_size, symmetric, clip_ratio, outlier_groups, layout: as in ``quantize_activations``.
        implementation: a name of ``IMPLEMENTATIONS``, or None for the best that works.

    Returns:
        int8 codes ``[..., K]`` and float32 scales (and offsets) ``[..., K / group_size]``; with ``update`` the pair
        of ``x + update`` and those.

    Raises:
        ValueError: an argument is out of its range, ``gain`` or ``update`` do not fit ``x``, ``group_size`` does
            not divide K, or the name of the implementation is unknown.
        NotImplementedError: the named implementation cannot serve this call.
    """
    settings = checked_settings(
        _OP,
        x.dtype,
        x.shape[-1],
        bits=bits,
        group_size=group_size,
        symmetric=symmetric,
        clip_ratio=clip_ratio,
        outlier_groups=outlier_groups,
        layout=layout,
    )
    check_operands(_OP, x, gain, update, epsilon)
    chosen = _IMPLEMENTATIONS.select(
        implementation, lambda module: module.obstacle(x.shape[-1], settings["group_size"])
    )
    if update is None:
        return chosen.rms_norm_quantize(x, gain, epsilon=epsilon, **settings)
    return chosen.add_rms_norm_quantize(x, update, gain, epsilon=epsilon, **settings)
