"""``swiglu_hadamard`` as a Pallas Triton kernel for NVIDIA GPUs (compute capability 8.0 and newer).

The kernel of ``hadamard``, whose input is computed in registers. ``silu(gate) * up`` is float32 until it is rounded to
the dtype of the inputs. Programs that share a section would each compute all of its product: where sections have
several tiles, ``swiglu`` computes it before.
"""

from __future__ import annotations

import functools

import jax
from jax.experimental import pallas as pl
from jaxtyping import Array, Float

from pallas_kernels.backends.triton import registers
from pallas_kernels.hadamard import gpu_triton as transforms
from pallas_kernels.swiglu import gpu_triton as gating

obstacle = transforms.obstacle


def swiglu_hadamard(
    gate_up: Float[Array, "*batch two_K"], *, block: int, interpret: bool = False
) -> Float[Array, "*batch K"]:
    """See the public function."""
    registers.ignore_triton_deprecation()
    return _gate_and_transform(gate_up, block=block, interpret=interpret)


@functools.partial(jax.jit, static_argnames=("block", "interpret"))
def _gate_and_transform(gate_up: Array, *, block: int, interpret: bool) -> Array:
    *batch, both = gate_up.shape
    cut = transforms.Cut.of(both // 2, block)
    combine, inputs = inputs_of_transform(gate_up, cut, interpret=interpret)
    [out] = transforms.launch_transform(combine, inputs, cut=cut, interpret=interpret, name="swiglu_hadamard")
    return out.reshape(*batch, both // 2)


def inputs_of_transform(
    gate_up: Float[Array, "*batch two_K"], cut: transforms.Cut, *, interpret: bool
) -> tuple[transforms.Combine, list[tuple[Array, pl.BlockSpec]]]:
    """What ``launch_transform`` combines: gate and up of a token, or their product."""
    if cut.tiles_per_section > 1:
        return transforms.as_it_is, [transforms.whole_tokens(gating.swiglu(gate_up, interpret=interpret), cut)]
    halves = gate_up.reshape(-1, 2, cut.rows, cut.width)

    def half(index: int) -> pl.BlockSpec:
        return pl.BlockSpec((None, None, cut.padded_rows, cut.width), lambda token, program: (token, index, 0, 0))

    # One array read twice, since a slice of it is a copy.
    inputs = [(halves, half(index)) for index in range(2)]
    return functools.partial(gating.gated, dtype=gate_up.dtype, interpret=interpret), inputs
