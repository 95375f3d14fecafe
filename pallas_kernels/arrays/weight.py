"""The quantised weight that every precision reads, and the order of its codes in memory.

A weight ``w: [N, K]`` (``N`` outputs, ``K`` inputs) is stored as unsigned 4-bit codes with one scale
and one offset per output and per group of consecutive inputs::

    w[n, k] = scale[g, n] * code[n, k] - offset[g, n],      g = k // group_size

``offset = scale * zero_point``. A symmetric weight has ``zero_point = 8`` and stores no offset. One
formula therefore covers symmetric and asymmetric rounding, GGUF Q4_0 and Q4_1, AWQ and GPTQ, and,
with a single group, per-channel weights.

Two codes share a byte in *planes*: byte ``[n, j]`` holds the code of input ``j`` in its low nibble and
that of input ``j + K/2`` in its high nibble. A tile of bytes is thus two tiles of consecutive inputs,
whatever the tile's width, so no kernel has to interleave nibbles and one packing serves every block
size. A row of ``K = 8`` inputs::

    byte            0   1   2   3
    low nibble      0   1   2   3       input of the code: the low plane
    high nibble     4   5   6   7       the high plane

A *nested* weight has 8-bit codes ``u``, as two such arrays: ``packed`` has their upper nibbles ``h`` and ``low`` the
lower ones ``l``, ``u = 16 h + l``. The formula is the same with the code ``u / 16 = h + l / 16``, and the scale is that
of 16 steps of ``u``: a power of two, so that a float16 scale of 8-bit codes is kept exactly unless it overflows. Its
*upper nibbles* alone are a 4-bit weight of the same scales and offsets (:func:`upper_nibbles`). Of ``u / 16`` they say
that it is ``h`` at least and less than ``h + 1``: they stand for the middle, the code ``h + 1/2``. A symmetric nested
weight has ``zero_point = 8.5``, so that its upper nibbles are a symmetric 4-bit weight like any other, which has a
zero. Small weights beside a large one need that: without it a whole model can break. Scales may be negative.

:class:`Layout` says in which order the bytes of a row lie.
"""

from __future__ import annotations

import dataclasses
import enum
import math
import typing
from numbers import Integral
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Shaped, UInt8

from pallas_kernels.arrays.arguments import checked
from pallas_kernels.arrays.shown import with_shapes

SYMMETRIC_ZERO_POINT = 8
MAX_CODE = 15
NESTED_ZERO_POINT = 8.5  # of a symmetric nested weight: so its upper nibbles mean 0 by 8
TRUNCATED_CODE = 0.5  # what a code stands for beyond itself, if it is the upper nibble of another
_WGMMA_BYTES = 128  # bytes of a row among which Layout.WGMMA permutes
WGMMA_CODES = 16  # activation codes among which it does
_AnyArray = typing.TypeVar("_AnyArray", Array, np.ndarray)


class Layout(enum.Enum):
    """The order of the bytes of a packed row, and of the activation codes that meet them.

    Attributes:
        PLANES: byte ``j`` holds inputs ``j`` and ``j + K/2``; activation codes lie in the order of the inputs. What
            checkpoints store, and every implementation but Mosaic reads.
        WGMMA: in each run of 128 bytes, byte ``32 t + 4 i + 2 e + h`` holds what byte ``16 i + 8 h + 2 t + e`` of
            ``PLANES`` does: thread ``t`` of the four that share a row finds in its 32 bytes what Hopper's 16-bit
            ``wgmma`` wants of it, instruction by instruction. The 8-bit instruction takes the same bytes as its inputs
            ``16 i + 4 t + 2 e + h``, so activation codes lie in that order: in each run of 16, code ``2 j + h`` is
            that of input ``8 h + j``.

    A run of 128 bytes of ``WGMMA``, by the bytes of ``PLANES`` that it holds. Four bytes are a word in a register of a
    thread: of each plane, what one 16-bit instruction wants of this thread, two pairs of neighbouring inputs::

                    thread 0            thread 1            thread 2            thread 3
        word 0        0   8   1   9       2  10   3  11       4  12   5  13       6  14   7  15
        word 1       16  24  17  25      18  26  19  27      20  28  21  29      22  30  23  31
        ...
        word 7      112 120 113 121     114 122 115 123     116 124 117 125     118 126 119 127

    In memory thread follows thread: bytes 0 to 31 are the column of thread 0, bytes 32 to 63 that of thread 1. The
    8-bit instruction takes word by word across the threads, so ``0 8 1 9 2 10 3 11 ...``, as activation codes lie.
    """

    PLANES = "planes"
    WGMMA = "wgmma"


