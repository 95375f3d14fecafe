"""The specification of ``rms_norm_quantize`` in ``jax.numpy``, and its implementation on the CPU.

``rms_norm``, followed by ``quantize_activations``; their equations stand in their own references::

    s, y = rms_norm(x, gain, update)
    y[k] = scale * codes[k] - offset
"""

from __future__ import annotations

from typing import Any

from jaxtyping import Array, Float

from pallas_kernels.arrays.activation import QuantizedActivation
from pallas_kernels.arrays.partial_sums import PartialSums
from pallas_kernels.quantize_activations import reference
from pallas_kernels.rms_norm import reference as norm


def rms_norm_quantize(
    x: Float[Array, "*batch K"], gain: Float[Array, " K"], *, epsilon: float, **settings: Any
) -> QuantizedActivation:
    """Normalises, then quantises; see the public function."""
    return reference.quantize_activations(norm.rms_norm(x, gain, epsilon=epsilon), **settings)


def add_rms_norm_quantize(
    x: Float[Array, "*batch K"],
    update: Float[Array, "*batch K"] | PartialSums,
    gain: Float[Array, " K"],
    *,
    epsilon: float,
    **settings: Any,
) -> tuple[Float[Array, "*batch K"], QuantizedActivation]:
    """Adds, normalises, then quantises; ``s`` and the codes of ``y``."""
    total, normalised = norm.add_rms_norm(x, update, gain, epsilon=epsilon)
    return total, reference.quantize_activations(normalised, **settings)
