"""``swiglu`` as a Pallas Triton kernel for NVIDIA GPUs (compute capability 8.0 and newer).

A program computes a piece of one token, so that a single token keeps many programs busy. ``silu(gate) * up`` is float32
until it is rounded to the dtype of the inputs.

:func:`load_gated` and :func:`gated` are what the operations share that go on with the product.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from pallas_kernels.backends.triton import producers, registers

# Of a number from 1 to infinity, to a unit in the last place; correct rounding takes ten times the instructions.
_RECIPROCAL = "rcp.approx.ftz.f32 $0, $1;"


def obstacle() -> None:
    """Why this kernel cannot serve a call: it serves all that the public function takes."""


def swiglu(gate_up: Float[Array, "*batch two_K"], *, interpret: bool = False) -> Float[Array, "*batch K"]:
    """See the public function."""
    registers.ignore_triton_deprecation()
    return _gate(gate_up, interpret=interpret)


@functools.partial(jax.jit, static_argnames="interpret")
def _gate(gate_up: Array, *, interpret: bool) -> Array:
    *batch, both = gate_up.shape
    halves = gate_up.reshape(-1, 2, both // 2)
    num_tokens, _, num_inputs = halves.shape
    product = pl.pallas_call(
        functools.partial(_kernel, num_inputs=num_inputs, interpret=interpret),
        grid=(num_tokens, pl.cdiv(num_inputs, producers.PIECE)),
        in_specs=half_specs(),
        out_specs=pl.BlockSpec((None, 1, producers.PIECE), lambda row, part: (row, 0, part)),
        out_shape=jax.ShapeDtypeStruct((num_tokens, 1, num_inputs), gate_up.dtype),
        compiler_params=plgpu.CompilerParams(num_warps=producers.PIECE_WARPS, num_stages=1),
        interpret=interpret,
        name="swiglu",
    )(halves, halves)
    return product.reshape(*batch, num_inputs)


def half_specs() -> list[pl.BlockSpec]:
    """The pieces of gate and up in ``[tokens, 2, K]``: one array read twice, since a slice of it is a copy."""
    block = None, 1, producers.PIECE
    return [pl.BlockSpec(block, lambda row, part, half=half: (row, half, part)) for half in range(2)]


def _kernel(
    gate_ref,  # [1, piece]
    up_ref,  # [1, piece]
    product_ref,  # [1, piece]
    *,
    num_inputs: int,
    interpret: bool,
):
    exists = producers.exists_in_piece(gate_ref.shape, num_inputs, interpret=interpret)
    product = load_gated(gate_ref, up_ref, exists, interpret=interpret)
    plgpu.store(product_ref, product.astype(product_ref.dtype), mask=exists)


def load_gated(gate_ref: registers.Ref, up_ref: registers.Ref, exists: Array, *, interpret: bool) -> Array:
    """``silu(gate) * up`` of two blocks as :func:`gated` rounds it, with a correctly rounded reciprocal.

    Zero where not ``exists``.
    """
    gate, up = (
        plgpu.load(ref, mask=exists, other=jnp.zeros((), ref.dtype)).astype(jnp.float32) for ref in (gate_ref, up_ref)
    )
    return gated(gate, up, dtype=gate_ref.dtype, reciprocal=producers.reciprocal, interpret=interpret)


def approximate_reciprocal(x: Array, *, interpret: bool) -> Array:
    """``1 / x`` in float32, for kernels that are short of registers."""
    return 1 / x if interpret else registers.inline_asm(_RECIPROCAL, x, constraints="=f,f", dtype=jnp.float32)


def gated(
    gate: Array,
    up: Array,
    *,
    dtype: DTypeLike,
    reciprocal: Callable[..., Array] = approximate_reciprocal,
    interpret: bool,
) -> Array:
    """``silu(gate) * up`` of float32 blocks, rounded to ``dtype``, in float32."""
    sigmoid = reciprocal(1 + jnp.exp(-gate), interpret=interpret)
    return producers.rounded_to(gate * sigmoid * up, dtype, interpret=interpret)
