"""The ceilings of a device, measured, and the plot of results under them (Williams et al., 2009)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from qspec_jax.bench.timing import compile_calls, time_calls

if TYPE_CHECKING:
    pass

_INTEGER_OPS = ("w4a8", "w4a4")


@dataclasses.dataclass(frozen=True)
class Ceilings:
    """What the device reaches in the same run: a copy of a large array, and large matmuls through XLA.

    Attributes:
        copy_tb_per_s: bytes read and written.
        bf16_top_per_s, int8_top_per_s: multiplications and additions.
    """

    copy_tb_per_s: float
    bf16_top_per_s: float
    int8_top_per_s: float

    def top_per_s(self, op: str) -> float:
        """The matmul rate of the arithmetic that an operation runs in."""
        return self.int8_top_per_s if op in _INTEGER_OPS else self.bf16_top_per_s


def measure_ceilings(*, repeats: int) -> Ceilings:
    """Copies an array, and multiplies two that are large on a GPU and small elsewhere."""
    side = 8192 if jax.default_backend() == "gpu" else 512
    keys = jax.random.split(jax.random.key(0))
    # Random bits: a GPU multiplies tame numbers faster, since they take less power.
    floats = [jax.random.normal(key, (side, side)).astype(jnp.bfloat16) for key in keys]
    integers = [jax.random.randint(key, (side, side), -128, 128, jnp.int8) for key in keys]
    return Ceilings(
        copy_tb_per_s=measure_copy(repeats=repeats),
        bf16_top_per_s=_matmul_top_per_s(floats, jnp.bfloat16, repeats),
        int8_top_per_s=_matmul_top_per_s(integers, jnp.int32, repeats),
    )


def measure_copy(*, repeats: int) -> float:
    """TB/s read and written by a copy of an array far beyond the caches on a GPU, and a small one elsewhere."""
    num_bytes = 2**30 if jax.default_backend() == "gpu" else 2**26
    arrays = [jnp.full((num_bytes // 4,), value, jnp.int32) for value in (1, 2)]
    # Inverts the bits, since a bare copy may become one of the driver's, which is no kernel.
    return 2 * num_bytes / _us(lambda _, a: ~a, None, arrays, repeats) * 1e-6


def _matmul_top_per_s(operands: list[jax.Array], out_dtype: DTypeLike, repeats: int) -> float:
    rows, weight = operands

    def product(x: jax.Array, w: jax.Array) -> jax.Array:
        return lax.dot_general(x, w, (((1,), (1,)), ((), ())), preferred_element_type=out_dtype)

    return 2 * len(rows) ** 3 / _us(product, rows, [weight], repeats) * 1e-6


def _us(function: Callable[[Any, Any], Any], shared: Any, copies: list[Any], repeats: int) -> float:
    return time_calls(compile_calls(function, shared, copies), shared, copies, repeats=repeats).microseconds
