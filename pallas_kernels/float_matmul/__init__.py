"""The matmul with a weight in floating point: the LM head, and linears that verify at a checkpoint's own floats."""

from __future__ import annotations

import math

import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32

from pallas_kernels.arrays.arguments import checked
from pallas_kernels.arrays.partial_sums import PartialSums, value_of
from pallas_kernels.dispatch import TPU, TRITON, Implementations

_OP = "float_matmul"
# A file has float_matmul, which may leave PartialSums, and obstacle(num_rows, dtype), of any number of rows with None.
# With PREFILL_ALIKE it takes ``prefill``, and any rows of such calls are alike.
_IMPLEMENTATIONS = Implementations(__name__, {TRITON: "gpu_triton", TPU: "tpu"})
_DTYPES = (jnp.float32, jnp.bfloat16, jnp.float16)


@checked
def float_matmul(
    x: Float[Array, "*batch K"], weight: Float[Array, "N K"], *, implementation: str | None = None
) -> Float32[Array, "*batch N"]:
    """``x @ weight.T``, accumulated in float32 and not rounded afterwards.

    The Triton kernel serves up to 256 rows of 16 bits and gives a row the same bits whatever rows are beside it.
    The reference is left to XLA, whose library chooses another order of the sum for another number of rows.

    Args:
        x: ``[..., K]`` float32, bfloat16 or float16.
        weight: ``[N, K]`` in the dtype of ``x``.
        implementation: a name of ``IMPLEMENTATIONS``, or None for the best that works.

    Returns:
        ``[..., N]`` float32.

    Raises:
        ValueError: shapes or dtypes do not fit together, the dtype is not one of the three, or the name of the
            implementation is unknown.
        NotImplementedError: the named implementation cannot serve this call.
    """
    return value_of(float_partial_sums(x, weight, dtype=jnp.float32, implementation=implementation))


@checked
def float_partial_sums(
    x: Float[Array, "*batch K"],
    weight: Float[Array, "N K"],
    *,
    dtype: DTypeLike,
    prefill: bool = False,
    implementation: str | None = None,
) -> Float[Array, "*batch N"] | PartialSums:
    """:func:`float_matmul`, rounded to ``dtype``, for a reader that adds what is left to add, if anything is.

    ``prefill`` says that the rows are those of prompts. Where an implementation has tiles for any number of them
    (:func:`float_prefill_is_alike`), it takes those.
    """
    num_inputs = x.shape[-1]
    if weight.shape[1] != num_inputs or weight.dtype != x.dtype:
        raise ValueError(
            f"{_OP}: weight is {weight.dtype} {weight.shape}; use {x.dtype} [N, {num_inputs}], as x is "
            f"{x.dtype} {x.shape}"
        )
    if x.dtype not in _DTYPES:
        raise ValueError(f"{_OP}: x is {x.dtype}; use float32, bfloat16 or float16")
    num_rows = math.prod(x.shape[:-1])
    chosen = _IMPLEMENTATIONS.select(
        implementation,
        lambda module: module.obstacle(None if prefill and module.PREFILL_ALIKE else num_rows, x.dtype),
    )
    asked = {"prefill": True} if prefill and chosen.PREFILL_ALIKE else {}
    return chosen.float_matmul(x, weight, dtype=dtype, **asked)


def float_prefill_is_alike(dtype: DTypeLike, *, implementation: str | None = None) -> bool:
    """Whether rows of a dtype have the same bits in any call with ``prefill``, whatever the others are.

    Raises:
        ValueError: the name of the implementation is unknown.
    """
    chosen = _IMPLEMENTATIONS.serves(implementation, lambda module: module.obstacle(1, jnp.dtype(dtype)))
    return chosen is not None and chosen.PREFILL_ALIKE
