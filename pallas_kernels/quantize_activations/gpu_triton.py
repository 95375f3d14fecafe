"""``quantize_activations`` as a Pallas Triton kernel for NVIDIA GPUs (compute capability 8.0 and newer).

A program quantises whole groups, whichever tokens they belong to; where outlier groups are sought, which takes a
comparison between the groups of a token, it has them all. How a group becomes codes, ``backends/triton/producers.py``
says.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float

from pallas_kernels.arrays.activation import QuantizedActivation
from pallas_kernels.arrays.weight import Layout
from pallas_kernels.backends.triton import registers
from pallas_kernels.backends.triton.producers import BLOCK_VALUES, MAX_VALUES, store_quantized


def obstacle(num_inputs: int, group_size: int, outlier_groups: int) -> str | None:
    """Why this kernel cannot serve a shape, as the end of a sentence; None if it can."""
    if not outlier_groups:
        too_long = group_size > MAX_VALUES
        return f"needs groups of at most {MAX_VALUES} inputs; this is {group_size}" if too_long else None
    values = pl.next_power_of_2(num_inputs // group_size) * pl.next_power_of_2(group_size)
    too_long = f"needs tokens of at most {MAX_VALUES} inputs where outlier groups are sought; this is {num_inputs}"
    return too_long if values > MAX_VALUES else None


def quantize_activations(
    x: Float[Array, "*batch K"],
    *,
    bits: int,
    group_size: int,
    symmetric: bool,
    clip_ratio: float,
    outlier_groups: int = 0,
    layout: Layout = Layout.PLANES,
    interpret: bool = False,
) -> QuantizedActivation:
    """See the public function."""
    registers.ignore_triton_deprecation()
    num_groups = x.shape[-1] // group_size
    # Groups that need not be compared with each other are spread over as many programs as there are.
    groups_together = num_groups if outlier_groups else 1
    codes, scale, *offset = _quantize(
        x.reshape(-1, groups_together, group_size),
        bits=bits,
        symmetric=symmetric,
        clip_ratio=float(clip_ratio),
        outlier_groups=outlier_groups,
        layout=layout,
        interpret=interpret,
    )
    per_group = (*x.shape[:-1], num_groups)
    offset = offset[0].reshape(per_group) if offset else None
    return QuantizedActivation(codes.reshape(x.shape), scale.reshape(per_group), offset, bits, layout)


@functools.partial(
    jax.jit, static_argnames=("bits", "symmetric", "clip_ratio", "outlier_groups", "layout", "interpret")
)
def _quantize(x: Array, *, layout: Layout, interpret: bool, **settings: Any) -> tuple[Array, ...]:
    """Codes ``[rows, G, group]``, scale and offset ``[rows, G]`` of the groups of each row."""
    num_rows, *widths = x.shape
    block_widths = [pl.next_power_of_2(width) for width in widths]
    values = math.prod(block_widths)
    block_rows = max(1, min(BLOCK_VALUES // values, pl.next_power_of_2(num_rows)))
    row_spec = pl.BlockSpec((block_rows, *block_widths), lambda row: (row, 0, 0))
    per_group_spec = pl.BlockSpec((block_rows, block_widths[0]), lambda row: (row, 0))
    per_group = [jax.ShapeDtypeStruct((num_rows, widths[0]), jnp.float32)] * (1 if settings["symmetric"] else 2)
    outputs = pl.pallas_call(
        functools.partial(_kernel, shape=x.shape, layout=layout, settings=settings, interpret=interpret),
        grid=(pl.cdiv(num_rows, block_rows),),
        in_specs=[row_spec],
        out_specs=[row_spec] + [per_group_spec] * len(per_group),
        out_shape=[jax.ShapeDtypeStruct(x.shape, jnp.int8), *per_group],
        compiler_params=plgpu.CompilerParams(num_warps=max(4, min(16, values // 1024)), num_stages=1),
        interpret=interpret,
        name="quantize_activations",
    )(x)
    return tuple(outputs)


def _kernel(
    x_ref,  # [block_rows, block_groups, block_group]
    codes_ref,  # [block_rows, block_groups, block_group] int8
    *per_group_refs,  # scale, and offset of an asymmetric activation: [block_rows, block_groups] f32
    shape: tuple[int, ...],  # rows, groups, values of a group
    layout: Layout,
    settings: dict[str, Any],
    interpret: bool,
):
    rows, groups, values = (jax.lax.broadcasted_iota(jnp.int32, x_ref.shape, axis) for axis in range(3))
    first_row = registers.start_next(pl.program_id(0), interpret=interpret) * x_ref.shape[0]
    exists = (first_row + rows < shape[0]) & (groups < shape[1]) & (values < shape[2])
    x = plgpu.load(x_ref, mask=exists, other=jnp.zeros((), x_ref.dtype)).astype(jnp.float32)
    # Groups of the padding must not win among the outliers: they count as zeros without spread.
    rows, groups = (jax.lax.broadcasted_iota(jnp.int32, x_ref.shape[:2], axis) for axis in range(2))
    group_exists = (first_row + rows < shape[0]) & (groups < shape[1])
    outputs = codes_ref, *per_group_refs
    store_quantized(x, exists, group_exists, outputs, layout=layout, settings=settings, interpret=interpret)
