"""The axis legend, and the names of the five usual precisions.

Axes: ``B`` sequences of the batch, ``B_all`` these and further ones that make up whole tiles of rows, ``T`` tokens of
this call, ``S`` positions of the cache, ``L`` layers, ``H`` query heads, ``KH`` key/value heads, ``HD`` head
dimension, ``D`` hidden size, ``F`` MLP size, ``V`` vocabulary, ``K`` inputs and ``N`` outputs of a linear, ``G``
groups along ``K``.
"""

from __future__ import annotations

import enum


class Precision(enum.Enum):
    """How the linears of one pass are computed. The weights in memory are the same for all of them.

    Each names a view (``view.py``), which also says what else a pass reads.
    """

    W4A4 = "w4a4"
    """4-bit weights, 4-bit activations, integer matmul: a draft precision."""
    W4A8 = "w4a8"
    """4-bit weights, 8-bit activations, integer matmul: a draft precision."""
    W4A16 = "w4a16"
    """4-bit weights dequantised on the fly, activations untouched: the verify precision."""
    W8A16 = "w8a16"
    """8-bit weights dequantised on the fly, activations untouched: verifies where weights are nested."""
    FLOAT = "float"
    """Floating-point weights, or the same quantised weights dequantised and multiplied in float32."""
