"""GGUF files as people and other programs leave them: splits, odd metadata, damage, and types that are not read."""

import json
import shutil
import struct
from pathlib import Path

import gguf
import jax.numpy as jnp
import numpy as np
import pytest
from gguf import GGMLQuantizationType

from qspec_jax.errors import CheckpointError, RequantizationWarning, UnsupportedModelError
from qspec_jax.model.config import QuantConfig
from qspec_jax.weights.fill import load_decoder, weight_formats
from qspec_jax.weights.gguf.ends import end_token_ids
from qspec_jax.weights.gguf.file import GGUFFile
from qspec_jax.weights.gguf.metadata import read_config
from qspec_jax.weights.gguf.values import can_dequantize, read_codes, read_floats
from qspec_jax.weights.resolve import model_bytes, open_source, resolve_model
from tests.weights.tiny_checkpoints import gguf_tensors, hf_config, hf_tensors, write_gguf, write_hf

CONFIG = hf_config()
TENSORS = gguf_tensors(CONFIG, hf_tensors(CONFIG))


def write(path, **options):
    return write_gguf(path, CONFIG, TENSORS, **options)


@pytest.fixture
def split(tmp_path):
    """The parts of a model, in a directory of their own."""
    (tmp_path / "split").mkdir()
    write(tmp_path / "split" / "m.gguf", tensors_per_part=8)
    return sorted((tmp_path / "split").glob("*.gguf"))


def assert_equal_tensors(source, expected):
    assert source.config == expected.config
    assert source.entries.keys() == expected.entries.keys()
    for name, entry in source.entries.items():
        np.testing.assert_array_equal(entry.read(), expected.entries[name].read(), err_msg=name)


@pytest.mark.parametrize("given", [0, 1, 2, "directory"])
def test_a_split_model_loads_by_any_part_and_by_its_directory(split, tmp_path, given):
    expected = open_source(write(tmp_path / "whole.gguf"))
    (split[0].parent / "mmproj-model-f16.gguf").write_bytes(b"GGUF")
    path = split[0].parent if given == "directory" else split[given]
    source = open_source(resolve_model(path))
    assert [part.name for part in split] == [f"m-0000{part}-of-00003.gguf" for part in (1, 2, 3)]
    assert source.path == split[0]
    assert_equal_tensors(source, expected)
    assert model_bytes(resolve_model(path)) == sum(part.stat().st_size for part in split)


def test_a_split_whose_part_is_replaced_is_parsed_anew(split):
    first = GGUFFile.open(split[0])
    assert GGUFFile.open(split[2]) is first
    split[1].write_bytes(split[1].read_bytes() + b"\0")
    assert GGUFFile.open(split[0]) is not first


@pytest.mark.parametrize("missing", [0, 1, 2])
def test_parts_that_are_missing_are_named(split, missing):
    split[missing].unlink()
    for path in (split[0].parent, split[(missing + 1) % 3]):
        with pytest.raises(CheckpointError, match=rf"1 of the 3 parts .* missing: m-0000{missing + 1}-of-00003\.gguf"):
            open_source(path)


def test_parts_of_different_splits_are_refused(split, tmp_path):
    (tmp_path / "other").mkdir()
    write_gguf(
        tmp_path / "other" / "m.gguf",
        CONFIG,
        TENSORS | {"more.weight": TENSORS["output_norm.weight"]},
        tensors_per_part=8,
    )
    shutil.copy(tmp_path / "other" / split[1].name, split[1])
    with pytest.raises(CheckpointError, match=r"m-00002-of-00003\.gguf says .*another split"):
        open_source(split[0])


def test_a_part_in_the_place_of_another_is_refused(split):
    shutil.copy(split[1], split[2])
    with pytest.raises(CheckpointError, match=r"m-00003-of-00003\.gguf says that it is part 1 of 3"):
        open_source(split[0])


