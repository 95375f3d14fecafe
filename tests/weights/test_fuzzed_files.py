"""Whatever stands in a model's files, nothing comes out but a model or an error of this library."""

from __future__ import annotations

import contextlib
import json
import struct
import tempfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qspec_jax.errors import CheckpointWarning, QSpecError
from qspec_jax.model.config import ModelConfig
from qspec_jax.model.parameters import expected_parameters
from qspec_jax.model.rope import inverse_frequencies
from qspec_jax.weights.resolve import open_source, resolve_model
from qspec_jax.weights.source import read_entry
from qspec_jax.weights.tokenizers import load_tokenizer
from tests.fuzzing import JSON_VALUES, ODD_NUMBERS, ODD_TEXTS, fuzzed
from tests.weights.prequantized_packers import CASES, tiny_checkpoint
from tests.weights.tiny_checkpoints import gguf_tensors, hf_config, hf_tensors, write_gguf, write_hf

TOKENS = ["<unk>", "<s>", "</s>", "▁", "a", "b", "▁a", "<|im_end|>", *(f"<{number}>" for number in range(40))]
VOCABULARY = {
    "tokenizer.ggml.model": "llama",
    "tokenizer.ggml.pre": "default",
    "tokenizer.ggml.tokens": TOKENS,
    "tokenizer.ggml.token_type": [2, 3, 3, 1, 1, 1, 1, 3, *[1] * 40],
    "tokenizer.ggml.scores": [-float(number) for number in range(48)],
    "tokenizer.chat_template": "{{ messages[0].content }}",
}
BYTE_LEVEL = {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "qwen2", "tokenizer.ggml.merges": ["a b"]}
ROTARY = {f"llama.rope.{key}": value for key, value in {"scaling.type": "yarn", "scaling.factor": 4.0}.items()}


@contextlib.contextmanager
def only_own_errors():
    """Fails on any other error, and on any warning that is not this library's."""
    with warnings.catch_warnings(), contextlib.suppress(QSpecError):
        warnings.simplefilter("ignore", CheckpointWarning)
        yield


@contextlib.contextmanager
def directory():
    """A directory for one of the many inputs of a test."""
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


def read_weights(path: Path) -> None:
    """Opens a model and reads all of it, as far as it goes."""
    with only_own_errors():
        source = open_source(resolve_model(path))
        inverse_frequencies(source.config)
        for name, entry in source.entries.items():
            read_entry(name, entry)


def use_tokenizer(path: Path) -> None:
    with only_own_errors():
        tokenizer = load_tokenizer(path)
        tokenizer.decode(tokenizer.encode("ab a</s>"))
        tokenizer.apply_chat([{"role": "user", "content": "a"}])


@pytest.fixture(scope="module")
def gguf_files(tmp_path_factory) -> dict[str, Path]:
    config, folder = hf_config(), tmp_path_factory.mktemp("gguf")
    tensors = gguf_tensors(config, hf_tensors(config))
    kinds = {"sentencepiece": VOCABULARY, "bytes": VOCABULARY | BYTE_LEVEL, "rotary": VOCABULARY | ROTARY}
    return {
        kind: write_gguf(folder / f"{kind}.gguf", config, tensors, metadata=metadata)
        for kind, metadata in kinds.items()
    }


def changed(content: bytes, changes: list[tuple[int, int]], cut: int | None) -> bytes:
    altered = bytearray(content)
    for place, byte in changes:
        altered[place % len(altered)] = byte
    return bytes(altered[:cut])


HEADER = 6000  # bytes that hold all that is not weights
BYTE = st.one_of(st.sampled_from([0, 1, 0x7F, 0x80, 0xFF]), st.integers(0, 255))
CHANGES = st.lists(st.tuples(st.integers(0, HEADER), BYTE), min_size=1, max_size=6)


@fuzzed
@given(
    kind=st.sampled_from(["sentencepiece", "bytes", "rotary"]),
    changes=CHANGES,
    cut=st.one_of(st.none(), st.none(), st.integers(0, HEADER)),
)
def test_a_gguf_file_with_changed_bytes(gguf_files, kind, changes, cut):
    with directory() as path:
        (path / "m.gguf").write_bytes(changed(gguf_files[kind].read_bytes(), changes, cut))
        read_weights(path / "m.gguf")
        use_tokenizer(path / "m.gguf")


SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
KEYS = [
    *(f"llama.{key}" for key in ("block_count", "context_length", "embedding_length", "feed_forward_length")),
    *(f"llama.attention.{key}" for key in ("head_count", "head_count_kv", "key_length", "value_length")),
    *(f"llama.attention.{key}" for key in ("layer_norm_rms_epsilon", "sliding_window")),
    *(f"llama.rope.{key}" for key in ("freq_base", "dimension_count", "scale_linear", "scaling.type")),
    *(f"llama.rope.scaling.{key}" for key in ("factor", "attn_factor", "original_context_length")),
    *(f"llama.rope.scaling.yarn_{key}" for key in ("beta_fast", "beta_slow", "ext_factor", "log_multiplier")),
    *(f"tokenizer.ggml.{key}_token_id" for key in ("bos", "eos", "eot", "eom", "unknown", "padding", "fim_pad")),
    *(f"tokenizer.ggml.{key}" for key in ("model", "pre", "tokens", "token_type", "scores", "merges")),
    *(f"tokenizer.ggml.{key}" for key in ("add_bos_token", "add_space_prefix")),
    *("general.architecture", "general.type", "general.alignment", "tokenizer.chat_template", "llama.expert_count"),
    *("split.count", "split.no", "split.tensors.count"),
]


@st.composite
def gguf_values(draw, depth: int = 0) -> bytes:
    """The type and the bytes of a value of any kind."""
    kind = draw(st.sampled_from([*SCALARS, 8, *([9] if depth < 2 else [])]))
    return struct.pack("<I", kind) + draw(gguf_content(kind, depth))


@st.composite
def gguf_content(draw, kind: int, depth: int) -> bytes:
    if kind == 8:
        text = draw(ODD_TEXTS).encode("utf-8", "surrogatepass")
        return struct.pack("<Q", len(text)) + text
    if kind == 9:
        inner = draw(st.sampled_from([*SCALARS, 8, *([9] if depth < 2 else [])]))
        entries = draw(st.lists(gguf_content(inner, depth + 1), max_size=4))
        return struct.pack("<IQ", inner, len(entries)) + b"".join(entries)
    size = struct.calcsize(SCALARS[kind])
    with contextlib.suppress(struct.error, OverflowError):
        return struct.pack("<" + SCALARS[kind], draw(ODD_NUMBERS))
    return draw(st.binary(min_size=size, max_size=size))


def with_values(content: bytes, values: dict[str, bytes]) -> bytes:
    """A file whose metadata have these values, before those that it had; the keys that it had are renamed."""
    count = struct.unpack_from("<Q", content, 16)[0]
    for key in values:
        field = struct.pack("<Q", len(key)) + key.encode()
        content = content.replace(field, field[:-1] + b"~", 1)
    pairs = b"".join(struct.pack("<Q", len(key)) + key.encode() + value for key, value in values.items())
    aligned = pairs + bytes(-len(pairs) % 32)  # as the data that follow are
    if extra := len(aligned) - len(pairs):
        name = b"p" * ((extra - 13) % 32)
        pairs += struct.pack("<Q", len(name)) + name + struct.pack("<I", 7) + b"\0"
        count += 1
    return content[:16] + struct.pack("<Q", count + len(values)) + pairs + content[24:]


@fuzzed
@given(
    kind=st.sampled_from(["sentencepiece", "bytes", "rotary"]),
    values=st.dictionaries(st.sampled_from(KEYS), gguf_values(), min_size=1, max_size=3),
)
def test_a_gguf_file_with_metadata_of_odd_types(gguf_files, kind, values):
    with directory() as path:
        (path / "m.gguf").write_bytes(with_values(gguf_files[kind].read_bytes(), values))
        read_weights(path / "m.gguf")
        use_tokenizer(path / "m.gguf")


