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

from pallas_kernels import gpu_triton as tiles
from pallas_kernels.activations import QuantizedActivation
from pallas_kernels.packing import Layout
from pallas_kernels.quantize_activations import gpu_triton as quantizer
from pallas_kernels.swiglu import gpu_triton as gating

# Where the two are used. Compared with one program on an H100 with 14,336 values and one token (docs/performance.md).
_LONG_TOKEN, _FEW_TOKENS = 4096, 64
_STATIC = ("bits", "group_size", "symmetric", "clip_ratio", "outlier_groups", "layout", "interpret")

obstacle = quantizer.obstacle  # the blocks are those of quantize_activations


def swiglu_quantize(
    gate_up: Float[Array, "*batch two_K"], *, interpret: bool = False, **settings: Any
) -> QuantizedActivation:
    """See the public function."""
    tiles.ignore_triton_deprecation()
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
    *batch, _ = gate_up.shape
    halves = gate_up.reshape(-1, 2, group_size)
    num_tokens, num_pieces = halves.shape[0], pl.cdiv(group_size, gating.PIECE)
    options: dict[str, Any] = {
        "grid": (num_tokens, num_pieces),
        "compiler_params": plgpu.CompilerParams(num_warps=gating.NUM_WARPS, num_stages=1),
        "interpret": interpret,
    }
    piece_spec = pl.BlockSpec((None, 1, gating.PIECE), lambda row, part: (row, 0, part))
    product, magnitudes = pl.pallas_call(
        functools.partial(_gate_piece, num_inputs=group_size, interpret=interpret),
        in_specs=gating.half_specs(),
        out_specs=[piece_spec, pl.BlockSpec((None, 1), lambda row, part: (row, part))],
        out_shape=[
            jax.ShapeDtypeStruct((num_tokens, 1, group_size), gate_up.dtype),
            jax.ShapeDtypeStruct((num_tokens, num_pieces), jnp.float32),
        ],
        name="swiglu_magnitude",
        **options,
    )(halves, halves)
    codes, scale = pl.pallas_call(
        functools.partial(
            _quantize_piece, layout=layout, settings=settings, num_inputs=group_size, interpret=interpret
        ),
        in_specs=[piece_spec, pl.BlockSpec((None, pl.next_power_of_2(num_pieces)), lambda row, part: (row, 0))],
        out_specs=[piece_spec, pl.BlockSpec((None, 1), lambda row, part: (row, 0))],
        out_shape=[
            jax.ShapeDtypeStruct(product.shape, jnp.int8),
            jax.ShapeDtypeStruct((num_tokens, 1), jnp.float32),
        ],
        name="quantize_pieces",
        **options,
    )(product, magnitudes)
    codes, scale = codes.reshape(*batch, group_size), scale.reshape(*batch, 1)
    return QuantizedActivation(codes, scale, None, settings["bits"], layout)


def _gate_piece(
    gate_ref,  # [1, piece]
    up_ref,  # [1, piece]
    product_ref,  # [1, piece]
    magnitude_ref,  # [1] f32
    *,
    num_inputs: int,
    interpret: bool,
):
    exists = gating.exists_in_piece(gate_ref.shape, num_inputs, interpret=interpret)
    product = gating.load_gated(gate_ref, up_ref, exists, interpret=interpret)
    plgpu.store(product_ref, product.astype(product_ref.dtype), mask=exists)
    magnitude_ref[:] = jnp.max(jnp.abs(product), axis=1)


def _quantize_piece(
    product_ref,  # [1, piece]
    magnitudes_ref,  # [pieces of a token] f32
    codes_ref,  # [1, piece] int8
    scale_ref,  # [1] f32
    *,
    layout: Layout,
    settings: dict[str, Any],
    num_inputs: int,
    interpret: bool,
):
    of_token = jax.lax.broadcasted_iota(jnp.int32, magnitudes_ref.shape, 0) * gating.PIECE < num_inputs
    magnitude = jnp.max(plgpu.load(magnitudes_ref, mask=of_token, other=jnp.float32(0)))
    exists = gating.exists_in_piece(product_ref.shape, num_inputs, interpret=interpret)
    product = plgpu.load(product_ref, mask=exists, other=jnp.zeros((), product_ref.dtype)).astype(jnp.float32)
    quantizer.store_quantized(
        product,
        exists,
        jnp.full((1,), pl.program_id(1) == 0),  # the token's first piece stores its scale
        (codes_ref, scale_ref),
        layout=layout,
        settings=settings | {"magnitude": jnp.full((1,), magnitude)},
        interpret=interpret,
    )


@functools.partial(jax.jit, static_argnames=_STATIC)
def _gate_and_quantize(gate_up: Array, *, group_size: int, interpret: bool, **settings: Any) -> QuantizedActivation:
    *batch, both = gate_up.shape
    halves = gate_up.reshape(-1, 2, both // 2 // group_size, group_size)

    def half(index: int):
        # One array read twice: a slice of it would be a copy.
        return halves, lambda *block: pl.BlockSpec((None, None, *block), lambda row, part: (row, index, part, 0))

    product, _ = quantizer.launch_producer(
        functools.partial(gating.load_gated, interpret=interpret),
        [half(0), half(1)],
        shape=(*batch, both // 2),
        group_size=group_size,
        block_values=quantizer.BLOCK_VALUES,
        interpret=interpret,
        name="swiglu_quantize",
        **settings,
    )
    return product