@pytest.mark.parametrize("names", [("m-1-of-3", "m-2-of-3", "m-3-of-3"), ("c", "b", "a")])
@pytest.mark.parametrize("given", [0, 1, 2, "directory"])
def test_parts_that_were_renamed_are_known_by_what_they_say(split, tmp_path, names, given):
    expected = open_source(write(tmp_path / "whole.gguf"))
    (split[0].parent / "mmproj.gguf").write_bytes(b"GGUF")
    renamed = [part.rename(part.with_name(f"{name}.gguf")) for part, name in zip(split, names, strict=True)]
    source = open_source(split[0].parent if given == "directory" else renamed[given])
    assert source.path == renamed[0]
    assert_equal_tensors(source, expected)


def test_a_part_that_was_renamed_is_no_model_without_the_others(split):
    renamed = split[0].rename(split[0].with_name("renamed.gguf"))
    assert open_source(renamed).path == renamed
    split[1].unlink()
    with pytest.raises(
        CheckpointError, match=r"one of 3 parts of a model, .*; put them there, named NAME-00001-of-00003"
    ):
        open_source(renamed)


@pytest.mark.parametrize("target", ["m.gguf", "nowhere.gguf"])
def test_a_link_to_nothing_is_named(tmp_path, target):
    (tmp_path / "m.gguf").symlink_to(tmp_path / target)
    with pytest.raises(CheckpointError, match=r"(?i)m\.gguf.*: (no such file|too many levels)"):
        open_source(tmp_path)


def test_a_link_to_a_part_stands_for_the_model(split, tmp_path):
    (tmp_path / "link.gguf").symlink_to(split[1])
    assert open_source(tmp_path / "link.gguf").path == split[0]


def test_a_file_that_is_only_named_like_a_part_is_read(tmp_path):
    assert open_source(write(tmp_path / "m-00001-of-00001.gguf"))


@pytest.mark.demo
def test_a_split_of_the_demo_model_has_its_tensors(demo_gguf, tmp_path):
    reader = gguf.GGUFReader(demo_gguf)
    writer = gguf.GGUFWriter(tmp_path / "demo.gguf", "llama", split_max_tensors=100)
    for name, field in reader.fields.items():
        if not name.startswith("GGUF.") and name != "general.architecture":
            kinds = [*field.types, None]
            writer.add_key_value(name, field.contents(), kinds[0], sub_type=kinds[1])
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_shape=tensor.data.shape, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    source, expected = open_source(tmp_path), open_source(demo_gguf)
    assert len(list(tmp_path.iterdir())) == 3
    assert source.config == expected.config
    for name in ("embedding.weight", "layers.0.attention.query.weight", "layers.15.mlp.up.weight", "final_norm.weight"):
        one, other = source.entries[name].read(), expected.entries[name].read()
        for field in ("codes", "scale", "offset") if hasattr(one, "codes") else ("real",):
            np.testing.assert_array_equal(getattr(one, field), getattr(other, field))
    ours, theirs = GGUFFile.open(source.path), GGUFFile.open(demo_gguf)
    assert ours.tensors.keys() == theirs.tensors.keys()
    assert all(np.array_equal(ours.tensors[name].data, theirs.tensors[name].data) for name in theirs.tensors)


@pytest.mark.parametrize("kind", ["mmproj", "imatrix", "adapter"])
def test_other_files_beside_a_model_are_no_second_one(tmp_path, kind):
    path = write(tmp_path / "model.gguf")
    write(tmp_path / "a.gguf", metadata={"general.type": kind})
    write(tmp_path / "mmproj-BF16.gguf")
    write(tmp_path / "vision.gguf", architecture="clip")  # as projectors were before they had a type
    assert resolve_model(tmp_path) == path
    path.unlink()
    with pytest.raises(UnsupportedModelError, match=rf"a\.gguf is a GGUF file of type '{kind}', not a model"):
        open_source(tmp_path)


def test_several_models_are_counted_by_their_splits(split):
    write(split[0].with_name("a.gguf"))
    with pytest.raises(CheckpointError, match=r"2 GGUF files \(a\.gguf, m-00001-of-00003\.gguf\)"):
        resolve_model(split[0].parent)


