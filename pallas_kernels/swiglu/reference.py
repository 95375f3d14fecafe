"""The specification of ``swiglu`` in ``jax.numpy``, and its implementation on the CPU.

The gated unit of Shazeer (2020)::

    y[k] = silu(gate[k]) * up[k],      silu(a) = a / (1 + exp(-a))

In 16 bits XLA rounds inside ``silu`` as suits the platform; an implementation may instead round only ``y``.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.arrays.partial_sums import PartialSums, value_of


def swiglu(gate_up: Float[Array, "*batch two_K"] | PartialSums) -> Float[Array, "*batch K"]:
    """``silu(gate) * up``, the halves of the last axis."""
    gate, up = jnp.split(value_of(gate_up), 2, axis=-1)
    return jax.nn.silu(gate) * up
