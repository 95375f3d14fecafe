"""``rms_norm`` as a Pallas Triton kernel for NVIDIA GPUs (compute capability 8.0 and newer).

A program normalises one token, or several where tokens are short (the heads of a query), of which each is summed
alone. The tile depends on K only, so the sum of squares is added in the same order whatever tokens are computed
beside it. That order is not XLA's: the mean may differ from the reference's in its last bit.

:func:`normalise` and :func:`load_sum` are what ``rms_norm_quantize`` shares.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from pallas_kernels.arrays.partial_sums import PartialSums, tree_sum
from pallas_kernels.backends.triton import registers
from pallas_kernels.backends.triton.producers import MAX_VALUES, rounded_to

_BLOCK_VALUES = 1024  # values per program where tokens are short
_VALUES_PER_WARP = 512


def obstacle(num_inputs: int) -> str | None:
    """Why this kernel cannot serve a shape, as the end of a sentence; None if it can."""
    if num_inputs > MAX_VALUES:
        return f"needs tokens of at most {MAX_VALUES} inputs; this is {num_inputs}"
    return None


def rms_norm(
    x: Float[Array, "*batch K"],
    gain: Float[Array, " K"],
    *,
    epsilon: float,
    num_warps: int | None = None,
    interpret: bool = False,
) -> Float[Array, "*batch K"]:
    """See the public function. ``num_warps`` replaces the choice for a program."""
    [norm] = _launch(x, None, gain, epsilon=epsilon, num_warps=num_warps, interpret=interpret)
    return norm


def add_rms_norm(
    x: Float[Array, "*batch K"],
    update: Float[Array, "*batch K"] | PartialSums,
    gain: Float[Array, " K"],
    *,
    epsilon: float,
    num_warps: int | None = None,
    interpret: bool = False,
) -> tuple[Float[Array, "*batch K"], Float[Array, "*batch K"]]:
    """``rms_norm`` with an update; see the public function."""
    total, norm = _launch(x, update, gain, epsilon=epsilon, num_warps=num_warps, interpret=interpret)
    return total, norm


def _launch(x: Array, update: Array | PartialSums | None, gain: Array, **settings: Any) -> list[Array]:
    registers.ignore_triton_deprecation()
    rows = x.reshape(-1, x.shape[-1])
    update = None if update is None else update.reshape(*rows.shape)
    return [array.reshape(x.shape) for array in _rms_norm(rows, update, gain, **settings)]


@functools.partial(jax.jit, static_argnames=("epsilon", "num_warps", "interpret"))
def _rms_norm(
    x: Array,
    update: Array | PartialSums | None,
    gain: Array,
    *,
    epsilon: float,
    num_warps: int | None,
    interpret: bool,
) -> Sequence[Array]:
    """The sum, if there is an update, and the norm: each ``[M, K]``."""
    num_rows, num_inputs = x.shape
    block_k = pl.next_power_of_2(num_inputs)
    block_rows = max(1, _BLOCK_VALUES // block_k)
    row_spec = pl.BlockSpec((block_rows, block_k), lambda row: (row, 0))
    updates = _update_blocks(update, block_rows, block_k)
    num_outputs = 1 if update is None else 2
    return pl.pallas_call(
        functools.partial(_kernel, shape=x.shape, num_outputs=num_outputs, epsilon=epsilon, interpret=interpret),
        grid=(pl.cdiv(num_rows, block_rows),),
        in_specs=[
            pl.BlockSpec((1, block_k), lambda row: (0, 0)),
            row_spec,
            *[spec for _, spec in updates],
        ],
        out_specs=[row_spec] * num_outputs,
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype)] * num_outputs,
        compiler_params=plgpu.CompilerParams(
            num_warps=num_warps or max(4, min(16, block_k // _VALUES_PER_WARP)), num_stages=1
        ),
        interpret=interpret,
        name="rms_norm",
    )(gain[None], x, *[array for array, _ in updates])


def _update_blocks(
    update: Array | PartialSums | None, block_rows: int, block_k: int
) -> list[tuple[Array, pl.BlockSpec]]:
    """The update, or each of its parts: one array read several times, since slices of it would be copies."""
    if not isinstance(update, PartialSums):
        return [] if update is None else [(update, pl.BlockSpec((block_rows, block_k), lambda row: (row, 0)))]

    def part(index: int) -> tuple[Array, pl.BlockSpec]:
        return update.parts, pl.BlockSpec((None, block_rows, block_k), lambda row: (index, row, 0))

    return [part(index) for index in range(len(update.parts))]


def _kernel(
    gain_ref,  # [1, block_k]
    *refs,  # x, and maybe an update as load_sum takes it; then the sum if there was one, and the norm
    shape: tuple[int, ...],  # tokens, values of a token
    num_outputs: int,
    epsilon: float,
    interpret: bool,
):
    inputs, outputs = refs[:-num_outputs], refs[-num_outputs:]
    row, column = (jax.lax.broadcasted_iota(jnp.int32, inputs[0].shape, axis) for axis in range(2))
    first_row = registers.start_next(pl.program_id(0), interpret=interpret) * inputs[0].shape[0]
    exists = (first_row + row < shape[0]) & (column < shape[1])
    column = jax.lax.broadcasted_iota(jnp.int32, gain_ref.shape, 1)
    gain = plgpu.load(gain_ref, mask=column < shape[1], other=jnp.zeros((), gain_ref.dtype)).astype(jnp.float32)
    total = load_sum(inputs, outputs[:-1], exists, interpret=interpret)
    dtype = outputs[-1].dtype
    norm = normalise(total, gain, axes=(1,), num_inputs=shape[1], epsilon=epsilon, dtype=dtype, interpret=interpret)
    plgpu.store(outputs[-1], norm.astype(dtype), mask=exists)


def load_sum(
    inputs: Sequence[registers.Ref], sums: Sequence[registers.Ref], exists: Array, *, interpret: bool
) -> Array:
    """The block of the only input, or that of the sum of both, which is stored too; float32, zero where not ``exists``.

    Args:
        inputs: a ref, and maybe an update: of the same shape and dtype, or several that are its partial sums.
        sums: where the sum of two is stored; empty for one.
    """
    x, *update = (plgpu.load(ref, mask=exists, other=jnp.zeros((), ref.dtype)).astype(jnp.float32) for ref in inputs)
    if not update:
        return x
    dtype = inputs[0].dtype
    added = update[0] if len(update) == 1 else rounded_to(tree_sum(update), dtype, interpret=interpret)
    total = rounded_to(x + added, dtype, interpret=interpret)
    plgpu.store(sums[0], total.astype(dtype), mask=exists)
    return total


def normalise(
    x: Array,
    gain: Array,
    *,
    axes: tuple[int, ...],
    num_inputs: int,
    epsilon: float,
    dtype: DTypeLike,
    interpret: bool,
) -> Array:
    """The norm of float32 ``x`` over ``axes``, rounded to ``dtype`` where the reference does, in float32.

    Args:
        x: zero where a token has no value.
        gain: float32, broadcasts with ``x``.
        num_inputs: values of a token.
    """
    total = jnp.square(x)
    for axis in axes:  # one at a time, which Triton wants
        total = jnp.sum(total, axis=axis, keepdims=True)
    scale = jax.lax.rsqrt(total * jnp.float32(1 / num_inputs) + jnp.float32(epsilon))
    normalised = rounded_to(x * scale, dtype, interpret=interpret)
    # The product of two 16-bit floats is exact in float32, so this rounds once, as their own product does.
    return rounded_to(normalised * gain, dtype, interpret=interpret)
