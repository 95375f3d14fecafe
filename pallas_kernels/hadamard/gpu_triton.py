"""``hadamard`` as a Pallas Triton kernel for NVIDIA GPUs (compute capability 8.0 and newer).

A transform of ``A * B`` values, where ``B`` is a power of two of at most 128, is ``H_A @ X @ H_B`` of a matrix
``X: [A, B]``: two tensor-core products, of tiles that :class:`Cut` describes. All entries of both matrices are plus or
minus one (or zero) and thus exact in bfloat16; the other operand is split into bfloat16 parts that add up to it, so
that every product is exact and only the float32 sums round: one part for bfloat16 activations, and two (16 bits) or
three (24 bits, all of a float32) else.

A program computes one tile of one token, so that a single token keeps several programs busy, and a token's bits do not
depend on the tokens beside it. :func:`transform` and :func:`launch_transform` are what the operations share that
transform what they have just computed.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float

from pallas_kernels.backends.triton import registers
from pallas_kernels.backends.triton.producers import rounded_to
from pallas_kernels.hadamard.matrices import core_order, hadamard_matrix, sylvester_matrix

# Tensor-core products in Triton have sides of 16 at least. 64 rows of a result would take Triton's wgmma path, which
# rounds differently, on the GPUs that have one.
_MIN_SIDE, _MAX_WIDTH, _MAX_TILE, _MAX_CHUNK = 16, 128, 32, 64
NUM_WARPS = 8  # of a program that computes a tile

Combine = Callable[..., Array]  # of float32 blocks of the inputs: the block to transform, float32


@dataclasses.dataclass(frozen=True)
class Cut:
    """How the transforms of a token are cut into tensor-core products.

    Attributes:
        block: consecutive values of a transform.
        rows, width: of a token as a matrix.
        section: rows that one matrix multiplies from the left: those of one transform, or of several small ones, whose
            matrices then lie on the diagonal of one. It multiplies even if it is the identity: without that product
            every warp would compute all inputs of the one from the right.
        tile: rows of a result that are computed at once.
        chunk: rows that are read at once.
    """

    block: int
    rows: int
    width: int
    section: int
    tile: int
    chunk: int

    @classmethod
    def of(cls, num_inputs: int, block: int) -> Cut:
        """For tokens of ``num_inputs``, of which each ``block`` are transformed."""
        core = core_order(block)
        power_of_two = num_inputs if core == 1 else block // core
        width = min(power_of_two & -power_of_two, _MAX_WIDTH)
        rows, height = num_inputs // width, max(1, block // width)
        section = height
        if core == 1 and height <= _MAX_TILE:
            section = min(_MAX_TILE, max(_MIN_SIDE, pl.next_power_of_2(rows)))
        tile = _MIN_SIDE if section <= _MIN_SIDE else _MAX_TILE
        chunk = min(_MAX_CHUNK, max(_MIN_SIDE, pl.next_power_of_2(section)))
        return cls(block, rows, width, section, tile, chunk)

    @property
    def num_sections(self) -> int:
        return pl.cdiv(self.rows, self.section)

    @property
    def tiles_per_section(self) -> int:
        return pl.cdiv(self.section, self.tile)

    @property
    def chunks_per_section(self) -> int:
        return pl.cdiv(self.section, self.chunk)

    @property
    def padded_rows(self) -> int:
        """Rows of a block of memory in which every tile and chunk lies."""
        read = max(self.tiles_per_section * self.tile, self.chunks_per_section * self.chunk)
        return (self.num_sections - 1) * self.section + read

    @property
    def token_spec(self) -> pl.BlockSpec:
        """Of a token in ``[tokens, rows, width]``, for a grid of tokens x programs."""
        return pl.BlockSpec((None, self.padded_rows, self.width), lambda token, program: (token, 0, 0))

    def matrices(self) -> list[Array]:
        """The left one, padded with zeros to whole tiles and chunks, and the right one: bfloat16."""
        height, side = max(1, self.block // self.width), min(self.block, self.width)
        left = np.kron(np.eye(self.section // height, dtype=np.int8), hadamard_matrix(height))
        left = np.pad(left, [(0, -self.section % self.tile), (0, -self.section % self.chunk)])
        right = np.kron(np.eye(self.width // side, dtype=np.int8), sylvester_matrix(side))
        return [jnp.asarray(matrix, jnp.bfloat16) for matrix in (left, right)]

    def exists(self, section: Array | int, first: Array | int, shape: tuple[int, ...]) -> Array:
        """Which values of a block exist whose first row is the section's row ``first``."""
        row = first + jax.lax.broadcasted_iota(jnp.int32, shape, 0)
        return (row < self.section) & (section * self.section + row < self.rows)


