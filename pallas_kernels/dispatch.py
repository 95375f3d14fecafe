"""Implementation names, what runs where, and the one error when none fits.

Every operation of this package takes ``implementation``. A name runs that implementation or raises;
None takes the first one of :data:`IMPLEMENTATIONS` that works for the platform and the shapes, and
always finds one because the reference is plain ``jax.numpy``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

REFERENCE = "reference"
TRITON = "triton"
MOSAIC = "mosaic"
# In the order in which None tries them, but for the matmuls of large weights (order_of_trial). Where JAX has no
# Triton backend, Mosaic is the first that works.
IMPLEMENTATIONS = (TRITON, MOSAIC, REFERENCE)
# Inputs times outputs from which Mosaic is the faster one on Hopper, at any number of rows (docs/results.md).
_LARGE_WEIGHT = 4_000_000

# bfloat16 tensor cores and `fma.rn.bf16x2` begin with Ampere; `wgmma` is Hopper's alone.
_COMPUTE_CAPABILITIES = {TRITON: ((8, 0), None, "8.0 or newer"), MOSAIC: ((9, 0), (10, 0), "9.x (Hopper)")}


def available_implementations(platform: str | None = None) -> tuple[str, ...]:
    """The implementation names that work on a platform, in the order in which None tries them.

    Args:
        platform: ``"cpu"``, ``"gpu"``, ``"cuda"``, ``"tpu"``, ...; None means the platform that JAX
            uses by default, whose device is then examined too.

    Returns:
        Names of :data:`IMPLEMENTATIONS`. A shape may still rule one out for a single call.
    """
    return tuple(name for name in IMPLEMENTATIONS if _platform_obstacle(name, platform) is None)


def order_of_trial(num_outputs: int, num_inputs: int) -> tuple[str, ...]:
    """The names in the order in which None tries them for a 4-bit weight ``[num_outputs, num_inputs]``.

    It depends on the weight alone, so that a row has the same bits however many rows are beside it.
    """
    large = num_outputs * num_inputs >= _LARGE_WEIGHT
    return (MOSAIC, TRITON, REFERENCE) if large else IMPLEMENTATIONS


def select_implementation(
    op: str,
    implementation: str | None,
    *,
    triton_obstacle: Callable[[], str | None],
    mosaic_obstacle: Callable[[], str | None] | None = None,
    order: tuple[str, ...] = IMPLEMENTATIONS,
) -> str:
    """Resolves the ``implementation`` argument of an operation.

    Args:
        op: name of the operation, for messages.
        implementation: a name of :data:`IMPLEMENTATIONS`, or None for the best one that works.
        triton_obstacle: called only where Triton could run; says why the Triton kernel cannot serve
            these shapes and dtypes, or returns None. An ImportError, of a JAX that lacks the backend or has
            another interface, is an obstacle too.
        mosaic_obstacle: the same of Mosaic GPU; None if the operation has no such kernel.
        order: in which None tries them.

    Returns:
        The name of the implementation to call.

    Raises:
        ValueError: ``implementation`` is not a known name.
        NotImplementedError: the named implementation does not work on this platform or these shapes.
    """
    if implementation is not None and implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"{op}: unknown implementation {implementation!r}; use one of {', '.join(IMPLEMENTATIONS)}, or None"
        )
    obstacles = {
        MOSAIC: mosaic_obstacle or (lambda: "does not exist for this operation"),
        TRITON: triton_obstacle,
        REFERENCE: lambda: None,
    }
    for name in order if implementation is None else (implementation,):
        obstacle = _platform_obstacle(name, None) or _told_or_import_error(obstacles[name])
        if obstacle is None:
            return name
    raise NotImplementedError(f"{op}: implementation '{implementation}' {obstacle}; use '{REFERENCE}' or None")


def would_select(name: str, op: str, implementation: str | None, **choice: Any) -> bool:
    """Whether :func:`select_implementation` resolves to ``name``; not where it refuses what was asked for by name."""
    try:
        return select_implementation(op, implementation, **choice) == name
    except NotImplementedError:
        return False


def _told_or_import_error(obstacle: Callable[[], str | None]) -> str | None:
    try:
        return obstacle()
    except ImportError as error:
        return f"cannot be imported: {error}"


def _platform_obstacle(name: str, platform: str | None) -> str | None:
    """Why an implementation cannot run on a platform, as the end of a sentence; None if it can."""
    if name == REFERENCE:
        return None
    where = platform or jax.default_backend()
    if where not in ("gpu", "cuda"):
        return f"needs an NVIDIA GPU; this is {where}"
    if platform is not None:
        return None
    device = jax.devices()[0]
    if "rocm" in device.client.platform_version.lower():
        return "needs an NVIDIA GPU; this is an AMD GPU"
    capability = tuple(int(part) for part in device.compute_capability.split("."))
    first, end, wanted = _COMPUTE_CAPABILITIES[name]
    if capability < first or (end is not None and capability >= end):
        return f"needs an NVIDIA GPU of compute capability {wanted}; this one has {device.compute_capability}"
    return None
