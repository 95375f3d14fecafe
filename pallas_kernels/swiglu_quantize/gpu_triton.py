"""``swiglu_quantize`` as a Pallas Triton kernel for NVIDIA GPUs (compute capability 8.0 and newer).

A program computes the groups of one token that its block holds, all of them where outlier groups are sought, and
quantises them from registers. ``silu(gate) * up`` is float32 until it is rounded to the dtype of the inputs.

A long token with one scale would so keep a single program busy. While there are few of them, two kernels take pieces of
tokens instead: the first finds the largest magnitude of each, the second quantises. The codes are the same.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float

from pallas_kernels.arrays.activation import QuantizedActivation
from pallas_kernels.arrays.partial_sums import PartialSums
from pallas_kernels.arrays.weight import Layout
from pallas_kernels.backends.triton import producers, registers
from pallas_kernels.quantize_activations import gpu_triton
from pallas_kernels.swiglu import gpu_triton as gating

# Where the two are used. Compared with one program on an H100 with 14,336 values and one token (docs/lab-notebook/012).
_LONG_TOKEN, _FEW_TOKENS = 4096, 64
_STATIC = ("bits", "group_size", "symmetric", "clip_ratio", "outlier_groups", "layout", "interpret")

obstacle = gpu_triton.obstacle  # the blocks are those of quantize_activations


def swiglu_quantize(
    gate_up: Float[Array, "*batch two_K"] | PartialSums, *, interpret: bool = False, **settings: Any
) -> QuantizedActivation:
    """See the public function."""
    registers.ignore_triton_deprecation()
    num_inputs = gate_up.shape[-1] // 2
    num_tokens = math.prod(gate_up.shape[:-1])
    one_scale = settings["symmetric"] and settings["group_size"] == num_inputs
    if one_scale and num_inputs >= _LONG_TOKEN and num_tokens <= _FEW_TOKENS:
        return _gate_then_quantize(gate_up, interpret=interpret, **settings)
    return _gate_and_quantize(gate_up, interpret=interpret, **settings)


@functools.partial(jax.jit, static_argnames=_STATIC)
def _gate_then_quantize(
    gate_up: Array | PartialSums,
    *,
    group_size: int,
    layout: Layout = Layout.PLANES,
    interpret: bool,
    **settings: Any,
) -> QuantizedActivation:
    halves = gating.halves_of(gate_up)
    num_tokens, num_pieces = halves.shape[1], pl.cdiv(group_size, producers.PIECE)
    product, magnitudes = pl.pallas_call(
        functools.partial(_gate_piece, num_inputs=group_size, interpret=interpret),
        grid=(num_tokens, num_pieces),
        in_specs=gating.half_specs(len(halves)),
        out_specs=[
            pl.BlockSpec((None, 1, producers.PIECE), lambda row, part: (row, 0, part)),
            pl.BlockSpec((None, 1), lambda row, part: (row, part)),
        ],
        out_shape=[
            jax.ShapeDtypeStruct((num_tokens, 1, group_size), gate_up.dtype),
            jax.ShapeDtypeStruct((num_tokens, num_pieces), jnp.float32),
        ],
        compiler_params=plgpu.CompilerParams(num_warps=producers.PIECE_WARPS, num_stages=1),
        interpret=interpret,
        name="swiglu_magnitude",
    )(*[halves] * 2 * len(halves))
    product = product.reshape(*gate_up.shape[:-1], group_size)
    return producers.quantize_pieces(product, magnitudes, layout=layout, interpret=interpret, **settings)


def _gate_piece(
    *refs,  # each part of gate, each of up, product: [1, piece]; magnitude [1] f32
    num_inputs: int,
    interpret: bool,
):
    *inputs, product_ref, magnitude_ref = refs
    exists = producers.exists_in_piece(product_ref.shape, num_inputs, interpret=interpret)
    product = gating.load_gated(*inputs, exists, dtype=product_ref.dtype, interpret=interpret)
    plgpu.store(product_ref, product.astype(product_ref.dtype), mask=exists)
    magnitude_ref[:] = jnp.max(jnp.abs(product), axis=1)


@functools.partial(jax.jit, static_argnames=_STATIC)
def _gate_and_quantize(
    gate_up: Array | PartialSums, *, group_size: int, interpret: bool, **settings: Any
) -> QuantizedActivation:
    halves = gating.halves_of(gate_up)
    num_parts, num_tokens, _, num_inputs = halves.shape
    halves = halves.reshape(num_parts, num_tokens, 2, num_inputs // group_size, group_size)

    def half(half: int, index: int):
        # One array read several times: slices of it would be copies.
        return halves, lambda *block: pl.BlockSpec(
            (None, None, None, *block), lambda row, part: (index, row, half, part, 0)
        )

    product, _ = producers.launch_producer(
        functools.partial(gating.load_gated, dtype=gate_up.dtype, interpret=interpret),
        [half(place, index) for place in range(2) for index in range(num_parts)],
        shape=(*gate_up.shape[:-1], num_inputs),
        group_size=group_size,
        block_values=producers.BLOCK_VALUES,
        interpret=interpret,
        name="swiglu_quantize",
        **settings,
    )
    return product
