"""What the Pallas Triton kernels of this package share: nibble decoding, tiles, and the launch of a matmul.

A matmul kernel walks over tiles of ``[block_n, block_k]`` packed bytes. Each byte tile feeds two dots, one
per nibble plane, so the two tiles of activations lie ``K/2`` inputs apart. ``block_k`` divides the group
size, hence a tile never straddles two groups and its scale multiplies the dot's float32 result.

Row invariance: up to ``ROW_INVARIANT_ROWS`` rows, ``block_k``, ``split`` and the order over K depend on the
weight and the dtypes alone, so a row gets the same bits whatever rows are computed beside it. More rows are
a prefill, where larger tiles and another tensor-core instruction round differently.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jax.typing import DTypeLike

from pallas_kernels import early_launch, tuning
from pallas_kernels.packing import QuantizedWeight

Ref = Any  # a block of memory inside a kernel; JAX publishes no type for it

ROW_INVARIANT_ROWS = 256  # a batch of 64 that verifies 4 tokens each
_MIN_DOT_SIDE = 16  # of a tensor-core dot in Triton
_MIN_BLOCK_K = 32  # of an int8 tensor-core dot
INT8_CODE_FACTOR = 16  # decode_planes returns 16 * (code - 8) as int8

# Four bytes b0..b3 hold two nibbles each. prmt spreads the bytes to 16-bit lanes, lop3 ((a & b) | c) makes
# the float 128 + nibble (bfloat16) or 1024 + nibble (float16), and the subtraction that centres the code
# is exact. `sub.bf16x2` needs compute capability 9.0, `fma.rn.bf16x2` only 8.0.
_DECODE_FLOAT = """{{
.reg .b32 nibbles, t0, t1, one, centre;
mov.b32 one, {one}; mov.b32 centre, {centre};
shr.u32 nibbles, $2, {shift};
prmt.b32 t0, nibbles, 0, 0x4140; prmt.b32 t1, nibbles, 0, 0x4342;
lop3.b32 t0, t0, 0x000F000F, {magic}, 0xEA; lop3.b32 t1, t1, 0x000F000F, {magic}, 0xEA;
fma.rn.{kind}x2 $0, t0, one, centre; fma.rn.{kind}x2 $1, t1, one, centre;
}}"""
_FLOAT_CONSTANTS = {
    jnp.dtype(jnp.bfloat16): {"kind": "bf16", "magic": "0x43004300", "one": "0x3F803F80", "centre": "0xC308C308"},
    jnp.dtype(jnp.float16): {"kind": "f16", "magic": "0x64006400", "one": "0x3C003C00", "centre": "0xE408E408"},
}
# (bytes << shift & 0xF0) ^ 0x80 is 16 * (nibble - 8) as int8: no borrow can cross a byte.
_DECODE_INT8 = "{{.reg .b32 t; shl.b32 t, $1, {shift}; lop3.b32 $0, t, 0xF0F0F0F0, 0x80808080, 0x6A;}}"


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
    """

    block_m: int
    block_n: int
    block_k: int
    split: int
    num_warps: int
    num_stages: int


def tuned_config(op: str, m: int, weight: QuantizedWeight) -> TileConfig | None:
    """The measured tiles of :mod:`pallas_kernels.tuning` for the default GPU; None where there are none."""
    if jax.default_backend() != "gpu":
        return None
    return tuning.tuned_tiles(
        op,
        m=m,
        n=weight.num_outputs,
        k=weight.num_inputs,
        group_size=weight.group_size,
        symmetric=weight.symmetric,
        device_kind=jax.devices()[0].device_kind,
    )


def tile_config(m: int, n: int, k: int, run: int, *, integer: bool = False, asymmetric: bool = False) -> TileConfig:
    """The tiles that were fastest on an H200 among those that keep rows invariant.

    Args:
        m, n, k: rows, outputs and inputs.
        run: inputs that share all scales within a plane (see :func:`scale_run`).
        integer: int8 activations whose products are scaled in the loop.
        asymmetric: the weight has zero points, so row sums are taken in the loop.
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
    if integer:
        block_m = next(rows for rows in (16, 32, 64) if m <= rows or rows == 64)
        return TileConfig(block_m, block_n, block_k, split, num_warps=2, num_stages=3)
    if asymmetric and m <= 16 and n % 128 == 0 and run == 128:
        return TileConfig(16, 128, block_k, split, num_warps=2, num_stages=3)  # as measured
    # 64 rows in four warps would take Triton's wgmma path, which rounds differently from mma.sync.
    return TileConfig(16 if m <= 16 else 32, block_n, block_k, split, num_warps=4, num_stages=3)


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


def decode_planes(packed: jax.Array, dtype: DTypeLike, *, interpret: bool) -> tuple[jax.Array, jax.Array]:
    """The two planes of a byte tile as ``code - 8`` in a 16-bit float, or 16 times that as int8.

    Args:
        packed: ``[block_n, block_k]`` uint8.
        dtype: bfloat16, float16 or int8.
        interpret: use ``jax.numpy``, since inline assembly has no interpreter.
    """
    dtype = jnp.dtype(dtype)
    if interpret:
        centred = [nibbles.astype(jnp.int8) - jnp.int8(8) for nibbles in (packed & 0xF, packed >> 4)]
        if dtype == jnp.int8:
            centred = [codes * jnp.int8(INT8_CODE_FACTOR) for codes in centred]
        return centred[0].astype(dtype), centred[1].astype(dtype)

    def decode(shift: int) -> jax.Array:
        if dtype == jnp.int8:
            # The low plane is shifted up into the high nibble; the high plane is there already.
            asm, constraints = _DECODE_INT8.format(shift=4 - shift), "=r,r"
        else:
            asm, constraints = _DECODE_FLOAT.format(shift=shift, **_FLOAT_CONSTANTS[dtype]), "=r,=r,r"
        return inline_asm(asm, packed, constraints=constraints, dtype=dtype, pack=4)

    return decode(0), decode(4)


def inline_asm(asm: str, *args: jax.Array, constraints: str, dtype: DTypeLike, pack: int = 1) -> jax.Array:
    """Elementwise PTX with one result of the arguments' shape."""
    result = jax.ShapeDtypeStruct(args[0].shape, dtype)
    [out] = plgpu.elementwise_inline_asm(
        asm, args=args, constraints=constraints, pack=pack, result_shape_dtypes=[result]
    )
    return out


