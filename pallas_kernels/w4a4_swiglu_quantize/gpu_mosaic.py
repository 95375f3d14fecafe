"""``w4a4_swiglu_quantize`` for NVIDIA Hopper: a Pallas Mosaic GPU kernel multiplies and gates, a Triton one quantises.

The first is that of ``w4a4_matmul``, which gates its outputs and leaves the largest magnitude of a row in each 64 of
them. The codes are those of the kernels of ``swiglu_quantize`` after that matmul; see ``w4a16_swiglu``.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from pallas_kernels.arrays.activation import QuantizedActivation
from pallas_kernels.arrays.weight import QuantizedWeight
from pallas_kernels.backends import codes
from pallas_kernels.backends.mosaic import matmul as hopper
from pallas_kernels.backends.triton import producers, registers
from pallas_kernels.w4a4_matmul import gpu_mosaic

FUSED = True


def obstacle(x: QuantizedActivation, weight: QuantizedWeight, dtype: DTypeLike) -> str | None:
    """Why this kernel cannot serve a call, as the end of a sentence; None if it can."""
    if jnp.dtype(dtype) not in codes.NAMES:
        return f"needs a product in bfloat16 or float16; this is {jnp.dtype(dtype)}"
    return gpu_mosaic.obstacle(x, weight) or hopper.gated_obstacle(math.prod(x.codes.shape[:-1]), weight)


def w4a4_swiglu_quantize(
    x: QuantizedActivation, weight: QuantizedWeight, *, dtype: DTypeLike, group_size: int, **settings: Any
) -> QuantizedActivation:
    """See the public function; ``group_size`` is the whole row."""
    registers.ignore_triton_deprecation()
    return _quantize(*gpu_mosaic.gated_product(x, weight, dtype=dtype), **settings)


# A jit of its own, so that a program with many layers lowers the kernel once per shape.
_quantize = jax.jit(
    functools.partial(producers.quantize_pieces, interpret=False),
    static_argnames=("bits", "symmetric", "clip_ratio", "outlier_groups", "layout"),
)
