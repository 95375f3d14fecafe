"""RMS norm and the quantisation of its result in one operation."""

from __future__ import annotations

from jaxtyping import Array, Float

from pallas_kernels import dispatch
from pallas_kernels.activations import QuantizedActivation
from pallas_kernels.quantize_activations import checked_settings
from pallas_kernels.rms_norm_quantize import reference

_OP = "rms_norm_quantize"


def rms_norm_quantize(
    x: Float[Array, "*batch K"],
    gain: Float[Array, " K"],
    *,
    epsilon: float,
    bits: int,
    group_size: int | None = None,
    symmetric: bool = True,
    clip_ratio: float = 1.0,
    outlier_groups: int = 0,
    implementation: str | None = None,
) -> QuantizedActivation:
    """``quantize_activations(rms_norm(x, gain))``, which never writes the norm; the equations stand in the reference.

    Args:
        x: ``[..., K]`` float32, bfloat16 or float16.
        gain: ``[K]`` in the dtype of ``x``.
        epsilon: added to the mean of squares; positive.
        bits, group_size, symmetric, clip_ratio, outlier_groups: as in ``quantize_activations``.
        implementation: ``"reference"``, ``"triton"``, or None for the best that works.

    Returns:
        int8 codes ``[..., K]`` and float32 scales (and offsets) ``[..., K / group_size]``.

    Raises:
        ValueError: an argument is out of its range, ``gain`` does not fit ``x``, ``group_size`` does not
            divide K, or the name of the implementation is unknown.
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
    )
    if gain.shape != x.shape[-1:] or gain.dtype != x.dtype:
        raise ValueError(
            f"{_OP}: gain is {gain.dtype} {gain.shape}; use {x.dtype} {x.shape[-1:]}, the dtype and last axis of x"
        )
    if not epsilon > 0:
        raise ValueError(f"{_OP}: epsilon={epsilon}; use a positive number, or a token of zeros divides by zero")
    chosen = dispatch.select_implementation(
        _OP, implementation, triton_obstacle=lambda: _triton().obstacle(x.shape[-1], settings["group_size"])
    )
    if chosen == dispatch.TRITON:
        return _triton().rms_norm_quantize(x, gain, epsilon=epsilon, **settings)
    return reference.rms_norm_quantize(x, gain, epsilon=epsilon, **settings)


def _triton():
    from pallas_kernels.rms_norm_quantize import gpu_triton  # imported only where it can run

    return gpu_triton
