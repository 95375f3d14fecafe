"""A cache of int8 as the Triton kernels for attention see it."""

from __future__ import annotations

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.typing import DTypeLike
from jaxtyping import Array

from pallas_kernels.arrays.int8_cache import KEY_BLOCK, RING, Int8Cache
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


def values_as_floats(codes: Array, dtype: DTypeLike, *, always: Array) -> Array:
    """Codes of values ``[slots, block_dim]`` as floats, for a product along the slots.

    Triton would move the conversion behind the transposition that tensor cores need here, which then takes single bytes
    from shared memory. It moves nothing out of a branch: ``always`` is true, and the compiler does not know.
    """
    return lax.cond(always, lambda: codes.astype(dtype), lambda: jnp.zeros(codes.shape, dtype))
