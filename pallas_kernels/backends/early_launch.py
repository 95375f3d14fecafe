"""Kernels that start before the one before them has ended: programmatic dependent launch, on NVIDIA Hopper.

A kernel that signals lets the next one start. That one then does what does not depend on the first, and waits for its
end. The Pallas Triton kernels of a decode step signal (``registers.start_next``), but for Hadamard transforms and what
XLA reads the results of: LM heads, and what weighs and chooses blocks. XLA has every Triton kernel wait before anything
else, its signal included, so that only launches overlap. A Mosaic matmul copies the first tiles of its weight before it
waits: they are on their way before there are activations to multiply. It does not signal, unless it gates what it has
multiplied, as a kernel after it would.

This is right only in programs of which two things hold, so nothing of it happens outside of :func:`early_launch`.
:func:`obstacle` looks through a traced program for what breaks them.

- No kernel of the program writes a 4-bit weight: its codes and scales are arguments of the program as they are, neither
  cut out of an array (a scan over layers) nor copied or computed. What the last program before this one wrote is safe
  behind any other kernel of this one.
- What a kernel that signals has written is read by kernels of this package alone, until one of those that does not
  signal has ended. XLA's own read what they are given through the path for data that nobody writes meanwhile
  (``ld.global.nc``), unless the kernel before them is one of its own that signals.

Where A, B and C follow each other, C waits for B alone. But B has waited for A before it signals or ends, so A has
ended, and what it wrote is there, before C goes on.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

import jax
from jax.extend import core

_enabled: Any = jax.make_user_context(False)  # a part of the key under which jit finds what it traced
SIGNAL = "griddepcontrol.launch_dependents"
_WAIT = "griddepcontrol_wait"  # Pallas' name of what a Mosaic kernel does that starts early
_KERNELS = ("pallas_call", "custom_vmap_call")  # as which Triton and Mosaic kernels are traced
_VIEWS = ("reshape", "squeeze", "expand_dims", "broadcast_in_dim")


def early_launch(enabled: bool = True) -> AbstractContextManager[None]:
    """A program traced in this context has kernels that start early, or has none."""
    return _enabled(enabled)


def is_enabled() -> bool:
    """Whether a kernel that is traced now may start early, and let the next one."""
    return bool(_enabled.value)


def is_supported() -> bool:
    """Whether it does anything: from jax 0.11 on, on the GPUs for which there are Mosaic kernels.

    Kernels of Triton signal, and one pads rows: a JAX that no longer has that backend has no early starts.
    """
    if jax.default_backend() != "gpu" or jax.__version_info__ < (0, 11) or not _has_triton():
        return False
    return str(getattr(jax.local_devices()[0], "compute_capability", "")).startswith("9.")


def _has_triton() -> bool:
    try:
        importlib.import_module("jax.experimental.pallas.triton")
    except ImportError:
        return False
    return True


def obstacle(program: core.ClosedJaxpr) -> str | None:
    """Why kernels of a program that was traced in :func:`early_launch` may not start early; None if they may.

    Args:
        program: a pass of a model. What calls it may read its results behind its last kernel only.

    Returns:
        the end of a sentence.
    """
    arguments = [_Value(is_argument=True)] * len(program.jaxpr.invars)
    try:
        _read(program.jaxpr, arguments)
    except _NotAllowedError as error:
        return str(error)
    return None


def reads_ahead(program: core.ClosedJaxpr) -> bool:
    """Whether a matmul of a traced program copies some of its weight before it waits."""
    return any(equation.primitive.name == _WAIT for equation in _equations(program.jaxpr))


class _NotAllowedError(Exception):
    pass


class _Value:
    """What is known of an array: that it is an argument as it was given, or that a kernel wrote it that signals."""

    def __init__(self, *, is_argument: bool = False, behind_signal: bool = False):
        self.is_argument, self.behind_signal = is_argument, behind_signal


_OTHER = _Value()


def _read(jaxpr: core.Jaxpr, arguments: Sequence[_Value]) -> list[_Value]:
    """The results of a program of some arguments."""
    values: dict[Any, _Value] = dict(zip(jaxpr.invars, arguments, strict=True))

    def of(atom: Any) -> _Value:
        return _OTHER if isinstance(atom, core.Literal) else values.get(atom, _OTHER)

    for equation in jaxpr.eqns:
        inputs, name = [of(atom) for atom in equation.invars], equation.primitive.name
        if name in _KERNELS:
            results = [_of_kernel(equation, inputs)] * len(equation.outvars)
        elif name == "jit":
            results = _read(equation.params["jaxpr"].jaxpr, inputs)
        elif name in _VIEWS and _is_view(equation):
            results = inputs[:1]
        elif any(value.behind_signal for value in inputs):
            raise _NotAllowedError(f"XLA computes {name} of what a kernel that signals has written")
        elif any(one.primitive.name in _KERNELS for one in _within(equation)):
            raise _NotAllowedError(f"kernels are within {name}, whose arrays XLA cuts out and copies")
        else:
            results = [_OTHER] * len(equation.outvars)
        values.update(zip(equation.outvars, results, strict=True))
    return [of(atom) for atom in jaxpr.outvars]


def _is_view(equation: Any) -> bool:
    return equation.invars[0].aval.size == equation.outvars[0].aval.size


def _of_kernel(equation: Any, inputs: Sequence[_Value]) -> _Value:
    """What a kernel writes."""
    signals, starts_early = _traits(equation.params.get("jaxpr", equation.params.get("call")))
    if starts_early:
        if jax.__version_info__ < (0, 12):
            raise _NotAllowedError("before jax 0.12, a CUDA graph holds a Mosaic kernel as one of its own, which waits")
        given = [(atom.aval, value.is_argument) for atom, value in zip(equation.invars, inputs, strict=True)]
        num_outputs = {array.shape[0] for array, _ in given if array.dtype == "uint8"}
        if not all(is_argument for array, is_argument in given if _is_of_weight(array, num_outputs)):
            raise _NotAllowedError("a 4-bit weight is no argument of the program")
    return _Value(behind_signal=signals)


def _is_of_weight(array: Any, num_outputs: set[int]) -> bool:
    """Whether a Mosaic matmul copies an array before it waits: codes, or factors of a weight with such outputs."""
    return array.dtype == "uint8" or (array.ndim == 3 and array.dtype == "float16" and array.shape[2] in num_outputs)


def _traits(kernel: Any) -> tuple[bool, bool]:
    """Whether a kernel signals, and whether it starts early."""
    equations = list(_equations(getattr(kernel, "jaxpr", kernel)))
    signals = any(SIGNAL in str(one.params.get(name)) for one in equations for name in ("asm", "mgpu_fn"))
    return signals, any(one.primitive.name == _WAIT for one in equations)


def _equations(jaxpr: core.Jaxpr) -> Iterator[Any]:
    """Of a program and all within it."""
    for equation in jaxpr.eqns:
        yield equation
        yield from _within(equation)


def _within(equation: Any) -> Iterator[Any]:
    for inner in core.jaxprs_in_params(equation.params):
        yield from _equations(getattr(inner, "jaxpr", inner))
