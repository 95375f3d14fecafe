"""``hadamard`` as a Pallas kernel for TPUs, compiled for v5e, v6e and 7x; no TPU has run it.

``H_K = H_a x H_128`` with ``a = K / 128``: 128 values by one product with the matrix of 128, whose entries are exact in
bfloat16, and the ``a`` tiles of 128 lanes by additions of whole registers. A float32 is the sum of three bfloat16
values, so that the products of the matrix unit are exact. Nothing is reshaped: the reference's formula in a kernel
takes a hundred times the cycles.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from pallas_kernels.backends.tpu import words
from pallas_kernels.backends.tpu.dots import dot
from pallas_kernels.hadamard.matrices import core_order, kronecker_factors, sylvester_matrix

_LANES = 128
_ROWS = 16
_MAX_CORE = 64  # additions of a core are as many as its entries, all of them code


def obstacle(num_inputs: int) -> str | None:
    """Why this kernel cannot serve a size, as the end of a sentence; None if it can."""
    core = core_order(num_inputs)
    if core > _MAX_CORE:
        return f"needs a core of at most {_MAX_CORE} rows; that of K={num_inputs} has {core}"
    if num_inputs // core < _LANES:
        return f"needs {_LANES} values for each row of the core; K={num_inputs} has {num_inputs // core}"
    return None


@functools.partial(jax.jit, static_argnames="interpret")
def hadamard(x: Float[Array, "*batch K"], *, interpret: Any = False) -> Float[Array, "*batch K"]:
    """See the public function."""
    num_inputs = x.shape[-1]
    rows = x.reshape(-1, num_inputs)
    rows = rows.astype(jnp.float32) if x.dtype == jnp.float16 else rows
    height = min(_ROWS, rows.shape[0])
    spec = pl.BlockSpec((height, num_inputs), lambda i: (i, 0))
    out = pl.pallas_call(
        functools.partial(_kernel, factors=_tile_factors(num_inputs)),
        grid=(pl.cdiv(rows.shape[0], height),),
        in_specs=[spec, pl.BlockSpec((_LANES, _LANES), lambda i: (0, 0))],
        out_specs=spec,
        out_shape=jax.ShapeDtypeStruct(rows.shape, rows.dtype),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",)),
        interpret=interpret,
        name="hadamard",
    )(rows, jnp.asarray(sylvester_matrix(_LANES), jnp.bfloat16))
    return out.astype(x.dtype).reshape(x.shape)


@functools.cache
def _tile_factors(num_inputs: int) -> tuple[np.ndarray, ...]:
    """Of ``H_a``: the outer factors of ``H_K``, without what is in ``H_128``."""
    factors, rest = [], num_inputs // _LANES
    for factor in kronecker_factors(num_inputs):
        side = math.gcd(len(factor), rest)
        if rest > 1:
            factors.append(factor if side == len(factor) else sylvester_matrix(side))
            rest //= side
    return tuple(factors)


def _kernel(x_ref, lanes_ref, out_ref, *, factors: Sequence[np.ndarray]):
    width = x_ref.shape[1]
    count = width // _LANES
    pieces = words.bfloat16_pieces(x_ref[...])

    def product(tile):
        columns = slice(tile * _LANES, (tile + 1) * _LANES)
        parts = [dot(piece[:, columns], lanes_ref[...]) for piece in pieces]  # the matrix is symmetric
        return functools.reduce(jnp.add, reversed(parts))

    tiles = [product(tile) for tile in range(count)]
    after = count
    for factor in factors:
        after //= len(factor)
        tiles = _along(tiles, factor, after)
    for tile, values in enumerate(tiles):
        out_ref[:, tile * _LANES : (tile + 1) * _LANES] = (values * jnp.float32(1 / math.sqrt(width))).astype(
            out_ref.dtype
        )


def _along(tiles: list[Array], factor: np.ndarray, after: int) -> list[Array]:
    """``factor`` along the middle axis of ``[before, side, after]`` tiles."""
    side, out = len(factor), list(tiles)
    butterfly = side & (side - 1) == 0 and np.array_equal(factor, sylvester_matrix(side))
    for start in range(0, len(tiles), side * after):
        for inner in range(after):
            index = [start + j * after + inner for j in range(side)]
            some = [tiles[i] for i in index]
            for i, value in zip(index, _butterfly(some) if butterfly else _dense(some, factor), strict=True):
                out[i] = value
    return out


def _butterfly(tiles: list[Array]) -> list[Array]:
    """Sylvester's matrix of as many rows as there are tiles."""
    step = 1
    while step < len(tiles):
        following = list(tiles)
        for j in range(len(tiles)):
            if j & step == 0:
                following[j], following[j + step] = tiles[j] + tiles[j + step], tiles[j] - tiles[j + step]
        tiles, step = following, 2 * step
    return tiles


def _dense(tiles: list[Array], factor: np.ndarray) -> list[Array]:
    def row(signs: np.ndarray) -> Array:
        return functools.reduce(jnp.add, [tile if sign > 0 else -tile for tile, sign in zip(tiles, signs, strict=True)])

    return [row(signs) for signs in factor]
