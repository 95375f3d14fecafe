"""``rms_norm_quantize`` as a Pallas Triton kernel for NVIDIA GPUs (compute capability 8.0 and newer).

A program normalises one token and quantises it from registers. It has the token to itself, so its sum of squares
is added in the same order whatever tokens are computed beside it. That order is not XLA's: the mean may differ
from the reference's in its last bit, and a code that was nearly a tie by one.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float

from pallas_kernels.arrays.activation import QuantizedActivation
from pallas_kernels.arrays.partial_sums import PartialSums
from pallas_kernels.backends.triton import producers, registers
from pallas_kernels.rms_norm import gpu_triton as norm

_Input = tuple[Array, Callable[..., pl.BlockSpec]]
_STATIC = ("epsilon", "bits", "group_size", "symmetric", "clip_ratio", "outlier_groups", "layout", "interpret")


def obstacle(num_inputs: int, group_size: int) -> str | None:
    """Why this kernel cannot serve a shape, as the end of a sentence; None if it can."""
    values = pl.next_power_of_2(num_inputs // group_size) * pl.next_power_of_2(group_size)
    too_long = f"needs tokens of at most {producers.MAX_VALUES} inputs, padded; this is {num_inputs}"
    return too_long if values > producers.MAX_VALUES else None


def rms_norm_quantize(
    x: Float[Array, "*batch K"], gain: Float[Array, " K"], *, interpret: bool = False, **settings: Any
) -> QuantizedActivation:
    """See the public function."""
    registers.ignore_triton_deprecation()
    quantized, _ = _normalise_and_quantize(x, None, gain, interpret=interpret, **settings)
    return quantized


def add_rms_norm_quantize(
    x: Float[Array, "*batch K"],
    update: Float[Array, "*batch K"] | PartialSums,
    gain: Float[Array, " K"],
    *,
    interpret: bool = False,
    **settings: Any,
) -> tuple[Float[Array, "*batch K"], QuantizedActivation]:
    """``rms_norm_quantize`` with an update; see the public function."""
    registers.ignore_triton_deprecation()
    quantized, [total] = _normalise_and_quantize(x, update, gain, interpret=interpret, **settings)
    return total, quantized


@functools.partial(jax.jit, static_argnames=_STATIC)
def _normalise_and_quantize(
    x: Array,
    update: Array | PartialSums | None,
    gain: Array,
    *,
    epsilon: float,
    group_size: int,
    interpret: bool,
    **settings: Any,
) -> tuple[QuantizedActivation, list[Array]]:
    num_inputs = x.shape[-1]
    groups = num_inputs // group_size, group_size
    return producers.launch_producer(
        functools.partial(_normalised, num_inputs=num_inputs, epsilon=epsilon, interpret=interpret),
        [
            (gain.reshape(groups), lambda *block: pl.BlockSpec(block, lambda row, part: (part, 0))),
            _of_token(x, groups),
            *_update_of_token(update, groups),
        ],
        shape=x.shape,
        group_size=group_size,
        block_values=None,
        also_written=[] if update is None else [x.dtype],
        interpret=interpret,
        name="rms_norm_quantize",
        **settings,
    )


def _of_token(array: Array, groups: tuple[int, int]) -> _Input:
    """An input ``[..., K]`` and the blocks of one token."""
    return array.reshape(-1, *groups), lambda *block: pl.BlockSpec((None, *block), lambda row, part: (row, part, 0))


def _update_of_token(update: Array | PartialSums | None, groups: tuple[int, int]) -> list[_Input]:
    """The same of an update, or of each of its parts."""
    if not isinstance(update, PartialSums):
        return [] if update is None else [_of_token(update, groups)]
    parts = update.parts.reshape(len(update.parts), -1, *groups)

    def of_part(index: int) -> _Input:
        return parts, lambda *block: pl.BlockSpec((None, None, *block), lambda row, part: (index, row, part, 0))

    return [of_part(index) for index in range(len(parts))]


def _normalised(
    gain_ref,  # [block_groups, block_group]
    *refs,  # x, maybe an update as load_sum takes it and the sum [block_groups, block_group]; then which values exist
    num_inputs: int,
    epsilon: float,
    interpret: bool,
) -> Array:
    *refs, exists = refs
    inputs, sums = (refs, []) if len(refs) == 1 else (refs[:-1], refs[-1:])
    gain = plgpu.load(gain_ref, mask=exists, other=jnp.zeros((), gain_ref.dtype)).astype(jnp.float32)
    x = norm.load_sum(inputs, sums, exists, interpret=interpret)
    return norm.normalise(
        x, gain, axes=(1, 0), num_inputs=num_inputs, epsilon=epsilon, dtype=gain_ref.dtype, interpret=interpret
    )
