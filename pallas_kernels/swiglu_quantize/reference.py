"""The specification of ``swiglu_quantize`` in ``jax.numpy``, and its implementation on the CPU.

The gated unit of Shazeer (2020), followed by ``quantize_activations``::

    y[k] = silu(gate[k]) * up[k],      silu(a) = a / (1 + exp(-a))
    y[k] = scale * codes[k] - offset   as quantize_activations finds them

In 16 bits XLA rounds inside ``silu`` as suits the platform; an implementation may instead round only ``y``.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.activations import QuantizedActivation
from pallas_kernels.quantize_activations import reference


def swiglu(gate_up: Float[Array, "*batch two_K"]) -> Float[Array, "*batch K"]:
    """``silu(gate) * up``, the halves of the last axis."""
    gate, up = jnp.split(gate_up, 2, axis=-1)
    return jax.nn.silu(gate) * up


def swiglu_quantize(gate_up: Float[Array, "*batch two_K"], **settings: Any) -> QuantizedActivation:
    """Gates, then quantises; see the public function."""
    return reference.quantize_activations(swiglu(gate_up), **settings)
