"""Ready-made weights in 4 or 8 bits: from the arrays of GPTQ, AWQ, compressed-tensors and QSpec files to codes.

Every format means ``w[n, k] = scale[g, n] * (code[n, k] - zero[g, n])`` with codes and zero points of as many bits and
differs in how they are packed: below those of 4 bits, of which a word has twice as many as of 8. One function per
format undoes that; nothing is rounded:

=================== ============================== ============================================================
function            codes                          where it is written
=================== ============================== ============================================================
unpack_gptq         int32 ``[K/8, N]``, along K    GPTQModel ``nn_modules/qlinear/__init__.py``: ``pack_original``,
                                                   ``dequantize_weight``; AutoGPTQ ``qlinear_cuda_old.py``
unpack_awq          int32 ``[K, N/8]``, along N    AutoAWQ ``modules/linear/gemm.py``, ``utils/packing_utils.py``
unpack_compressed   int32 ``[N, K/8]``, along K    compressed-tensors ``compressors/pack_quantized/``
unpack_qspec        uint8 ``[N, K/2]``, along K    QSpec ``third-party/QuaRot/quarot/functional/quantization.py``
=================== ============================== ============================================================

This file is numpy alone: it reads no file and knows no names of tensors (see :mod:`.layouts`).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Float32, Int32, Integer, Shaped, UInt8

from pallas_kernels.arrays.weight import SYMMETRIC_ZERO_POINT
from qspec_jax.weights.source import QuantizedTensor, around_zero, check_finite

# Nibble i of an AWQ word is column (0, 2, 4, 6, 1, 3, 5, 7)[i]; column c is therefore this nibble.
_AWQ_NIBBLE_OF_COLUMN = [0, 4, 1, 5, 2, 6, 3, 7]
_ONES = {4: np.uint32(0x11111111), 8: np.uint32(0x01010101)}  # in every field of so many bits


class Unpacked(NamedTuple):
    """A weight as its format means it.

    Attributes:
        codes: ``[N, K]``, 0 to 15, or to 255.
        scale: ``[G, N]``, in the dtype of the file.
        zero: ``[G, N]``, likewise, or None where it is 8, or 128, everywhere.
    """

    codes: UInt8[np.ndarray, "N K"]
    scale: Shaped[np.ndarray, "G N"]
    zero: UInt8[np.ndarray, "G N"] | None


def unpack_gptq(
    qweight: Int32[np.ndarray, "K_words N"],
    qzeros: Int32[np.ndarray, "G N_words"],
    scales: Shaped[np.ndarray, "G N"],
    *,
    zeros_less_one: bool,
    bits: int = 4,
) -> Unpacked:
    """A GPTQ weight without activation order. Words hold eight codes, the first in the lowest bits.

    Args:
        qweight: ``[K/8, N]``, eight inputs per word.
        qzeros: ``[G, N/8]``, eight outputs per word.
        scales: ``[G, N]``.
        zeros_less_one: the file stores ``zero - 1`` (checkpoint format ``gptq``; not ``gptq_v2``). The one comes
            back by adding to whole words, as GPTQModel's ``convert_gptq_v1_to_v2_format_module`` does: a zero
            point of 0 was stored by a borrow from its neighbour, which the carry gives back.
        bits: of a code and of a zero point: 4 or 8.
    """
    if zeros_less_one:
        qzeros = (qzeros.view(np.uint32) + _ONES[bits]).view(np.int32)
    return Unpacked(_fields(qweight.T, bits), scales, _fields(qzeros, bits))


def unpack_awq(
    qweight: Int32[np.ndarray, "K N_words"], qzeros: Int32[np.ndarray, "G N_words"], scales: Shaped[np.ndarray, "G N"]
) -> Unpacked:
    """An AWQ weight of version ``gemm``: eight outputs per word, in the order 0, 2, 4, 6, 1, 3, 5, 7.

    Args:
        qweight: ``[K, N/8]``.
        qzeros: ``[G, N/8]``.
        scales: ``[G, N]``.
    """

    def in_order(words: np.ndarray) -> np.ndarray:
        nibbles = _nibbles(words).reshape(words.shape[0], -1, 8)
        return nibbles[..., _AWQ_NIBBLE_OF_COLUMN].reshape(words.shape[0], -1)

    return Unpacked(np.ascontiguousarray(in_order(qweight).T), scales, in_order(qzeros))


def unpack_compressed(
    packed: Int32[np.ndarray, "N K_words"],
    scale: Shaped[np.ndarray, "N G"],
    zero_point: Int32[np.ndarray, "N_words G"] | None = None,
    *,
    bits: int = 4,
) -> Unpacked:
    """A compressed-tensors weight in the format ``pack-quantized``: signed codes and zero points, stored plus 8 or 128.

    Args:
        packed: ``[N, K/8]``, eight inputs per word, the first in the lowest bits.
        scale: ``[N, G]``.
        zero_point: ``[N/8, G]``, eight outputs per word; None for a symmetric weight.
        bits: of a code and of a zero point: 4 or 8.
    """
    zero = None if zero_point is None else _fields(zero_point.T, bits)
    return Unpacked(_fields(packed, bits), np.ascontiguousarray(scale.T), zero)


def unpack_qspec(weight: UInt8[np.ndarray, "N half_K"], weight_scales: Shaped[np.ndarray, "N 1"]) -> Unpacked:
    """A weight of the QSpec release: two's complement nibbles, low one first, one scale per output.

    Args:
        weight: ``[N, K/2]``.
        weight_scales: ``[N, 1]``.
    """
    # -8 .. 7 in two's complement with the sign bit turned over is 0 .. 15.
    return Unpacked(_nibbles(weight) ^ np.uint8(SYMMETRIC_ZERO_POINT), np.ascontiguousarray(weight_scales.T), None)


def check_group_index(group_index: Integer[np.ndarray, " K"], *, group_size: int) -> None:
    """Raises ValueError unless groups are runs of consecutive inputs (GPTQ's ``g_idx`` without activation order)."""
    expected = np.arange(group_index.size) // group_size
    if not np.array_equal(group_index, expected):
        first = int(np.argmax(group_index != expected))
        raise ValueError(
            f"its inputs are quantised in activation order (desc_act): g_idx puts input {first} into group "
            f"{group_index[first]}, not {expected[first]}; supported: groups of consecutive inputs. Use a checkpoint "
            "made with desc_act=false (or static_groups=true)"
        )


def quantized_tensor(unpacked: Unpacked, *, symmetric: bool, bits: int = 4) -> QuantizedTensor:
    """The weight as codes, scales and offsets ``scale * zero``, all exact.

    A product of a scale and a zero point seldom fits float16. Scales and offsets are float16 if every one of both is
    exactly that, else float32, which always holds a float16 or bfloat16 scale times 4 bits.

    Args:
        unpacked: the weight.
        symmetric: whether its config says that every zero point is 8, or 128. No offset is kept then, of 4
            bits.
        bits: of a code: 4 or 8. Scales of 8 are kept as those of 16 steps.

    Raises:
        ValueError: a scale is not a finite number, or a zero point is another one although ``symmetric``.
    """
    codes, scale, zero = unpacked
    scale, steps = scale.astype(np.float32), 2 ** (bits - 4)
    check_finite(scale, what="its scales")
    centre = SYMMETRIC_ZERO_POINT * steps
    if symmetric and zero is not None and (wrong := np.flatnonzero(zero != centre)).size:
        raise ValueError(
            f"its config says that it is symmetric, but {wrong.size} of {zero.size} zero points are not "
            f"{centre} (the first is {zero.flat[wrong[0]]}); is the checkpoint format right?"
        )
    if bits == 8 and (symmetric or zero is None):
        return around_zero(codes, scale)
    offset = None if symmetric or zero is None else scale * zero.astype(np.float32)
    scale = scale * np.float32(steps)
    if all(_fits_float16(array) for array in (scale, offset) if array is not None):
        scale = scale.astype(np.float16)
        offset = None if offset is None else offset.astype(np.float16)
    return QuantizedTensor(codes, scale, offset, bits)


def dequantized(tensor: QuantizedTensor) -> Float32[np.ndarray, "N K"]:
    """The weight in float32."""
    num_groups, num_outputs = tensor.scale.shape
    scale = tensor.scale.astype(np.float32)
    offset = SYMMETRIC_ZERO_POINT * scale if tensor.offset is None else tensor.offset.astype(np.float32)
    groups = tensor.codes.reshape(num_outputs, num_groups, -1) / np.float32(2 ** (tensor.bits - 4))
    return (groups * scale.T[..., None] - offset.T[..., None]).reshape(tensor.codes.shape)


def _nibbles(words: Shaped[np.ndarray, "rows columns"]) -> UInt8[np.ndarray, "rows nibbles"]:
    """The 4-bit numbers of each row of little-endian words, lowest bits first."""
    octets = np.ascontiguousarray(words).view(np.uint8)
    return np.stack([octets & 0xF, octets >> 4], axis=-1).reshape(words.shape[0], -1)


def _fields(words: Shaped[np.ndarray, "rows columns"], bits: int) -> UInt8[np.ndarray, "rows fields"]:
    """The numbers of 4 or 8 bits of each row of little-endian words, lowest bits first."""
    return _nibbles(words) if bits == 4 else np.ascontiguousarray(words).view(np.uint8)


def _fits_float16(values: np.ndarray) -> bool:
    with np.errstate(over="ignore"):
        return np.array_equal(values.astype(np.float16).astype(np.float32), values)