def with_type(path, number):
    """The file with the type of its embedding replaced, as its header says it."""
    content, name = path.read_bytes(), b"token_embd.weight"
    place = content.index(name) + len(name) + 4 + 2 * 8
    path.write_bytes(content[:place] + struct.pack("<I", number) + content[place + 4 :])
    return path


@pytest.mark.parametrize(
    ("number", "origin"),
    [
        (31, "Q4_0_4_4, which llama.cpp has removed"),
        (32, "Q4_0_4_8, which"),
        (33, "Q4_0_8_8, which"),
        (4, "Q4_2, which"),
        (38, "IQ4_NL_8_8, which"),
        (152, "a fork of llama.cpp, such as ik_llama.cpp"),
        (77, "newer than the installed gguf package"),
    ],
)
def test_types_that_are_not_read_are_named(tmp_path, number, origin):
    with pytest.raises(
        UnsupportedModelError, match=rf"token_embd\.weight is of type {number}, .*{origin}.*Supported: Q4_0"
    ):
        open_source(with_type(write(tmp_path / "m.gguf"), number))


@pytest.mark.parametrize(
    ("moved", "to", "what"),
    [
        ("blk.0.ffn_up.weight", "blk.0.ffn_gate.weight", "overlaps the one before"),
        ("blk.1.ffn_norm.weight", "blk.0.ffn_norm.weight", "overlaps the one before"),
        ("blk.1.attn_k.weight", None, "leaves 32 bytes before it unused"),
    ],
)
def test_tensors_that_share_or_skip_bytes_are_damage_as_in_llama_cpp(tmp_path, moved, to, what):
    path = write(tmp_path / "m.gguf")
    starts = {tensor.name: int(tensor.data_offset) for tensor in gguf.GGUFReader(path).tensors}
    data = min(starts.values())
    was, becomes = (struct.pack("<Q", starts[name] - data) for name in (moved, to or moved))
    content = path.read_bytes()
    place = content.index(was, content.index(moved.encode()))
    if to is None:  # padding that is no padding
        start = starts[moved]
        content = content[:start] + bytes(32) + content[start:]
        becomes = struct.pack("<Q", start - data + 32)
    path.write_bytes(content[:place] + becomes + content[place + 8 :])
    with pytest.raises(CheckpointError, match=rf"m\.gguf is damaged: tensor \S+ {what}; fetch the file again"):
        open_source(path)


def test_a_type_that_cannot_be_is_damage(tmp_path):
    with pytest.raises(CheckpointError, match="truncated or damaged"):
        open_source(with_type(write(tmp_path / "m.gguf"), 1 << 20))


@pytest.mark.parametrize(
    ("beginning", "error", "message"),
    [
        (b"version https://git-lfs.github.com/spec/v1\n", CheckpointError, "Git LFS pointer; run `git lfs pull`"),
        (b"tjgg\3\0\0\0", CheckpointError, "a GGML file of 2023"),
        (b"GGUF\1\0\0\0" + bytes(100), UnsupportedModelError, "of version 1; supported: 2, 3"),
        (b"GGUF\4\0\0\0" + bytes(100), UnsupportedModelError, "of version 4; supported: 2, 3"),
        (b"GGUF\0\0\0\3" + bytes(100), UnsupportedModelError, "big-endian"),
    ],
)
def test_other_formats_and_versions_are_named(tmp_path, beginning, error, message):
    (tmp_path / "m.gguf").write_bytes(beginning)
    with pytest.raises(error, match=message):
        open_source(tmp_path / "m.gguf")


READABLE = [kind for kind in GGMLQuantizationType if not kind.name.startswith("I") or "Q" in kind.name]
READABLE = [kind for kind in READABLE if can_dequantize(kind)]


