"""Pallas Triton kernels that quantise activations on their way to memory.

:func:`launch_producer` is for the operations that quantise what they have just computed, :func:`quantize_pieces` for
those that know the largest magnitude of a token. The reciprocal of the scale and the rounding are spelled in PTX
because Triton divides approximately and Pallas cannot lower ``round``; so the codes equal those of the reference.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from pallas_kernels.arrays import rounding
from pallas_kernels.arrays.activation import QuantizedActivation
from pallas_kernels.arrays.weight import WGMMA_CODES, Layout
from pallas_kernels.backends.triton import registers

MAX_VALUES = 65536  # that one program can hold in registers
BLOCK_VALUES = 1024  # values per program where groups are short
PIECE = 1024  # values of a token in a program that takes a piece of one
PIECE_WARPS = 4  # of it

_RECIPROCAL = "rcp.rn.f32 $0, $1;"
_ROUND_HALF_TO_EVEN = "cvt.rni.f32.f32 $0, $1;"


def store_quantized(
    x: Array,  # [..., block_groups, block_group] f32
    exists: Array,
    group_exists: Array,
    refs: Sequence[registers.Ref],  # codes, scale, and offset of an asymmetric activation
    *,
    layout: Layout,
    settings: dict[str, Any],
    interpret: bool,
) -> None:
    """Quantises the groups of a block, or pieces of groups with ``magnitude`` among the settings, and stores them."""
    codes, *per_group = rounding.quantize_groups(
        x,
        **settings,
        reciprocal=functools.partial(reciprocal, interpret=interpret),
        rounding=functools.partial(round_half_to_even, interpret=interpret),
        exists=exists | ~group_exists[..., None],
    )
    codes_ref, *per_group_refs = refs
    plgpu.store(_in_order(codes_ref, layout), codes, mask=exists)
    for ref, array in zip(per_group_refs, per_group, strict=True):
        plgpu.store(ref, array, mask=group_exists)


def _in_order(codes_ref: registers.Ref, layout: Layout) -> registers.Ref:
    """The places of a block's codes: those of ``order_activation_codes`` in ``arrays/weight.py``."""
    if layout is Layout.PLANES:
        return codes_ref
    *outer, value = (jax.lax.broadcasted_iota(jnp.int32, codes_ref.shape, axis) for axis in range(codes_ref.ndim))
    half = WGMMA_CODES // 2
    place = value // WGMMA_CODES * WGMMA_CODES + value % half * 2 + value // half % 2
    return codes_ref.at[(*outer, place)]


def quantize_pieces(
    x: Float[Array, "*batch K"], magnitudes: Array, *, layout: Layout, interpret: bool, **settings: Any
) -> QuantizedActivation:
    """Quantises tokens with one symmetric scale each, by as many programs for a token as it has pieces.

    Args:
        x: tokens.
        magnitudes: ``[tokens, parts]`` float32, the largest magnitude of each part of a token, whatever the parts.
        layout: the order of the codes.
        settings: ``bits``, ``symmetric=True``, ``clip_ratio`` and ``outlier_groups``.
    """
    *batch, num_inputs = x.shape
    num_tokens, num_parts = magnitudes.shape
    piece_spec = pl.BlockSpec((None, 1, PIECE), lambda row, part: (row, 0, part))
    codes, scale = pl.pallas_call(
        functools.partial(
            _quantize_piece,
            num_inputs=num_inputs,
            num_parts=num_parts,
            layout=layout,
            settings=settings,
            interpret=interpret,
        ),
        grid=(num_tokens, pl.cdiv(num_inputs, PIECE)),
        in_specs=[piece_spec, pl.BlockSpec((None, pl.next_power_of_2(num_parts)), lambda row, part: (row, 0))],
        out_specs=[piece_spec, pl.BlockSpec((None, 1), lambda row, part: (row, 0))],
        out_shape=[
            jax.ShapeDtypeStruct((num_tokens, 1, num_inputs), jnp.int8),
            jax.ShapeDtypeStruct((num_tokens, 1), jnp.float32),
        ],
        compiler_params=plgpu.CompilerParams(num_warps=PIECE_WARPS, num_stages=1),
        interpret=interpret,
        name="quantize_pieces",
    )(x.reshape(num_tokens, 1, num_inputs), magnitudes)
    return QuantizedActivation(codes.reshape(x.shape), scale.reshape(*batch, 1), None, settings["bits"], layout)


