"""``w4a4_matmul`` as a Pallas Triton kernel for NVIDIA GPUs (compute capability 8.0 and newer).

The integer formula of :mod:`pallas_kernels.arrays.activation`: int8 tensor cores multiply the activation codes by
``16 * (code - 8)`` (four-bit codes too: Hopper has no 4-bit path, and the product is exact either way), sums
are int32 as long as one scale covers them and float32 beyond, and a factor 1/16, which is exact, ends it.
The zero points of an asymmetric weight and of asymmetric activations add one rank-1 term per group each.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float

from pallas_kernels.arrays.activation import QuantizedActivation
from pallas_kernels.arrays.partial_sums import PartialSums
from pallas_kernels.arrays.weight import SYMMETRIC_ZERO_POINT, Layout, QuantizedWeight, layout_obstacle
from pallas_kernels.backends.triton import matmul, registers, tiles, tuning

LAYOUT = Layout.PLANES


def obstacle(x: QuantizedActivation, weight: QuantizedWeight) -> str | None:
    """Why this kernel cannot serve a call, as the end of a sentence; None if it can."""
    return (
        tiles.matmul_obstacle(weight.num_outputs, weight.num_inputs, weight.group_size, x.group_size)
        or layout_obstacle(weight.layout, LAYOUT)
        or layout_obstacle(x.layout, LAYOUT, what="activations")
    )


def w4a4_matmul(
    x: QuantizedActivation,
    weight: QuantizedWeight,
    *,
    dtype: jax.typing.DTypeLike,
    config: tiles.TileConfig | None = None,
    interpret: bool = False,
) -> Float[Array, "*batch N"] | PartialSums:
    """See the public function. ``config`` replaces the measured choice of tiles."""
    registers.ignore_triton_deprecation()
    batch = x.codes.shape[:-1]
    rows = jax.tree.map(lambda a: a.reshape(-1, a.shape[-1]), x)
    if config is None:
        config = _tile_config(rows.codes.shape[0], x, weight)
    outputs = _matmul(rows, weight, dtype=jnp.dtype(dtype), config=config, interpret=interpret)
    return outputs.reshape(*batch, weight.num_outputs)


def tuned_op(x: QuantizedActivation) -> str | None:
    """The operation (``tuning.OPS``) under which tuning tables have such activations, or None where they have none.

    Their scales decide, for they are what the kernel's loop differs by; ``x.bits`` do not, since codes of 4 bits take
    a byte too: ``"w4a8"`` are symmetric activations with one group, that is one scale per token, and ``"w4a4"`` are
    asymmetric ones in groups of 32.
    """
    if x.symmetric and x.num_groups == 1:
        return "w4a8"
    return "w4a4" if not x.symmetric and x.group_size == 32 else None


def _tile_config(num_rows: int, x: QuantizedActivation, weight: QuantizedWeight) -> tiles.TileConfig:
    op = tuned_op(x)
    tuned = None if op is None else tuning.tuned_config(op, num_rows, weight)
    if tuned is not None:
        return tuned
    run = tiles.scale_run(weight.num_inputs, weight.group_size, x.group_size)
    scaled_in_loop = weight.num_groups > 1 or x.num_groups > 1
    return tiles.tile_config(
        num_rows,
        weight.num_outputs,
        weight.num_inputs,
        run,
        integer=scaled_in_loop,
        asymmetric=not weight.symmetric and x.num_groups == 1,
    )


# A jit of its own, so that a program with many layers lowers the kernel once per shape.
@functools.partial(jax.jit, static_argnames=("dtype", "config", "interpret"))
def _matmul(
    x: QuantizedActivation,
    weight: QuantizedWeight,
    *,
    dtype: jax.typing.DTypeLike,
    config: tiles.TileConfig,
    interpret: bool,
) -> Array | PartialSums:
    rows = {"codes": x.codes, "x_scale": x.scale}
    columns = {"packed": weight.packed, "scale": weight.scale}
    if weight.offset is not None:
        columns["offset"] = weight.offset
    if x.offset is not None and weight.group_sum is not None:
        rows["x_offset"] = x.offset
        columns["group_sum"] = weight.group_sum

    def kernel(*refs):
        named = dict(zip([*rows, *columns, "out"], refs, strict=True))
        _kernel(
            _Refs(**named, truncated=weight.truncated), num_rows=x.codes.shape[0], config=config, interpret=interpret
        )

    return matmul.launch_matmul(
        kernel,
        tuple(rows.values()),
        tuple(columns.values()),
        config=config,
        out_dtype=dtype,
        interpret=interpret,
        name=f"w4a{x.bits}",  # as profiles show it
    )


@dataclasses.dataclass(frozen=True)
class _Refs:
    """The memory of one program; ``Gx`` and ``G`` are the groups of activations and weight."""

    codes: registers.Ref  # [block_m, K] int8
    x_scale: registers.Ref  # [block_m, Gx] f32
    packed: registers.Ref  # [block_n, K/2] uint8
    scale: registers.Ref  # [G, block_n]
    out: registers.Ref  # [block_m, block_n]
    offset: registers.Ref = None  # [G, block_n], asymmetric weight
    x_offset: registers.Ref = None  # [block_m, Gx] f32, asymmetric activations
    group_sum: registers.Ref = None  # [A, block_n], A a multiple of Gx, asymmetric activations
    truncated: bool = False  # the weight's codes stand for half a step more

    @property
    def num_inputs(self) -> int:
        return self.codes.shape[1]

    @property
    def group_size(self) -> int:
        return self.num_inputs // self.scale.shape[0]

    @property
    def x_group_size(self) -> int:
        return self.num_inputs // self.x_scale.shape[1]

    @property
    def scale_at_end(self) -> bool:
        """One weight scale covers the row."""
        return self.scale.shape[0] == 1

    @property
    def x_scale_at_end(self) -> bool:
        """One activation scale covers the row."""
        return self.x_scale.shape[1] == 1

    def of_group(self, group: jax.Array | int) -> tuple[jax.Array, ...]:
        """``[block_n]``: the weight's scale, and its offset if it has one, as they are stored."""
        return tuple(ref[group, :] for ref in (self.scale, self.offset) if ref is not None)


