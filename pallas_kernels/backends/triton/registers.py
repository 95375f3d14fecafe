"""What a Pallas Triton kernel does with its registers: nibbles become numbers, PTX, the signal to the next kernel."""

from __future__ import annotations

import warnings
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import triton as plgpu
from jax.typing import DTypeLike

from pallas_kernels.backends import early_launch

Ref = Any  # a block of memory inside a kernel; JAX publishes no type for it
INT8_CODE_FACTOR = 16  # decode_planes returns 16 * (code - 8) as int8

# Four bytes b0..b3 hold two nibbles each. prmt spreads the bytes to 16-bit lanes, lop3 ((a & b) | c) makes
# the float 128 + nibble (bfloat16) or 1024 + nibble (float16), and the subtraction that centres the code
# is exact. `sub.bf16x2` needs compute capability 9.0, `fma.rn.bf16x2` only 8.0.
_DECODE_FLOAT = """{{
.reg .b32 nibbles, t0, t1, one, centre;
mov.b32 one, {one}; mov.b32 centre, {centre};
shr.u32 nibbles, $2, {shift};
prmt.b32 t0, nibbles, 0, 0x4140; prmt.b32 t1, nibbles, 0, 0x4342;
lop3.b32 t0, t0, 0x000F000F, {magic}, 0xEA; lop3.b32 t1, t1, 0x000F000F, {magic}, 0xEA;
fma.rn.{kind}x2 $0, t0, one, centre; fma.rn.{kind}x2 $1, t1, one, centre;
}}"""
_FLOAT_CONSTANTS = {
    jnp.dtype(jnp.bfloat16): {"kind": "bf16", "magic": "0x43004300", "one": "0x3F803F80", "centre": "0xC308C308"},
    jnp.dtype(jnp.float16): {"kind": "f16", "magic": "0x64006400", "one": "0x3C003C00", "centre": "0xE408E408"},
}
# (bytes << shift & 0xF0) ^ 0x80 is 16 * (nibble - 8) as int8: no borrow can cross a byte.
_DECODE_INT8 = "{{.reg .b32 t; shl.b32 t, $1, {shift}; lop3.b32 $0, t, 0xF0F0F0F0, 0x80808080, 0x6A;}}"


def decode_planes(packed: jax.Array, dtype: DTypeLike, *, interpret: bool) -> tuple[jax.Array, jax.Array]:
    """The two planes of a byte tile as ``code - 8`` in a 16-bit float, or 16 times that as int8.

    Args:
        packed: ``[block_n, block_k]`` uint8.
        dtype: bfloat16, float16 or int8.
        interpret: use ``jax.numpy``, since inline assembly has no interpreter.
    """
    dtype = jnp.dtype(dtype)
    if interpret:
        centred = [nibbles.astype(jnp.int8) - jnp.int8(8) for nibbles in (packed & 0xF, packed >> 4)]
        if dtype == jnp.int8:
            centred = [codes * jnp.int8(INT8_CODE_FACTOR) for codes in centred]
        return centred[0].astype(dtype), centred[1].astype(dtype)

    def decode(shift: int) -> jax.Array:
        if dtype == jnp.int8:
            # The low plane is shifted up into the high nibble; the high plane is there already.
            asm, constraints = _DECODE_INT8.format(shift=4 - shift), "=r,r"
        else:
            asm, constraints = _DECODE_FLOAT.format(shift=shift, **_FLOAT_CONSTANTS[dtype]), "=r,=r,r"
        return inline_asm(asm, packed, constraints=constraints, dtype=dtype, pack=4)

    return decode(0), decode(4)


def inline_asm(asm: str, *args: jax.Array, constraints: str, dtype: DTypeLike, pack: int = 1) -> jax.Array:
    """Elementwise PTX with one result of the arguments' shape."""
    result = jax.ShapeDtypeStruct(args[0].shape, dtype)
    [out] = plgpu.elementwise_inline_asm(
        asm, args=args, constraints=constraints, pack=pack, result_shape_dtypes=[result]
    )
    return out


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
