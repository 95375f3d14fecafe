"""Packs 4-bit weights as GPTQ, AWQ, compressed-tensors and QSpec files hold them, one number at a time.

Written from the packing loops of those libraries and not from this library's unpacking: every code is placed by its
own shift, so that a wrong order shows.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from tests.weights.tiny_checkpoints import hf_config, hf_tensors, write_hf

AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]  # order_map of AutoAWQ's WQLinear_GEMM.from_linear


@dataclasses.dataclass(frozen=True)
class Weight:
    """``scale[g, n] * (codes[n, k] - zero[g, n])``."""

    codes: np.ndarray  # [N, K]
    scale: np.ndarray  # [G, N]
    zero: np.ndarray  # [G, N]
    bits: int = 4

    @property
    def floats(self) -> np.ndarray:
        """``[N, K]`` float32, exact: a product of at most 11 and 5 bits."""
        size = self.codes.shape[1] // len(self.scale)
        scale, zero = (np.repeat(array.astype(np.float64).T, size, axis=1) for array in (self.scale, self.zero))
        return (scale * (self.codes - zero)).astype(np.float32)


def random_weight(
    n: int,
    k: int,
    group_size: int | None,
    *,
    symmetric: bool,
    dtype: Any = np.float16,
    seed: int = 0,
    lowest: int = 0,
    bits: int = 4,
) -> Weight:
    random = np.random.default_rng([seed, n, k])
    groups = k // (group_size or k)
    zero = np.full((groups, n), 2 ** (bits - 1)) if symmetric else random.integers(lowest, 2**bits, (groups, n))
    scale = random.uniform(0.002, 0.02, (groups, n)).astype(dtype)
    return Weight(random.integers(0, 2**bits, (n, k)), scale, zero, bits)


def pack_words(numbers: np.ndarray, order: list[int] | None = None, *, bits: int = 4) -> np.ndarray:
    """``[rows, columns]`` to int32, 8 or 4 a word; ``order[i]`` is the column whose bits start at ``bits * i``."""
    rows, columns = numbers.shape
    count = 32 // bits
    words = np.zeros((rows, columns // count), np.uint32)
    for word in range(columns // count):
        for i in range(count):
            column = count * word + (i if order is None else order[i])
            words[:, word] |= numbers[:, column].astype(np.uint32) << np.uint32(bits * i)
    return words.view(np.int32)


def gptq_parts(weight: Weight, *, less_one: bool = True) -> dict[str, np.ndarray]:
    """AutoGPTQ's ``QuantLinear.pack``; without ``less_one`` GPTQModel's ``pack_original`` (format ``gptq_v2``)."""
    num_inputs = weight.codes.shape[1]
    return {
        "qweight": pack_words(weight.codes, bits=weight.bits).T.copy(),
        "qzeros": pack_words(weight.zero - int(less_one), bits=weight.bits),
        "scales": weight.scale,
        "g_idx": (np.arange(num_inputs) * len(weight.scale) // num_inputs).astype(np.int32),
    }


def awq_parts(weight: Weight) -> dict[str, np.ndarray]:
    """AutoAWQ's ``WQLinear_GEMM.from_linear``."""
    return {
        "qweight": pack_words(weight.codes.T, AWQ_ORDER),
        "qzeros": pack_words(weight.zero, AWQ_ORDER),
        "scales": weight.scale,
    }


def compressed_parts(weight: Weight, *, symmetric: bool) -> dict[str, np.ndarray]:
    """``PackedQuantizationCompressor.compress`` of compressed-tensors: signed numbers stored plus 8 or 128."""
    parts = {
        "weight_packed": pack_words(weight.codes, bits=weight.bits),
        "weight_scale": weight.scale.T.copy(),
        "weight_shape": np.array(weight.codes.shape, np.int64),
    }
    return parts if symmetric else parts | {"weight_zero_point": pack_words(weight.zero, bits=weight.bits).T.copy()}


def qspec_parts(weight: Weight) -> dict[str, np.ndarray]:
    """``pack_i4`` of the QSpec repository: two's complement, the even input in the low nibble."""
    signed = weight.codes - 8
    nibbles = np.where(signed < 0, signed + 16, signed)
    packed = (nibbles[:, 0::2] | nibbles[:, 1::2] << 4).astype(np.uint8)
    return {"weight": packed, "weight_scales": weight.scale.T.copy()}