@pytest.mark.parametrize("kind", [kind for kind in READABLE if kind.name != "NVFP4"], ids=lambda kind: kind.name)
def test_scales_that_are_not_finite_are_refused_in_every_type(kind):
    """A block of ones all over holds NaN wherever the type has one; no scale of NVFP4 is one."""
    block, size = gguf.GGML_QUANT_SIZES[kind]
    data = np.full((8, size * (256 // block)), 0xFF, np.uint8)
    if kind.name in ("F64", "F32", "F16"):
        data = data.view({"F64": np.float64, "F32": np.float32, "F16": np.float16}[kind.name])
    shape = np.array([256, 8] if block > 1 else [data.shape[1] if data.dtype != np.uint8 else 256, 8])
    tensor = gguf.gguf_reader.ReaderTensor("t", kind, shape, 0, 0, 0, data, None)
    with np.errstate(all="ignore"):
        assert not np.isfinite(gguf.quants.dequantize(data, kind)).all()
    with pytest.raises(ValueError, match="not all finite; fetch the file again"):
        read_floats(tensor)
    if kind.name in ("Q4_0", "Q4_1"):
        with pytest.raises(ValueError, match="its scales are not all finite"):
            read_codes(tensor)


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q8_0", "F16"])
def test_a_model_with_damaged_scales_is_not_loaded(tmp_path, kind, value):
    path, linear_type = tmp_path / "m.gguf", GGMLQuantizationType[kind]
    write(path, linear_type=linear_type)
    (offset,) = (
        int(tensor.data_offset) for tensor in gguf.GGUFReader(path).tensors if tensor.name == "blk.1.ffn_up.weight"
    )
    content = path.read_bytes()
    path.write_bytes(content[:offset] + np.float16(value).tobytes() + content[offset + 2 :])
    with pytest.raises(CheckpointError, match=r"cannot read tensor layers\.1\.mlp\.up\.weight: its .* not all finite"):
        loaded(open_source(path), None)


def loaded(source, quantization=QuantConfig()):  # noqa: B008 - frozen
    options = {"dtype": jnp.dtype("float32"), "kernels": "reference", "scan_layers": True}
    return load_decoder(source, quantization=quantization, formats=weight_formats(source, quantization), **options)


def test_linears_that_a_4_bit_file_has_in_float_are_not_rounded_in_silence(tmp_path):
    tensors = TENSORS | {"blk.0.ffn_up.weight": TENSORS["blk.0.ffn_up.weight"].astype(np.float16)}
    path = write_gguf(tmp_path / "m.gguf", CONFIG, tensors, linear_type=GGMLQuantizationType.Q4_0)
    with pytest.warns(RequantizationWarning, match=r"1 of 14 linears, layers\.0\.mlp\.up\.weight for one, are left in"):
        loaded(open_source(path))


@pytest.mark.parametrize(
    ("tokens", "named", "expected"),
    [
        (["a", "<|endoftext|>", "<|im_end|>"], {"eos": 2}, (2, 1)),
        (["a", "<|endoftext|>", "<|im_end|>"], {"eos": 1}, (1, 2)),
        (["<|eot_id|>", "<|eom_id|>", "<|end_of_text|>"], {"eos": 2, "eot": 0}, (2, 0, 1)),
        (["<end_of_turn>", "<eos>", "</s>", "b"], {}, (0, 1, 2)),
        (["a", "b", "c", "d"], {"eos": 0, "eot": 1, "eom": 2}, (0, 1, 2)),
        (["<|fim_pad|>", "<|repo_name|>", "<|file_sep|>", "<PAD>"], {}, (0, 1, 2, 3)),
        (["a", "<|fim_pad|>"], {"fim_pad": 0}, (0,)),
        (["<|return|>", "<|call|>", "<|end|>"], {}, (0, 1)),
        (["<|return|>", "<|end|>"], {"eos": 0}, (0, 1)),
        (["</s>", "<|tool_response>", "<eos>"], {"eos": 2}, (2, 1)),
        (["a"], {"eos": 4294967295, "eot": -1, "eom": [0, 7]}, (0,)),
        (["a"], {"eos": "a", "eot": 1.0, "eom": True}, ()),
        (None, {"eos": 5}, (5,)),
        ("abc", {}, ()),
    ],
)
def test_end_tokens_are_those_of_llama_cpp(tokens, named, expected):
    metadata = {f"tokenizer.ggml.{kind}_token_id": value for kind, value in named.items()}
    assert end_token_ids(metadata | {"tokenizer.ggml.tokens": tokens}) == expected


@pytest.mark.parametrize(
    "metadata",
    [
        {"tokenizer.ggml.padding_token_id": 48},
        {"tokenizer.ggml.seperator_token_id": [1, 2]},
        {"tokenizer.ggml.bos_token_id": [1]},
        {"tokenizer.ggml.mask_token_id": "none"},
        {"llama.rope.dimension_count": 0},
        {"llama.attention.value_length": None},
        {"llama.attention.head_count": [4, 4]},
        {"llama.attention.head_count_kv": [2, 2]},
        {"llama.expert_count": 0},
        {"llama.attention.sliding_window": 0},
        {"llama.rope.freq_base": None},
        {"llama.context_length": None},
        {"llama.vocab_size": "48"},
        {"general.file_type": "odd"},
        {"split.count": [3]},
        {"split.count": 1, "split.no": "a"},
    ],
)
def test_what_is_not_used_or_has_a_default_never_matters(tmp_path, metadata):
    assert open_source(write(tmp_path / "m.gguf", metadata=metadata)).config.num_heads == 4


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"llama.attention.head_count": "4"}, r"llama\.attention\.head_count='4' is not a whole number"),
        ({"llama.block_count": True}, r"llama\.block_count=True is not a whole number"),
        ({"llama.embedding_length": None}, r"metadata llama\.embedding_length is missing \(a whole number\)"),
        (
            {"llama.attention.layer_norm_rms_epsilon": None},
            r"metadata llama\.attention\.layer_norm_rms_epsilon is missing \(a finite number\)",
        ),
        ({"llama.embedding_length": 64.0}, r"llama\.embedding_length=64\.0 is not a whole number"),
        ({"llama.rope.freq_base": float("nan")}, r"rope\.freq_base=nan is not a finite number"),
        ({"llama.rope.freq_base": [True]}, r"rope\.freq_base=True is not a finite number"),
        ({"llama.context_length": "long"}, r"llama\.context_length='long' is not a whole number"),
    ],
)
def test_what_is_used_is_checked_by_name(tmp_path, metadata, message):
    with pytest.raises(CheckpointError, match=message):
        open_source(write(tmp_path / "m.gguf", metadata=metadata))


