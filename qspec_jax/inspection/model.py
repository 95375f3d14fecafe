"""What a model is and what it takes, from its headers: no weight is read."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from qspec_jax.decoding.chunks import fitting_capacity
from qspec_jax.decoding.plan import AUTO
from qspec_jax.device.memory import available_bytes
from qspec_jax.device.mesh import MeshShape
from qspec_jax.engine.load import OpenedModel, open_model
from qspec_jax.errors import QSpecError
from qspec_jax.inspection.choices import kernel_choices
from qspec_jax.model.cache import position_bytes, row_bytes
from qspec_jax.model.config import ModelConfig, QuantConfig, quantization_config, quantization_method
from qspec_jax.model.decoder import abstract_decoder, num_bytes
from qspec_jax.model.linear import WeightFormat
from qspec_jax.model.parameters import HEAD, expected_parameters, layer_anatomy
from qspec_jax.model.placement import decoder_options, kv_format
from qspec_jax.model.sharding import check_split, local_config, local_formats
from qspec_jax.tokenizer.tokenizer import Tokenizer
from qspec_jax.weights.checkpoint.manifest import is_checkpoint
from qspec_jax.weights.checkpoint.restore import Checkpoint, open_checkpoint
from qspec_jax.weights.resolve import model_bytes, open_tokenizer
from qspec_jax.weights.source import Source

_ONE_DEVICE = MeshShape()
BATCHES = (1, 8, 32, 128)
CONTEXTS = (1024, 4096, 16384, 65536)


@dataclasses.dataclass(frozen=True)
class _Stored:
    """How a model lies on the disk: its architecture, what made its codes, and how many linears are stored how."""

    kind: str
    architecture: str
    method: str
    linears: Mapping[str, int]


def describe_model(
    path: Path,
    *,
    quantization: QuantConfig | None = None,
    dtype: str | None = None,
    kernels: str = "auto",
    kv: str = "model",
    mesh: MeshShape = _ONE_DEVICE,
    verify: str = AUTO,
    draft_path: Path | None = None,
    heads: Mapping[str, int | None] | None = None,
) -> dict[str, Any]:
    """Facts by name, for JSON.

    Args:
        path: of ``resolve_model``.
        quantization: of weights that are rounded as they are read; None for that of the checkpoint, or the usual one.
        dtype, kernels, kv: as of :func:`qspec_jax.load`.
        mesh: devices like this one that share the model; there need not be so many.
        verify, draft_path: as of :func:`qspec_jax.load`, the second of its ``draft_model``.
        heads: its ``head_bits`` and ``draft_head``, as far as they are given.

    Raises:
        UsageError: an argument makes no sense for this model, or it does not split among so many devices.
        CheckpointError, UnsupportedModelError: the model cannot be opened.
    """
    placement = decoder_options(kernels, dtype)
    kv = kv_format(kv, dtype=placement["dtype"])
    heads = heads or {}
    opened = open_model(path, quantization or "auto", verify=verify, draft_path=draft_path, **heads)
    config, chosen, formats = opened.config, opened.quantization, opened.formats
    assert chosen is not None
    assert formats is not None
    stored = _how_stored(path, opened, draft_path)
    check_split(config, mesh.model, quantization=chosen, formats=formats)
    tokenizer, problem = _tokenizer(path)
    shapes = {"quantization": chosen, "formats": formats}
    return {
        "model": path.name,
        "path": str(path),
        "kind": stored.kind,
        "architecture": stored.architecture,
        "disk_bytes": model_bytes(path),
        "shapes": _shapes(config),
        "quantization": _quantization(config, stored, formats, chosen),
        "mesh": {"data": mesh.data, "model": mesh.model},
        "memory": _memory(config, placement, shapes, mesh, kv),
        "kernels": _kernels(config, placement, shapes, mesh, {"kv": kv, "verify": verify}),
        "device": jax.local_devices()[0].device_kind,
        **_text(config, tokenizer, problem),
    }


def _how_stored(path: Path, opened: OpenedModel, draft_path: Path | None) -> _Stored:
    """How an opened model lies on the disk; its linears are those of the 4-bit copy, if it has one."""
    assert opened.formats is not None
    stored = _stored(path, opened.source, opened.formats)
    if opened.drafts is None or draft_path is None:
        return stored
    copied = _stored(draft_path, opened.drafts, opened.formats)
    return dataclasses.replace(stored, method=copied.method, linears=copied.linears)


def _stored(path: Path, source: Source | Checkpoint, formats: Mapping[str, WeightFormat]) -> _Stored:
    if isinstance(source, Source) and not is_checkpoint(path):
        return _stored_source(path, source, formats)
    return _stored_checkpoint(source if isinstance(source, Checkpoint) else open_checkpoint(path))


def _stored_checkpoint(checkpoint: Checkpoint) -> _Stored:
    manifest = checkpoint.manifest
    name = str(manifest.recipe.get("name", "unknown"))
    linears: collections.Counter[str] = collections.Counter()
    beside = " and floats" if manifest.quantization.keep_floats else ""
    for spec in expected_parameters(manifest.model).values():
        if spec.kind == "linear":
            linears[f"{manifest.formats[spec.module].bits}-bit codes{beside}, kept"] += 1
    return _Stored("checkpoint of qspec_jax", _anatomy(manifest.model), f"recipe {name}", linears)


def _stored_source(path: Path, source: Source, formats: Mapping[str, WeightFormat]) -> _Stored:
    linears: collections.Counter[str] = collections.Counter()
    made: set[str] = set()
    kind, architecture, method = _kind(path, source)
    for name, entry in source.entries.items():
        if (spec := source.specs[name]).kind == "linear":
            made.add(method if entry.codes is not None else "rounding to nearest, as it is read")
            if (codes := entry.codes) is not None:
                of_file = "Q8_0" if codes.bits == 8 else "Q4_0" if codes.symmetric else "Q4_1"
                linears[f"{f'{codes.bits}-bit' if path.is_dir() else of_file} codes, kept"] += 1
            else:
                stored, to = entry.requantized_from, f"rounded to {formats[spec.module].bits} bits"
                linears[f"{stored}, {to} once more" if stored else f"floats, {to}"] += 1
    return _Stored(kind, architecture, "; ".join(sorted(made)), linears)


def _kind(path: Path, source: Source) -> tuple[str, str, str]:
    """What a model lies in, its architecture, and what made the codes that it has, if it has any."""
    if not path.is_dir():
        return "GGUF file", _anatomy(source.config), "of the file's types"
    from qspec_jax.weights.huggingface.files import read_json
    from qspec_jax.weights.huggingface.settings import complete_config

    parsed = complete_config(path, read_json(path / "config.json"))
    named = parsed.get("architectures") or [parsed.get("model_type") or _anatomy(source.config)]
    settings = quantization_config(parsed)
    method = "QSpec release" if settings is None else quantization_method(settings)  # which names no method
    return "Hugging Face directory", str(named[0] if isinstance(named, list) else named), method


def _anatomy(config: ModelConfig) -> str:
    """The family that a config is of, by what it has."""
    if config.qk_norm:
        return "Qwen3"
    if config.qkv_bias and not config.output_bias:
        return "Qwen2"
    return "Mistral" if config.sliding_window else "Llama"


def _shapes(config: ModelConfig) -> dict[str, Any]:
    names = ("num_layers", "hidden_size", "intermediate_size", "num_heads", "num_kv_heads", "head_dim", "vocab_size")
    parameters = expected_parameters(config).values()
    scaling = config.rope_scaling
    return {
        **{name: getattr(config, name) for name in names},
        "num_parameters": sum(_size(spec.shape) for spec in parameters),
        "max_positions": config.max_position_embeddings,
        "sliding_window": config.sliding_window,
        "rope_theta": config.rope_theta,
        "rope_scaling": None if scaling is None else dataclasses.asdict(scaling),
        "biases": [name for name in ("qkv_bias", "output_bias", "mlp_bias") if getattr(config, name)],
        "qk_norm": config.qk_norm,
    }


def _size(shape: Sequence[int]) -> int:
    size = 1
    for axis in shape:
        size *= axis
    return size


def _quantization(
    config: ModelConfig, stored: _Stored, formats: Mapping[str, WeightFormat], quantization: QuantConfig
) -> dict[str, Any]:
    """How its linears are kept in memory; a group size of None is the whole row."""
    linears = layer_anatomy(config).linears
    return {
        "bits": quantization.bits,
        "keeps_floats": quantization.keep_floats,
        "method": stored.method,
        "linears": dict(stored.linears),
        "formats": {
            name: {"group_size": None if one.group_size == linears[name].num_inputs else one.group_size}
            | {"symmetric": one.symmetric, "bits": one.bits}
            for name, one in formats.items()
            if name in linears
        },
        "drafts": {name: dataclasses.asdict(getattr(quantization, name)) for name in ("w4a8", "w4a4")},
        "rotated": config.down_hadamard,
        "hadamard_block": config.hadamard_block,
        "head": "tied to the embedding" if config.tie_word_embeddings else "of its own",
        "head_bits": quantization.head_bits,
        "keeps_head_codes": HEAD in formats,
        "draft_head": quantization.draft_head,
    }


def _kernels(
    config: ModelConfig,
    placement: Mapping[str, Any],
    shapes: Mapping[str, Any],
    mesh: MeshShape,
    asked: Mapping[str, str],
) -> dict[str, Any]:
    """What one device runs, whose shapes are those of a smaller model."""
    options: dict[str, Any] = {**shapes, "formats": local_formats(config, shapes["formats"], mesh.model)}
    options |= {"kernels": placement["kernels"], "dtype": placement["dtype"], **asked}
    found = kernel_choices(local_config(config, mesh.model), **options)
    return {name: [dataclasses.asdict(choice) for choice in choices] for name, choices in found.items()}


def _memory(
    config: ModelConfig, placement: Mapping[str, Any], shapes: Mapping[str, Any], mesh: MeshShape, kv: str
) -> dict[str, Any]:
    """Bytes of weights and caches on a device, and what fits beside the weights; batches are those of all devices."""
    decoder = abstract_decoder(config, **shapes, **placement, split=mesh.model)
    weights, free = num_bytes(decoder), available_bytes()
    contexts = sorted({min(size, config.max_position_embeddings) for size in CONTEXTS})
    local, kept = local_config(config, mesh.model), {"dtype_bytes": placement["dtype"].itemsize, "kv": kv}
    per_position, per_row = position_bytes(local, **kept), row_bytes(local, **kept)
    one = {context: fitting_capacity(context) * per_position + per_row for context in contexts}
    left = None if free is None else free - weights
    fitting = {context: max(0, (left or 0) // size) * mesh.data for context, size in one.items()}
    return {
        "dtype": placement["dtype"].name,
        "kv": kv,
        "weight_bytes": weights,
        "cache_bytes_per_token": per_position,
        "cache_bytes": {
            context: {batch: size * -(-batch // mesh.data) for batch in BATCHES} for context, size in one.items()
        },
        "free_bytes": free,
        "weights_fit": None if left is None else left >= 0,
        "largest_batch": None if left is None else fitting,
    }


def _tokenizer(path: Path) -> tuple[Tokenizer | None, str | None]:
    """The tokenizer, and why there is none: a model can be looked at without."""
    try:
        tokenizer = open_tokenizer(path)
    except QSpecError as error:
        return None, str(error)
    return tokenizer, None if tokenizer is not None else "it was saved without one"


def _text(config: ModelConfig, tokenizer: Tokenizer | None, problem: str | None) -> dict[str, Any]:
    known = tokenizer.eos_token_ids if tokenizer is not None else ()
    ends = sorted({*config.eos_token_ids, *known})
    template = None if tokenizer is None else tokenizer.chat_template
    return {
        "tokenizer": {"problem": problem, "vocab_size": None if tokenizer is None else tokenizer.vocab_size},
        "end_tokens": {token: None if tokenizer is None else tokenizer.vocabulary_token(token) for token in ends},
        "chat_template": template,
    }
