"""Quantised matmuls and what stands between them, for JAX: the operations as plain functions, and the arrays they read.

Each operation has a folder: ``reference.py`` is its specification in ``jax.numpy``, and each of its other
implementations a file, as ``gpu_triton.py`` with the Pallas Triton kernel for NVIDIA GPUs. ``implementation=None``
picks the best one that works; see :mod:`pallas_kernels.dispatch`. This package knows nothing of models.
"""

from pallas_kernels.arrays.activation import QuantizedActivation, dequantize_activation
from pallas_kernels.arrays.int8_cache import Int8Cache
from pallas_kernels.arrays.partial_sums import PartialSums, value_of
from pallas_kernels.arrays.weight import (
    Layout,
    QuantizedWeight,
    check_group_size,
    dequantize,
    pack_codes,
    pack_nested,
    unpack_codes,
    unpack_nested,
    upper_nibbles,
    with_group_sums,
    with_layout,
)
from pallas_kernels.block_attention import block_attention, choose_blocks, least_blocks
from pallas_kernels.block_attention.reference import EVERYTHING
from pallas_kernels.decode_attention import decode_attention, decode_attention_with_masses
from pallas_kernels.decode_attention.reference import MAX_DECODE_TOKENS
from pallas_kernels.decode_attention_int8 import (
    block_attention_int8,
    decode_attention_int8,
    decode_attention_int8_with_masses,
    prefill_int8,
)
from pallas_kernels.dispatch import IMPLEMENTATIONS, available_implementations
from pallas_kernels.float_matmul import float_matmul, float_partial_sums, float_prefill_is_alike
from pallas_kernels.hadamard import hadamard
from pallas_kernels.prefill_attention import prefill_attention, prefill_is_alike
from pallas_kernels.prefill_attention_int8 import prefill_int8_is_alike, prefill_pieces_int8
from pallas_kernels.quantize_activations import quantize_activations
from pallas_kernels.rms_norm import rms_norm
from pallas_kernels.rms_norm_quantize import rms_norm_quantize
from pallas_kernels.rotate_and_write import rotate_and_write
from pallas_kernels.rotate_and_write_int8 import rotate_and_write_int8
from pallas_kernels.swiglu import swiglu
from pallas_kernels.swiglu_hadamard import swiglu_hadamard
from pallas_kernels.swiglu_hadamard_quantize import swiglu_hadamard_quantize
from pallas_kernels.swiglu_quantize import swiglu_quantize
from pallas_kernels.w4a4_matmul import best_layout_for_codes, w4a4_matmul, w4a4_partial_sums
from pallas_kernels.w4a4_swiglu_quantize import w4a4_swiglu_quantize, w4a4_swiglu_quantize_is_fused
from pallas_kernels.w4a16_matmul import best_layout, rows_alike, rows_read, w4a16_matmul, w4a16_partial_sums
from pallas_kernels.w4a16_swiglu import w4a16_swiglu, w4a16_swiglu_is_fused

__all__ = [
    "EVERYTHING",
    "IMPLEMENTATIONS",
    "MAX_DECODE_TOKENS",
    "Int8Cache",
    "Layout",
    "PartialSums",
    "QuantizedActivation",
    "QuantizedWeight",
    "available_implementations",
    "best_layout",
    "best_layout_for_codes",
    "block_attention",
    "block_attention_int8",
    "check_group_size",
    "choose_blocks",
    "decode_attention",
    "decode_attention_int8",
    "decode_attention_int8_with_masses",
    "decode_attention_with_masses",
    "dequantize",
    "dequantize_activation",
    "float_matmul",
    "float_partial_sums",
    "float_prefill_is_alike",
    "hadamard",
    "least_blocks",
    "pack_codes",
    "pack_nested",
    "prefill_attention",
    "prefill_int8",
    "prefill_int8_is_alike",
    "prefill_is_alike",
    "prefill_pieces_int8",
    "quantize_activations",
    "rms_norm",
    "rms_norm_quantize",
    "rotate_and_write",
    "rotate_and_write_int8",
    "rows_alike",
    "rows_read",
    "swiglu",
    "swiglu_hadamard",
    "swiglu_hadamard_quantize",
    "swiglu_quantize",
    "unpack_codes",
    "unpack_nested",
    "upper_nibbles",
    "value_of",
    "w4a4_matmul",
    "w4a4_partial_sums",
    "w4a4_swiglu_quantize",
    "w4a4_swiglu_quantize_is_fused",
    "w4a16_matmul",
    "w4a16_partial_sums",
    "w4a16_swiglu",
    "w4a16_swiglu_is_fused",
    "with_group_sums",
    "with_layout",
]
