"""The axis legend, and the precision a call runs at.

Axes: ``B`` sequences of the batch, ``T`` tokens of this call, ``S`` cache slots, ``L`` layers, ``H``
query heads, ``KH`` key/value heads, ``HD`` head dimension, ``D`` hidden size, ``F`` MLP size, ``V``
vocabulary, ``K`` inputs and ``N`` outputs of a linear, ``G`` groups along ``K``.
"""

from __future__ import annotations

import enum


class Precision(enum.Enum):
    """How the linears of one call are computed. The weights in memory are the same for all of them.

    A precision is data of the call, never of the model: it is passed as a keyword, static under jit.
    """

    W4A4 = "w4a4"
    """4-bit weights, 4-bit activations, integer matmul: a draft precision."""
    W4A8 = "w4a8"
    """4-bit weights, 8-bit activations, integer matmul: a draft precision."""
    W4A16 = "w4a16"
    """4-bit weights dequantised on the fly, activations untouched: the verify precision."""
    FLOAT = "float"
    """Floating-point weights, or the same 4-bit weights dequantised and multiplied in float32."""

    @property
    def activation_bits(self) -> int | None:
        """Bits of an integer activation, or None where activations stay in floating point."""
        return {Precision.W4A4: 4, Precision.W4A8: 8}.get(self)
