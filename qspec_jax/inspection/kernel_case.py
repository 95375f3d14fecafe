"""What a case of the self-test is: one call of an operation of ``pallas_kernels``, and the widths that it has."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

import pallas_kernels
from pallas_kernels import Layout, PartialSums, QuantizedWeight, with_layout

ROWS = 5  # a verification of four drafts


@dataclasses.dataclass(frozen=True)
class Widths:
    """Of a model: hidden size, size of its MLP, and its heads.

    Attributes:
        weight: group size (None: whole rows) and symmetry of its 4-bit weights.
    """

    name: str
    hidden: int
    mlp: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    weight: tuple[int | None, bool]


DEMO = Widths("SmolLM2-135M", 576, 1536, 9, 3, 64, (32, False))
LLAMA_8B = Widths("Llama-3-8B", 4096, 14336, 32, 8, 128, (128, True))


@dataclasses.dataclass(frozen=True)
class KernelCase:
    """One call of an operation.

    Attributes:
        op: the operation's name, that of its folder.
        function: of ``pallas_kernels``.
        shape: for people.
        dtype: of its operands.
        num_inputs: that a result adds up.
        operands: makes them, on the default device.
        keywords: names of the last operands, which are given by name.
        options: of the call.
        measure: of the error: ``relative``, the share of ``codes`` that differ, or that of whole ``numbers``.
        wide: whether the reference gets float32 operands.
        expected: what is expected instead of the reference's own result on the same operands.
    """

    op: str
    function: str
    shape: str
    dtype: str
    num_inputs: int
    operands: Callable[[], tuple[Any, ...]]
    keywords: tuple[str, ...] = ()
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    measure: Literal["relative", "codes", "numbers"] = "relative"
    wide: bool = False
    expected: Callable[[tuple[Any, ...]], Any] | None = None

    def call(self, operands: tuple[Any, ...], implementation: str) -> Any:
        """The result of an implementation.

        Raises:
            NotImplementedError: it cannot serve the call.
        """
        first = len(operands) - len(self.keywords)
        named = dict(zip(self.keywords, operands[first:], strict=True))
        function = getattr(pallas_kernels, self.function)
        return function(*operands[:first], **named, **self.options, implementation=implementation)

    def laid_out(self, operands: tuple[Any, ...], implementation: str) -> tuple[Any, ...]:
        """The operands with weights, and codes for them, in the order that the implementation reads."""
        weights = [one for one in operands if isinstance(one, QuantizedWeight)]
        if not weights:
            return operands
        best = functools.partial(pallas_kernels.best_layout, implementation=implementation)
        layout = best(weights[0], jnp.dtype("bfloat16" if self.op == "w4a4_matmul" else self.dtype))
        return tuple(_in_layout(one, layout) for one in operands)


def _in_layout(operand: Any, layout: Layout) -> Any:
    return with_layout(operand, layout) if isinstance(operand, QuantizedWeight) else operand


def random_rows(*shape: int, dtype: str, seed: int = 1) -> jax.Array:
    """Normal values with a mean, so that zero points matter."""
    values = np.random.default_rng(seed).standard_normal(shape, np.float32) + np.float32(0.25)
    return jnp.asarray(values, jnp.dtype(dtype))


def partial_sums(*shape: int, dtype: str, seed: int = 1) -> PartialSums:
    """Such values as a matmul leaves them to its reader: in three parts."""
    return PartialSums(random_rows(3, *shape, dtype="float32", seed=seed), jnp.dtype(dtype))
