"""Opens a GGUF file as a source of tensors.

Q4_0, Q4_1 and Q8_0 linears keep their codes and scales bit for bit, and so does an LM head in Q8_0 that is to have 8
bits. Every other tensor is dequantised to float32 when it is read, and a linear among them (K-quants) is then rounded a
second time: its entry says from which type, so that loading can warn. The rows of query and key, which llama.cpp
reorders for the Llama architecture (its rotary embedding pairs neighbours), come back in the order of the original
checkpoint.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterable, Mapping

import numpy as np

from qspec_jax.errors import UnsupportedModelError
from qspec_jax.model.config import ModelConfig
from qspec_jax.model.head import IMPORTED_HEAD
from qspec_jax.model.linear import WeightFormat
from qspec_jax.model.parameters import ParameterSpec, expected_parameters, head_name
from qspec_jax.weights.gguf.file import GGUFFile
from qspec_jax.weights.gguf.metadata import ROPE_FACTORS, read_config
from qspec_jax.weights.gguf.values import BLOCK, can_dequantize, read_codes, read_floats, shape_of
from qspec_jax.weights.source import FoundTensor, QuantizedTensor, Source, TensorEntry, canonical_name, check_entries

_NAMES = {
    r"token_embd\.weight": r"embedding.weight",
    r"output_norm\.weight": r"final_norm.weight",
    r"output\.weight": r"lm_head.weight",
    r"blk\.(\d+)\.attn_norm\.weight": r"layers.\1.attention_norm.weight",
    r"blk\.(\d+)\.ffn_norm\.weight": r"layers.\1.mlp_norm.weight",
    r"blk\.(\d+)\.attn_q\.(weight|bias)": r"layers.\1.attention.query.\2",
    r"blk\.(\d+)\.attn_k\.(weight|bias)": r"layers.\1.attention.key.\2",
    r"blk\.(\d+)\.attn_v\.(weight|bias)": r"layers.\1.attention.value.\2",
    r"blk\.(\d+)\.attn_output\.(weight|bias)": r"layers.\1.attention.output.\2",
    r"blk\.(\d+)\.attn_q_norm\.weight": r"layers.\1.attention.query_norm.weight",
    r"blk\.(\d+)\.attn_k_norm\.weight": r"layers.\1.attention.key_norm.weight",
    r"blk\.(\d+)\.ffn_(gate|up|down)\.(weight|bias)": r"layers.\1.mlp.\2.\3",
}
_WHOLE_NUMBERS = ("I8", "I16", "I32", "I64")
_FLOAT_TYPES = ("F64", "F32", "F16", "BF16")
_KEPT = {
    "Q4_0": WeightFormat(BLOCK, symmetric=True),
    "Q4_1": WeightFormat(BLOCK, symmetric=False),
    "Q8_0": WeightFormat(BLOCK, symmetric=False, bits=8, wide=True),
}


def open_gguf(path: str | os.PathLike[str]) -> Source:
    """Opens a GGUF file and checks that its tensors are those of its config.

    Raises:
        CheckpointError: the file is unreadable, damaged or incomplete.
        UnsupportedModelError: its architecture, or an option of it, is not supported.
    """
    file = GGUFFile.open(path)
    config = read_config(file)
    specs = expected_parameters(config)
    found = _found_tensors(file, config, specs)
    return Source(config, file.path, check_entries(specs, found, path=file.path), specs)


def _found_tensors(file: GGUFFile, config: ModelConfig, specs: Mapping[str, ParameterSpec]) -> Iterable[FoundTensor]:
    linears = {name for name, spec in specs.items() if spec.kind == "linear"}
    for source_name, tensor in file.tensors.items():
        if source_name == ROPE_FACTORS:
            continue
        name = canonical_name(source_name, _NAMES)
        order = functools.partial(_row_order, name or "", config) if file.architecture == "llama" else None
        kept = _KEPT.get(tensor.tensor_type.name) if name in linears else None
        read = functools.partial(_read, file, source_name, order=order, codes=kept is not None)
        if tensor.tensor_type.name not in _WHOLE_NUMBERS and not can_dequantize(tensor.tensor_type):
            raise UnsupportedModelError(
                f"{file.path}: {source_name} is of type {tensor.tensor_type.name}, which is not read; use Q4_0, Q4_1, "
                "Q8_0, another type that the gguf package dequantises, or the model's safetensors checkpoint"
            )
        problem = None if can_dequantize(tensor.tensor_type) else f"is {tensor.tensor_type.name}, which cannot be read"
        quantized = kept is None and tensor.tensor_type.name not in _FLOAT_TYPES
        kind = tensor.tensor_type.name
        is_head = name == head_name(config) and _KEPT.get(kind) == IMPORTED_HEAD
        head = functools.partial(read_codes, tensor) if is_head else None
        entry = TensorEntry(
            shape_of(tensor), read, kept, kind if quantized else None, head, IMPORTED_HEAD if is_head else None
        )
        yield FoundTensor(source_name, name, entry, problem)


def _row_order(name: str, config: ModelConfig) -> np.ndarray | None:
    """Rows of llama.cpp's query or key in the order of the original checkpoint, None for other tensors.

    llama.cpp interleaves the two halves of every head: its row ``2 i + j`` of a head is row
    ``j * HD/2 + i`` of the original.
    """
    projections = {"query": config.num_heads, "key": config.num_kv_heads}
    heads = next((heads for part, heads in projections.items() if f".attention.{part}." in name), None)
    if heads is None:
        return None
    rows = np.arange(heads * config.head_dim)
    return rows.reshape(heads, config.head_dim // 2, 2).swapaxes(1, 2).reshape(-1)


def _read(
    file: GGUFFile, source_name: str, *, order: Callable[[], np.ndarray | None] | None, codes: bool
) -> np.ndarray | QuantizedTensor:
    """One tensor. A source that can read holds the file: its tokenizer, opened meanwhile, does not parse it again."""
    tensor, rows = file.tensors[source_name], None if order is None else order()
    return read_codes(tensor, rows=rows) if codes else read_floats(tensor, rows=rows)
