"""``swiglu_quantize`` as a Pallas Triton kernel for NVIDIA GPUs (compute capability 8.0 and newer).

A program computes the groups of one token that its block holds, all of them where outlier groups are sought, and
quantises them from registers. ``silu(gate) * up`` is float32 until it is rounded to the dtype of the inputs.

A long token with one scale would so keep a single program busy. While there are few of them, two kernels take pieces of
tokens instead: the first finds the largest magnitude of each, the second quantises. The codes are the same.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float

from pallas_kernels.arrays.activation import QuantizedActivation
from pallas_kernels.arrays.weight import Layout
from pallas_kernels.backends.triton import producers, registers
from pallas_kernels.quantize_activations import gpu_triton
from pallas_kernels.swiglu import gpu_triton as gating

# Where the two are used. Compared with one program on an H100 with 14,336 values and one token (docs/lab-notebook/012).
_LONG_TOKEN, _FEW_TOKENS = 4096, 64
_STATIC = ("bits", "group_size", "symmetric", "clip_ratio", "outlier_groups", "layout", "interpret")

obstacle = gpu_triton.obstacle  # the blocks are those of quantize_activations


def swiglu_quantize(
    gate_up: Float[Array, "*batch two_K"], *, interpret: bool = False, **settings: Any
) -> QuantizedActivation:
    """See the public function."""
    registers.ignore_triton_deprecation()
    num_inputs = gate_up.shape[-1] // 2
    num_tokens = gate_up.size // gate_up.shape[-1]
    one_scale = settings["symmetric"] and settings["group_size"] == num_inputs
    if one_scale and num_inputs >= _LONG_TOKEN and num_tokens <= _FEW_TOKENS:
        return _gate_then_quantize(gate_up, interpret=interpret, **settings)
    return _gate_and_quantize(gate_up, interpret=interpret, **settings)


@functools.partial(jax.jit, static_argnames=_STATIC)
def _gate_then_quantize(
    gate_up: Array, *, group_size: int, layout: Layout = Layout.PLANES, interpret: bool, **settings: Any
) -> QuantizedActivation:
    halves = gate_up.reshape(-1, 2, group_size)
    num_tokens, num_pieces = halves.shape[0], pl.cdiv(group_size, producers.PIECE)
    product, magnitudes = pl.pallas_call(
        functools.partial(_gate_piece, num_inputs=group_size, interpret=interpret),
        grid=(num_tokens, num_pieces),
        in_specs=gating.half_specs(),
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
    )(halves, halves)
    product = product.reshape(*gate_up.shape[:-1], group_size)
    return producers.quantize_pieces(product, magnitudes, layout=layout, interpret=interpret, **settings)


def _gate_piece(
    gate_ref,  # [1, piece]
    up_ref,  # [1, piece]
    product_ref,  # [1, piece]
    magnitude_ref,  # [1] f32
    *,
    num_inputs: int,
    interpret: bool,
):
    exists = producers.exists_in_piece(gate_ref.shape, num_inputs, interpret=interpret)
    product = gating.load_gated(gate_ref, up_ref, exists, interpret=interpret)
    plgpu.store(product_ref, product.astype(product_ref.dtype), mask=exists)
    magnitude_ref[:] = jnp.max(jnp.abs(product), axis=1)


@functools.partial(jax.jit, static_argnames=_STATIC)
def _gate_and_quantize(gate_up: Array, *, group_size: int, interpret: bool, **settings: Any) -> QuantizedActivation:
    *batch, both = gate_up.shape
    halves = gate_up.reshape(-1, 2, both // 2 // group_size, group_size)

    def half(index: int):
        # One array read twice: a slice of it would be a copy.
        return halves, lambda *block: pl.BlockSpec((None, None, *block), lambda row, part: (row, index, part, 0))

    product, _ = producers.launch_producer(
        functools.partial(gating.load_gated, interpret=interpret),
        [half(0), half(1)],
        shape=(*batch, both // 2),
        group_size=group_size,
        block_values=producers.BLOCK_VALUES,
        interpret=interpret,
        name="swiglu_quantize",
        **settings,
    )
    return product
