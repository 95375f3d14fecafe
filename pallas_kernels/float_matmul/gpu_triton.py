"""``float_matmul`` as a Pallas Triton kernel for NVIDIA GPUs (compute capability 8.0 and newer).

For few rows the time is that of reading the weight once. A program computes a tile of ``[block_m, block_n]``
outputs; programs that share a tile of the weight are neighbours in the grid, so that the second of them finds it in
the L2 cache. Of an LM head it sums over all of K. A narrower weight has too few tiles to keep the memory busy: there
``split`` programs share the sum, and leave its parts to the operation that reads the result.

Weights of linears are the left operand, ``out.T = weight @ x.T``: so Hopper multiplies any number of rows by wgmma,
whose left side is 64 high. Rows are the left operand of an LM head, of which few are verified.

Row invariance: ``block_k``, ``split``, the sides of the operands and the tensor-core instruction are the same for every
number of rows, so the sum of an output has one order.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from pallas_kernels.arrays.partial_sums import PartialSums
from pallas_kernels.backends.triton import matmul, registers
from pallas_kernels.float_matmul.reference import MAX_ROWS

PREFILL_ALIKE = True
_BLOCK_K = 64  # 128 bytes of a weight row, one cache line
_MIN_PROGRAMS = 264  # two for each SM of an H100
_MIN_PROGRAMS_OF_LINEARS = 190  # as many keep its memory busy with larger steps
_MAX_SPLIT = 8  # the reader of the result adds as many parts
_LARGE_SHARED_MEMORY = ("9.", "10.")  # compute capabilities of which a program may use 227 KB, and not 99


@dataclasses.dataclass(frozen=True)
class TileConfig:
    """How the outputs are cut into programs.

    Attributes:
        block_m: rows per program.
        block_n: outputs per program.
        block_k, split: inputs per step, and programs that share the sum over K; rows keep their bits only among
            configurations that agree in both.
        num_warps: warps per program; fewer than four for 64 rows or more, see :func:`tile_config`.
        num_stages: software pipeline depth.
        weight_first: the weight is the left operand.
    """

    block_m: int
    block_n: int
    block_k: int
    split: int
    num_warps: int
    num_stages: int
    weight_first: bool = False


PROMPT_TILES = TileConfig(128, 128, _BLOCK_K, 1, num_warps=4, num_stages=3, weight_first=True)  # of many rows


def tile_config(m: int, n: int, k: int, *, is_head: bool = False) -> TileConfig:
    """Tiles for ``m`` rows, ``n`` outputs and ``k`` inputs, of an LM head or of a linear."""
    if not is_head and n % 64 == 0 and k % 64 == 0:
        return _tiles_of_linear(m, n, k)
    return _tiles_of_head(m, n, k)


def _tiles_of_linear(m: int, n: int, k: int) -> TileConfig:
    """Those that were fastest on an H200, where 1 to 96 rows take the time of cuBLAS or less."""
    block_k = 128 if k % 128 == 0 else 64
    split = _split(k // block_k, n // 64, min_programs=_MIN_PROGRAMS_OF_LINEARS)
    block_m, block_n, num_stages = next(
        tiles for most, tiles in ((16, (16, 64, 4)), (32, (32, 64, 3)), (MAX_ROWS, (64, 64, 3))) if m <= most
    )
    if m > 64 and _has_large_shared_memory():
        block_m, block_n = 128, 128 if n % 128 == 0 else 64
    return TileConfig(block_m, block_n, block_k, split, num_warps=4, num_stages=num_stages, weight_first=True)


def _has_large_shared_memory() -> bool:
    capability = str(getattr(jax.local_devices()[0], "compute_capability", ""))
    return capability.startswith(_LARGE_SHARED_MEMORY)


def _tiles_of_head(m: int, n: int, k: int) -> TileConfig:
    """Tiles for the outputs of a vocabulary, or of any number.

    A tile of the weight takes 16 KB, two or three of which are in flight for each of the two or three programs that
    fit on an SM: more than the 40 KB that keep the memory of an H100 busy. Fewer outputs take narrower tiles, and
    then a share of K each, and so more programs.
    """
    block_n = next((block for block in (128, 64) if n >= block * _MIN_PROGRAMS), 32)
    split = _split(pl.cdiv(k, _BLOCK_K), pl.cdiv(n, block_n), min_programs=_MIN_PROGRAMS)
    if m > 32:
        # Four warps would take Triton's wgmma path here, which rounds differently from mma.sync.
        return TileConfig(64, block_n, _BLOCK_K, split, num_warps=2, num_stages=3)
    return TileConfig(16 if m <= 16 else 32, block_n, _BLOCK_K, split, num_warps=4, num_stages=4)


def _split(steps: int, tiles: int, *, min_programs: int) -> int:
    """The fewest equal shares of the steps over K that make enough programs, or the most that there may be."""
    shares = [share for share in range(1, _MAX_SPLIT + 1) if steps % share == 0]
    return next((share for share in shares if share * tiles >= min_programs), shares[-1])


def obstacle(num_rows: int | None, dtype: jnp.dtype) -> str | None:
    """Why this kernel cannot serve a call, as the end of a sentence; None if it can. Rows of prompts have no number."""
    if dtype == jnp.float32:
        return "needs bfloat16 or float16; x is float32"
    if num_rows is not None and not 0 < num_rows <= MAX_ROWS:
        return f"needs 1 to {MAX_ROWS} rows; x has {num_rows}"
    return None


def float_matmul(
    x: Float[Array, "*batch K"],
    weight: Float[Array, "N K"],
    *,
    dtype: DTypeLike = jnp.float32,
    prefill: bool = False,
    config: TileConfig | None = None,
    interpret: bool = False,
) -> Float[Array, "*batch N"] | PartialSums:
    """See the public functions. ``config`` replaces the choice of tiles."""
    registers.ignore_triton_deprecation()
    rows = x.reshape(-1, x.shape[-1])
    if prefill:
        config = config or PROMPT_TILES
    if config is None:
        # Nobody rounds the logits of a head, and a linear has the dtype of its rows.
        config = tile_config(rows.shape[0], *weight.shape, is_head=jnp.dtype(dtype) == jnp.float32)
    parts = _matmul(rows, weight, dtype=jnp.dtype(dtype), config=config, interpret=interpret)
    shape = *x.shape[:-1], weight.shape[0]
    return parts.reshape(shape) if config.split == 1 else PartialSums(parts, dtype).reshape(*shape)


# A jit of its own, so that a program with many layers lowers the kernel once per shape.
@functools.partial(jax.jit, static_argnames=("dtype", "config", "interpret"))
def _matmul(x: Array, weight: Array, *, dtype: jnp.dtype, config: TileConfig, interpret: bool) -> Array:
    (m, k), n = x.shape, weight.shape[0]
    return pl.pallas_call(
        functools.partial(_kernel, m=m, n=n, config=config, signals=dtype != jnp.float32, interpret=interpret),
        grid=(pl.cdiv(m, config.block_m), pl.cdiv(n, config.block_n), config.split),
        in_specs=[
            pl.BlockSpec((config.block_m, k), lambda m, n, p: (m, 0)),
            pl.BlockSpec((config.block_n, k), lambda m, n, p: (n, 0)),
        ],
        out_specs=pl.BlockSpec((None, config.block_m, config.block_n), lambda m, n, p: (p, m, n)),
        out_shape=jax.ShapeDtypeStruct((config.split, m, n), jnp.float32 if config.split > 1 else dtype),
        compiler_params=plgpu.CompilerParams(num_warps=config.num_warps, num_stages=config.num_stages),
        interpret=interpret,
        name="float_matmul",
    )(x, weight)


def _kernel(
    x_ref,  # [block_m, K] bf16 or f16
    weight_ref,  # [block_n, K]
    out_ref,  # [block_m, block_n]
    *,
    m: int,
    n: int,
    config: TileConfig,
    signals: bool,
    interpret: bool,
):
    k = x_ref.shape[1]
    rows_left = m - pl.program_id(0) * config.block_m
    outputs_left = n - pl.program_id(1) * config.block_n
    steps = pl.cdiv(pl.cdiv(k, config.block_k), config.split)
    part = pl.program_id(2)
    first_step = (registers.start_next(part, interpret=interpret) if signals else part) * steps

    def step(index, total):
        start = (first_step + index) * config.block_k
        x = _load_tile(x_ref, start, config.block_k, rows_left, whole_rows=m % config.block_m == 0)
        weight = _load_tile(weight_ref, start, config.block_k, outputs_left, whole_rows=n % config.block_n == 0)
        return total + matmul.dot_transposed(*((weight, x) if config.weight_first else (x, weight)))

    shape = (config.block_n, config.block_m) if config.weight_first else (config.block_m, config.block_n)
    total = jax.lax.fori_loop(0, steps, step, jnp.zeros(shape, jnp.float32))
    total = (total.T if config.weight_first else total).astype(out_ref.dtype)
    row, output = (jax.lax.broadcasted_iota(jnp.int32, total.shape, axis) for axis in range(2))
    plgpu.store(out_ref, total, mask=(row < rows_left) & (output < outputs_left))


def _load_tile(ref: registers.Ref, start: Array, width: int, rows_left: Array, *, whole_rows: bool) -> Array:
    """``ref[:, start : start + width]``, with zeros where the array has ended."""
    columns = ref.at[:, pl.ds(start, width)]
    num_rows, k = ref.shape
    row, column = (jax.lax.broadcasted_iota(jnp.int32, (num_rows, width), axis) for axis in range(2))
    ends = [] if whole_rows else [row < rows_left]
    if k % width:
        ends.append(column < k - start)
    if not ends:
        return plgpu.load(columns)
    return plgpu.load(columns, mask=functools.reduce(jnp.logical_and, ends), other=jnp.zeros((), ref.dtype))