def _quantize_piece(
    x_ref,  # [1, piece]
    magnitudes_ref,  # [parts of a token] f32
    codes_ref,  # [1, piece] int8
    scale_ref,  # [1] f32
    *,
    num_inputs: int,
    num_parts: int,
    layout: Layout,
    settings: dict[str, Any],
    interpret: bool,
):
    of_token = jax.lax.broadcasted_iota(jnp.int32, magnitudes_ref.shape, 0) < num_parts
    magnitude = jnp.max(plgpu.load(magnitudes_ref, mask=of_token, other=jnp.float32(0)))
    exists = exists_in_piece(x_ref.shape, num_inputs, interpret=interpret)
    x = plgpu.load(x_ref, mask=exists, other=jnp.zeros((), x_ref.dtype)).astype(jnp.float32)
    store_quantized(
        x,
        exists,
        jnp.full((1,), pl.program_id(1) == 0),  # the token's first piece stores its scale
        (codes_ref, scale_ref),
        layout=layout,
        settings=settings | {"magnitude": jnp.full((1,), magnitude)},
        interpret=interpret,
    )


def exists_in_piece(shape: tuple[int, int], num_inputs: int, *, interpret: bool) -> Array:
    """Which values of a program's piece are of the token."""
    first = registers.start_next(pl.program_id(1), interpret=interpret) * PIECE
    return first + jax.lax.broadcasted_iota(jnp.int32, shape, 1) < num_inputs


def reciprocal(x: Array, *, interpret: bool) -> Array:
    """``1 / x`` in float32, correctly rounded."""
    return 1 / x if interpret else _float32_asm(_RECIPROCAL, x)


def round_half_to_even(x: Array, *, interpret: bool) -> Array:
    """float32 ``x`` as whole numbers."""
    return jnp.round(x) if interpret else _float32_asm(_ROUND_HALF_TO_EVEN, x)


def rounded_to(x: Array, dtype: DTypeLike, *, interpret: bool) -> Array:
    """float32 ``x`` as an array of ``dtype`` would hold it, in float32 again."""
    if not interpret:
        return x.astype(dtype).astype(jnp.float32)
    # The interpreted kernel is a program of XLA, which drops a conversion there and back as excess precision.
    return jax.lax.reduce_precision(x, jnp.finfo(dtype).nexp, jnp.finfo(dtype).nmant)


def _float32_asm(asm: str, x: Array) -> Array:
    return registers.inline_asm(asm, x, constraints="=f,f", dtype=jnp.float32)


