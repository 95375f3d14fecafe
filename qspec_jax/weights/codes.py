"""Tensors of a file as parts of the arrays of a decoder, in host memory: rounded, widened, or as they are."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from pallas_kernels import QuantizedWeight, dequantize, pack_codes, pack_nested
from pallas_kernels.arrays.weight import TRUNCATED_CODE
from qspec_jax.model.linear import WeightFormat
from qspec_jax.quantization.rtn import quantize_rtn
from qspec_jax.weights.source import QuantizedTensor

_ROWS_AT_ONCE = 1 << 15


def with_tensor(target: Any, row: int, tensor: np.ndarray | QuantizedTensor) -> Any:
    """A parameter in host memory with a tensor in its rows; of wider scales, if those of the tensor are."""
    rows = slice(row, row + _num_rows(tensor))
    if isinstance(target, QuantizedWeight):
        part = as_format(tensor, WeightFormat(target.group_size, target.symmetric, target.bits))
        target = _widened(target, part.scale.dtype)
        target.packed[rows] = part.packed
        target.scale[:, rows] = part.scale
        if target.offset is not None:
            target.offset[:, rows] = part.offset
        if target.low is not None:
            target.low[rows] = part.low
        return target
    if isinstance(tensor, QuantizedTensor):
        tensor = np.asarray(dequantize(jax.tree.map(jnp.asarray, packed(tensor))))
    target[rows] = tensor
    return target


def _num_rows(tensor: np.ndarray | QuantizedTensor) -> int:
    return len(tensor.codes if isinstance(tensor, QuantizedTensor) else tensor)


def _widened(weight: QuantizedWeight, dtype: DTypeLike) -> QuantizedWeight:
    """The weight with scales and offsets that hold those of ``dtype`` exactly: float16 where that is enough."""
    if jnp.dtype(dtype).itemsize <= weight.scale.dtype.itemsize:
        return weight
    offset = None if weight.offset is None else weight.offset.astype(dtype)
    return dataclasses.replace(weight, scale=weight.scale.astype(dtype), offset=offset)


def as_format(tensor: np.ndarray | QuantizedTensor, wanted: WeightFormat) -> QuantizedWeight:
    """The tensor as a part of an array of some format, as arrays in host memory."""
    if isinstance(tensor, QuantizedTensor) and tensor.bits > wanted.bits:
        tensor = np.asarray(dequantize(jax.tree.map(jnp.asarray, packed(tensor))))
    if not isinstance(tensor, QuantizedTensor):
        return rounded(tensor, wanted)
    weight = packed(tensor)
    if weight.symmetric and not wanted.symmetric:
        weight = dataclasses.replace(weight, offset=weight.zero_point * weight.scale)
    return _nested(weight) if wanted.bits > weight.bits else weight


def rounded(tensor: np.ndarray, wanted: WeightFormat) -> QuantizedWeight:
    """Floats rounded to nearest, in host memory; some rows at a time, since an LM head has very many."""
    options: Any = {"group_size": wanted.group_size, "symmetric": wanted.symmetric, "bits": wanted.bits}
    pieces = [
        jax.tree.map(np.asarray, quantize_rtn(jnp.asarray(tensor[start : start + _ROWS_AT_ONCE]), **options))
        for start in range(0, len(tensor), _ROWS_AT_ONCE)
    ]
    if len(pieces) == 1:
        return pieces[0]
    joined = {
        name: np.concatenate([getattr(piece, name) for piece in pieces], axis=axis)
        for name, axis in (("packed", -2), ("scale", -1), ("offset", -1), ("low", -2))
        if getattr(pieces[0], name) is not None
    }
    return dataclasses.replace(pieces[0], **joined)


def _nested(weight: QuantizedWeight) -> QuantizedWeight:
    """A 4-bit weight with offsets as the upper nibbles of one in 8 bits, of which it is all there is.

    Each code becomes the middle of those that it is the upper nibble of, and the offset takes that back.
    """
    scale, offset = (np.asarray(array, np.float32) for array in (weight.scale, weight.offset))
    offset = offset + np.float32(TRUNCATED_CODE) * scale
    arrays = [array.astype(np.float16) for array in (scale, offset)]
    if not all(map(np.array_equal, arrays, (scale, offset))):  # float16 does not hold them exactly
        arrays = [scale, offset]
    low = np.full_like(weight.packed, 0x11 * round(16 * TRUNCATED_CODE))
    nested: dict[str, Any] = {"scale": arrays[0], "offset": arrays[1], "low": low}
    return dataclasses.replace(weight, **nested)


def packed(tensor: QuantizedTensor) -> QuantizedWeight:
    """The codes of a file as a weight, in the kind of array that they are in."""
    codes, low = (pack_codes(tensor.codes), None) if tensor.bits == 4 else pack_nested(tensor.codes)
    arrays: dict[str, Any] = {"packed": codes, "scale": tensor.scale, "offset": tensor.offset, "low": low}
    return QuantizedWeight(**arrays)
