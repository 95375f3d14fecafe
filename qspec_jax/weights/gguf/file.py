"""Opens a GGUF file (llama.cpp) as a source of tensors.

Q4_0 and Q4_1 linears keep their codes and scales bit for bit; every other tensor is dequantised to
float32 when it is read, and a linear among them (K-quants, Q8_0) is then rounded a second time: its entry says from
which type, so that loading can warn. The rows of query and key, which llama.cpp reorders for the Llama architecture
(its rotary embedding pairs neighbours), come back in the order of the original checkpoint. The file stays
memory-mapped: a tensor that is not read costs nothing.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import weakref
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from qspec_jax.errors import CheckpointError, UnsupportedModelError
from qspec_jax.model.config import ModelConfig, RopeScaling
from qspec_jax.model.linear import WeightFormat
from qspec_jax.model.parameters import ParameterSpec, expected_parameters
from qspec_jax.model.rope import llama3_multipliers
from qspec_jax.weights.source import (
    FoundTensor,
    QuantizedTensor,
    Source,
    TensorEntry,
    canonical_name,
    check_entries,
)

if TYPE_CHECKING:
    from gguf import ReaderTensor

# Mistral files say "llama".
_HF_ARCHITECTURE = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
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
_ROPE_FACTORS = "rope_freqs.weight"  # a table made from the config, not a parameter
_GROUP_SIZE = 32
_FLOAT_TYPES = ("F64", "F32", "F16", "BF16")
_FOUR_BIT = {"Q4_0": WeightFormat(_GROUP_SIZE, symmetric=True), "Q4_1": WeightFormat(_GROUP_SIZE, symmetric=False)}

_open_files: weakref.WeakValueDictionary[tuple[str, int, int], GGUFFile] = weakref.WeakValueDictionary()


@dataclasses.dataclass(frozen=True, eq=False)
class GGUFFile:
    """A parsed GGUF file: all metadata decoded, all tensors mapped.

    Attributes:
        path: of the file.
        metadata: key to number, string, bool, or list of these.
        tensors: name to tensor, in the order of the file.
    """

    path: Path
    metadata: Mapping[str, Any]
    tensors: Mapping[str, ReaderTensor]

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> GGUFFile:
        """Parses ``path``, or returns the object that still exists for the same unchanged file.

        Raises:
            CheckpointError: the file cannot be read, is not GGUF, or is damaged.
        """
        path = Path(path)
        try:
            status = path.stat()
        except OSError as error:
            raise CheckpointError(f"cannot read {path}: {error.strerror}") from error
        key = (str(path.resolve()), status.st_mtime_ns, status.st_size)
        file = _open_files.get(key)
        if file is None:
            file = _open_files[key] = _parse(path)
        return file

    @property
    def architecture(self) -> str:
        """``general.architecture``.

        Raises:
            UnsupportedModelError: it is not supported.
        """
        architecture = self.metadata.get("general.architecture")
        if architecture not in _HF_ARCHITECTURE:
            raise UnsupportedModelError(
                f"{self.path}: GGUF architecture {architecture!r} is not supported; supported: "
                f"{', '.join(_HF_ARCHITECTURE)} (Mistral files say llama)"
            )
        return architecture

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """The tokens that the file names as the end of a sequence or of a turn."""
        keys = ("tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id")
        return tuple(dict.fromkeys(self.metadata[key] for key in keys if key in self.metadata))


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


def _parse(path: Path) -> GGUFFile:
    from qspec_jax.weights.gguf.reader import Reader

    try:
        with path.open("rb") as stream:
            magic = stream.read(4)
        if magic != b"GGUF":
            raise CheckpointError(f"{path} is not a GGUF file: it starts with {magic!r} instead of b'GGUF'")
        reader = Reader(path)
        metadata = {name: field.contents() for name, field in reader.fields.items()}
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from error
    except (ValueError, IndexError, KeyError, TypeError, OverflowError, MemoryError) as error:
        # The reader takes slices without checking them: what it raises on a cut-off file is accidental.
        reason = f"{type(error).__name__}: {error}"
        raise CheckpointError(f"{path} is truncated or damaged; fetch the file again ({reason})") from error
    if reader.byte_order == "S":
        raise UnsupportedModelError(f"{path} is a big-endian GGUF file; supported: little-endian")
    return GGUFFile(path, metadata, {tensor.name: tensor for tensor in reader.tensors})


def read_config(file: GGUFFile) -> ModelConfig:
    """The model's config, out of the metadata and the set of tensors.

    Raises:
        CheckpointError: required metadata or the embedding is missing.
        UnsupportedModelError: the architecture, or an option of it, is not supported.
    """
    try:
        config = ModelConfig.from_hf(_hf_config(file))
    except UnsupportedModelError as error:
        raise UnsupportedModelError(f"{file.path} (metadata read as a config.json): {error}") from error

    def any_bias(*names: str) -> bool:
        return any(f"blk.0.{name}.bias" in file.tensors for name in names)

    return dataclasses.replace(
        config,
        qkv_bias=any_bias("attn_q", "attn_k", "attn_v"),
        output_bias=any_bias("attn_output"),
        mlp_bias=any_bias("ffn_gate", "ffn_up", "ffn_down"),
        eos_token_ids=file.eos_token_ids,
        rope_scaling=_rope_scaling(file, config),
    )


def _hf_config(file: GGUFFile) -> dict[str, Any]:
    """The metadata in the terms of a Hugging Face ``config.json``."""
    architecture = file.architecture

    def metadata(key: str, default: Any = None) -> Any:
        return file.metadata.get(f"{architecture}.{key}", default)

    required = ("block_count", "embedding_length", "feed_forward_length", "attention.head_count")
    if missing := [f"{architecture}.{key}" for key in required if not isinstance(metadata(key), int)]:
        raise CheckpointError(f"{file.path}: metadata missing or not an integer: {', '.join(missing)}")
    if "token_embd.weight" not in file.tensors:
        raise CheckpointError(f"{file.path}: tensor token_embd.weight is missing; it may hold a vocabulary alone")
    if metadata("expert_count", 0):
        raise UnsupportedModelError(f"{architecture}.expert_count={metadata('expert_count')} (supported: dense models)")
    heads, head_dim = metadata("attention.head_count"), metadata("attention.key_length")
    if metadata("attention.value_length", head_dim) != head_dim:
        raise UnsupportedModelError("attention.key_length and attention.value_length differ (supported: equal lengths)")
    head_dim = head_dim or metadata("embedding_length") // heads
    window = metadata("attention.sliding_window") if architecture == "llama" else None
    return {
        "architectures": ["MistralForCausalLM" if window else _HF_ARCHITECTURE[architecture]],
        "vocab_size": _shape(file.tensors["token_embd.weight"])[0],
        "hidden_size": metadata("embedding_length"),
        "intermediate_size": metadata("feed_forward_length"),
        "num_hidden_layers": metadata("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": metadata("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "partial_rotary_factor": metadata("rope.dimension_count", head_dim) / head_dim,
        "rms_norm_eps": metadata("attention.layer_norm_rms_epsilon", 1e-5),
        "rope_theta": metadata("rope.freq_base", 10000.0),
        "rope_scaling": _linear_or_named_scaling(metadata("rope.scaling.type"), metadata),
        "max_position_embeddings": metadata("context_length", 2048),
        "sliding_window": window,
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "bos_token_id": file.metadata.get("tokenizer.ggml.bos_token_id"),
    }


def _linear_or_named_scaling(kind: str | None, metadata: Any) -> dict[str, Any] | None:
    linear_factor = metadata("rope.scale_linear")  # older files
    if kind is None and linear_factor not in (None, 1.0):
        return {"rope_type": "linear", "factor": linear_factor}
    if kind in (None, "none"):
        return None
    return {"rope_type": kind, "factor": metadata("rope.scaling.factor", 1.0)}


def _rope_scaling(file: GGUFFile, config: ModelConfig) -> RopeScaling | None:
    """Recognises Llama 3.1+ scaling, which llama.cpp stores as one divisor per frequency.

    The divisors do not say which parameters made them, so those of the released models are tried: their
    factor is the largest divisor, the other three never changed.
    """
    if _ROPE_FACTORS not in file.tensors:
        return config.rope_scaling
    divisors = _read_floats(file.tensors[_ROPE_FACTORS]).reshape(-1)
    if np.allclose(divisors, 1.0, rtol=0, atol=1e-5):
        return config.rope_scaling
    scaling = RopeScaling("llama3", factor=float(divisors.max()))
    frequencies = config.rope_theta ** -(np.arange(0, config.head_dim, 2) / config.head_dim)
    expected = 1.0 / llama3_multipliers(frequencies, scaling)
    if divisors.shape != expected.shape or not np.allclose(divisors, expected, rtol=1e-5, atol=0):
        raise UnsupportedModelError(
            f"{file.path}: the rotary factors in {_ROPE_FACTORS} are not those of Llama 3.1 to 3.3; "
            "use the model's safetensors checkpoint, whose config.json names its scaling"
        )
    return scaling


def _found_tensors(file: GGUFFile, config: ModelConfig, specs: Mapping[str, ParameterSpec]) -> Iterable[FoundTensor]:
    linears = {name for name, spec in specs.items() if spec.kind == "linear"}
    for source_name, tensor in file.tensors.items():
        if source_name == _ROPE_FACTORS:
            continue
        name = canonical_name(source_name, _NAMES)
        order = _row_order(name or "", config) if file.architecture == "llama" else None
        four_bit = _FOUR_BIT.get(tensor.tensor_type.name) if name in linears else None
        read = functools.partial(_read, file, source_name, rows=order, codes=four_bit is not None)
        problem = None if _can_dequantize(tensor.tensor_type) else f"is {tensor.tensor_type.name}, which cannot be read"
        quantized = four_bit is None and tensor.tensor_type.name not in _FLOAT_TYPES
        entry = TensorEntry(_shape(tensor), read, four_bit, tensor.tensor_type.name if quantized else None)
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


def _shape(tensor: ReaderTensor) -> tuple[int, ...]:
    return tuple(int(size) for size in reversed(tensor.shape))


@functools.cache
def _can_dequantize(tensor_type: Any) -> bool:
    from gguf import GGML_QUANT_SIZES
    from gguf.quants import dequantize

    _, block_bytes = GGML_QUANT_SIZES[tensor_type]
    try:
        dequantize(np.zeros((1, block_bytes), np.uint8), tensor_type)
    except NotImplementedError:
        return False
    return True


def _read(file: GGUFFile, source_name: str, *, rows: np.ndarray | None, codes: bool) -> np.ndarray | QuantizedTensor:
    """One tensor. A source that can read holds the file: its tokenizer, opened meanwhile, does not parse it again."""
    tensor = file.tensors[source_name]
    return _read_codes(tensor, rows=rows) if codes else _read_floats(tensor, rows=rows)


def _read_floats(tensor: ReaderTensor, *, rows: np.ndarray | None = None) -> np.ndarray:
    """The tensor as float32, its rows taken in the order ``rows``."""
    from gguf.quants import dequantize

    data = tensor.data if rows is None else tensor.data[rows]
    floats = dequantize(data, tensor.tensor_type).astype(np.float32, copy=False).reshape(_shape(tensor))
    # A float32 tensor is still the mapped file here; a copy does not fault when the file is replaced.
    return floats.copy() if np.may_share_memory(floats, tensor.data) else floats


def _read_codes(tensor: ReaderTensor, *, rows: np.ndarray | None = None) -> QuantizedTensor:
    """The codes and scales of a Q4_0 or Q4_1 tensor, its rows taken in the order ``rows``.

    A block of 32 inputs is: scale, minimum (Q4_1 only), 16 bytes whose low nibbles are inputs 0 to 15 and
    whose high nibbles are inputs 16 to 31. ``w = scale * code + minimum``, or ``scale * (code - 8)``.
    """
    num_outputs, num_inputs = _shape(tensor)
    data = tensor.data if rows is None else tensor.data[rows]
    blocks = data.reshape(num_outputs, num_inputs // _GROUP_SIZE, -1)
    num_scales = (blocks.shape[-1] - _GROUP_SIZE // 2) // 2
    scales = np.ascontiguousarray(blocks[..., : 2 * num_scales]).view("<f2").astype(np.float16)
    nibbles = blocks[..., 2 * num_scales :]
    codes = np.concatenate([nibbles & 0xF, nibbles >> 4], axis=-1).reshape(num_outputs, num_inputs)
    scale, *minimum = (np.ascontiguousarray(scales[..., index].T) for index in range(num_scales))
    return QuantizedTensor(codes, scale, -minimum[0] if minimum else None)