@typing.no_type_check  # as a pytree it also holds shapes and other stand-ins for arrays
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class QuantizedWeight:
    """A ``[N, K]`` weight in 4 bits, or nested in 8. Leading axes (stacked layers) are allowed on every array.

    Attributes:
        packed: ``[..., N, K/2]`` uint8, two codes per byte, in planes (see the module docstring), in the order of
            ``layout``.
        scale: ``[..., G, N]`` floating point, ``G = K / group_size``.
        offset: ``[..., G, N]`` like ``scale``, or None for a symmetric weight (``zero_point * scale``).
        group_sum: ``[..., A, N]``, the sums of the weights of ``A`` equal runs of inputs, which carry the
            zero point of asymmetrically quantised activations: ``A`` is a multiple of their groups. None
            where no such activation meets this weight. Of a nested weight they are those of its upper nibbles,
            which alone meet integers.
        layout: the order of the bytes of a row; :func:`with_layout` changes it.
        low: like ``packed``, the lower nibbles of 8-bit codes, or None for a weight in 4 bits.
        truncated: the codes are the upper nibbles of 8-bit ones, and stand for half a step more.
    """

    packed: Shaped[Array, "*layers N half_K"]
    scale: Shaped[Array, "*layers G N"]
    offset: Shaped[Array, "*layers G N"] | None = None
    group_sum: Shaped[Array, "*layers A N"] | None = None
    layout: Layout = dataclasses.field(default=Layout.PLANES, metadata={"static": True})
    low: Shaped[Array, "*layers N half_K"] | None = None
    truncated: bool = dataclasses.field(default=False, metadata={"static": True})

    def __repr__(self) -> str:
        return with_shapes(self)

    @property
    def bits(self) -> int:
        """Of a code: 4, or 8 of a nested weight."""
        return 4 if self.low is None else 8

    @property
    def num_outputs(self) -> int:
        return self.packed.shape[-2]

    @property
    def num_inputs(self) -> int:
        return 2 * self.packed.shape[-1]

    @property
    def num_groups(self) -> int:
        return self.scale.shape[-2]

    @property
    def group_size(self) -> int:
        return self.num_inputs // self.num_groups

    @property
    def symmetric(self) -> bool:
        return self.offset is None

    @property
    def zero_point(self) -> float:
        """Of a symmetric weight."""
        return SYMMETRIC_ZERO_POINT if self.low is None else NESTED_ZERO_POINT

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays of this weight."""
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self))


def check_group_size(num_inputs: int, group_size: int | Any, *, what: str = "weight") -> None:
    """Raises ValueError unless ``num_inputs`` splits into whole groups and two nibble planes."""
    if num_inputs % 2:
        raise ValueError(f"{what}: K={num_inputs} is odd; two 4-bit codes share a byte, so K must be even")
    is_whole = isinstance(group_size, Integral) and not isinstance(group_size, bool)
    if not is_whole or group_size <= 0 or num_inputs % group_size:
        fitting = [str(g) for g in (32, 64, 128) if num_inputs % g == 0]
        raise ValueError(
            f"{what}: K={num_inputs} is not a multiple of group_size={group_size!r}; "
            f"use {' or '.join([*fitting, f'the whole row ({num_inputs})'])}"
        )


def check_weight(weight: QuantizedWeight, num_inputs: int, *, op: str) -> None:
    """Raises ValueError unless ``weight`` is one consistent ``[N, K]`` weight for inputs of ``num_inputs``."""
    if weight.packed.ndim != 2:
        raise ValueError(
            f"{op}: weight.packed has shape {weight.packed.shape}, not [N, K/2]; "
            "take one layer of a stack with jax.tree.map(lambda a: a[layer], weight) or lax.scan"
        )
    if weight.num_inputs != num_inputs:
        raise ValueError(
            f"{op}: x has K={num_inputs} inputs but weight.packed {weight.packed.shape} holds {weight.num_inputs}; "
            "K must be twice the last axis of weight.packed"
        )
    if weight.low is not None and weight.low.shape != weight.packed.shape:
        raise ValueError(
            f"{op}: weight.low has shape {weight.low.shape}; expected that of weight.packed, {weight.packed.shape}"
        )
    per_group = (weight.num_groups, weight.num_outputs)
    for name in ("scale", "offset"):
        array = getattr(weight, name)
        if array is not None and array.shape != per_group:
            raise ValueError(f"{op}: weight.{name} has shape {array.shape}; expected [G, N] = {list(per_group)}")
    sums = weight.group_sum
    if sums is not None and (sums.ndim != 2 or sums.shape[1] != weight.num_outputs or num_inputs % sums.shape[0]):
        raise ValueError(
            f"{op}: weight.group_sum has shape {sums.shape}; expected [A, N] with N={weight.num_outputs} and A a "
            f"divisor of K={num_inputs}"
        )
    if num_inputs % 2 or num_inputs % weight.num_groups:
        raise ValueError(f"{op}: K={num_inputs} does not split into the weight's {weight.num_groups} groups")


@checked
def pack_codes(codes: UInt8[_AnyArray, "*layers N K"]) -> UInt8[_AnyArray, "*layers N half_K"]:
    """Packs unsigned 4-bit codes (0..15, one per byte) into nibble planes, on the device or in host memory.

    Raises:
        ValueError: K is odd, or ``codes`` are no such array.
    """
    check_group_size(codes.shape[-1], codes.shape[-1] or 1, what="pack_codes")
    half = codes.shape[-1] // 2
    # pyrefly: ignore[bad-return]: it does not look at each kind of array by itself
    return codes[..., :half] | (codes[..., half:] << 4)


@checked
def unpack_codes(packed: UInt8[Array, "*layers N half_K"]) -> UInt8[Array, "*layers N K"]:
    """The inverse of :func:`pack_codes`."""
    return jnp.concatenate([packed & 0xF, packed >> 4], axis=-1)


@checked
def pack_nested(
    codes: UInt8[_AnyArray, "*layers N K"],
) -> tuple[UInt8[_AnyArray, "*layers N half_K"], UInt8[_AnyArray, "*layers N half_K"]]:
    """``packed`` and ``low`` of unsigned 8-bit codes, on the device or in host memory."""
    # pyrefly: ignore[bad-return, bad-specialization]: as above
    return pack_codes(codes >> 4), pack_codes(codes & 0xF)


@checked
def unpack_nested(
    packed: UInt8[Array, "*layers N half_K"], low: UInt8[Array, "*layers N half_K"]
) -> UInt8[Array, "*layers N K"]:
    """The inverse of :func:`pack_nested`."""
    return (unpack_codes(packed) << 4) | unpack_codes(low)


@checked
def upper_nibbles(weight: QuantizedWeight) -> QuantizedWeight:
    """The 4-bit weight inside a nested one, of the same arrays; a weight in 4 bits is its own."""
    if weight.low is None:
        return weight
    # Of a symmetric one, the half steps of codes and zero point cancel.
    return dataclasses.replace(weight, low=None, truncated=not weight.symmetric)


@checked
def with_layout(weight: QuantizedWeight, layout: Layout) -> QuantizedWeight:
    """The weight with its bytes in the order of ``layout``, on the device or in host memory.

    Raises:
        ValueError: K is no multiple of 256, which the order of ``Layout.WGMMA`` needs.
    """

    def ordered(array: Any) -> Any:
        return None if array is None else order_bytes(order_bytes(array, weight.layout, inverse=True), layout)

    return dataclasses.replace(weight, packed=ordered(weight.packed), low=ordered(weight.low), layout=layout)


def layout_obstacle(layout: Layout, wanted: Layout, *, what: str = "a weight") -> str | None:
    """Why a kernel that reads ``wanted`` cannot serve ``layout``, as the end of a sentence; None if it can."""
    if layout is wanted:
        return None
    return f"needs {what} in layout '{wanted.value}', not '{layout.value}' (with_layout makes one of the other)"


def order_bytes(
    packed: Shaped[_AnyArray, "*rows half_K"], layout: Layout, *, inverse: bool = False
) -> Shaped[_AnyArray, "*rows half_K"]:
    """Rows of ``Layout.PLANES`` in the order of ``layout``, or (``inverse``) the other way round."""
    if layout is Layout.PLANES:
        return packed
    if packed.shape[-1] % _WGMMA_BYTES:
        raise ValueError(
            f"layout {layout.value}: K={2 * packed.shape[-1]} is not a multiple of {2 * _WGMMA_BYTES}; use planes"
        )
    order = np.arange(_WGMMA_BYTES).reshape(8, 2, 4, 2).transpose(2, 0, 3, 1).reshape(-1)
    return _take_in_runs(packed, order, inverse)


def order_activation_codes(
    codes: Shaped[Array, "*batch K"], layout: Layout, *, inverse: bool = False
) -> Shaped[Array, "*batch K"]:
    """Activation codes of consecutive inputs in the order of ``layout``, or (``inverse``) the other way round."""
    if layout is Layout.PLANES:
        return codes
    order = np.arange(WGMMA_CODES).reshape(2, WGMMA_CODES // 2).T.reshape(-1)
    return _take_in_runs(codes, order, inverse)


def _take_in_runs(array: Any, order: np.ndarray, inverse: bool) -> Any:
    """Permutes each run of ``len(order)`` along the last axis."""
    runs = array.reshape(*array.shape[:-1], -1, len(order))
    order = np.argsort(order) if inverse else order
    take = np.take if isinstance(runs, np.ndarray) else jnp.take
    return take(runs, order, axis=-1, mode="clip").reshape(array.shape)


def dequantize_planes(
    weight: QuantizedWeight, dtype: DTypeLike
) -> tuple[Float[Array, "*layers N half_K"], Float[Array, "*layers N half_K"]]:
    """The weight as floats, as its two planes: inputs ``[0, K/2)`` and inputs ``[K/2, K)``.

    The planes stay apart because each is a plain elementwise function of ``packed``; joining them
    costs a copy that a matmul of two halves does not need.
    """
    half = weight.packed.shape[-1]
    run = math.gcd(weight.group_size, half)  # inputs that share a scale within one plane

    def per_run(per_group: Array) -> tuple[Array, Array]:
        repeats = weight.group_size // run
        columns = jnp.repeat(jnp.swapaxes(per_group, -1, -2).astype(dtype), repeats, axis=-1)
        low, high = jnp.split(columns, 2, axis=-1)
        return low[..., None], high[..., None]

    scales = per_run(weight.scale)
    offsets = tuple(weight.zero_point * scale for scale in scales) if weight.offset is None else per_run(weight.offset)

    def plane(codes: Array, scale: Array, offset: Array) -> Array:
        runs = codes.reshape(*codes.shape[:-1], half // run, run)
        return (runs * scale - offset).reshape(codes.shape)

    low, high = _float_codes(weight, dtype)
    return plane(low, scales[0], offsets[0]), plane(high, scales[1], offsets[1])


def _float_codes(weight: QuantizedWeight, dtype: DTypeLike) -> tuple[Array, Array]:
    """The codes of both planes: whole numbers of 4 bits, or with the part of a step that nested ones have beyond."""

    def planes(array: Array) -> list[Array]:
        in_planes = order_bytes(array, weight.layout, inverse=True)
        return [nibbles.astype(dtype) for nibbles in (in_planes & 0xF, in_planes >> 4)]

    low, high = planes(weight.packed)
    if weight.low is not None:
        sixteenth = jnp.asarray(1 / 16, dtype)
        parts = planes(weight.low)
        return low + parts[0] * sixteenth, high + parts[1] * sixteenth
    half = jnp.asarray(TRUNCATED_CODE, dtype)
    return (low + half, high + half) if weight.truncated else (low, high)


@checked
def dequantize(weight: QuantizedWeight, dtype: DTypeLike = jnp.float32) -> Float[Array, "*layers N K"]:
    """The weight as one float array ``[..., N, K]``: the definition, computed in ``dtype``.

    Raises:
        ValueError: ``dtype`` is no floating-point one.
    """
    if not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f"dequantize: dtype={jnp.dtype(dtype)} holds no fractions; use float32, bfloat16 or float16")
    return jnp.concatenate(dequantize_planes(weight, dtype), axis=-1)


@checked
def with_group_sums(weight: QuantizedWeight, group_size: int | None = None) -> QuantizedWeight:
    """The weight with ``group_sum`` over groups of ``group_size`` inputs (None: its own), in the dtype of its scales.

    Those of a nested weight are of its upper nibbles.

    Raises:
        ValueError: ``group_size`` does not divide K.
    """
    group_size = weight.group_size if group_size is None else group_size
    check_group_size(weight.num_inputs, group_size, what="with_group_sums")
    floats = dequantize(upper_nibbles(weight))
    groups = floats.reshape(*floats.shape[:-1], weight.num_inputs // group_size, group_size).sum(-1)
    return dataclasses.replace(weight, group_sum=jnp.swapaxes(groups, -1, -2).astype(weight.scale.dtype))