def block_shape(num_groups: int, group_size: int, *, block_values: int | None, outlier_groups: int) -> tuple[int, int]:
    """Groups of a token that a program of :func:`launch_producer` quantises, and values of a group: powers of two.

    Args:
        block_values: that it quantises at most, unless a group has more; None for all of a token, which it does too
            where outlier groups are sought.
    """
    block_groups, block_group = pl.next_power_of_2(num_groups), pl.next_power_of_2(group_size)
    if block_values is None or outlier_groups:
        return block_groups, block_group
    return min(block_groups, max(1, block_values // block_group)), block_group


def launch_producer(
    produce: Callable[..., Array],
    inputs: Sequence[tuple[Array, Callable[..., pl.BlockSpec]]],
    *,
    shape: tuple[int, ...],
    group_size: int,
    block_values: int | None,
    also_written: Sequence[DTypeLike] = (),
    layout: Layout = Layout.PLANES,
    num_warps: int | None = None,
    interpret: bool,
    name: str,
    **settings: Any,
) -> tuple[QuantizedActivation, list[Array]]:
    """Quantises what ``produce`` computes, without writing it: one token per program, or some groups of one.

    Args:
        produce: takes a ref per input, a ref ``[block_groups, block_group]`` per array that it writes itself, and
            which values of the block exist, and returns the block as float32, zero where nothing exists.
        inputs: each array with a function that makes its block specification of ``(block_groups, block_group)``;
            the grid is tokens x blocks of groups.
        shape: ``[..., K]`` of the result; the arrays have one axis for all tokens.
        block_values: as in :func:`block_shape`.
        also_written: the dtypes of the arrays of the result's shape that ``produce`` writes itself.
        layout: the order of the codes.
        num_warps: replaces the choice for a program.
        settings: ``bits``, ``symmetric``, ``clip_ratio`` and ``outlier_groups``.

    Returns:
        The quantised result, and the arrays that ``produce`` has written.
    """
    *batch, num_inputs = shape
    num_rows, num_groups = math.prod(batch), num_inputs // group_size
    block_groups, block_group = block_shape(
        num_groups, group_size, block_values=block_values, outlier_groups=settings["outlier_groups"]
    )
    block_spec = pl.BlockSpec((None, block_groups, block_group), lambda row, part: (row, part, 0))
    per_group_spec = pl.BlockSpec((None, block_groups), lambda row, part: (row, part))
    num_per_group = 1 if settings["symmetric"] else 2
    outputs = pl.pallas_call(
        functools.partial(
            _producer_kernel,
            produce=produce,
            shape=(num_groups, group_size),
            layout=layout,
            settings=settings,
            interpret=interpret,
        ),
        grid=(num_rows, pl.cdiv(num_groups, block_groups)),
        in_specs=[spec(block_groups, block_group) for _, spec in inputs],
        out_specs=[*[block_spec] * (len(also_written) + 1), *[per_group_spec] * num_per_group],
        out_shape=[
            *[jax.ShapeDtypeStruct((num_rows, num_groups, group_size), dtype) for dtype in (*also_written, jnp.int8)],
            *[jax.ShapeDtypeStruct((num_rows, num_groups), jnp.float32)] * num_per_group,
        ],
        compiler_params=plgpu.CompilerParams(
            num_warps=num_warps or max(4, min(16, block_groups * block_group // 1024)), num_stages=1
        ),
        interpret=interpret,
        name=name,
    )(*[array for array, _ in inputs])
    *written, codes = (array.reshape(shape) for array in outputs[:-num_per_group])
    scale, *offset = (array.reshape(*batch, num_groups) for array in outputs[-num_per_group:])
    offset = offset[0] if offset else None
    return QuantizedActivation(codes, scale, offset, settings["bits"], layout), written


def _producer_kernel(
    *refs: registers.Ref,  # those of produce, codes [block_groups, block_group], scale, maybe offset [block_groups]
    produce: Callable[..., Array],
    shape: tuple[int, int],  # groups, values of a group
    layout: Layout,
    settings: dict[str, Any],
    interpret: bool,
):
    num_outputs = 2 if settings["symmetric"] else 3
    of_produce, outputs = refs[:-num_outputs], refs[-num_outputs:]
    block = outputs[0].shape
    first_group = registers.start_next(pl.program_id(1), interpret=interpret) * block[0]
    groups, values = (jax.lax.broadcasted_iota(jnp.int32, block, axis) for axis in range(2))
    exists = (first_group + groups < shape[0]) & (values < shape[1])
    group_exists = first_group + jax.lax.broadcasted_iota(jnp.int32, block[:1], 0) < shape[0]
    x = produce(*of_produce, exists)
    store_quantized(x, exists, group_exists, outputs, layout=layout, settings=settings, interpret=interpret)
