"""``swiglu_hadamard_quantize`` as a Pallas Triton kernel for NVIDIA GPUs (compute capability 8.0 and newer).

Three ways, whose codes have the same bits; which one depends on the sizes alone:

- a program quantises the tile of a transform that it computes, where groups lie within tiles: from registers;
- a program computes all tiles of a token, writes them, and quantises what it then reads again: a scale per token, or
  groups that are compared for outliers;
- tokens too long for that take two kernels, ``swiglu_hadamard`` and ``quantize_activations``.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float

from pallas_kernels import gpu_triton as tiles
from pallas_kernels.activations import QuantizedActivation
from pallas_kernels.hadamard import gpu_triton as transforms
from pallas_kernels.quantize_activations import gpu_triton as quantizer
from pallas_kernels.swiglu.gpu_triton import gated
from pallas_kernels.swiglu_hadamard import gpu_triton as floats

_STATIC = ("block", "bits", "group_size", "symmetric", "clip_ratio", "outlier_groups", "layout", "interpret")
_MAX_TOKEN = 32768  # values that one program transforms and quantises
_MAX_PRODUCTS = 40  # of tiles, that one program unrolls for that


def obstacle(num_inputs: int, block: int, group_size: int, outlier_groups: int) -> str | None:
    """Why this kernel cannot serve a shape, as the end of a sentence; None if it can."""
    return transforms.obstacle(num_inputs, block) or quantizer.obstacle(num_inputs, group_size, outlier_groups)


def swiglu_hadamard_quantize(
    gate_up: Float[Array, "*batch two_K"], *, block: int, interpret: bool = False, **settings: Any
) -> QuantizedActivation:
    """See the public function."""
    tiles.ignore_triton_deprecation()
    num_inputs = gate_up.shape[-1] // 2
    cut = transforms.Cut.of(num_inputs, block)
    of_tiles = _groups_lie_in_tiles(cut, settings["group_size"], settings["outlier_groups"])
    if of_tiles or (num_inputs <= _MAX_TOKEN and cut.num_products <= _MAX_PRODUCTS):
        return _gate_transform_and_quantize(gate_up, block=block, interpret=interpret, **settings)
    rotated = floats.swiglu_hadamard(gate_up, block=block, interpret=interpret)
    return quantizer.quantize_activations(rotated, interpret=interpret, **settings)


def _groups_lie_in_tiles(cut: transforms.Cut, group_size: int, outlier_groups: int) -> bool:
    """Whether the tiles of a token follow each other without a gap, and each is what a program quantises."""
    if not (cut.num_sections == 1 or cut.section == cut.tile):
        return False
    num_groups = cut.rows * cut.width // group_size
    values = cut.tile * cut.width
    block_groups, block_group = quantizer.block_shape(
        num_groups, group_size, block_values=values, outlier_groups=outlier_groups
    )
    return block_groups * block_group == values and (block_group == group_size or num_groups == 1)


@functools.partial(jax.jit, static_argnames=_STATIC)
def _gate_transform_and_quantize(
    gate_up: Array, *, block: int, group_size: int, interpret: bool, **settings: Any
) -> QuantizedActivation:
    *batch, both = gate_up.shape
    cut = transforms.Cut.of(both // 2, block)
    of_tiles = _groups_lie_in_tiles(cut, group_size, settings["outlier_groups"])
    produce = _tile if of_tiles else functools.partial(_token, group_size=group_size)
    combine = functools.partial(gated, dtype=gate_up.dtype, interpret=interpret)
    inputs = [
        *[(matrix, pl.BlockSpec(matrix.shape, lambda row, part: (0, 0))) for matrix in cut.matrices()],
        *floats.halves_of_tokens(gate_up, cut),
    ]
    quantized, _ = quantizer.launch_producer(
        functools.partial(produce, combine=combine, cut=cut, interpret=interpret),
        [(array, lambda *block, spec=spec: spec) for array, spec in inputs],
        shape=(*batch, both // 2),
        group_size=group_size,
        block_values=cut.tile * cut.width if of_tiles else None,
        also_written=[] if of_tiles else [gate_up.dtype],
        num_warps=8 if of_tiles else 16,
        interpret=interpret,
        name="swiglu_hadamard_quantize",
        **settings,
    )
    return quantized


def _tile(
    left_ref,
    right_ref,  # the matrices of the cut
    gate_ref,
    up_ref,  # [padded_rows, width]
    exists: Array,  # [block_groups, block_group]
    *,
    combine: transforms.Combine,
    cut: transforms.Cut,
    interpret: bool,
) -> Array:
    part = pl.program_id(1)
    section, tile = part // cut.tiles_per_section, part % cut.tiles_per_section
    matrices = left_ref, right_ref
    [result] = transforms.transform(
        combine, [gate_ref, up_ref], matrices, cut=cut, section=section, chosen=[tile], interpret=interpret
    )
    return result.reshape(exists.shape)


def _token(
    left_ref,
    right_ref,  # the matrices of the cut
    gate_ref,
    up_ref,  # [padded_rows, width]
    written_ref,  # [block_groups, block_group]
    exists: Array,  # [block_groups, block_group]
    *,
    group_size: int,
    combine: transforms.Combine,
    cut: transforms.Cut,
    interpret: bool,
) -> Array:
    chosen, matrices = range(cut.tiles_per_section), (left_ref, right_ref)
    for section in range(cut.num_sections):
        results = transforms.transform(
            combine, [gate_ref, up_ref], matrices, cut=cut, section=section, chosen=chosen, interpret=interpret
        )
        for tile, result in zip(chosen, results, strict=True):
            first = tile * cut.tile
            mask = cut.exists(section, first, result.shape)
            row, column = (jax.lax.broadcasted_iota(jnp.int32, result.shape, axis) for axis in range(2))
            place = (section * cut.section + first + row) * cut.width + column
            # Not // and %, whose care for signs hides from Triton which places follow each other.
            groups = jax.lax.div(place, jnp.int32(group_size)), jax.lax.rem(place, jnp.int32(group_size))
            at = written_ref.at[groups]
            plgpu.store(at, result.astype(written_ref.dtype), mask=mask)
    if not interpret:
        plgpu.debug_barrier()  # a thread reads what others have written
    return plgpu.load(written_ref, mask=exists, other=jnp.zeros((), written_ref.dtype)).astype(jnp.float32)
