"""What a Pallas Triton kernel does with its registers: nibbles become numbers, PTX, the signal to the next kernel."""

from __future__ import annotations

import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.pallas import triton as plgpu
from jax.typing import DTypeLike

from pallas_kernels.backends import codes, early_launch

Ref = Any  # a block of memory inside a kernel; JAX publishes no type for it
INT8_CODE_FACTOR = 16  # decode_planes returns 16 * (code - 8) as int8

# prmt spreads four bytes b0..b3, which hold two nibbles each, to 16-bit lanes. `sub.bf16x2` needs compute capability
# 9.0, `fma.rn.bf16x2` only 8.0.
_DECODE_FLOAT = """{{
.reg .b32 codes, t0, t1, c0, c1, one;
mov.b32 one, {one};
{codes}
prmt.b32 t0, codes, 0, 0x4140; prmt.b32 t1, codes, 0, 0x4342;
{first} {second}
fma.rn.{kind}x2 $0, t0, one, c0; fma.rn.{kind}x2 $1, t1, one, c1;
}}"""
# (bytes << shift & 0xF0) ^ 0x80 is 16 * (nibble - 8) as int8: no borrow can cross a byte. Half a step more is an 8 in
# the nibble that the mask has cleared.
_DECODE_INT8 = "{{.reg .b32 t; shl.b32 t, $1, {shift}; lop3.b32 $0, t, 0xF0F0F0F0, {centre}, 0x6A;}}"


