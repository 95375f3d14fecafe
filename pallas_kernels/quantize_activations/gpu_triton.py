"""``quantize_activations`` as a Pallas Triton kernel for NVIDIA GPUs (compute capability 8.0 and newer).

A group is a row of ``group_size`` values, whichever token it belongs to, so one kernel that reduces rows
serves every grouping. The reciprocal of the scale and the rounding are spelled in PTX because Triton divides
approximately and Pallas cannot lower ``round``; with them the codes equal those of the reference.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float

from pallas_kernels import gpu_triton as tiles
from pallas_kernels.activations import QuantizedActivation
from pallas_kernels.quantize_activations import reference

_MAX_ROW = 65536  # values that one program can hold in registers
_BLOCK_VALUES = 1024  # values per program where rows are short

_RECIPROCAL = "rcp.rn.f32 $0, $1;"
_ROUND_HALF_TO_EVEN = "cvt.rni.f32.f32 $0, $1;"


def obstacle(num_inputs: int, group_size: int) -> str | None:
    """Why this kernel cannot serve a shape, as the end of a sentence; None if it can."""
    del num_inputs
    return f"needs groups of at most {_MAX_ROW} inputs; this is {group_size}" if group_size > _MAX_ROW else None


def quantize_activations(
    x: Float[Array, "*batch K"],
    *,
    bits: int,
    group_size: int,
    symmetric: bool,
    clip_ratio: float,
    interpret: bool = False,
) -> QuantizedActivation:
    """See the public function."""
    tiles.ignore_triton_deprecation()
    codes, scale, *offset = _quantize_rows(
        x.reshape(-1, group_size), bits=bits, symmetric=symmetric, clip_ratio=float(clip_ratio), interpret=interpret
    )
    per_group = (*x.shape[:-1], x.shape[-1] // group_size)
    offset = offset[0].reshape(per_group) if offset else None
    return QuantizedActivation(codes.reshape(x.shape), scale.reshape(per_group), offset, bits)


@functools.partial(jax.jit, static_argnames=("bits", "symmetric", "clip_ratio", "interpret"))
def _quantize_rows(x: Array, *, bits: int, symmetric: bool, clip_ratio: float, interpret: bool) -> tuple[Array, ...]:
    num_rows, width = x.shape
    block_width = pl.next_power_of_2(width)
    block_rows = max(1, min(_BLOCK_VALUES // block_width, pl.next_power_of_2(num_rows)))
    row_spec = pl.BlockSpec((block_rows, block_width), lambda row: (row, 0))
    per_row_spec = pl.BlockSpec((block_rows,), lambda row: (row,))
    per_row = [jax.ShapeDtypeStruct((num_rows,), jnp.float32)] * (1 if symmetric else 2)
    outputs = pl.pallas_call(
        functools.partial(
            _kernel, shape=x.shape, bits=bits, symmetric=symmetric, clip_ratio=clip_ratio, interpret=interpret
        ),
        grid=(pl.cdiv(num_rows, block_rows),),
        in_specs=[row_spec],
        out_specs=[row_spec] + [per_row_spec] * len(per_row),
        out_shape=[jax.ShapeDtypeStruct(x.shape, jnp.int8), *per_row],
        compiler_params=plgpu.CompilerParams(num_warps=max(4, min(16, block_width // 1024)), num_stages=1),
        interpret=interpret,
        name="quantize_activations",
    )(x)
    return tuple(outputs)


def _kernel(
    x_ref,  # [block_rows, block_width]
    codes_ref,  # [block_rows, block_width] int8
    scale_ref,  # [block_rows] f32
    *offset_refs,  # [block_rows] f32, asymmetric only
    shape: tuple[int, ...],
    bits: int,
    symmetric: bool,
    clip_ratio: float,
    interpret: bool,
):
    num_rows, width = shape
    rows = pl.program_id(0) * x_ref.shape[0] + jax.lax.broadcasted_iota(jnp.int32, x_ref.shape, 0)
    columns = jax.lax.broadcasted_iota(jnp.int32, x_ref.shape, 1)
    exists = (rows < num_rows) & (columns < width)
    row_exists = pl.program_id(0) * x_ref.shape[0] + jax.lax.iota(jnp.int32, x_ref.shape[0]) < num_rows
    x = plgpu.load(x_ref, mask=exists, other=jnp.zeros((), x_ref.dtype)).astype(jnp.float32)
    reciprocal = (lambda scale: 1 / scale) if interpret else functools.partial(_float32_asm, _RECIPROCAL)
    rounding = jnp.round if interpret else functools.partial(_float32_asm, _ROUND_HALF_TO_EVEN)
    if symmetric:
        scale = reference.symmetric_scale(jnp.max(jnp.abs(x), axis=1), bits=bits, clip_ratio=clip_ratio)
        codes = reference.symmetric_codes(x, reciprocal(scale)[:, None], bits=bits, rounding=rounding)
    else:
        low = jnp.float32(clip_ratio) * jnp.min(jnp.where(exists, x, jnp.inf), axis=1)
        high = jnp.float32(clip_ratio) * jnp.max(jnp.where(exists, x, -jnp.inf), axis=1)
        scale = reference.asymmetric_scale(low, high, bits=bits)
        inverse_scale = reciprocal(scale)
        zero = rounding(low * inverse_scale)
        codes = reference.asymmetric_codes(x, zero[:, None], inverse_scale[:, None], bits=bits, rounding=rounding)
        plgpu.store(offset_refs[0], reference.asymmetric_offset(zero, scale, bits=bits), mask=row_exists)
    plgpu.store(codes_ref, codes, mask=exists)
    plgpu.store(scale_ref, scale, mask=row_exists)


def _float32_asm(asm: str, x: Array) -> Array:
    return tiles.inline_asm(asm, x, constraints="=f,f", dtype=jnp.float32)
