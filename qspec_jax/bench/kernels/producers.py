"""The benchmarked operations that compute the inputs of a matmul: quantisers, the gated unit, Hadamard transforms.

Every call reads activations of its own, as many copies as exceed the L2 cache together.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from pallas_kernels import (
    dequantize_activation,
    hadamard,
    quantize_activations,
    swiglu,
    swiglu_hadamard,
    swiglu_hadamard_quantize,
    swiglu_quantize,
)
from pallas_kernels.dispatch import REFERENCE
from pallas_kernels.hadamard.matrices import core_order
from qspec_jax.bench.kernels.operands import RELATIVE_ERROR_BOUND, Workload, num_copies, random_rows, recipe

# Of rounding to the codes, whose steps follow the largest of the products of a gated unit.
_CODE_ERROR_BOUNDS = {8: 0.1, 4: 0.3}


@dataclasses.dataclass(frozen=True)
class _Producer:
    """An operation, the values that it reads for each that it writes, and the exact result without the rounding."""

    function: Callable[..., Any]
    reads: int
    exact: Callable[..., Array] | None


_rotate = functools.partial(hadamard, implementation=REFERENCE)
_gate = functools.partial(swiglu, implementation=REFERENCE)
_gate_and_rotate = functools.partial(swiglu_hadamard, implementation=REFERENCE)
_PRODUCERS = {
    "quantize_a8": _Producer(quantize_activations, 1, None),
    "quantize_a4": _Producer(quantize_activations, 1, None),
    "swiglu": _Producer(swiglu, 2, _gate),
    "swiglu_a8": _Producer(swiglu_quantize, 2, _gate),
    "swiglu_a4": _Producer(swiglu_quantize, 2, _gate),
    "hadamard": _Producer(hadamard, 1, _rotate),
    "swiglu_hadamard": _Producer(swiglu_hadamard, 2, _gate_and_rotate),
    "swiglu_hadamard_a8": _Producer(swiglu_hadamard_quantize, 2, _gate_and_rotate),
    "swiglu_hadamard_a4": _Producer(swiglu_hadamard_quantize, 2, _gate_and_rotate),
}


def obstacle(op: str, k: int) -> str | None:
    """Why one of ``names.PRODUCERS`` has no result of ``k`` values; None if it has."""
    if quantizes(op):
        size = recipe(op)[1].group_size or k
        if k % size:
            return f"{op}: its activation groups of {size} do not divide K={k}"
    if "hadamard" in op:
        try:
            core_order(k)
        except ValueError as error:
            return str(error)
    return None


def quantizes(op: str) -> bool:
    """Whether the result is integers, by the default recipe of a draft precision."""
    return op.endswith(("_a8", "_a4"))


def producer_workload(op: str, rows: int, k: int) -> Workload:
    """One of ``names.PRODUCERS`` that writes ``[rows, k]``; transforms are of all ``k`` values."""
    producer = _PRODUCERS[op]
    settings: dict[str, Any] = {}
    bound = RELATIVE_ERROR_BOUND
    if quantizes(op):
        bits, how = recipe(op)
        settings = {"bits": bits, **dataclasses.asdict(how)}
        bound = bound if producer.exact is None else _CODE_ERROR_BOUNDS[bits]

    def implement(name: str | None) -> Callable[[Any, Any], Any]:
        return lambda _, x: producer.function(x, implementation=name, **settings)

    width = producer.reads * k
    copies = [random_rows(rows, width, seed=seed) for seed in range(num_copies(2 * rows * width))]
    if producer.exact is None:
        expected = dequantize_activation(jax.jit(implement(REFERENCE))(None, copies[0]))
    else:
        expected = jax.jit(producer.exact)(copies[0].astype(jnp.float32))
    return Workload(None, copies, implement, expected, None, error_bound=bound)
