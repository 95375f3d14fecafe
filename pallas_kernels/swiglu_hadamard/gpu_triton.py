"""``swiglu_hadamard`` as a Pallas Triton kernel for NVIDIA GPUs (compute capability 8.0 and newer).

The kernel of ``hadamard``, whose input is computed in registers. ``silu(gate) * up`` is float32 until it is rounded to
the dtype of the inputs. Few tokens are spread over programs that compute it anew; that costs less than waiting.
"""

from __future__ import annotations

import functools

import jax
from jax.experimental import pallas as pl
from jaxtyping import Array, Float

from pallas_kernels import gpu_triton as tiles
from pallas_kernels.hadamard import gpu_triton as transforms
from pallas_kernels.swiglu.gpu_triton import gated

_MANY_TOKENS = 64  # that keep a GPU busy with a program per section
_MAX_TILES = 5  # that a program holds in registers

obstacle = transforms.obstacle


def swiglu_hadamard(
    gate_up: Float[Array, "*batch two_K"], *, block: int, interpret: bool = False
) -> Float[Array, "*batch K"]:
    """See the public function."""
    tiles.ignore_triton_deprecation()
    return _gate_and_transform(gate_up, block=block, interpret=interpret)


@functools.partial(jax.jit, static_argnames=("block", "interpret"))
def _gate_and_transform(gate_up: Array, *, block: int, interpret: bool) -> Array:
    *batch, both = gate_up.shape
    cut = transforms.Cut.of(both // 2, block)
    halves = halves_of_tokens(gate_up, cut)
    out = transforms.launch_transform(
        functools.partial(gated, dtype=gate_up.dtype, interpret=interpret),
        halves,
        cut=cut,
        tiles_together=halves[0][0].shape[0] >= _MANY_TOKENS and cut.tiles_per_section <= _MAX_TILES,
        interpret=interpret,
        name="swiglu_hadamard",
    )
    return out.reshape(*batch, both // 2)


def halves_of_tokens(gate_up: Array, cut: transforms.Cut) -> list[tuple[Array, pl.BlockSpec]]:
    """Gate and up, each with the specification of a token: one array read twice, since a slice of it is a copy."""
    halves = gate_up.reshape(-1, 2, cut.rows, cut.width)

    def half(index: int) -> pl.BlockSpec:
        return pl.BlockSpec((None, None, cut.padded_rows, cut.width), lambda token, program: (token, index, 0, 0))

    return [(halves, half(index)) for index in range(2)]
