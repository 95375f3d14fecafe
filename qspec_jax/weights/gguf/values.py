"""The values of GGUF tensors: floats, or codes as they stand in the file."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import numpy as np

from qspec_jax.weights.source import QuantizedTensor, around_zero, check_finite

if TYPE_CHECKING:
    from gguf import ReaderTensor

BLOCK = 32  # inputs per scale of Q4_0, Q4_1 and Q8_0


def shape_of(tensor: ReaderTensor) -> tuple[int, ...]:
    """Of the float tensor, outputs first."""
    return tuple(int(size) for size in reversed(tensor.shape))


@functools.cache
def can_dequantize(tensor_type: Any) -> bool:
    """Whether the gguf package turns a type into floats."""
    from gguf import GGML_QUANT_SIZES
    from gguf.quants import dequantize

    _, block_bytes = GGML_QUANT_SIZES[tensor_type]
    try:
        dequantize(np.zeros((1, block_bytes), np.uint8), tensor_type)
    except NotImplementedError:
        return False
    return True


def read_floats(tensor: ReaderTensor, *, rows: np.ndarray | None = None) -> np.ndarray:
    """The tensor as float32, its rows taken in the order ``rows``.

    Raises:
        ValueError: a value is not a finite number.
    """
    from gguf.quants import dequantize

    data = tensor.data if rows is None else tensor.data[rows]
    with np.errstate(all="ignore"):  # what is not finite is refused below
        floats = dequantize(data, tensor.tensor_type).astype(np.float32, copy=False).reshape(shape_of(tensor))
    check_finite(floats)
    # A float32 tensor is still the mapped file here; a copy does not fault when the file is replaced.
    return floats.copy() if np.may_share_memory(floats, tensor.data) else floats


def read_codes(tensor: ReaderTensor, *, rows: np.ndarray | None = None) -> QuantizedTensor:
    """The codes and scales of a Q4_0, Q4_1 or Q8_0 tensor, its rows taken in the order ``rows``.

    A block of 32 inputs is: scale, minimum (Q4_1 only), 16 bytes whose low nibbles are inputs 0 to 15 and
    whose high nibbles are inputs 16 to 31. ``w = scale * code + minimum``, or ``scale * (code - 8)``. A block of Q8_0
    is scale and 32 signed bytes, ``w = scale * byte``.

    Raises:
        ValueError: a scale or minimum is not a finite number.
    """
    num_outputs, num_inputs = shape_of(tensor)
    data = tensor.data if rows is None else tensor.data[rows]
    blocks = data.reshape(num_outputs, num_inputs // BLOCK, -1)
    if tensor.tensor_type.name == "Q8_0":
        return _read_bytes(blocks)
    num_scales = (blocks.shape[-1] - BLOCK // 2) // 2
    scales = np.ascontiguousarray(blocks[..., : 2 * num_scales]).view("<f2").astype(np.float16)
    nibbles = blocks[..., 2 * num_scales :]
    codes = np.concatenate([nibbles & 0xF, nibbles >> 4], axis=-1).reshape(num_outputs, num_inputs)
    check_finite(scales, what="its scales")
    scale, *minimum = (np.ascontiguousarray(scales[..., index].T) for index in range(num_scales))
    return QuantizedTensor(codes, scale, -minimum[0] if minimum else None)


def _read_bytes(blocks: np.ndarray) -> QuantizedTensor:
    """Codes and scales of blocks ``[N, G, 34]`` of Q8_0."""
    scale = np.ascontiguousarray(blocks[..., :2]).view("<f2").astype(np.float16)[..., 0].T
    check_finite(scale, what="its scales")
    codes = blocks[..., 2:] ^ np.uint8(0x80)  # two's complement with the sign bit turned over: 128 more
    return around_zero(codes.reshape(len(blocks), -1), scale.astype(np.float32))
