"""``rms_norm_quantize`` as a Pallas Triton kernel for NVIDIA GPUs (compute capability 8.0 and newer).

A program normalises one token and quantises it from registers. It has the token to itself, so its sum of squares
is added in the same order whatever tokens are computed beside it. That order is not XLA's: the mean may differ
from the reference's in its last bit, and a code that was nearly a tie by one.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float

from pallas_kernels import gpu_triton as tiles
from pallas_kernels.activations import QuantizedActivation
from pallas_kernels.quantize_activations import gpu_triton as quantizer
from pallas_kernels.rms_norm import gpu_triton as norm

_STATIC = ("epsilon", "bits", "group_size", "symmetric", "clip_ratio", "outlier_groups", "layout", "interpret")


def obstacle(num_inputs: int, group_size: int) -> str | None:
    """Why this kernel cannot serve a shape, as the end of a sentence; None if it can."""
    values = pl.next_power_of_2(num_inputs // group_size) * pl.next_power_of_2(group_size)
    too_long = f"needs tokens of at most {quantizer.MAX_VALUES} inputs, padded; this is {num_inputs}"
    return too_long if values > quantizer.MAX_VALUES else None


def rms_norm_quantize(
    x: Float[Array, "*batch K"], gain: Float[Array, " K"], *, interpret: bool = False, **settings: Any
) -> QuantizedActivation:
    """See the public function."""
    tiles.ignore_triton_deprecation()
    quantized, _ = _normalise_and_quantize((x,), gain, interpret=interpret, **settings)
    return quantized


def add_rms_norm_quantize(
    x: Float[Array, "*batch K"],
    update: Float[Array, "*batch K"],
    gain: Float[Array, " K"],
    *,
    interpret: bool = False,
    **settings: Any,
) -> tuple[Float[Array, "*batch K"], QuantizedActivation]:
    """``rms_norm_quantize`` with an update; see the public function."""
    tiles.ignore_triton_deprecation()
    quantized, [total] = _normalise_and_quantize((x, update), gain, interpret=interpret, **settings)
    return total, quantized


@functools.partial(jax.jit, static_argnames=_STATIC)
def _normalise_and_quantize(
    inputs: tuple[Array, ...], gain: Array, *, epsilon: float, group_size: int, interpret: bool, **settings: Any
) -> tuple[QuantizedActivation, list[Array]]:
    shape, dtype = inputs[0].shape, inputs[0].dtype
    tokens = [array.reshape(-1, shape[-1] // group_size, group_size) for array in inputs]
    return quantizer.launch_producer(
        functools.partial(_normalised, num_inputs=shape[-1], epsilon=epsilon, interpret=interpret),
        [
            (gain.reshape(tokens[0].shape[1:]), lambda *block: pl.BlockSpec(block, lambda row, part: (part, 0))),
            *[
                (token, lambda *block: pl.BlockSpec((None, *block), lambda row, part: (row, part, 0)))
                for token in tokens
            ],
        ],
        shape=shape,
        group_size=group_size,
        whole_tokens=True,
        also_written=[dtype] * (len(inputs) - 1),
        interpret=interpret,
        name="rms_norm_quantize",
        **settings,
    )


def _normalised(
    gain_ref,  # [block_groups, block_group]
    *refs,  # x, or x, an update and their sum: [block_groups, block_group]; then which values exist
    num_inputs: int,
    epsilon: float,
    interpret: bool,
) -> Array:
    *refs, exists = refs
    inputs, sums = refs[: len(refs) // 2 + 1], refs[len(refs) // 2 + 1 :]
    gain = plgpu.load(gain_ref, mask=exists, other=jnp.zeros((), gain_ref.dtype)).astype(jnp.float32)
    x = norm.load_sum(inputs, sums, exists, interpret=interpret)
    return norm.normalise(
        x, gain, axes=(1, 0), num_inputs=num_inputs, epsilon=epsilon, dtype=gain_ref.dtype, interpret=interpret
    )