def test_a_gguf_file_with_another_value_is_still_read(gguf_files, tmp_path):
    """What the test above writes is a file like any other."""
    for factor in (4.0, 8.0):
        value = struct.pack("<If", 6, factor)
        (tmp_path / "m.gguf").write_bytes(
            with_values(gguf_files["rotary"].read_bytes(), {"llama.rope.scaling.factor": value})
        )
        source = open_source(tmp_path / "m.gguf")
        assert source.config.rope_scaling is not None
        assert source.config.rope_scaling.factor == factor
        np.testing.assert_array_equal(
            source.entries["lm_head.weight"].read(), hf_tensors(hf_config())["lm_head.weight"]
        )


CONFIG_KEYS = [
    *hf_config(),
    *("rope_scaling", "rope_parameters", "partial_rotary_factor", "original_max_position_embeddings", "hidden_act"),
    *("use_sliding_window", "sliding_window", "max_window_layers", "layer_types", "attention_bias", "mlp_bias"),
    *("quantization_config", "compression_config", "quantization", "model_type", "pad_token_id"),
]
ROPE_KEYS = ["rope_type", "type", "factor", "rope_theta", "low_freq_factor", "high_freq_factor", "beta_fast", "mscale"]
ROPE_KEYS += ["beta_slow", "mscale_all_dim", "attention_factor", "truncate", "original_max_position_embeddings"]
ROPES = st.builds(
    lambda kind, values: {"rope_type": kind, "factor": 2.0} | values,
    st.sampled_from(["linear", "llama3", "yarn", "default"]),
    st.dictionaries(st.sampled_from(ROPE_KEYS), JSON_VALUES, max_size=4),
)
ARCHITECTURES = st.sampled_from(["LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"])


@fuzzed
@given(
    architecture=ARCHITECTURES,
    changes=st.dictionaries(st.sampled_from(CONFIG_KEYS), JSON_VALUES, max_size=3),
    rope=st.one_of(st.none(), ROPES),
)
def test_a_config_with_odd_values(architecture, changes, rope):
    with only_own_errors():
        config = ModelConfig.from_hf(hf_config(architecture, rope_scaling=rope) | changes)
        if config.head_dim <= 1 << 16:
            assert np.isfinite(inverse_frequencies(config)).all()
        if config.num_layers <= 100:
            assert all(min(spec.shape) > 0 for spec in expected_parameters(config).values())


@pytest.fixture(scope="module")
def quantised(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("quantised")
    return {case: tiny_checkpoint(CASES[case]).write(folder / case) for case in ("gptq", "awq", "compressed", "qspec")}


OTHER_FILES = ["generation_config.json", "quantize_config.json", "quant_config.json", "hf_quant_config.json"]
SETTINGS = ["quant_method", "bits", "group_size", "desc_act", "sym", "dynamic", "checkpoint_format", "version"]
SETTINGS += [
    "format",
    "config_groups",
    "ignore",
    "packing_format",
    "extra_config",
    "modules_to_not_convert",
    "pack_dtype",
]


@fuzzed
@given(
    case=st.sampled_from(["gptq", "awq", "compressed", "qspec"]),
    changes=st.dictionaries(st.sampled_from(SETTINGS), JSON_VALUES, max_size=2),
    files=st.dictionaries(st.sampled_from(OTHER_FILES), JSON_VALUES, max_size=1),
)
def test_settings_of_a_quantised_directory_with_odd_values(quantised, case, changes, files):
    config = json.loads((quantised[case] / "config.json").read_text())
    if changes:
        config["quantization_config"] = config.get("quantization_config", {}) | changes
    with directory() as path:
        (path / "model.safetensors").symlink_to(quantised[case] / "model.safetensors")
        for name, value in {"config.json": config, **files}.items():
            (path / name).write_text(json.dumps(value))
        read_weights(path)


def written(value: Any) -> bytes:
    return json.dumps(value).encode("utf-8", "surrogatepass")


FILES = ["model-00001-of-00002.safetensors", "model.safetensors", "config.json", ".", "..", "/"]
NAMES = st.one_of(st.sampled_from(FILES), ODD_TEXTS)
INDEXES = st.one_of(
    st.binary(max_size=20),
    JSON_VALUES.map(written),
    st.dictionaries(st.sampled_from([*hf_tensors(hf_config()), "x"]), st.one_of(NAMES, JSON_VALUES), max_size=4).map(
        lambda weight_map: written({"weight_map": weight_map})
    ),
)


@fuzzed
@given(index=INDEXES, num_shards=st.sampled_from([1, 2]), both=st.booleans())
def test_an_index_of_anything(index, num_shards, both):
    config = hf_config()
    with directory() as path:
        write_hf(path, config, hf_tensors(config), num_shards=num_shards)
        if both:
            write_hf(path, config, hf_tensors(config))
        (path / "model.safetensors.index.json").write_bytes(index)
        read_weights(path)


TENSOR_NAMES = st.one_of(st.sampled_from([*hf_tensors(hf_config()), "__metadata__"]), ODD_TEXTS)
ENTRIES = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.one_of(st.sampled_from(["F32", "BF16", "I32", "F8_E4M3", "X"]), JSON_VALUES),
        "shape": st.one_of(st.lists(ODD_NUMBERS, max_size=3), JSON_VALUES),
        "data_offsets": st.one_of(st.lists(ODD_NUMBERS, min_size=2, max_size=2), JSON_VALUES),
    },
)