def _compressed_settings(group_size: int | None, symmetric: bool, bits: int) -> dict[str, Any]:
    strategy = {"strategy": "group", "group_size": group_size} if group_size else {"strategy": "channel"}
    weights = {"num_bits": bits, "type": "int", "symmetric": symmetric, "dynamic": False, "actorder": None} | strategy
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None, "output_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
    }


@dataclasses.dataclass(frozen=True)
class Case:
    """A kind of checkpoint that is supported."""

    method: str
    group_size: int | None
    symmetric: bool
    dtype: Any = np.float16
    less_one: bool = True
    bits: int = 4

    def settings(self) -> dict[str, Any] | None:
        size = self.group_size or -1
        if self.method == "gptq":
            stored = "gptq" if self.less_one else "gptq_v2"
            common = {"bits": self.bits, "group_size": size, "desc_act": False, "sym": self.symmetric}
            return common | {"quant_method": "gptq", "checkpoint_format": stored}
        if self.method == "awq":
            return {"quant_method": "awq", "bits": 4, "group_size": size, "version": "gemm", "zero_point": True}
        return None if self.method == "qspec" else _compressed_settings(self.group_size, self.symmetric, self.bits)

    def parts(self, weight: Weight) -> dict[str, np.ndarray]:
        return {
            "gptq": lambda: gptq_parts(weight, less_one=self.less_one),
            "awq": lambda: awq_parts(weight),
            "compressed-tensors": lambda: compressed_parts(weight, symmetric=self.symmetric),
            "qspec": lambda: qspec_parts(weight),
        }[self.method]()

    def weight(self, n: int, k: int, seed: int = 0) -> Weight:
        lowest = int(self.method == "gptq" and self.less_one)  # AutoGPTQ's loop cannot store 0 less one
        kind = {"symmetric": self.symmetric, "dtype": self.dtype, "seed": seed, "lowest": lowest, "bits": self.bits}
        return random_weight(n, k, self.group_size, **kind)


CASES = {
    "gptq": Case("gptq", 32, True),
    "gptq_asymmetric": Case("gptq", 32, False),
    "gptq_whole_row": Case("gptq", None, False),
    "gptq_v2": Case("gptq", 32, True, less_one=False),
    "gptq_v2_asymmetric": Case("gptq", 32, False, less_one=False),
    "awq": Case("awq", 32, False),
    "awq_whole_row": Case("awq", None, False),
    "compressed": Case("compressed-tensors", 32, True),
    "compressed_bfloat16": Case("compressed-tensors", 32, True, ml_dtypes.bfloat16),
    "compressed_asymmetric": Case("compressed-tensors", 32, False, ml_dtypes.bfloat16),
    "compressed_whole_row": Case("compressed-tensors", None, True),
    "compressed_whole_row_asymmetric": Case("compressed-tensors", None, False),
    "qspec": Case("qspec", None, True),
    "gptq_8": Case("gptq", 32, True, bits=8),
    "gptq_8_whole_row_asymmetric": Case("gptq", None, False, bits=8),
    "compressed_8": Case("compressed-tensors", 32, True, ml_dtypes.bfloat16, bits=8),
    "compressed_8_asymmetric": Case("compressed-tensors", 32, False, bits=8),
}


@dataclasses.dataclass
class Checkpoint:
    """A tiny checkpoint that can still be changed: its config, its tensors, and the floats that it means."""

    config: dict[str, Any]
    tensors: dict[str, np.ndarray]
    floats: dict[str, np.ndarray]

    def write(self, path: Path, **options: Any) -> Path:
        return write_hf(path, self.config, self.tensors, **options)


def tiny_checkpoint(case: Case, architecture: str = "LlamaForCausalLM", **changes: Any) -> Checkpoint:
    """A checkpoint whose linears are all quantised; embedding, norms and LM head are float16."""
    settings = case.settings()
    config = hf_config(architecture, **({} if settings is None else {"quantization_config": settings}), **changes)
    tensors, floats = {}, {}
    for seed, (name, array) in enumerate(hf_tensors(config, np.float16).items()):
        module, _, kind = name.rpartition(".")
        if module.endswith("_proj") and kind == "weight":
            weight = case.weight(*array.shape, seed=seed)
            tensors |= {f"{module}.{part}": values for part, values in case.parts(weight).items()}
            floats[name] = weight.floats
        else:
            tensors[name] = array
            floats[name] = array.astype(np.float32)
    return Checkpoint(config, tensors, floats)
