"""The gated unit ``silu(gate) * up`` in PTX, for the Triton and the Mosaic GPU kernels: one formula, the same bits.

Float32, each operation rounded by itself, so that no compiler makes one of two::

    up * (gate * (1 / (1 + 2^(gate * -log2(e)))))

``rcp.rn`` is spelled out: for numbers of such a size it is an approximation and a step of Newton's method, and for
others it calls a function. Beside a call, where there may be others that the compiler does not see, products of
warpgroups run one after the other. From ``2^126`` on, 0 stands for what a float32 cannot hold as a normal number.
"""

from __future__ import annotations

_ROUNDED = """rcp.approx.ftz.f32 r, s;
neg.f32 e, s;
fma.rn.f32 e, e, r, 0f3F800000;
fma.rn.f32 r, r, e, r;
setp.lt.f32 p, s, 0f7E800000;
selp.f32 s, r, 0f00000000, p;"""
# Takes gate and up, with the constraints that follow.
_GATED = """{{.reg .f32 s, r, e;
.reg .pred p;
mul.rn.f32 s, $1, 0fBFB8AA3B;
ex2.approx.ftz.f32 s, s;
add.rn.f32 s, s, 0f3F800000;
{reciprocal}
mul.rn.f32 s, $1, s;
mul.rn.f32 $0, s, $2;}}"""
CONSTRAINTS = "=f,f,f"
GATED = _GATED.format(reciprocal=_ROUNDED)
# Of a number from 1 to infinity, to a unit in the last place: for kernels that are short of registers.
GATED_ROUGHLY = _GATED.format(reciprocal="rcp.approx.ftz.f32 s, s;")
