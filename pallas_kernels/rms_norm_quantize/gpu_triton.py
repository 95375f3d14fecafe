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

_STATIC = ("epsilon", "bits", "group_size", "symmetric", "clip_ratio", "outlier_groups", "interpret")


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
    return _normalise_and_quantize(x, gain, interpret=interpret, **settings)


@functools.partial(jax.jit, static_argnames=_STATIC)
def _normalise_and_quantize(
    x: Array, gain: Array, *, epsilon: float, group_size: int, interpret: bool, **settings: Any
) -> QuantizedActivation:
    num_inputs = x.shape[-1]
    token = x.reshape(-1, num_inputs // group_size, group_size)
    return quantizer.launch_producer(
        functools.partial(_normalised, num_inputs=num_inputs, epsilon=epsilon, interpret=interpret),
        [
            (token, lambda *block: pl.BlockSpec((None, *block), lambda row, part: (row, part, 0))),
            (gain.reshape(token.shape[1:]), lambda *block: pl.BlockSpec(block, lambda row, part: (part, 0))),
        ],
        shape=x.shape,
        group_size=group_size,
        whole_tokens=True,
        interpret=interpret,
        name="rms_norm_quantize",
        **settings,
    )


def _normalised(
    x_ref,  # [block_groups, block_group]
    gain_ref,  # [block_groups, block_group]
    exists: Array,
    *,
    num_inputs: int,
    epsilon: float,
    interpret: bool,
) -> Array:
    dtype = x_ref.dtype
    x, gain = (
        plgpu.load(ref, mask=exists, other=jnp.zeros((), ref.dtype)).astype(jnp.float32) for ref in (x_ref, gain_ref)
    )
    total = jnp.sum(jnp.sum(jnp.square(x), axis=1, keepdims=True), axis=0, keepdims=True)  # one axis at a time
    scale = jax.lax.rsqrt(total * jnp.float32(1 / num_inputs) + jnp.float32(epsilon))
    normalised = quantizer.rounded_to(x * scale, dtype, interpret=interpret)
    # The product of two 16-bit floats is exact in float32, so this rounds once, as their own product does.
    return quantizer.rounded_to(normalised * gain, dtype, interpret=interpret)
