"""``swiglu_hadamard_quantize`` as a Pallas Triton kernel for NVIDIA GPUs (compute capability 8.0 and newer).

Where groups lie within tiles, a program quantises the tile of a transform that it computes, from registers. Otherwise
the quantiser is a kernel of its own, to which tiles leave their largest magnitude where a token has one symmetric
scale. Before either, ``swiglu`` may be one as well (``swiglu_hadamard``). Which way depends on sizes and settings,
never on the number of tokens.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
from jax.experimental import pallas as pl
from jaxtyping import Array, Float

from pallas_kernels.arrays.activation import QuantizedActivation
from pallas_kernels.arrays.weight import Layout
from pallas_kernels.backends.triton import producers, registers
from pallas_kernels.hadamard import gpu_triton as transforms
from pallas_kernels.quantize_activations import gpu_triton
from pallas_kernels.swiglu_hadamard.gpu_triton import inputs_of_transform

_STATIC = ("block", "bits", "group_size", "symmetric", "clip_ratio", "outlier_groups", "layout", "interpret")


def obstacle(num_inputs: int, block: int, group_size: int, outlier_groups: int) -> str | None:
    """Why this kernel cannot serve a shape, as the end of a sentence; None if it can."""
    return transforms.obstacle(num_inputs, block) or gpu_triton.obstacle(num_inputs, group_size, outlier_groups)


def swiglu_hadamard_quantize(
    gate_up: Float[Array, "*batch two_K"], *, block: int, interpret: bool = False, **settings: Any
) -> QuantizedActivation:
    """See the public function."""
    registers.ignore_triton_deprecation()
    return _gate_transform_and_quantize(gate_up, block=block, interpret=interpret, **settings)


@functools.partial(jax.jit, static_argnames=_STATIC)
def _gate_transform_and_quantize(
    gate_up: Array, *, block: int, layout: Layout = Layout.PLANES, interpret: bool, **settings: Any
) -> QuantizedActivation:
    *batch, both = gate_up.shape
    shape = (*batch, both // 2)
    group_size, symmetric, outlier_groups = (settings[name] for name in ("group_size", "symmetric", "outlier_groups"))
    cut = transforms.Cut.of(shape[-1], block)
    combine, inputs = inputs_of_transform(gate_up, cut, interpret=interpret)
    if _groups_lie_in_tiles(cut, group_size, outlier_groups):
        matrices = [(matrix, pl.BlockSpec(matrix.shape, lambda row, part: (0, 0))) for matrix in cut.matrices()]
        quantized, _ = producers.launch_producer(
            functools.partial(_tile, combine=combine, cut=cut, interpret=interpret),
            [(array, lambda *block, spec=spec: spec) for array, spec in [*matrices, *inputs]],
            shape=shape,
            block_values=cut.tile * cut.width,
            layout=layout,
            num_warps=transforms.NUM_WARPS,
            interpret=interpret,
            name="swiglu_hadamard_quantize",
            **settings,
        )
        return quantized
    one_scale = symmetric and group_size == shape[-1]
    rotated, *magnitudes = transforms.launch_transform(
        combine, inputs, cut=cut, with_magnitudes=one_scale, interpret=interpret, name="swiglu_hadamard"
    )
    rotated = rotated.reshape(shape)
    if one_scale:
        del settings["group_size"]
        return producers.quantize_pieces(rotated, *magnitudes, layout=layout, interpret=interpret, **settings)
    return gpu_triton.quantize_activations(rotated, layout=layout, interpret=interpret, **settings)


def _groups_lie_in_tiles(cut: transforms.Cut, group_size: int, outlier_groups: int) -> bool:
    """Whether the tiles of a token follow each other without a gap, and each is what a program quantises."""
    if not (cut.num_sections == 1 or cut.section == cut.tile):
        return False
    num_groups = cut.rows * cut.width // group_size
    values = cut.tile * cut.width
    block_groups, block_group = producers.block_shape(
        num_groups, group_size, block_values=values, outlier_groups=outlier_groups
    )
    return block_groups * block_group == values and (block_group == group_size or num_groups == 1)


def _tile(
    left_ref,
    right_ref,  # the matrices of the cut
    *refs,  # each input [padded_rows, width]; and which values exist, an array [block_groups, block_group]
    combine: transforms.Combine,
    cut: transforms.Cut,
    interpret: bool,
) -> Array:
    *inputs, exists = refs
    section, tile = pl.program_id(1) // cut.tiles_per_section, pl.program_id(1) % cut.tiles_per_section
    matrices = left_ref, right_ref
    result = transforms.transform(combine, inputs, matrices, cut=cut, section=section, tile=tile, interpret=interpret)
    return result.reshape(exists.shape)