def start_next(index: jax.Array, *, interpret: bool) -> jax.Array:
    """``index``, a program id: a kernel that uses it signals at its start; see :mod:`pallas_kernels.early_launch`."""
    if interpret or not early_launch.is_enabled():
        return index
    # A tensor of one value, of which every thread executes this once; used, or it would be removed.
    asm = "griddepcontrol.launch_dependents; mov.b32 $0, $1;"
    return jnp.max(inline_asm(asm, jnp.full((1,), index), constraints="=r,r", dtype=jnp.int32))


def dot_transposed(rows: jax.Array, weight: jax.Array) -> jax.Array:
    """``rows: [m, k]`` times ``weight: [n, k]`` transposed, in float32 or int32."""
    accumulator = jnp.int32 if rows.dtype == jnp.int8 else jnp.float32
    return jax.lax.dot_general(rows, weight, (((1,), (1,)), ((), ())), preferred_element_type=accumulator)


def row_mask(num_rows: int, block_m: int, width: int) -> jax.Array | None:
    """``[block_m, width]`` bool, which rows of this program's block exist; None if all of them do."""
    if num_rows % block_m == 0:
        return None
    rows = pl.program_id(2) * block_m + jax.lax.broadcasted_iota(jnp.int32, (block_m, width), 0)
    return rows < num_rows


def load_rows(ref: Ref, start: jax.Array | int, width: int, mask: jax.Array | None) -> jax.Array:
    """``ref[:, start : start + width]`` with zeros in the rows that do not exist."""
    columns = ref.at[:, pl.ds(start, width)]
    if mask is None:
        return plgpu.load(columns)
    return plgpu.load(columns, mask=mask, other=jnp.zeros((), ref.dtype))


def launch_matmul(
    kernel: Callable[..., None],
    row_arrays: tuple[jax.Array, ...],
    weight_arrays: tuple[jax.Array, ...],
    *,
    config: TileConfig,
    out_dtype: DTypeLike,
    interpret: bool,
    name: str,
) -> jax.Array:
    """Runs ``kernel`` over N blocks x split x M blocks and adds the partial sums in order.

    Args:
        kernel: takes a ref per array and the output ref ``[block_m, block_n]``.
        row_arrays: ``[M, *]``, seen by the kernel as ``[block_m, *]``.
        weight_arrays: ``[N, K/2]`` packed codes, then ``[G, N]`` arrays, seen as ``[block_n, K/2]`` and
            ``[G, block_n]``.
    """
    m, (n, half) = row_arrays[0].shape[0], weight_arrays[0].shape
    row_specs = [pl.BlockSpec((config.block_m, a.shape[1]), lambda n, p, m: (m, 0)) for a in row_arrays]
    packed_spec = pl.BlockSpec((config.block_n, half), lambda n, p, m: (n, 0))
    group_specs = [pl.BlockSpec((a.shape[0], config.block_n), lambda n, p, m: (0, n)) for a in weight_arrays[1:]]
    partial_sums = pl.pallas_call(
        kernel,
        grid=(n // config.block_n, config.split, pl.cdiv(m, config.block_m)),
        in_specs=[*row_specs, packed_spec, *group_specs],
        out_specs=pl.BlockSpec((None, config.block_m, config.block_n), lambda n, p, m: (p, m, n)),
        out_shape=jax.ShapeDtypeStruct((config.split, m, n), jnp.float32 if config.split > 1 else out_dtype),
        compiler_params=plgpu.CompilerParams(num_warps=config.num_warps, num_stages=config.num_stages),
        interpret=interpret,
        name=name,
    )(*row_arrays, *weight_arrays)
    # Unrolled so that the order is ours; XLA fuses the additions with what follows.
    return functools.reduce(jnp.add, [partial_sums[p] for p in range(config.split)]).astype(out_dtype)


def ignore_triton_deprecation() -> None:
    """Silences JAX's notice that its Triton backend is deprecated, and nothing else.

    The notice is given when the caller's program is lowered, after the kernel's function has returned, so
    the filter has to stay. Repeating it does not grow the list of filters. Call it outside of a jit, which
    would remember the trace and skip the call.
    """
    warnings.filterwarnings("ignore", message="The Pallas Triton backend is deprecated", category=DeprecationWarning)


def _power_of_two_divisor(size: int) -> int:
    return size & -size
