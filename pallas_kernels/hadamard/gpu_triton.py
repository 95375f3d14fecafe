"""``hadamard`` as a Pallas Triton kernel for NVIDIA GPUs (compute capability 8.0 and newer).

A token of ``K = A * B`` values is a matrix ``X: [A, B]``, where ``B`` is a power of two of at most 128, and its
transform is ``H_A @ X @ H_B``: two tensor-core products. A program computes some rows of one token's result, so a
token's bits do not depend on the tokens beside it. All entries of both matrices are plus or minus one and thus exact
in bfloat16; the other operand is split into bfloat16 parts that add up to it, so that every product is exact and only
the float32 sums round: one part for bfloat16 activations, and two (16 bits) or three (24 bits, all of a float32) else.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float

from pallas_kernels import gpu_triton as tiles
from pallas_kernels.hadamard.matrices import core_order, hadamard_matrix, sylvester_matrix
from pallas_kernels.quantize_activations.gpu_triton import rounded_to

_MIN_SIDE, _MAX_SIDE = 16, 128  # of H_B; tensor-core products in Triton have sides of 16 at least
_BLOCK_ROWS = 32  # of H_A, so that a single token is spread over several programs
_BLOCK_K = 64


def obstacle(num_inputs: int) -> str | None:
    """Why this kernel cannot serve a size, as the end of a sentence; None if it can."""
    power = num_inputs // core_order(num_inputs)
    if power < _MIN_SIDE:
        return f"needs K to be a multiple of {_MIN_SIDE} times {core_order(num_inputs)}; this is {num_inputs}"
    return None


def hadamard(x: Float[Array, "*batch K"], *, interpret: bool = False) -> Float[Array, "*batch K"]:
    """See the public function."""
    tiles.ignore_triton_deprecation()
    num_inputs = x.shape[-1]
    right_side = min(num_inputs // core_order(num_inputs), _MAX_SIDE)
    tokens = x.reshape(-1, num_inputs // right_side, right_side)
    return _transform(tokens, interpret=interpret).reshape(x.shape)


@functools.partial(jax.jit, static_argnames="interpret")
def _transform(tokens: Array, *, interpret: bool) -> Array:
    num_tokens, left_side, right_side = tokens.shape
    left = jnp.asarray(_padded(hadamard_matrix(left_side)), jnp.bfloat16)
    right = jnp.asarray(sylvester_matrix(right_side), jnp.bfloat16)
    return pl.pallas_call(
        functools.partial(_kernel, left_side=left_side, interpret=interpret),
        grid=(num_tokens, left.shape[0] // _BLOCK_ROWS),
        in_specs=[
            pl.BlockSpec((_BLOCK_ROWS, left.shape[1]), lambda token, block: (block, 0)),
            pl.BlockSpec(right.shape, lambda token, block: (0, 0)),
            pl.BlockSpec((None, pl.next_power_of_2(left_side), right_side), lambda token, block: (token, 0, 0)),
        ],
        out_specs=pl.BlockSpec((None, _BLOCK_ROWS, right_side), lambda token, block: (token, block, 0)),
        out_shape=jax.ShapeDtypeStruct(tokens.shape, tokens.dtype),
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=2),
        interpret=interpret,
        name="hadamard",
    )(left, right, tokens)


def _padded(matrix: np.ndarray) -> np.ndarray:
    """With rows and columns of zeros up to whole blocks."""
    side = matrix.shape[0]
    padding = [(0, -side % _BLOCK_ROWS), (0, -side % _block_k(side))]
    return np.pad(matrix, padding)


def _block_k(left_side: int) -> int:
    return min(_BLOCK_K, max(_MIN_SIDE, pl.next_power_of_2(left_side)))


def _kernel(
    left_ref,  # [block_rows, A_padded] bf16
    right_ref,  # [B, B] bf16
    x_ref,  # [A_padded, B]
    out_ref,  # [block_rows, B]
    *,
    left_side: int,
    interpret: bool,
):
    right_side = right_ref.shape[0]
    block_k = _block_k(left_side)
    parts = functools.partial(_parts, interpret=interpret)

    def step(index, total):
        start = index * block_k
        row = jax.lax.broadcasted_iota(jnp.int32, (block_k, right_side), 0)
        mask = None if left_side % block_k == 0 else start + row < left_side
        other = None if mask is None else jnp.zeros((), x_ref.dtype)
        x = plgpu.load(x_ref.at[pl.ds(start, block_k), :], mask=mask, other=other)
        left = plgpu.load(left_ref.at[:, pl.ds(start, block_k)])
        for part in parts(x.astype(jnp.float32), count=_NUM_PARTS[jnp.dtype(x_ref.dtype)][0]):
            total += jnp.dot(left, part, preferred_element_type=jnp.float32)
        return total

    product = jnp.zeros((left_ref.shape[0], right_side), jnp.float32)
    product = jax.lax.fori_loop(0, left_ref.shape[1] // block_k, step, product)
    total = jnp.zeros_like(product)
    for part in parts(product, count=_NUM_PARTS[jnp.dtype(x_ref.dtype)][1]):
        total += jnp.dot(part, plgpu.load(right_ref), preferred_element_type=jnp.float32)
    total *= jnp.float32(1 / math.sqrt(left_side * right_side))
    row = jax.lax.broadcasted_iota(jnp.int32, total.shape, 0)
    exists = pl.program_id(1) * _BLOCK_ROWS + row < left_side
    plgpu.store(out_ref, total.astype(out_ref.dtype), mask=exists)


# Of the activations, and of the product between the matrices.
_NUM_PARTS = {
    jnp.dtype(jnp.bfloat16): (1, 2),
    jnp.dtype(jnp.float16): (2, 2),
    jnp.dtype(jnp.float32): (3, 3),
}


def _parts(x: Array, *, count: int, interpret: bool) -> list[Array]:
    """bfloat16 arrays that add up to float32 ``x``, to 8 bits of precision each."""
    parts = []
    for _ in range(count):
        rounded = rounded_to(x, jnp.bfloat16, interpret=interpret)
        parts.append(rounded.astype(jnp.bfloat16))
        x = x - rounded
    return parts
