"""GPTQ (Frantar et al., 2022, arXiv 2210.17323): rounding that makes up for its own errors.

The inputs of a weight are rounded one after the other, and what each rounding adds to the output
``W x`` is taken back, as far as possible, by the inputs that are not rounded yet. How far that is, the second
moments of the activations say: ``hessian = mean of x x^T``.

- Activation order: inputs are rounded by decreasing ``hessian`` diagonal, the loudest first, before anything was
  shifted onto them. Groups stay those of consecutive inputs ("static groups"), so no permutation is stored.
- The grid of a group is fixed beforehand, from the weights as they were: of a few clip ratios the one with the
  least squared error, weighted by the diagonal.
- A nested weight has two roundings, to its 8-bit codes and to their upper nibbles, and the errors of both are taken
  back in one, as MatGPTQ does (arXiv 2602.03537). That of the upper nibbles has a small share: what makes up for it is
  an error of the 8-bit weight.
- Inputs are taken in blocks: within one, each rounding updates the block; then all the others are updated by one
  matrix product (section 3.3 there).

``qwix.contrib.gptq_core`` (0.1.8) was tried first: it has no activation order and no clip search, raises for
asymmetric weights, keeps float32 scales, and unrolls a step per input into its program, whereas this is one
compiled loop for every shape.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Float32, Int32, UInt8

from pallas_kernels.arrays.weight import TRUNCATED_CODE, QuantizedWeight, check_group_size, pack_codes, pack_nested
from qspec_jax.quantization.rtn import nearest_codes, spanning_grid

CLIP_RATIOS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7)
DAMPING = 0.01
UPPER_SHARE = (
    1 / 32
)  # of the error of upper nibbles in what is taken back: 1/16 would leave the 8-bit error of rounding
_MAX_BLOCK = 128


@functools.partial(
    jax.jit, static_argnames=("group_size", "symmetric", "bits", "damping", "clip_ratios", "upper_share")
)
def gptq(
    weight: Float[Array, "N K"],
    hessian: Float32[Array, "K K"],
    *,
    group_size: int | None = None,
    symmetric: bool = False,
    bits: int = 4,
    damping: float = DAMPING,
    clip_ratios: tuple[float, ...] = CLIP_RATIOS,
    upper_share: float = UPPER_SHARE,
) -> QuantizedWeight:
    """Rounds a weight to 4 bits, or to a nested one of 8, so that its output on the calibration text changes little.

    Args:
        weight: ``[N, K]``, any float dtype.
        hessian: ``[K, K]``, mean or sum of ``x x^T`` over the inputs ``x`` of the weight.
        group_size: inputs per scale, None for the whole row.
        symmetric: no offset.
        bits: 4 or 8.
        damping: share of the diagonal's mean that is added to the diagonal.
        clip_ratios: the grid of each group spans the best of these shares of what its weights span.
        upper_share: of a nested weight, how much the error of the upper nibbles counts, from 0 to 1.

    Returns:
        the weight, with scales and offsets in the dtype of ``quantize_rtn``.

    Raises:
        ValueError: ``group_size`` does not divide ``K``; the message names sizes that do.
    """
    num_outputs, num_inputs = weight.shape
    group_size = group_size or num_inputs
    check_group_size(num_inputs, group_size)
    weight = weight.astype(jnp.float32)
    loudness = jnp.diagonal(hessian)
    groups = weight.reshape(num_outputs, num_inputs // group_size, group_size)
    grid = _Grid(symmetric, bits, upper_share if bits == 8 else 0.0)
    scale, offset = _best_grid(groups, loudness.reshape(-1, group_size), grid, clip_ratios)
    order = jnp.argsort(-loudness, stable=True).astype(jnp.int32)
    compensation = _compensation(hessian[order][:, order], damping)
    ordered = _round_in_order(weight.T[order], compensation, order // group_size, scale.T, offset.T, grid)
    codes = jnp.zeros_like(ordered).at[order].set(ordered).T
    packed, low = (pack_codes(codes), None) if bits == 4 else pack_nested(codes)
    return QuantizedWeight(packed, scale.T, None if symmetric else offset.T, low=low)


@dataclasses.dataclass(frozen=True)
class _Grid:
    """The kind of a grid, and how much the upper nibbles of its codes count."""

    symmetric: bool
    bits: int
    upper_share: float

    def spanning(self, groups: Array, clip_ratio: float | Array = 1.0) -> tuple[Array, Array]:
        """Scale and offset."""
        return spanning_grid(groups, symmetric=self.symmetric, clip_ratio=clip_ratio, bits=self.bits)

    def nearest(self, weight: Array, scale: Array, offset: Array) -> Float32[Array, ...]:
        """Codes."""
        return nearest_codes(weight, scale, offset, bits=self.bits)

    def value(self, codes: Array, scale: Array, offset: Array) -> Float32[Array, ...]:
        """What a code is worth, to both of its readers together."""
        steps = codes / 2 ** (self.bits - 4)
        if self.upper_share:
            steps = steps + self.upper_share * (jnp.floor(steps) + TRUNCATED_CODE - steps)
        return steps * scale.astype(jnp.float32) - offset.astype(jnp.float32)


def _best_grid(
    groups: Float32[Array, "N G group"],
    loudness: Float32[Array, "G group"],
    grid: _Grid,
    clip_ratios: tuple[float, ...],
) -> tuple[Float[Array, "N G"], Float[Array, "N G"]]:
    """Scale and offset of each group by the clip ratio whose rounding errors weigh least."""

    def try_ratio(best: tuple[Array, Array, Array], clip_ratio: Array) -> tuple[tuple[Array, Array, Array], None]:
        scale, offset = grid.spanning(groups, clip_ratio)
        codes = grid.nearest(groups, scale[..., None], offset[..., None])
        error = (jnp.square(grid.value(codes, scale[..., None], offset[..., None]) - groups) * loudness).sum(-1)
        better = error < best[0]
        tried = (error, scale, offset)
        first, second, third = (jnp.where(better, new, old) for new, old in zip(tried, best, strict=True))
        return (first, second, third), None

    scale, offset = grid.spanning(groups)
    nothing = (jnp.full(scale.shape, jnp.inf, jnp.float32), scale, offset)
    (_, scale, offset), _ = lax.scan(try_ratio, nothing, jnp.asarray(clip_ratios, jnp.float32))
    return scale, offset


def _compensation(hessian: Float32[Array, "K K"], damping: float) -> Float32[Array, "K K"]:
    """The upper Cholesky factor ``U`` of the damped inverse, ``U^T U = H^-1``.

    Row ``i`` says how an error of input ``i`` is spread over the later ones. If ``R R^T = H`` with ``R`` upper
    triangular, which is a Cholesky factor with both axes reversed, ``U = R^-1``: nothing is inverted twice. Damping
    of 1% keeps the factorisation safe in float32 for any K below 10^5: no eigenvalue exceeds K times the mean.
    """
    mean = jnp.diagonal(hessian).mean()
    added = jnp.where(mean > 0, damping * mean, 1.0)
    identity = jnp.eye(hessian.shape[0], dtype=jnp.float32)
    lower = jnp.linalg.cholesky((hessian + added * identity)[::-1, ::-1])
    return lax.linalg.triangular_solve(lower[::-1, ::-1], identity, left_side=True, lower=False)


def _round_in_order(
    weight: Float32[Array, "K N"],
    compensation: Float32[Array, "K K"],
    group: Int32[Array, " K"],
    scale: Float[Array, "G N"],
    offset: Float[Array, "G N"],
    grid: _Grid,
) -> UInt8[Array, "K N"]:
    """Codes of the inputs (rows here), rounded from the first to the last."""
    num_inputs = weight.shape[0]
    block = next(size for size in range(min(_MAX_BLOCK, num_inputs), 0, -1) if num_inputs % size == 0)

    def one_block(weight: Array, start: Array) -> tuple[Array, Array]:
        spread = lax.dynamic_slice_in_dim(compensation, start, block)
        within = lax.dynamic_slice_in_dim(spread, start, block, axis=1)
        groups = lax.dynamic_slice_in_dim(group, start, block)

        def one_input(rows: Array, index: Array) -> tuple[Array, tuple[Array, Array]]:
            row, place = rows[index], (scale[groups[index]], offset[groups[index]])
            codes = grid.nearest(row, *place)
            error = (row - grid.value(codes, *place)) / within[index, index]
            return rows - within[index][:, None] * error, (codes.astype(jnp.uint8), error)

        rows = lax.dynamic_slice_in_dim(weight, start, block)
        _, (codes, errors) = lax.scan(one_input, rows, jnp.arange(block))
        # Rows up to this block change too, or not (their part of the triangle is zero); none is read again.
        return weight - jnp.matmul(spread.T, errors, precision=lax.Precision.HIGHEST), codes

    _, codes = lax.scan(one_block, weight, jnp.arange(0, num_inputs, block))
    return codes.reshape(weight.shape)
