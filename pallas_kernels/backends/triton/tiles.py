"""How the Pallas Triton matmuls are cut into programs.

Row invariance: up to ``ROW_INVARIANT_ROWS`` rows, ``block_k``, ``split`` and the order over K depend on the
weight and the dtypes alone, so a row gets the same bits whatever rows are computed beside it. More rows are
a prefill, where larger tiles and another tensor-core instruction round differently. Prompts that are read beside
others have tiles of their own for any number of rows (:func:`prefill_config`).
"""

from __future__ import annotations

import dataclasses
import math

ROW_INVARIANT_ROWS = 256  # a batch of 64 that verifies 4 tokens each
_MIN_DOT_SIDE = 16  # of a tensor-core dot in Triton
_MIN_BLOCK_K = 32  # of an int8 tensor-core dot


@dataclasses.dataclass(frozen=True)
class TileConfig:
    """How a matmul is cut into programs.

    Attributes:
        block_m: rows per program.
        block_n: outputs per program.
        block_k: bytes of a weight row per step, that is inputs per nibble plane.
        split: programs that share the sum over K; their partial sums are added in a fixed order.
        num_warps: warps per program.
        num_stages: software pipeline depth.
        sums_once: the sum of a row's activations, which zero points need, is taken once for a tile and not in every
            column of it. Its order depends on ``block_m``: rows that are to be alike need one.
    """

    block_m: int
    block_n: int
    block_k: int
    split: int
    num_warps: int
    num_stages: int
    sums_once: bool = False


def tile_config(m: int, n: int, k: int, run: int, *, integer: bool = False, asymmetric: bool = False) -> TileConfig:
    """The tiles that were fastest on an H200 among those that keep rows invariant.

    Args:
        m, n, k: rows, outputs and inputs.
        run: inputs that share all scales within a plane (see :func:`scale_run`).
        integer: int8 activations whose products are scaled in the loop.
        asymmetric: the weight has zero points, so row sums are taken in the loop; of integers, whose tokens have one
            scale each.
    """
    if m > ROW_INVARIANT_ROWS:
        block_m = 64 if integer else 128
        block_n = min(_power_of_two_divisor(n), 8192 // block_m)
        return TileConfig(block_m, block_n, min(run, 64), 1, num_warps=4, num_stages=3)
    block_k = min(run, 128)
    block_n = min(_power_of_two_divisor(n), 64)
    min_programs = 400 if integer else 512 if asymmetric or run < 128 else 384
    split = _split(k // 2 // block_k, n // block_n, min_programs=min_programs)
    if integer and m > 32 and split == 1 and n % 128 == 0 and run >= 128:
        return TileConfig(64, 128, block_k, split, num_warps=4, num_stages=3)
    if integer and asymmetric and m > 16:
        return TileConfig(32, block_n, block_k, split, num_warps=4, num_stages=3)
    if integer:
        block_m = next(rows for rows in (16, 32, 64) if m <= rows or rows == 64)
        return TileConfig(block_m, block_n, block_k, split, num_warps=2, num_stages=3)
    if asymmetric and m <= 16 and n % 128 == 0 and run == 128:
        return TileConfig(16, 128, block_k, split, num_warps=2, num_stages=3)  # as measured
    # 64 rows in four warps would take Triton's wgmma path, which rounds differently from mma.sync.
    return TileConfig(16 if m <= 16 else 32, block_n, block_k, split, num_warps=4, num_stages=3)


def rounds_weights(num_inputs: int, group_size: int, *, symmetric: bool, bits: int = 4) -> bool:
    """Whether programs round a weight to the 16 bits of their rows, and multiply by it from the left.

    A weight takes a multiplication and an addition then, once for all rows of a program. Else each sum takes two of
    them per tile, which is exact, and less work for few rows unless groups are small and have offsets. Where a row is
    one group, sums are scaled once.
    """
    few_inputs_a_scale = group_size < num_inputs and scale_run(num_inputs, group_size) < 64
    return bits == 4 and not symmetric and few_inputs_a_scale


def rounding_config(m: int, n: int, k: int, run: int) -> TileConfig:
    """Tiles of a weight that programs round (:func:`rounds_weights`), the fastest ones on an H200.

    ``block_n`` is 64 wherever it can be, for all numbers of rows: then all of them take the same instructions.
    """
    block_n = min(_power_of_two_divisor(n), 64)
    blocks, steps = n // block_n, k // 2 // run
    split = _split(steps, blocks, min_programs=264)
    if split == steps > 1:  # a step alone has nothing to load ahead
        fewer = max(d for d in range(1, split) if steps % d == 0)
        split = fewer if fewer * blocks >= 132 else split
    block_m = next(rows for rows in (16, 32, 64, 128) if m <= rows or rows == 128)
    while block_m > 32 and blocks * split * math.ceil(m / block_m) < 200:
        block_m //= 2
    return TileConfig(block_m, block_n, run, split, num_warps=4, num_stages=3)


def prefill_config(n: int, run: int, *, exact: bool) -> TileConfig:
    """The tiles of prompts that are read beside others, the same for any number of rows: nothing is left to add.

    Args:
        n: outputs.
        run: inputs that share all scales within a plane.
        exact: float32 rows, which take twice the shared memory and three times the dots.
    """
    block_n, block_k = min(_power_of_two_divisor(n), 64), min(run, 64)
    if exact:
        return TileConfig(32, block_n, block_k, 1, num_warps=4, num_stages=2)
    return TileConfig(128, block_n, block_k, 1, num_warps=4, num_stages=3, sums_once=True)


def _split(steps: int, blocks: int, *, min_programs: int) -> int:
    """The smallest divisor of ``steps``, up to 16, that makes ``min_programs``; else the largest."""
    divisors = [d for d in range(1, 17) if steps % d == 0]
    return next((d for d in divisors if d * blocks >= min_programs), divisors[-1])


def scale_run(num_inputs: int, *group_sizes: int) -> int:
    """The largest power of two that divides every group size and a nibble plane."""
    return _power_of_two_divisor(math.gcd(num_inputs // 2, *group_sizes))


def matmul_obstacle(num_outputs: int, num_inputs: int, *group_sizes: int) -> str | None:
    """Why no tile fits these sizes, as the end of a sentence; None if one does."""
    if num_inputs % (2 * _MIN_BLOCK_K):
        return f"needs K to be a multiple of {2 * _MIN_BLOCK_K}; this is {num_inputs}"
    if num_outputs % _MIN_DOT_SIDE:
        return f"needs N to be a multiple of {_MIN_DOT_SIDE}; this is {num_outputs}"
    if scale_run(num_inputs, *group_sizes) < _MIN_BLOCK_K:
        sizes = " and ".join(map(str, group_sizes))
        return f"needs group sizes that are multiples of {_MIN_BLOCK_K}; these are {sizes} of K={num_inputs}"
    return None


def _power_of_two_divisor(size: int) -> int:
    return size & -size
