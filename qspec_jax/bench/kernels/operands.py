"""Operands of the benchmarked matmuls: random weights and rows, and the results that the reference gives.

A call reads one of several copies of its weight, which together exceed the L2 cache, so that every call reads its
weight from memory as a decode step does. Activations stay in the cache, as they do there.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from pallas_kernels import (
    Layout,
    QuantizedActivation,
    QuantizedWeight,
    best_layout,
    dequantize_activation,
    float_partial_sums,
    quantize_activations,
    value_of,
    w4a4_matmul,
    w4a16_matmul,
    with_group_sums,
    with_layout,
)
from pallas_kernels.dispatch import MOSAIC, REFERENCE, operations
from qspec_jax.bench.kernels.names import PAIRS, WEIGHT_ONLY, XLA
from qspec_jax.bench.random_arrays import random_weight
from qspec_jax.model.config import ActivationQuantization, QuantConfig

# Rounding the result to bfloat16 costs 1.7e-3, and as much again where weights are scaled before they are multiplied.
RELATIVE_ERROR_BOUND = 5e-3

_MIN_COPIES, _MAX_COPIES = 3, 24
_BYTES_BEYOND_CACHE = 160_000_000  # three times the L2 of an H100


@dataclasses.dataclass(frozen=True, eq=False)
class Workload:
    """One operation on operands of one shape.

    Attributes:
        shared: what all calls read, such as the activations; None if there is nothing.
        copies: what each call reads its own copy of, such as the weight.
        implement: from the name of an implementation (None: the best) to the function of ``(shared, copy)``.
        expected: float32, the reference's result for the first copy.
        num_operations: multiplications and additions of a call; None where they are not the point.
        error_bound: relative error from which a result is wrong.
    """

    shared: Any
    copies: Sequence[Any]
    implement: Callable[[str | None], Callable[[Any, Any], Any]]
    expected: Array
    num_operations: int | None
    error_bound: float = RELATIVE_ERROR_BOUND

    def of_first(self, rows: int) -> Workload:
        """The same matmul of the first rows alone, whose results are known with those of all."""
        of_all = len(self.expected)
        return dataclasses.replace(
            self,
            shared=jax.tree.map(lambda array: array[:rows], self.shared),
            expected=self.expected[:rows],
            num_operations=None if self.num_operations is None else self.num_operations // of_all * rows,
        )

    def num_bytes(self, out: Any) -> int:
        """Bytes that a call must move: its operands (codes, scales, offsets, rows) once, and its result."""
        return sum(leaf.nbytes for leaf in jax.tree.leaves((self.shared, self.copies[0], out)))

    def relative_error(self, out: Any) -> float:
        """``||out - expected|| / ||expected||`` of the first copy's result; NaN if a value is not finite."""
        return float(_relative_error(out, self.expected))


def num_copies(num_bytes: int) -> int:
    """How many copies of so many bytes exceed the L2 cache of a GPU; the caches of a CPU are not modelled."""
    if jax.default_backend() != "gpu":
        return _MIN_COPIES
    return max(_MIN_COPIES, min(_MAX_COPIES, math.ceil(_BYTES_BEYOND_CACHE / num_bytes)))