@pytest.fixture(scope="module")
def safetensors_file(tmp_path_factory) -> Path:
    config = hf_config()
    path = write_hf(tmp_path_factory.mktemp("whole"), config, hf_tensors(config))
    return path / "model.safetensors"


@fuzzed
@given(
    entries=st.dictionaries(TENSOR_NAMES, st.one_of(ENTRIES, JSON_VALUES), max_size=3),
    changes=st.one_of(st.just([]), st.lists(st.tuples(st.integers(0, 2500), BYTE), max_size=4)),
    cut=st.one_of(st.none(), st.none(), st.integers(0, 3000)),
)
def test_a_safetensors_header_with_odd_entries(safetensors_file, entries, changes, cut):
    whole = safetensors_file.read_bytes()
    length = int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8 : 8 + length])
    for name, entry in entries.items():
        header[name] = header.get(name, {}) | entry if isinstance(entry, dict) else entry
    raw = written(header)
    content = len(raw).to_bytes(8, "little") + raw + whole[8 + length :]
    with directory() as path:
        (path / "config.json").write_text(json.dumps(hf_config()))
        (path / "model.safetensors").write_bytes(changed(content, changes, cut))
        read_weights(path)


TOKENIZER_KEYS = ["bos_token", "eos_token", "chat_template", "added_tokens_decoder", "additional_special_tokens"]
TOKENIZER_KEYS += ["extra_special_tokens", "tokenizer_class", "auto_map", "split_special_tokens", "model_max_length"]
TEMPLATES = st.lists(st.fixed_dictionaries({}, optional={"name": JSON_VALUES, "template": JSON_VALUES}))
TOKEN_VALUES = st.one_of(JSON_VALUES, TEMPLATES)


@pytest.fixture(scope="module")
def tokenizer_directory(tmp_path_factory, gguf_files) -> Path:
    path = tmp_path_factory.mktemp("tokenizer")
    (path / "m.gguf").write_bytes(gguf_files["sentencepiece"].read_bytes())
    load_tokenizer(path / "m.gguf").save(path / "saved")
    return path / "saved"


@fuzzed
@given(
    options=st.dictionaries(st.sampled_from(TOKENIZER_KEYS), TOKEN_VALUES, max_size=2),
    others=st.dictionaries(
        st.sampled_from(
            ["special_tokens_map.json", "chat_template.json", "tokenizer_config.json", "added_tokens.json"]
        ),
        st.one_of(st.binary(max_size=8), JSON_VALUES.map(written)),
        max_size=1,
    ),
)
def test_a_tokenizer_directory_with_odd_values(tokenizer_directory, options, others):
    content = json.loads((tokenizer_directory / "tokenizer_config.json").read_text()) | options
    with directory() as path:
        (path / "tokenizer.json").write_bytes((tokenizer_directory / "tokenizer.json").read_bytes())
        for name, raw in {"tokenizer_config.json": written(content), **others}.items():
            (path / name).write_bytes(raw)
        use_tokenizer(path)
