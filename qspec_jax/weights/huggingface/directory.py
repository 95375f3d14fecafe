"""Opens a Hugging Face directory: ``config.json`` and safetensors, in one file or in shards.

Only the headers are read up front (:mod:`.files`), and the LM head where the config ties it to an embedding that is
there too. Linears that are 4-bit in the file (GPTQ, AWQ, compressed-tensors, QSpec) keep their codes: see
:mod:`.layouts`.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from qspec_jax.errors import CheckpointError, CheckpointWarning, UnsupportedModelError
from qspec_jax.model.config import FAMILIES, ModelConfig, token_ids
from qspec_jax.model.parameters import expected_parameters
from qspec_jax.weights.huggingface import layouts
from qspec_jax.weights.huggingface.files import read_json, stored_tensors, weight_files
from qspec_jax.weights.huggingface.formats import PackedFormat, read_layout
from qspec_jax.weights.huggingface.settings import complete_config, refuse_online_hadamard
from qspec_jax.weights.listing import missing_weights
from qspec_jax.weights.source import (
    FoundTensor,
    Source,
    StoredTensor,
    TensorEntry,
    canonical_name,
    check_entries,
    check_finite,
)
from qspec_jax.weights.tails import warn_of_zero_tail

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
_WRAPPERS = re.compile(r"^(?:_orig_mod\.|module\.)+")  # of torch.compile and of parallel training
_FLOATS = ("F32", "F16", "BF16")
_EMBEDDING, _HEAD = "embedding.weight", "lm_head.weight"


def open_hf(path: str | os.PathLike[str]) -> Source:
    """Opens a directory and checks that its tensors are those of its config.

    Raises:
        CheckpointError: a file is missing, unreadable or damaged, or the tensors do not fit the config.
        UnsupportedModelError: the architecture, or an option of it, is not supported.

    Warns:
        CheckpointWarning: the weights are there twice, the config names two families, ties an LM head that is not the
            embedding or says that floats are quantised, or a file ends in zeros.
    """
    path = Path(path)
    if not (path / "config.json").exists():
        raise missing_weights(
            path, "has no config.json; give a Hugging Face directory (config.json and *.safetensors) or a GGUF file"
        )
    parsed = complete_config(path, read_json(path / "config.json"))
    config = _model_config(path, parsed)
    files = weight_files(path)
    stored = [tensor for file in files for tensor in stored_tensors(file) if not _is_table(tensor.name)]
    stored = _once(_renamed(stored))
    try:
        layout = read_layout(parsed, stored)
    except UnsupportedModelError as error:
        raise UnsupportedModelError(f"{path}: {error}") from error
    tied, stored = _tied(path, config, stored, layout)
    config = dataclasses.replace(config, tie_word_embeddings=tied)
    for file in files:
        warn_of_zero_tail(file)
    specs = expected_parameters(config)
    found = []
    if layout is not None:
        found, stored = layouts.found_linears(layout, stored, specs, _canonical_name)
    found += [_found_tensor(tensor) for tensor in stored]
    if layout is not None:
        found = layouts.completed(layout, found, specs)
    source = Source(config, path, check_entries(specs, found, path=path), specs)
    if layout is not None:
        _warn_of_floats(source, layout.method)
    return source


def _model_config(path: Path, parsed: Mapping[str, Any]) -> ModelConfig:
    """The config of the directory, with the end tokens that its ``generation_config.json`` adds."""
    try:
        refuse_online_hadamard(parsed)
        config = ModelConfig.from_hf(parsed)
    except UnsupportedModelError as error:
        raise UnsupportedModelError(f"{path}: {error}") from error
    _warn_of_another_family(path, parsed, config)
    generation = path / "generation_config.json"
    named = read_json(generation).get("eos_token_id") if generation.exists() else None
    more = token_ids(named, config.vocab_size)
    return dataclasses.replace(config, eos_token_ids=tuple(dict.fromkeys([*config.eos_token_ids, *more])))


def _warn_of_another_family(path: Path, parsed: Mapping[str, Any], config: ModelConfig) -> None:
    """Warns where ``model_type``, which decides in transformers, would read the config in another way."""
    named = next((name for name, family in FAMILIES.items() if family.model_type == parsed.get("model_type")), None)
    if named is None:
        return
    try:
        other = ModelConfig.from_hf({**parsed, "architectures": [named]})
    except UnsupportedModelError:
        differing = "that family refuses it"
    else:
        fields = (field.name for field in dataclasses.fields(config))
        differing = ", ".join(name for name in fields if getattr(other, name) != getattr(config, name))
    if differing:
        warnings.warn(
            f"{path}: config.json has model_type={parsed['model_type']!r} and architectures of another family; "
            f"it is read as these say. What differs: {differing}. Correct the one that is wrong",
            CheckpointWarning,
            stacklevel=2,
        )


def _warn_of_floats(source: Source, method: str) -> None:
    """Warns where settings of quantisation are there, and no linear that is quantised."""
    linears = [source.entries[name] for name, spec in source.specs.items() if spec.kind == "linear"]
    if all(one.codes is None for one in linears):
        warnings.warn(
            f"{source.path}: its quantization_config says {method}, but all {len(linears)} linears are floats; they "
            "are read as floats, and rounded as those of an unquantised checkpoint. Use the checkpoint with the "
            "quantised tensors, or remove the quantization_config if floats are meant",
            CheckpointWarning,
            stacklevel=3,
        )


def _renamed(stored: Sequence[StoredTensor]) -> list[StoredTensor]:
    """The tensors without the prefixes of what wrapped a model in training, and with the one that its body lacks."""
    names = [_WRAPPERS.sub("", tensor.name) for tensor in stored]
    if not any(name.startswith("model.") for name in names):
        names = [name if name.startswith("lm_head.") else f"model.{name}" for name in names]
    return [dataclasses.replace(tensor, name=name) for tensor, name in zip(stored, names, strict=True)]


def _once(stored: Sequence[StoredTensor]) -> list[StoredTensor]:
    """The tensors without copies of the same name and the same values in other shards; others are refused later."""
    kept: dict[str, list[StoredTensor]] = {}
    for tensor in stored:
        same = kept.setdefault(tensor.name, [])
        if not (same and same[0].dtype == tensor.dtype and _are_equal(same[0], tensor)):
            same.append(tensor)
    return [tensor for same in kept.values() for tensor in same]


def _tied(
    path: Path, config: ModelConfig, stored: Sequence[StoredTensor], layout: PackedFormat | None
) -> tuple[bool, list[StoredTensor]]:
    """Whether the embedding is the LM head, whatever the config says, and the tensors without one of two equal ones.

    It is where one of the two is missing, or where the config says so and they are equal. Two that differ are both
    kept: the config may have been written before the head was trained, or quantised.
    """
    names = {_canonical_name(tensor.name): tensor for tensor in stored}
    embedding, head = names.get(_EMBEDDING), names.get(_HEAD)
    packed, packed_embedding = (
        layout is not None and any(layouts.is_part(layout, tensor, module) for tensor in stored)
        for module in ("lm_head", "model.embed_tokens")
    )
    if head is None and not packed:
        return True, list(stored)
    if embedding is None and head is not None and not packed and not packed_embedding:
        alone = dataclasses.replace(head, name="model.embed_tokens.weight")
        return True, [alone if tensor is head else tensor for tensor in stored]
    if not config.tie_word_embeddings:
        return False, list(stored)
    if not packed and head is not None and embedding is not None and _are_equal(head, embedding):
        return True, [tensor for tensor in stored if tensor is not head]
    warnings.warn(
        f"{path}: config.json ties the LM head to the embedding, but the two tensors differ; both are kept. Set "
        "tie_word_embeddings to false if that is right, or remove lm_head from the weights",
        CheckpointWarning,
        stacklevel=2,
    )
    return False, list(stored)


def _are_equal(one: StoredTensor, other: StoredTensor) -> bool:
    if one.shape != other.shape or {one.dtype, other.dtype} - set(_FLOATS):
        return False
    try:
        first, second = one.read(), other.read()
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot read tensors {one.name} and {other.name}: {error}") from error
    if one.dtype == other.dtype:
        return np.array_equal(first.view(np.uint8), second.view(np.uint8))
    return np.array_equal(first.astype(np.float32), second.astype(np.float32))


def _canonical_name(source_name: str) -> str | None:
    return canonical_name(source_name, _NAMES)


def _is_table(source_name: str) -> bool:
    """Whether a tensor is made from the config, and no parameter."""
    return source_name.endswith(_IGNORED_ENDINGS)


def _found_tensor(tensor: StoredTensor) -> FoundTensor:
    problem = None if tensor.dtype in _FLOATS else f"is {tensor.dtype} (supported: {', '.join(_FLOATS)})"
    entry = TensorEntry(tensor.shape, functools.partial(_read_floats, tensor))
    return FoundTensor(tensor.name, _canonical_name(tensor.name), entry, problem)


def _read_floats(tensor: StoredTensor) -> np.ndarray:
    floats = tensor.read()
    check_finite(floats)
    return floats
