"""``swiglu`` as a Pallas Triton kernel for NVIDIA GPUs (compute capability 8.0 and newer).

A program computes a piece of one token, so that a single token keeps many programs busy. ``silu(gate) * up`` is float32
until it is rounded to the dtype of the inputs.

:func:`load_gated` and :func:`gated` are what the operations share that go on with the product.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from pallas_kernels.arrays.partial_sums import PartialSums, tree_sum
from pallas_kernels.backends import gating
from pallas_kernels.backends.triton import producers, registers


def obstacle() -> None:
    """Why this kernel cannot serve a call: it serves all that the public function takes."""


def swiglu(gate_up: Float[Array, "*batch two_K"] | PartialSums, *, interpret: bool = False) -> Float[Array, "*batch K"]:
    """See the public function."""
    registers.ignore_triton_deprecation()
    return _gate(gate_up, interpret=interpret)


@functools.partial(jax.jit, static_argnames="interpret")
def _gate(gate_up: Array | PartialSums, *, interpret: bool) -> Array:
    halves = halves_of(gate_up)
    num_tokens, num_inputs = halves.shape[1], halves.shape[3]
    product = pl.pallas_call(
        functools.partial(_kernel, num_inputs=num_inputs, interpret=interpret),
        grid=(num_tokens, pl.cdiv(num_inputs, producers.PIECE)),
        in_specs=half_specs(len(halves)),
        out_specs=pl.BlockSpec((None, 1, producers.PIECE), lambda row, part: (row, 0, part)),
        out_shape=jax.ShapeDtypeStruct((num_tokens, 1, num_inputs), gate_up.dtype),
        compiler_params=plgpu.CompilerParams(num_warps=producers.PIECE_WARPS, num_stages=1),
        interpret=interpret,
        name="swiglu",
    )(*[halves] * 2 * len(halves))
    return product.reshape(*gate_up.shape[:-1], num_inputs)


def halves_of(gate_up: Array | PartialSums) -> Array:
    """``[P, tokens, 2, K]``: an array is one part."""
    parts = gate_up.parts if isinstance(gate_up, PartialSums) else gate_up[None]
    return parts.reshape(len(parts), -1, 2, gate_up.shape[-1] // 2)


def half_specs(num_parts: int) -> list[pl.BlockSpec]:
    """The pieces of each part of gate, then of up: one array read several times, since slices of it are copies."""

    def spec(half: int, index: int) -> pl.BlockSpec:
        return pl.BlockSpec((None, None, 1, producers.PIECE), lambda row, part: (index, row, half, part))

    return [spec(half, index) for half in range(2) for index in range(num_parts)]


def _kernel(
    *refs,  # each part of gate, each of up, product: [1, piece]
    num_inputs: int,
    interpret: bool,
):
    *inputs, product_ref = refs
    exists = producers.exists_in_piece(product_ref.shape, num_inputs, interpret=interpret)
    product = load_gated(*inputs, exists, dtype=product_ref.dtype, interpret=interpret)
    plgpu.store(product_ref, product.astype(product_ref.dtype), mask=exists)


def load_gated(*refs_and_exists: Any, dtype: DTypeLike, interpret: bool) -> Array:
    """``silu(gate) * up`` of two blocks as :func:`gated` rounds it, with a correctly rounded reciprocal.

    Args:
        refs_and_exists: refs to the parts of gate, as many to those of up, and which values there are: others are zero.
        dtype: that gate, up and the product are rounded to.
    """
    *refs, exists = refs_and_exists
    parts = [plgpu.load(ref, mask=exists, other=jnp.zeros((), ref.dtype)).astype(jnp.float32) for ref in refs]
    half = len(parts) // 2
    gate, up = parts if half == 1 else (_rounded_sum(some, dtype, interpret) for some in (parts[:half], parts[half:]))
    return gated(gate, up, dtype=dtype, instructions=gating.GATED, interpret=interpret)


def _rounded_sum(parts: list[Array], dtype: DTypeLike, interpret: bool) -> Array:
    return producers.rounded_to(tree_sum(parts), dtype, interpret=interpret)


def gated(
    gate: Array, up: Array, *, dtype: DTypeLike, instructions: str = gating.GATED_ROUGHLY, interpret: bool
) -> Array:
    """``silu(gate) * up`` of float32 blocks, rounded to ``dtype``, in float32.

    Args:
        gate, up: the blocks.
        dtype: of the result.
        instructions: one of :mod:`pallas_kernels.backends.gating`.
    """
    if interpret:
        product = gate * (1 / (1 + jnp.exp(-gate))) * up
    else:
        product = registers.inline_asm(instructions, gate, up, constraints=gating.CONSTRAINTS, dtype=jnp.float32)
    return producers.rounded_to(product, dtype, interpret=interpret)