def _scale_and_shift(scale: Array, offset: Array | None = None) -> tuple[Array, Array | None]:
    """``[1, block_n]`` float32: the scale without the factor of the int8 codes, and what an asymmetric weight adds."""
    scale = scale.astype(jnp.float32)
    shift = None if offset is None else (SYMMETRIC_ZERO_POINT * scale - offset.astype(jnp.float32))[None, :]
    return scale[None, :] / registers.INT8_CODE_FACTOR, shift


def _kernel(refs: _Refs, *, num_rows: int, config: tiles.TileConfig, interpret: bool):
    half, block_k = refs.packed.shape[1], config.block_k
    steps = half // block_k // config.split
    first_step = registers.start_next(pl.program_id(1), interpret=interpret) * steps
    x_mask = matmul.row_mask(num_rows, config.block_m, block_k)
    row_mask = matmul.row_mask(num_rows, config.block_m, 1)
    integer = refs.scale_at_end and refs.x_scale_at_end
    accumulator = jnp.int32 if integer else jnp.float32

    def along_k(start):
        """The scales that vary along K at a place: those of the weight's group, and of the activations'."""
        of_weight = () if refs.scale_at_end else refs.of_group(lax.div(start, refs.group_size))
        if refs.x_scale_at_end:
            return of_weight, None
        return of_weight, matmul.load_rows(refs.x_scale, lax.div(start, refs.x_group_size), 1, row_mask)

    def of_planes(index):
        return along_k(index * block_k), along_k(half + index * block_k)

    def plane(start, weight_codes, scales, product, code_sum):
        x_codes = matmul.load_rows(refs.codes, start, block_k, x_mask)
        of_weight, x_scale = scales
        tile_product, tile_sum = _scaled_tile(refs, x_codes, weight_codes, of_weight, x_scale, accumulator)
        return product + tile_product, code_sum + tile_sum if sums_at_end else code_sum

    def step(index, carry, loaded):
        start = index * block_k
        packed = refs.packed[:, pl.ds(start, block_k)]
        low, high = registers.decode_planes(packed, jnp.int8, truncated=refs.truncated, interpret=interpret)
        return plane(half + start, high, loaded[1], *plane(start, low, loaded[0], *carry))

    sums_at_end = refs.offset is not None and refs.scale_at_end
    zeros = jnp.zeros((config.block_m, config.block_n), accumulator)
    begin = zeros, zeros if sums_at_end else jnp.zeros((), accumulator)
    product, code_sum = matmul.loop_with_loads_ahead(first_step, steps, step, begin, of_planes)
    product = _finish(refs, product.astype(jnp.float32), code_sum.astype(jnp.float32), row_mask, config.split)
    out_mask = matmul.row_mask(num_rows, config.block_m, config.block_n)
    plgpu.store(refs.out, product.astype(refs.out.dtype), mask=out_mask)