def obstacle(num_inputs: int, block: int | None = None) -> str | None:
    """Why this kernel cannot serve a size, as the end of a sentence; None if it can."""
    block = block or num_inputs
    if Cut.of(num_inputs, block).width >= _MIN_SIDE:
        return None
    if (core := core_order(block)) == 1:
        return f"needs K to be a multiple of {_MIN_SIDE}; this is {num_inputs}"
    return f"needs transforms of a multiple of {_MIN_SIDE} times {core} values; this is {block}"


def hadamard(x: Float[Array, "*batch K"], *, interpret: bool = False) -> Float[Array, "*batch K"]:
    """See the public function."""
    registers.ignore_triton_deprecation()
    return _hadamard(x, interpret=interpret)


@functools.partial(jax.jit, static_argnames="interpret")
def _hadamard(x: Array, *, interpret: bool) -> Array:
    cut = Cut.of(x.shape[-1], x.shape[-1])
    [out] = launch_transform(as_it_is, [whole_tokens(x, cut)], cut=cut, interpret=interpret, name="hadamard")
    return out.reshape(x.shape)


def as_it_is(block: Array) -> Array:
    """What to combine of a single input: the values themselves."""
    return block


def whole_tokens(x: Float[Array, "*batch K"], cut: Cut) -> tuple[Array, pl.BlockSpec]:
    """``[tokens, rows, width]`` and the specification of a token."""
    return x.reshape(-1, cut.rows, cut.width), cut.token_spec


def launch_transform(
    combine: Combine,
    inputs: Sequence[tuple[Array, pl.BlockSpec]],
    *,
    cut: Cut,
    with_magnitudes: bool = False,
    interpret: bool,
    name: str,
) -> Sequence[Array]:
    """Transforms what ``combine`` computes, without writing it; a program for each tile of a token.

    Args:
        combine: makes a block of rows from those of each input.
        inputs: arrays with a leading axis of tokens, of one dtype, and the specification of a token, ``[rows, width]``;
            the grid is tokens x programs.
        cut: of a token.
        with_magnitudes: of each tile, too.

    Returns:
        ``[tokens, rows, width]`` in the dtype of the inputs; and ``with_magnitudes`` ``[tokens, tiles]`` float32, the
        largest magnitude of each tile.
    """
    num_tokens, dtype = inputs[0][0].shape[0], inputs[0][0].dtype
    matrices = cut.matrices()
    num_tiles = cut.num_sections * cut.tiles_per_section
    out_specs, out_shape = [cut.token_spec], [jax.ShapeDtypeStruct((num_tokens, cut.rows, cut.width), dtype)]
    if with_magnitudes:
        out_specs.append(pl.BlockSpec((None, 1), lambda token, program: (token, program)))
        out_shape.append(jax.ShapeDtypeStruct((num_tokens, num_tiles), jnp.float32))
    return pl.pallas_call(
        functools.partial(_kernel, num_arrays=len(inputs), combine=combine, cut=cut, interpret=interpret),
        grid=(num_tokens, num_tiles),
        in_specs=[
            *[pl.BlockSpec(matrix.shape, lambda token, program: (0, 0)) for matrix in matrices],
            *[spec for _, spec in inputs],
        ],
        out_specs=out_specs,
        out_shape=out_shape,
        compiler_params=plgpu.CompilerParams(num_warps=NUM_WARPS, num_stages=1),
        interpret=interpret,
        name=name,
    )(*matrices, *[array for array, _ in inputs])