def decode_planes(
    packed: jax.Array,
    dtype: DTypeLike,
    *,
    low: jax.Array | None = None,
    truncated: bool = False,
    centred: bool = False,
    interpret: bool,
) -> tuple[jax.Array, jax.Array]:
    """The two planes of a byte tile as ``code - 8`` in a 16-bit float, or 16 times that as int8: exactly.

    Args:
        packed: ``[block_n, block_k]`` uint8.
        dtype: bfloat16, float16 or int8.
        low: the lower nibbles of a nested weight, for floats; None without.
        truncated: codes stand for half a step more, as in ``QuantizedWeight``.
        centred: a nested weight is centred by 8.5.
        interpret: use ``jax.numpy``, since inline assembly has no interpreter.
    """
    dtype = jnp.dtype(dtype)
    if interpret:
        more = jnp.asarray(INT8_CODE_FACTOR * (truncated - centred) // 2, jnp.int16)
        return _interpreted(packed, low, dtype, 0, more), _interpreted(packed, low, dtype, 1, more)

    def decode(plane: int) -> jax.Array:
        if dtype == jnp.int8:
            # The low plane is shifted up into the high nibble; the high plane is there already.
            asm = _DECODE_INT8.format(shift=4 * (1 - plane), centre="0x88888888" if truncated else "0x80808080")
            return inline_asm(asm, packed, constraints="=r,r", dtype=dtype, pack=4)
        lanes, kind = (
            codes.lanes_of(dtype, bits=4 if low is None else 8, truncated=truncated, centred=centred),
            codes.NAMES[dtype],
        )
        found = codes.shift_down("codes", "$2", 4 * plane - truncated)
        if low is not None:
            found = codes.JOIN[plane].format("codes", "$2", "$3")
        terms = {"first": lanes.prepare("t0", "c0"), "second": lanes.prepare("t1", "c1")}
        asm = _DECODE_FLOAT.format(codes=found, kind=kind, one=codes.ONE[kind], **terms)
        arrays, inputs = ((packed,), "r") if low is None else ((packed, low), "r,r")
        return inline_asm(asm, *arrays, constraints=f"=r,=r,{inputs}", dtype=dtype, pack=4)

    return decode(0), decode(1)


def _interpreted(packed: jax.Array, low: jax.Array | None, dtype: jnp.dtype, plane: int, more: jax.Array) -> jax.Array:
    shift = packed.dtype.type(4 * plane)
    sixteenths = (((packed >> shift) & 0xF).astype(jnp.int16) - jnp.int16(8)) * jnp.int16(INT8_CODE_FACTOR) + more
    if low is not None:
        sixteenths = sixteenths + ((low >> shift) & 0xF).astype(jnp.int16)
    if dtype == jnp.int8:
        return sixteenths.astype(jnp.int8)
    return (sixteenths.astype(jnp.float32) / INT8_CODE_FACTOR).astype(dtype)


def inline_asm(asm: str, *args: jax.Array, constraints: str, dtype: DTypeLike, pack: int = 1) -> jax.Array:
    """Elementwise PTX with one result of the arguments' shape."""
    result = jax.ShapeDtypeStruct(args[0].shape, dtype)
    [out] = plgpu.elementwise_inline_asm(
        asm, args=args, constraints=constraints, pack=pack, result_shape_dtypes=[result]
    )
    return out


LN_2, LOG2_E = 0.6931471805599453, 1.4426950408889634  # logarithms to base 2 times the first are natural ones


def exp2(x: jax.Array, *, interpret: bool) -> jax.Array:
    """Two to the power of ``x`` float32, as one instruction."""
    return jnp.exp2(x) if interpret else _float32_asm("ex2.approx.ftz.f32 $0, $1;", x)


def exp2_of_difference(x: jax.Array, less: jax.Array, scale: float, *, interpret: bool) -> jax.Array:
    """Roughly ``2 ** ((x - less) * scale)`` of float32, as two instructions: ``x * scale - less * scale``.

    Of equal values that is near 1, and not 1: only the second product is rounded.
    """
    if interpret:
        return jnp.exp2(_difference_of_products(x, less, scale))
    number = f"0f{np.float32(scale).view(np.uint32):08X}"
    less_scaled = f"mul.rn.f32 t, $2, {number}; neg.f32 t, t;"
    asm = f"{{.reg .f32 t; {less_scaled} fma.rn.f32 t, $1, {number}, t; ex2.approx.ftz.f32 $0, t;}}"
    return inline_asm(asm, x, less, constraints="=f,f,f", dtype=jnp.float32)


def _difference_of_products(x: jax.Array, less: jax.Array, scale: float) -> jax.Array:
    """``x * scale - less * scale``, of which only the second product is rounded, whatever a compiler contracts.

    Products of halves, of 12 bits each, are exact.
    """
    halves = lambda value: (high := lax.reduce_precision(value, 8, 11), value - high)  # noqa: E731
    scale = jnp.float32(scale)
    (x_high, x_low), (high, low) = halves(x), halves(scale)
    rest = x_high * low + x_low * high + x_low * low
    difference = (x_high * high - lax.reduce_precision(less * scale, 8, 23)) + rest
    return jnp.where(jnp.isinf(x), x, difference)


def log2(x: jax.Array, *, interpret: bool) -> jax.Array:
    """Roughly the logarithm of float32, as one instruction."""
    return jnp.log2(x) if interpret else _float32_asm("lg2.approx.ftz.f32 $0, $1;", x)


def _float32_asm(asm: str, x: jax.Array) -> jax.Array:
    return inline_asm(asm, x, constraints="=f,f", dtype=jnp.float32)


def start_next(index: jax.Array, *, interpret: bool) -> jax.Array:
    """``index``, a program id: a kernel that uses it signals at its start (``backends/early_launch.py``)."""
    if interpret or not early_launch.is_enabled():
        return index
    # A tensor of one value, of which every thread executes this once; used, or it would be removed.
    asm = "griddepcontrol.launch_dependents; mov.b32 $0, $1;"
    return jnp.max(inline_asm(asm, jnp.full((1,), index), constraints="=r,r", dtype=jnp.int32))


def ignore_triton_deprecation() -> None:
    """Silences JAX's notice that its Triton backend is deprecated, and nothing else.

    The notice is given when the caller's program is lowered, after the kernel's function has returned, so
    the filter has to stay. Repeating it does not grow the list of filters. Call it outside of a jit, which
    would remember the trace and skip the call.
    """
    warnings.filterwarnings("ignore", message="The Pallas Triton backend is deprecated", category=DeprecationWarning)