def random_weights(k: int, n: int, *, group_size: int, symmetric: bool, bits: int = 4) -> list[QuantizedWeight]:
    """Copies of a ``[N, K]`` weight that differ, with all codes and entries of about ``1 / sqrt(K)``."""
    make = functools.partial(random_weight, k=k, n=n, group_size=group_size, symmetric=symmetric, bits=bits)
    return [make(key) for key in jax.random.split(jax.random.key(0), num_copies(n * k * bits // 8))]


def random_rows(rows: int, k: int, *, seed: int = 1) -> Array:
    """``[rows, K]`` bfloat16 normal values with a mean, so that zero points matter."""
    return (jax.random.normal(jax.random.key(seed), (rows, k)) + 0.25).astype(jnp.bfloat16)


def cancelling(rows: Array) -> Array:
    """``[rows, K]`` with two large values, whose products cancel in the outputs that have one code for both.

    What is left there was added to large sums, so that it shows even in 16 bits how those were rounded. The two are in
    one group, but not of one tensor-core instruction.
    """
    large = jnp.asarray(8192, rows.dtype)
    return rows.at[:, 0].set(large).at[:, 17].set(-large)


def matmul_workload(op: str, x: Array, weights: Sequence[QuantizedWeight]) -> Workload:
    """One of ``names.MATMULS`` on rows ``x: [M, K]``."""
    num_operations = 2 * x.shape[0] * weights[0].num_inputs * weights[0].num_outputs
    if op in WEIGHT_ONLY:
        expected = jax.jit(lambda x, w: w4a16_matmul(x, w, implementation=REFERENCE))(x.astype(jnp.float32), weights[0])
        implement = lambda name: lambda x, w: weight_only_product(x, w, name)  # noqa: E731
        return Workload(x, weights, implement, expected, num_operations)
    codes = quantized_rows(op, x, weights[0].layout)
    expected = jax.jit(functools.partial(w4a4_matmul, dtype=jnp.float32, implementation=REFERENCE))(codes, weights[0])
    implement = lambda name: functools.partial(w4a4_matmul, dtype=x.dtype, implementation=name)  # noqa: E731
    return Workload(codes, weights, implement, expected, num_operations)


def weight_only_product(x: Array, weight: QuantizedWeight, name: str | None) -> Array:
    """``w4a16_matmul`` by the implementation of a name, or by pairs of Mosaic programs.

    Raises:
        NotImplementedError: it cannot serve this call, or does not run here.
    """
    if name != PAIRS:
        return w4a16_matmul(x, weight, implementation=name)
    mosaic = operations()["w4a16_matmul"].select(MOSAIC, lambda module: module.obstacle(x.dtype, weight))
    config = mosaic.pairs.default_config(x.shape[0], weight.num_outputs, weight.num_inputs)
    return value_of(mosaic.w4a16_matmul(x, weight, config=config))


def weights_for(op: str, weights: Sequence[QuantizedWeight]) -> Sequence[QuantizedWeight]:
    """The weights with the group sums that the operation's activations need, if they need any."""
    if op not in ("w4a8", "w4a4") or recipe(op)[1].symmetric:
        return weights
    add_sums = jax.jit(with_group_sums, static_argnums=1)
    return [add_sums(weight, recipe(op)[1].group_size or weight.num_inputs) for weight in weights]


def in_layout_for(name: str | None, weights: Sequence[QuantizedWeight]) -> Sequence[QuantizedWeight]:
    """The weights as the implementation of a name reads them beside bfloat16 rows."""
    layout = best_layout(weights[0], jnp.bfloat16, implementation=MOSAIC if name == PAIRS else name)
    if layout is weights[0].layout:
        return weights
    lay_out = jax.jit(with_layout, static_argnums=1)
    return [lay_out(weight, layout) for weight in weights]


def quantized_rows(op: str, x: Array, layout: Layout) -> QuantizedActivation:
    """Rows as the operation's draft precision quantises them, for weights in a layout."""
    bits, how = recipe(op)
    settings = {"bits": bits, "layout": layout, "implementation": REFERENCE, **dataclasses.asdict(how)}
    return jax.jit(functools.partial(quantize_activations, **settings))(x)


def recipe(op: str) -> tuple[int, ActivationQuantization]:
    """Bits, and the library's default recipe, of the activations that an operation multiplies or makes."""
    default = QuantConfig()
    return (4, default.w4a4) if op.endswith("a4") else (8, default.w4a8)


def float_weights(k: int, n: int) -> list[Array]:
    """Copies of a bfloat16 weight ``[N, K]`` that differ."""
    make = jax.jit(lambda key: (jax.random.normal(key, (n, k)) / math.sqrt(k)).astype(jnp.bfloat16))
    return [make(key) for key in jax.random.split(jax.random.key(2), num_copies(2 * n * k))]


def float_workload(x: Array, weights: Sequence[Array]) -> Workload:
    """``x @ w.T`` in bfloat16: through XLA, which is cuBLAS on an NVIDIA GPU, or by a kernel with invariant rows."""

    def product(x: Array, weight: Array, precision: lax.Precision | None = None) -> Array:
        return lax.dot_general(x, weight, (((1,), (1,)), ((), ())), precision=precision)

    def implement(name: str | None) -> Callable[[Any, Any], Any]:
        if name == XLA:
            return product
        return lambda x, weight: value_of(float_partial_sums(x, weight, dtype=x.dtype, implementation=name))

    wide = [array.astype(jnp.float32) for array in (x, weights[0])]
    expected = jax.jit(functools.partial(product, precision=lax.Precision.HIGHEST))(*wide)
    num_operations = 2 * x.shape[0] * weights[0].size
    return Workload(x, weights, implement, expected, num_operations)


@jax.jit
def _relative_error(out: Any, expected: Array) -> Array:
    wide = dequantize_activation(out) if isinstance(out, QuantizedActivation) else out.astype(jnp.float32)
    return jnp.linalg.norm(wide - expected) / jnp.linalg.norm(expected)