def _kernel(
    left_ref,  # [tiles * tile, chunks * chunk] bf16
    right_ref,  # [width, width] bf16
    *refs,  # each input and the result: [padded_rows, width]; perhaps [1] f32, the largest magnitude
    num_arrays: int,
    combine: Combine,
    cut: Cut,
    interpret: bool,
):
    inputs, out_ref, magnitude_refs = refs[:num_arrays], refs[num_arrays], refs[num_arrays + 1 :]
    section, tile = pl.program_id(1) // cut.tiles_per_section, pl.program_id(1) % cut.tiles_per_section
    matrices = left_ref, right_ref
    result = transform(combine, inputs, matrices, cut=cut, section=section, tile=tile, interpret=interpret)
    first = tile * cut.tile
    exists = cut.exists(section, first, result.shape)
    plgpu.store(
        out_ref.at[pl.ds(section * cut.section + first, cut.tile), :], result.astype(out_ref.dtype), mask=exists
    )
    for ref in magnitude_refs:
        ref[:] = jnp.max(jnp.where(exists, jnp.abs(result), 0), keepdims=True).reshape(1)


def transform(
    combine: Combine,
    inputs: Sequence[registers.Ref],
    matrices: tuple[registers.Ref, registers.Ref],
    *,
    cut: Cut,
    section: Array,
    tile: Array,
    interpret: bool,
) -> Array:
    """A tile of a section, ``[tile, width]`` float32 rounded to the dtype of the inputs.

    Args:
        combine, inputs: as in :func:`launch_transform`; refs of a token.
        matrices: refs of those of the cut.
    """
    left_ref, right_ref = matrices
    dtype = jnp.dtype(inputs[0].dtype)
    num_parts, num_product_parts = _NUM_PARTS[dtype]

    def fetch(chunk: int) -> list[Array]:
        first = chunk * cut.chunk
        rows = pl.ds(section * cut.section + first, cut.chunk)
        mask = cut.exists(section, first, (cut.chunk, cut.width))
        return [plgpu.load(ref.at[rows, :], mask=mask, other=jnp.zeros((), dtype)) for ref in inputs]

    product = jnp.zeros((cut.tile, cut.width), jnp.float32)
    following = fetch(0)
    for chunk in range(cut.chunks_per_section):
        blocks = following
        if chunk + 1 < cut.chunks_per_section:
            following = fetch(chunk + 1)  # on its way while this one is computed
        combined = combine(*[block.astype(jnp.float32) for block in blocks])
        columns = pl.ds(chunk * cut.chunk, cut.chunk)
        left = plgpu.load(left_ref.at[pl.ds(tile * cut.tile, cut.tile), columns])
        product = _add_product(product, [(left, part) for part in _parts(combined, num_parts, interpret=interpret)])
    right = plgpu.load(right_ref)
    parts = _parts(product, num_product_parts, interpret=interpret)
    total = _add_product(jnp.zeros_like(product), [(part, right) for part in parts])
    return rounded_to(total * jnp.float32(1 / math.sqrt(cut.block)), dtype, interpret=interpret)


def _add_product(total: Array, pairs: Sequence[tuple[Array, Array]]) -> Array:
    for left, right in pairs:
        total += jnp.dot(left, right, preferred_element_type=jnp.float32)
    return total


# Of the activations, and of the product between the matrices.
_NUM_PARTS = {
    jnp.dtype(jnp.bfloat16): (1, 2),
    jnp.dtype(jnp.float16): (2, 2),
    jnp.dtype(jnp.float32): (3, 3),
}


def _parts(x: Array, count: int, *, interpret: bool) -> list[Array]:
    """bfloat16 arrays that add up to float32 ``x``, to 8 bits of precision each."""
    parts = []
    for _ in range(count):
        rounded = rounded_to(x, jnp.bfloat16, interpret=interpret)
        parts.append(rounded.astype(jnp.bfloat16))
        x = x - rounded
    return parts
