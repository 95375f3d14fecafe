"""``rotate_and_write`` as a Pallas Triton kernel for NVIDIA GPUs (compute capability 8.0 and newer).

A program takes one head of one token. The caches are aliased to the results and seen whole, so that a program stores
the one row that is its own and nothing else of them is touched or copied.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32, Int32

from pallas_kernels.arrays.partial_sums import PartialSums, tree_sum
from pallas_kernels.backends.triton import registers
from pallas_kernels.backends.triton.producers import rounded_to

FURTHER_SEQUENCES = True


def obstacle(dtype: DTypeLike | None = None) -> None:
    """Why this kernel cannot serve a call: it serves all that the public function takes."""


def rotate_and_write(
    qkv: Float[Array, "B_all T heads HD"] | PartialSums,
    cosine: Float32[Array, "B T half_HD"],
    sine: Float32[Array, "B T half_HD"],
    keys: Float[Array, "rows S KH HD"],
    values: Float[Array, "rows S KH HD"],
    lengths: Int32[Array, " B"],
    *,
    rows: Int32[Array, " B"] | None = None,
    interpret: bool = False,
) -> tuple[Float[Array, "B_all T H HD"], Float[Array, "rows S KH HD"], Float[Array, "rows S KH HD"]]:
    """See the public function."""
    registers.ignore_triton_deprecation()
    return _rotate_and_write(qkv, cosine, sine, keys, values, lengths, rows, interpret=interpret)


# A jit of its own, so that a program with many layers lowers the kernel once per shape.
@functools.partial(jax.jit, static_argnames="interpret")
def _rotate_and_write(
    qkv: Array | PartialSums,
    cosine: Array,
    sine: Array,
    keys: Array,
    values: Array,
    lengths: Array,
    rows: Array | None,
    *,
    interpret: bool,
) -> tuple[Array, Array, Array]:
    batch, num_tokens, num_heads, head_dim = qkv.shape
    parts = qkv.parts if isinstance(qkv, PartialSums) else qkv[None]
    num_query_heads = num_heads - 2 * keys.shape[2]
    block_half = pl.next_power_of_2(head_dim // 2)
    block_dim = head_dim // 2 + block_half  # what a load of the second half may reach

    def whole(*sizes: int) -> pl.BlockSpec:
        return pl.BlockSpec((*sizes, block_dim), lambda head, token, sequence: (0, 0, 0, 0))

    def part_spec(index: int) -> pl.BlockSpec:
        # One array read several times: slices of it would be copies.
        return pl.BlockSpec(
            (None, None, None, None, block_dim), lambda head, token, sequence: (index, sequence, token, head, 0)
        )

    query_shape = (batch, num_tokens, num_query_heads)
    cache_spec = whole(*keys.shape[:3])
    rotation_spec = pl.BlockSpec((None, None, block_half), lambda head, token, sequence: (sequence, token, 0))
    number_spec = pl.BlockSpec((None,), lambda head, token, sequence: (sequence,))
    numbers = [lengths] if rows is None else [lengths, rows]
    return tuple(
        pl.pallas_call(
            functools.partial(_kernel, half=head_dim // 2, names_rows=rows is not None, interpret=interpret),
            grid=(num_heads, num_tokens, lengths.shape[0]),
            in_specs=[
                *[number_spec] * len(numbers),
                rotation_spec,
                rotation_spec,
                cache_spec,
                cache_spec,
                *[part_spec(index) for index in range(len(parts))],
            ],
            out_specs=[whole(*query_shape), cache_spec, cache_spec],
            out_shape=[
                jax.ShapeDtypeStruct((*query_shape, head_dim), qkv.dtype),
                jax.ShapeDtypeStruct(keys.shape, keys.dtype),
                jax.ShapeDtypeStruct(values.shape, values.dtype),
            ],
            input_output_aliases={len(numbers) + 2: 1, len(numbers) + 3: 2},
            compiler_params=plgpu.CompilerParams(num_warps=1, num_stages=1),
            interpret=interpret,
            name="rotate_and_write",
        )(*numbers, cosine, sine, keys, values, *[parts] * len(parts))
    )


def _kernel(
    length_ref,  # [] int32
    *refs,  # row [] int32, if there is one; see below
    half: int,
    names_rows: bool,
    interpret: bool,
):
    row_ref, refs = refs[: int(names_rows)], refs[int(names_rows) :]
    # Rotations [block_half] f32; caches, which are the same memory as the results; qkv or each of its parts
    # [block_dim]; query [B, T, H, block_dim], keys and values [rows, S, KH, block_dim].
    cosine_ref, sine_ref, _, _, *part_refs, query_ref, keys_ref, values_ref = refs
    head, token, sequence = (pl.program_id(axis) for axis in range(3))
    token = registers.start_next(token, interpret=interpret)
    first_key, first_value = query_ref.shape[2], query_ref.shape[2] + keys_ref.shape[2]
    position = length_ref[...] + token
    fits = position < keys_ref.shape[1]
    row = sequence
    if row_ref:
        row = row_ref[0][...]
        fits &= row >= 0
    block_half = cosine_ref.shape[0]
    mask = None if block_half == half else lax.broadcasted_iota(jnp.int32, (block_half,), 0) < half
    dtype = query_ref.dtype

    def load_sum(start):
        parts = [_load(ref.at[pl.ds(start, block_half)], mask).astype(jnp.float32) for ref in part_refs]
        total = tree_sum(parts)
        return total if len(parts) == 1 else rounded_to(total, dtype, interpret=interpret)

    first, second = load_sum(0), load_sum(half)

    def store(ref, row, place, head, parts):
        for start, part in zip((0, half), parts, strict=True):
            plgpu.store(ref.at[row, place, head, pl.ds(start, block_half)], part.astype(dtype), mask=mask)

    def rotated():
        cosine, sine = _load(cosine_ref, mask), _load(sine_ref, mask)
        return first * cosine - second * sine, second * cosine + first * sine

    @pl.when(head < first_key)
    def _():
        store(query_ref, sequence, token, head, rotated())

    @pl.when((head >= first_key) & (head < first_value) & fits)
    def _():
        store(keys_ref, row, position, head - first_key, rotated())

    @pl.when((head >= first_value) & fits)
    def _():
        store(values_ref, row, position, head - first_value, (first, second))


def _load(ref: registers.Ref, mask: Array | None) -> Array:
    return plgpu.load(ref) if mask is None else plgpu.load(ref, mask=mask, other=jnp.zeros((), ref.dtype))
