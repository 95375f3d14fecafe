"""Opens a Hugging Face directory: ``config.json`` and safetensors, in one file or in shards.

Only the headers are read up front. They are parsed here: the format is eight bytes of length and a JSON
object, and the safetensors library needs another framework for bfloat16. PyTorch pickles are not read.

Linears that are 4-bit in the file (GPTQ, AWQ, compressed-tensors, QSpec) keep their codes: see
:mod:`.quantized_layouts`.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from qspec_jax.errors import CheckpointError, UnsupportedModelError
from qspec_jax.model.config import ModelConfig
from qspec_jax.model.parameters import expected_parameters
from qspec_jax.weights.huggingface import layouts as quantized_layouts
from qspec_jax.weights.source import FoundTensor, Source, StoredTensor, TensorEntry, canonical_name, check_entries

_NAMES = {
    r"model\.embed_tokens\.weight": r"embedding.weight",
    r"model\.norm\.weight": r"final_norm.weight",
    r"lm_head\.weight": r"lm_head.weight",
    r"model\.layers\.(\d+)\.input_layernorm\.weight": r"layers.\1.attention_norm.weight",
    r"model\.layers\.(\d+)\.post_attention_layernorm\.weight": r"layers.\1.mlp_norm.weight",
    r"model\.layers\.(\d+)\.self_attn\.q_proj\.(weight|bias)": r"layers.\1.attention.query.\2",
    r"model\.layers\.(\d+)\.self_attn\.k_proj\.(weight|bias)": r"layers.\1.attention.key.\2",
    r"model\.layers\.(\d+)\.self_attn\.v_proj\.(weight|bias)": r"layers.\1.attention.value.\2",
    r"model\.layers\.(\d+)\.self_attn\.o_proj\.(weight|bias)": r"layers.\1.attention.output.\2",
    r"model\.layers\.(\d+)\.self_attn\.q_norm\.weight": r"layers.\1.attention.query_norm.weight",
    r"model\.layers\.(\d+)\.self_attn\.k_norm\.weight": r"layers.\1.attention.key_norm.weight",
    r"model\.layers\.(\d+)\.mlp\.(gate|up|down)_proj\.(weight|bias)": r"layers.\1.mlp.\2.\3",
}
_IGNORED_ENDINGS = (".rotary_emb.inv_freq",)  # a table made from the config, saved by old versions
_FLOATS = ("F32", "F16", "BF16")
_DTYPES = {
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
    "U8": np.dtype("u1"),
}
_MAX_HEADER_BYTES = 100_000_000  # the format's own limit
_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"


def open_hf(path: str | os.PathLike[str]) -> Source:
    """Opens a directory and checks that its tensors are those of its config.

    Raises:
        CheckpointError: a file is missing, unreadable or damaged, or the tensors do not fit the config.
        UnsupportedModelError: the architecture, or an option of it, is not supported.
    """
    path = Path(path)
    if not (path / "config.json").exists():
        raise CheckpointError(
            f"{path} has no config.json; give a Hugging Face directory (config.json and *.safetensors) or a GGUF file"
        )
    config_json = _read_json(path / "config.json")
    config = _model_config(path, config_json)
    specs = expected_parameters(config)
    stored = [tensor for file in _weight_files(path) for tensor in _stored_tensors(file)]
    try:
        layout = quantized_layouts.read_layout(config_json, stored)
    except UnsupportedModelError as error:
        raise UnsupportedModelError(f"{path}: {error}") from error
    found = []
    if layout is not None:
        found, stored = quantized_layouts.found_linears(layout, stored, specs, _canonical_name)
    found += [_found_tensor(tensor) for tensor in stored if not _is_superfluous(tensor.name, config)]
    if layout is not None:
        found = quantized_layouts.completed(layout, found, specs)
    return Source(config, path, check_entries(specs, found, path=path), specs)


def _model_config(path: Path, parsed: Mapping[str, Any]) -> ModelConfig:
    """The config of the directory, with the end tokens that its ``generation_config.json`` adds."""
    try:
        quantized_layouts.refuse_online_hadamard(parsed)
        config = ModelConfig.from_hf(parsed)
    except UnsupportedModelError as error:
        raise UnsupportedModelError(f"{path}: {error}") from error
    generation = path / "generation_config.json"
    more = _read_json(generation).get("eos_token_id") if generation.exists() else None
    more = more if isinstance(more, list) else [] if more is None else [more]
    return dataclasses.replace(config, eos_token_ids=tuple(dict.fromkeys([*config.eos_token_ids, *more])))


def _read_json(path: Path) -> dict[str, Any]:
    try:
        parsed = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}; fetch the file again") from error
    if not isinstance(parsed, dict):
        raise CheckpointError(f"{path} holds a JSON {type(parsed).__name__}, not an object; fetch the file again")
    return parsed


def _weight_files(path: Path) -> list[Path]:
    """The safetensors files of the model: by its index, else the one file, else all there are."""
    if (path / _INDEX).exists():
        weight_map = _read_json(path / _INDEX).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
            raise CheckpointError(f"{path / _INDEX} has no weight_map of tensor names to files; fetch it again")
        files = [path / name for name in sorted(set(weight_map.values()))]
        if missing := [file.name for file in files if not file.exists()]:
            raise CheckpointError(
                f"{path}: {len(missing)} of {len(files)} shards named in {_INDEX} are missing: "
                f"{', '.join(missing[:8])}; fetch them again"
            )
        return files
    if (path / _SINGLE).exists():
        return [path / _SINGLE]
    if files := sorted(path.glob("*.safetensors")):
        return files
    if pickles := sorted(file.name for pattern in ("*.bin", "*.pt", "*.pth") for file in path.glob(pattern)):
        raise CheckpointError(
            f"{path} has PyTorch weights only ({pickles[0]}), which are not read; convert them to safetensors: "
            "load the model with transformers and call model.save_pretrained(PATH)"
        )
    raise CheckpointError(f"{path} has a config.json but no *.safetensors; fetch the weights too")


def _canonical_name(source_name: str) -> str | None:
    return canonical_name(source_name, _NAMES)


def _is_superfluous(source_name: str, config: ModelConfig) -> bool:
    """Whether a tensor is a table made from the config, or the embedding once more."""
    tied_head = config.tie_word_embeddings and _canonical_name(source_name) == "lm_head.weight"
    return tied_head or source_name.endswith(_IGNORED_ENDINGS)


def _found_tensor(tensor: StoredTensor) -> FoundTensor:
    problem = None if tensor.dtype in _FLOATS else f"is {tensor.dtype} (supported: {', '.join(_FLOATS)})"
    return FoundTensor(tensor.name, _canonical_name(tensor.name), TensorEntry(tensor.shape, tensor.read), problem)


def _stored_tensors(file: Path) -> Iterator[StoredTensor]:
    header, data_start = _read_header(file)
    data_bytes = file.stat().st_size - data_start
    for name, description in header.items():
        if name != "__metadata__":
            yield _stored_tensor(file, name, description, data_start, data_bytes)


def _stored_tensor(file: Path, name: str, description: Any, data_start: int, data_bytes: int) -> StoredTensor:
    try:
        dtype_name, shape = description["dtype"], tuple(int(size) for size in description["shape"])
        start, end = (int(offset) for offset in description["data_offsets"])
    except (TypeError, KeyError, ValueError) as error:
        raise CheckpointError(f"{file}: the header is damaged at tensor {name}; fetch the file again") from error
    if not 0 <= start <= end <= data_bytes:
        raise CheckpointError(
            f"{file} is truncated: its header places {name} at bytes {start} to {end} of its data, which are "
            f"{data_bytes} bytes; fetch the file again"
        )
    dtype = _DTYPES.get(dtype_name)
    if dtype is not None and end - start != math.prod(shape) * dtype.itemsize:
        raise CheckpointError(
            f"{file}: the header is damaged: {name} is {dtype_name} {list(shape)} but takes {end - start} bytes"
        )
    read = functools.partial(_read_tensor, file, dtype or np.dtype(np.uint8), shape, data_start + start)
    return StoredTensor(name, str(dtype_name), shape, read)


def _read_header(file: Path) -> tuple[dict[str, Any], int]:
    """The JSON header of a safetensors file, and where its data start."""
    try:
        with file.open("rb") as stream:
            prefix = stream.read(8)
            length = int.from_bytes(prefix, "little")
            if len(prefix) < 8 or not 0 < length <= _MAX_HEADER_BYTES:
                raise CheckpointError(f"{file} is truncated or is not a safetensors file; fetch the file again")
            raw = stream.read(length)
    except OSError as error:
        raise CheckpointError(f"cannot read {file}: {error.strerror}") from error
    if len(raw) < length:
        raise CheckpointError(f"{file} is truncated within its header; fetch the file again")
    try:
        header = json.loads(raw)
    except ValueError as error:
        raise CheckpointError(f"{file}: the header is not valid JSON: {error}; fetch the file again") from error
    if not isinstance(header, dict):
        raise CheckpointError(f"{file}: the header is not a JSON object; fetch the file again")
    return header, 8 + length


def _read_tensor(file: Path, dtype: np.dtype, shape: tuple[int, ...], offset: int) -> np.ndarray:
    """Reads one tensor, in the dtype of the file."""
    flat = np.fromfile(file, dtype, count=math.prod(shape), offset=offset)
    return flat.reshape(shape)  # ValueError if the file has become shorter since its header was read
