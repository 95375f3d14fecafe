"""``w4a16_swiglu`` as a Pallas Mosaic GPU kernel for NVIDIA Hopper: that of ``w4a16_matmul``, which gates its outputs.

It has the bits of that kernel and the Triton kernel of ``swiglu`` after it, whatever the number of rows: both round
products first, and gate by the same instructions (:mod:`pallas_kernels.backends.gating`). A JAX without Triton gates
more rows by XLA, whose bits are others. So it has none of this one: importing this file fails.
"""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.arrays.partial_sums import value_of
from pallas_kernels.arrays.weight import QuantizedWeight
from pallas_kernels.backends.mosaic import matmul as hopper
from pallas_kernels.swiglu import gpu_triton as gates_more_rows  # noqa: F401
from pallas_kernels.w4a16_matmul import gpu_mosaic

FUSED = True


def obstacle(num_rows: int, dtype: jnp.dtype, weight: QuantizedWeight) -> str | None:
    """Why this kernel cannot serve a call, as the end of a sentence; None if it can."""
    return gpu_mosaic.obstacle(dtype, weight) or hopper.gated_obstacle(num_rows, weight)


def w4a16_swiglu(x: Float[Array, "*batch K"], weight: QuantizedWeight) -> Float[Array, "*batch F"]:
    """See the public function."""
    return value_of(gpu_mosaic.w4a16_matmul(x, weight, epilogue=hopper.Epilogue.GATED))
