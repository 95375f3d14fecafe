"""A cache of int8 as the Triton kernels for attention see it."""

from __future__ import annotations

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
_CODES_AS_FLOAT16 = """{{
.reg .b32 codes, zero;
mov.b32 zero, 0x64806480;
xor.b32 codes, $2, {highest_bits};
prmt.b32 $0, codes, 0x64646464, 0x4140; prmt.b32 $1, codes, 0x64646464, 0x4342;
sub.f16x2 $0, $0, zero; sub.f16x2 $1, $1, zero;
}}"""


def codes_as_floats(codes: Array, dtype: DTypeLike, *, interpret: bool) -> Array:
    """Codes as floats, exactly."""
    if interpret or jnp.dtype(dtype) != jnp.float16:
        return codes.astype(dtype)
    asm = _CODES_AS_FLOAT16.format(highest_bits="0x80808080")
    return registers.inline_asm(asm, codes, constraints="=r,=r,r", dtype=dtype, pack=4)


def values_as_floats(codes: Array, dtype: DTypeLike, *, always: Array, interpret: bool) -> Array:
    """Codes of values ``[slots, block_dim]`` as floats, for a product along the slots.

    Triton would move the conversion behind the transposition that tensor cores need here, which then takes single bytes
    from shared memory. It moves what depends on loads and constants alone: so the bits that are turned are none that it
    knows. ``always`` is true.
    """
    if interpret or jnp.dtype(dtype) != jnp.float16:
        return codes.astype(dtype)
    highest_bits = jnp.broadcast_to(jnp.where(always, jnp.int32(-128), jnp.int32(0)).astype(jnp.int8), codes.shape)
    asm = _CODES_AS_FLOAT16.format(highest_bits="$3")
    return registers.inline_asm(asm, codes, highest_bits, constraints="=r,=r,r,r", dtype=dtype, pack=4)
