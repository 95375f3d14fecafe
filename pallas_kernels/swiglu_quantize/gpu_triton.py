"""``swiglu_quantize`` as a Pallas Triton kernel for NVIDIA GPUs (compute capability 8.0 and newer).

A program computes the groups of one token that its block holds, all of them where outlier groups are sought, and
quantises them from registers. ``silu(gate) * up`` is float32 until it is rounded to the dtype of the inputs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from pallas_kernels import gpu_triton as tiles
from pallas_kernels.activations import QuantizedActivation
from pallas_kernels.quantize_activations import gpu_triton as quantizer

_STATIC = ("bits", "group_size", "symmetric", "clip_ratio", "outlier_groups", "layout", "interpret")

# Of a number from 1 to infinity, to a unit in the last place; correct rounding takes ten times the instructions.
_RECIPROCAL = "rcp.approx.ftz.f32 $0, $1;"

obstacle = quantizer.obstacle  # the blocks are those of quantize_activations


def swiglu_quantize(
    gate_up: Float[Array, "*batch two_K"], *, interpret: bool = False, **settings: Any
) -> QuantizedActivation:
    """See the public function."""
    tiles.ignore_triton_deprecation()
    return _gate_and_quantize(gate_up, interpret=interpret, **settings)


@functools.partial(jax.jit, static_argnames=_STATIC)
def _gate_and_quantize(gate_up: Array, *, group_size: int, interpret: bool, **settings: Any) -> QuantizedActivation:
    *batch, both = gate_up.shape
    halves = gate_up.reshape(-1, 2, both // 2 // group_size, group_size)

    def half(index: int):
        # One array read twice: a slice of it would be a copy.
        return halves, lambda *block: pl.BlockSpec((None, None, *block), lambda row, part: (row, index, part, 0))

    product, _ = quantizer.launch_producer(
        functools.partial(_gated, interpret=interpret),
        [half(0), half(1)],
        shape=(*batch, both // 2),
        group_size=group_size,
        block_values=quantizer.BLOCK_VALUES,
        interpret=interpret,
        name="swiglu_quantize",
        **settings,
    )
    return product


def _gated(
    gate_ref,  # [block_groups, block_group]
    up_ref,  # [block_groups, block_group]
    exists: Array,
    *,
    interpret: bool,
) -> Array:
    gate, up = (
        plgpu.load(ref, mask=exists, other=jnp.zeros((), ref.dtype)).astype(jnp.float32) for ref in (gate_ref, up_ref)
    )
    return gated(gate, up, dtype=gate_ref.dtype, reciprocal=quantizer.reciprocal, interpret=interpret)


def approximate_reciprocal(x: Array, *, interpret: bool) -> Array:
    """``1 / x`` in float32, for kernels that are short of registers."""
    return 1 / x if interpret else tiles.inline_asm(_RECIPROCAL, x, constraints="=f,f", dtype=jnp.float32)


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
    return quantizer.rounded_to(gate * sigmoid * up, dtype, interpret=interpret)
