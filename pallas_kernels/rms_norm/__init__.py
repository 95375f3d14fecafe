"""RMS norm, alone or of a sum: the residual stream's addition and its norm are one operation."""

from __future__ import annotations

from typing import overload

import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.arrays.arguments import checked
from pallas_kernels.arrays.partial_sums import PartialSums
from pallas_kernels.dispatch import TRITON, Implementations

_OP = "rms_norm"
# A file has rms_norm, add_rms_norm and obstacle(num_inputs).
_IMPLEMENTATIONS = Implementations(__name__, {TRITON: "gpu_triton"})
_DTYPES = (jnp.float32, jnp.bfloat16, jnp.float16)


@overload
def rms_norm(
    x: Float[Array, "*batch K"],
    gain: Float[Array, " K"],
    *,
    epsilon: float,
    update: None = None,
    implementation: str | None = None,
) -> Float[Array, "*batch K"]: ...


@overload
def rms_norm(
    x: Float[Array, "*batch K"],
    gain: Float[Array, " K"],
    *,
    epsilon: float,
    update: Float[Array, "*batch K"] | PartialSums,
    implementation: str | None = None,
) -> tuple[Float[Array, "*batch K"], Float[Array, "*batch K"]]: ...


@checked
def rms_norm(
    x: Float[Array, "*batch K"],
    gain: Float[Array, " K"],
    *,
    epsilon: float,
    update: Float[Array, "*batch K"] | PartialSums | None = None,
    implementation: str | None = None,
) -> Float[Array, "*batch K"] | tuple[Float[Array, "*batch K"], Float[Array, "*batch K"]]:
    """``x / sqrt(mean(x^2) + epsilon) * gain``; the equations, with every rounding, stand in the reference.

    Args:
        x: ``[..., K]`` float32, bfloat16 or float16.
        gain: ``[K]`` in the dtype of ``x``.
        epsilon: added to the mean of squares; positive.
        update: ``[..., K]`` in the dtype of ``x``, or its partial sums; what is normalised is then ``x + update``.
        implementation: a name of ``IMPLEMENTATIONS``, or None for the best that works.

    Returns:
        The norm in the dtype of ``x``; with ``update`` the pair of ``x + update`` and its norm.

    Raises:
        ValueError: ``gain`` or ``update`` do not fit ``x``, ``epsilon`` is not positive, the dtype is not one of
            the three, or the name of the implementation is unknown.
        NotImplementedError: the named implementation cannot serve this call.
    """
    check_operands(_OP, x, gain, update, epsilon)
    if x.dtype not in _DTYPES:
        raise ValueError(f"{_OP}: x is {x.dtype}; use float32, bfloat16 or float16")
    chosen = _IMPLEMENTATIONS.select(implementation, lambda module: module.obstacle(x.shape[-1]))
    if update is None:
        return chosen.rms_norm(x, gain, epsilon=epsilon)
    return chosen.add_rms_norm(x, update, gain, epsilon=epsilon)


def check_operands(op: str, x: Array, gain: Array, update: Array | PartialSums | None, epsilon: float) -> None:
    """Raises ValueError, in the name of ``op``, where they do not fit together."""
    if gain.shape != x.shape[-1:] or gain.dtype != x.dtype:
        raise ValueError(
            f"{op}: gain is {gain.dtype} {gain.shape}; use {x.dtype} {x.shape[-1:]}, the dtype and last axis of x"
        )
    if update is not None and (update.shape != x.shape or update.dtype != x.dtype):
        raise ValueError(f"{op}: update is {update.dtype} {update.shape}; use {x.dtype} {x.shape}, as x is")
    if not epsilon > 0:
        raise ValueError(f"{op}: epsilon={epsilon}; use a positive number, or a token of zeros divides by zero")