def _scaled_tile(
    refs: _Refs,
    x_codes: Array,
    weight_codes: Array,
    of_weight: tuple[Array, ...],
    x_scale: Array | None,
    accumulator: jax.typing.DTypeLike,
) -> tuple[Array, Array]:
    """One tile's product under the scales that vary along K, and of an asymmetric weight its codes' sum.

    Both are ``[block_m, block_n]``. The sum is in every column, by tensor cores: for one along a row, threads would
    have to meet in each step.
    """
    product = matmul.dot_transposed(x_codes, weight_codes).astype(accumulator)
    code_sum = jnp.zeros((), accumulator)
    if refs.offset is not None:
        code_sum = matmul.dot_transposed(x_codes, jnp.ones_like(weight_codes)).astype(accumulator)
    if not refs.scale_at_end:
        scale, shift = _scale_and_shift(*of_weight)
        product = product * scale
        product = product if shift is None else product + code_sum * shift
    if x_scale is not None:
        product, code_sum = product * x_scale, code_sum * x_scale
    return product, code_sum


def _finish(refs: _Refs, product: Array, code_sum: Array, row_mask: Array | None, split: int) -> Array:
    """Applies the scales that cover the whole row, and the zero point of the activations."""
    if refs.scale_at_end:
        scale, shift = _scale_and_shift(*refs.of_group(0))
        product = product * scale
        if shift is not None:
            product = product + code_sum * shift
    if refs.x_scale_at_end:
        product = product * matmul.load_rows(refs.x_scale, 0, 1, row_mask)
    if refs.x_offset is None:
        return product
    return product - _zero_point_term(refs, row_mask, split)


def _zero_point_term(refs: _Refs, row_mask: Array | None, split: int) -> Array:
    """``[block_m, block_n]``: offset of the activations times the sums of the weight.

    Every program of a split adds an equal share of the sums.
    """
    num_sums = refs.group_sum.shape[0]
    share = -(-num_sums // split)
    first = pl.program_id(1) * share
    sums_per_x_group = num_sums // refs.x_scale.shape[1]

    def add_group(index, total):
        group = jnp.minimum(first + index, num_sums - 1)
        x_offset = matmul.load_rows(refs.x_offset, lax.div(group, sums_per_x_group), 1, row_mask)
        group_sum = refs.group_sum[group, :].astype(jnp.float32)[None, :]
        return total + jnp.where(first + index < num_sums, x_offset * group_sum, jnp.float32(0))

    return lax.fori_loop(0, share, add_group, jnp.zeros(refs.out.shape, jnp.float32))
