"""A cache of int8 as the Triton kernels for attention see it."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.typing import DTypeLike
from jaxtyping import Array

from pallas_kernels.arrays.int8_cache import KEY_BLOCK, RING, Int8Cache
from pallas_kernels.backends.triton import registers
from pallas_kernels.decode_attention import gpu_triton as whole


def by_heads(cache: Int8Cache) -> list[Array]:
    """The arrays of a cache as kernels read them."""
    arrays = cache.keys, cache.key_scales, cache.recent_keys, cache.values
    shape = cache.num_kv_heads, cache.head_dim
    return [*[array.reshape(*array.shape[:2], *shape) for array in arrays], cache.value_scales]


def arrays_read(problem: whole.Problem) -> list[pl.BlockSpec]:
    """Queries and those arrays, as a program for a block of rows sees them; its grid is (head, part, batch)."""
    query, _, _ = whole.arrays_read(problem)
    row_blocks = problem.row_blocks

    def of_head(count: int) -> pl.BlockSpec:
        return pl.BlockSpec(
            (None, count, None, problem.block_dim),
            lambda program, part, sequence: (sequence, 0, lax.div(program, row_blocks), 0),
        )

    value_scales = pl.BlockSpec(
        (None, None, problem.slots), lambda program, part, sequence: (sequence, lax.div(program, row_blocks), 0)
    )
    counts = problem.slots, pl.cdiv(problem.slots, KEY_BLOCK), RING, problem.slots
    return [query, *[of_head(count) for count in counts], value_scales]


# A byte in two's complement with its highest bit turned is 128 more, as an unsigned number; behind 0x64 it is the
# float16 of 1024 and that number.
_CODES_AS_FLOAT16 = """{
.reg .b32 codes, zero;
mov.b32 zero, 0x64806480;
xor.b32 codes, $2, 0x80808080;
prmt.b32 $0, codes, 0x64646464, 0x4140; prmt.b32 $1, codes, 0x64646464, 0x4342;
sub.f16x2 $0, $0, zero; sub.f16x2 $1, $1, zero;
}"""


def codes_as_floats(codes: Array, dtype: DTypeLike, *, interpret: bool) -> Array:
    """Codes as floats, exactly."""
    if interpret or jnp.dtype(dtype) != jnp.float16:
        return codes.astype(dtype)
    return registers.inline_asm(_CODES_AS_FLOAT16, codes, constraints="=r,=r,r", dtype=dtype, pack=4)


def values_as_floats(
    codes: Array, dtype: DTypeLike, *, always: Array, other: Callable[[], Array], interpret: bool
) -> Array:
    """Codes of values ``[slots, block_dim]`` as floats, for a product along the slots.

    Triton would move the conversion behind the transposition that tensor cores need here, which then takes single bytes
    from shared memory. It moves nothing out of a branch if the other one has a layout of its own, as what it loads has:
    ``always`` is true, and the compiler does not know.
    """
    convert = functools.partial(codes_as_floats, dtype=dtype, interpret=interpret)
    return lax.cond(always, lambda: convert(codes), lambda: convert(other()))


def exp2(x: Array, *, interpret: bool) -> Array:
    """Two to the power of ``x`` float32, as one instruction."""
    return jnp.exp2(x) if interpret else _float32_asm("ex2.approx.ftz.f32 $0, $1;", x)


def log2(x: Array, *, interpret: bool) -> Array:
    """Roughly the logarithm of float32, as one instruction."""
    return jnp.log2(x) if interpret else _float32_asm("lg2.approx.ftz.f32 $0, $1;", x)


def _float32_asm(asm: str, x: Array) -> Array:
    return registers.inline_asm(asm, x, constraints="=f,f", dtype=jnp.float32)