def test_the_length_of_a_value_may_stand_alone():
    """As that of a key it is the length of a head by default."""
    metadata = {f"llama.{key}": 1 for key in ("block_count", "feed_forward_length", "context_length")}
    metadata |= {"llama.embedding_length": 128, "llama.attention.head_count": 4, "general.architecture": "llama"}
    metadata |= {"llama.attention.layer_norm_rms_epsilon": 1e-5, "llama.attention.value_length": 32}
    tensor = gguf.gguf_reader.ReaderTensor(
        "t", GGMLQuantizationType.F32, np.array([128, 8]), 0, 0, 0, np.zeros(1), None
    )
    file = GGUFFile(Path("m.gguf"), metadata, {"token_embd.weight": tensor})
    assert read_config(file).head_dim == 32


def test_a_model_that_reads_texts_as_a_whole_is_refused(tmp_path):
    with pytest.raises(UnsupportedModelError, match=r"attention\.causal=False \(supported: models that generate"):
        open_source(write(tmp_path / "m.gguf", metadata={"llama.attention.causal": False}))


def test_an_embedding_of_no_size_and_numbers_of_no_sense_are_refused(tmp_path):
    for metadata in ({"llama.attention.head_count": 0}, {"llama.block_count": 2**31}, {"llama.rope.freq_base": 0.0}):
        with pytest.raises(UnsupportedModelError):
            open_source(write(tmp_path / "m.gguf", metadata=metadata))


@pytest.mark.parametrize("config", [CONFIG, {"model_type": "bert"}])
def test_a_gguf_file_beside_a_config_is_the_model(tmp_path, config):
    (tmp_path / "config.json").write_text(json.dumps(config))
    file = write(tmp_path / "m.gguf")
    assert open_source(tmp_path).path == resolve_model(tmp_path) == file
    write_hf(tmp_path, CONFIG, hf_tensors(CONFIG))
    assert open_source(tmp_path).path == resolve_model(tmp_path) == tmp_path
