"""The gated unit ``silu(gate) * up`` in PTX, for the Triton and the Mosaic GPU kernels: one formula, the same bits.

Float32, each operation rounded by itself, so that no compiler makes one of two::

    up * (gate * (1 / (1 + 2^(gate * -log2(e)))))
"""

from __future__ import annotations

# Takes gate and up, with the constraints that follow.
_GATED = """{{.reg .f32 s;
mul.rn.f32 s, $1, 0fBFB8AA3B;
ex2.approx.ftz.f32 s, s;
add.rn.f32 s, s, 0f3F800000;
{reciprocal} s, s;
mul.rn.f32 s, $1, s;
mul.rn.f32 $0, s, $2;}}"""
CONSTRAINTS = "=f,f,f"
GATED = _GATED.format(reciprocal="rcp.rn.f32")
# Of a number from 1 to infinity, to a unit in the last place: for kernels that are short of registers. Correct rounding
# takes ten times the instructions.
GATED_ROUGHLY = _GATED.format(reciprocal="rcp.approx.ftz.f32")
