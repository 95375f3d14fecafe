"""Hugging Face directories as people and other programs leave them: what counts, and what is said."""

import contextlib
import json

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from qspec_jax.errors import CheckpointError, CheckpointWarning, RequantizationWarning, UnsupportedModelError
from qspec_jax.model.config import ModelConfig, QuantConfig
from qspec_jax.weights.fill import load_decoder, weight_formats
from qspec_jax.weights.huggingface.directory import _model_config
from qspec_jax.weights.resolve import open_source
from tests.weights.prequantized_packers import CASES, Case, tiny_checkpoint
from tests.weights.tiny_checkpoints import HIDDEN, VOCAB, hf_config, hf_tensors, write_hf

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def directory(path, *, changes=(), num_shards=1, **config):
    """A float checkpoint with some of its tensors changed, None for removed; its config says ``config``."""
    parsed = hf_config(**config)
    tensors = hf_tensors(parsed | {"tie_word_embeddings": False}) | dict(changes)
    return write_hf(path, parsed, {k: v for k, v in tensors.items() if v is not None}, num_shards=num_shards)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("missing", [HEAD, EMBEDDING])
def test_the_embedding_is_the_head_where_one_of_both_is_missing(tmp_path, tied, missing):
    source = open_source(directory(tmp_path, tie_word_embeddings=tied, changes={missing: None}))
    assert source.config.tie_word_embeddings
    expected = hf_tensors(hf_config())[HEAD if missing == EMBEDDING else EMBEDDING]
    np.testing.assert_array_equal(source.entries["embedding.weight"].read(), expected)
    assert "lm_head.weight" not in source.entries


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_a_head_that_equals_the_embedding_is_no_second_one(tmp_path, dtype):
    same = np.arange(VOCAB * HIDDEN).reshape(VOCAB, HIDDEN).astype(np.float32) % 13
    path = directory(tmp_path, tie_word_embeddings=True, changes={EMBEDDING: same, HEAD: same.astype(dtype)})
    assert open_source(path).config.tie_word_embeddings


@pytest.mark.parametrize("num_shards", [1, 2])
def test_a_head_that_differs_from_the_embedding_is_kept_with_a_warning(tmp_path, num_shards):
    path = directory(tmp_path, tie_word_embeddings=True, num_shards=num_shards)
    with pytest.warns(CheckpointWarning, match=r"ties the LM head to the embedding, but .*both are kept"):
        source = open_source(path)
    np.testing.assert_array_equal(source.entries[HEAD].read(), hf_tensors(hf_config())[HEAD])
    assert not source.config.tie_word_embeddings


@pytest.mark.parametrize("case", ["gptq", "awq", "compressed"])
def test_a_quantised_head_is_kept_though_the_config_ties_it(tmp_path, case):
    checkpoint = tiny_checkpoint(CASES[case], tie_word_embeddings=True)
    weight = CASES[case].weight(VOCAB, HIDDEN)
    checkpoint.tensors |= {f"lm_head.{part}": array for part, array in CASES[case].parts(weight).items()}
    with pytest.warns(CheckpointWarning, match="both are kept"):
        source = open_source(checkpoint.write(tmp_path))
    np.testing.assert_array_equal(source.entries[HEAD].read(), weight.floats)
    assert source.entries["embedding.weight"].read().shape == (VOCAB, HIDDEN)


@pytest.mark.parametrize("tied", [True, False])
def test_a_quantised_embedding_is_not_taken_for_a_missing_one(tmp_path, tied):
    checkpoint = tiny_checkpoint(CASES["gptq"], tie_word_embeddings=False)
    checkpoint.config["tie_word_embeddings"] = tied
    weight = CASES["gptq"].weight(VOCAB, HIDDEN)
    del checkpoint.tensors[EMBEDDING]
    parts = CASES["gptq"].parts(weight).items()
    checkpoint.tensors |= {f"model.embed_tokens.{part}": array for part, array in parts}
    with pytest.warns(CheckpointWarning, match="both are kept") if tied else contextlib.nullcontext():
        source = open_source(checkpoint.write(tmp_path))
    np.testing.assert_array_equal(source.entries["embedding.weight"].read(), weight.floats)
    assert source.entries[HEAD].read().dtype == np.float16


def test_an_untied_head_is_not_read_when_it_is_opened(tmp_path):
    path = directory(tmp_path, changes={HEAD: hf_tensors(hf_config())[EMBEDDING]})
    assert not open_source(path).config.tie_word_embeddings


def index_of(path, *names, files=("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")):
    weight_map = {name: files[index % len(files)] for index, name in enumerate(names)}
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


@pytest.mark.parametrize("index", ["{", "[]", '{"weight_map": 3}', '{"weight_map": {}}', None])
def test_a_complete_file_loads_whatever_an_index_says(tmp_path, index):
    directory(tmp_path)
    index_of(tmp_path, EMBEDDING, HEAD)
    if index is not None:
        (tmp_path / "model.safetensors.index.json").write_text(index)
    assert open_source(tmp_path).entries[HEAD].read().shape == (VOCAB, HIDDEN)


@pytest.mark.parametrize("index", ["{}", '{"weight_map": {}}', '{"weight_map": []}'])
def test_an_index_of_nothing_is_named_and_not_the_tensors(tmp_path, index):
    write_hf(tmp_path, hf_config(), hf_tensors(hf_config()), num_shards=2)
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(CheckpointError, match=r"index\.json has no weight_map of tensor names to files; fetch"):
        open_source(tmp_path)


@pytest.mark.parametrize(
    ("changes", "differing"),
    [
        ({"model_type": "mistral", "sliding_window": 8}, "sliding_window"),
        ({"model_type": "qwen2"}, "qkv_bias"),
        ({"model_type": "qwen3", "head_dim": None, "hidden_size": HIDDEN}, "head_dim, qk_norm"),
        (
            {"model_type": "qwen2", "use_sliding_window": True, "max_window_layers": 1, "sliding_window": 8},
            "that fam.*",
        ),
        ({"model_type": "mistral", "num_key_value_heads": None}, None),
        ({"model_type": "llama", "sliding_window": 8}, None),
        ({"model_type": "somebody's own"}, None),
        ({"architectures": None, "model_type": "llama"}, None),
    ],
)
def test_a_model_type_of_another_family_is_named_where_it_would_matter(tmp_path, changes, differing):
    changes = {"num_key_value_heads": 2} | changes
    if differing is None:
        assert _model_config(tmp_path, hf_config() | changes)  # a warning is an error
        return
    with pytest.warns(CheckpointWarning, match=rf"of another family; .* What differs: {differing}\. Correct"):
        config = _model_config(tmp_path, hf_config() | changes)
    assert config == ModelConfig.from_hf(hf_config() | changes)


def test_shards_beside_a_complete_file_are_left_out_and_named(tmp_path):
    newer = np.ones((VOCAB, HIDDEN), np.float32)
    directory(tmp_path, num_shards=2)
    save_file(hf_tensors(hf_config()) | {HEAD: newer}, tmp_path / "model.safetensors")
    with pytest.warns(
        CheckpointWarning, match=r"model\.safetensors read, model-00001-of-00002\.\S+, model-00002\S+ left"
    ):
        source = open_source(tmp_path)
    np.testing.assert_array_equal(source.entries[HEAD].read(), newer)


def test_a_file_that_lacks_tensors_of_the_shards_is_left_out_and_named(tmp_path):
    directory(tmp_path, num_shards=2)
    save_file({HEAD: np.ones((VOCAB, HIDDEN), np.float32)}, tmp_path / "model.safetensors")
    with pytest.warns(CheckpointWarning, match=r"2 shards of .*index\.json read, model\.safetensors left out"):
        source = open_source(tmp_path)
    np.testing.assert_array_equal(source.entries[HEAD].read(), hf_tensors(hf_config())[HEAD])


def test_an_index_that_names_the_one_file_is_no_second_place(tmp_path):
    directory(tmp_path)
    index_of(tmp_path, *hf_tensors(hf_config()), files=("model.safetensors",))
    assert open_source(tmp_path)


@pytest.mark.parametrize("name", ["../other.safetensors", "/etc/passwd", "a\0b", ""])
def test_an_index_names_files_of_its_directory_alone(tmp_path, name):
    directory(tmp_path, num_shards=2)
    index_of(tmp_path, EMBEDDING, files=(name,))
    with pytest.raises(CheckpointError, match="is no file of its directory"):
        open_source(tmp_path)


def test_a_name_too_long_for_a_file_is_a_missing_shard(tmp_path):
    directory(tmp_path, num_shards=2)
    index_of(tmp_path, EMBEDDING, HEAD, files=("a" * 300, "model-00001-of-00002.safetensors"))
    with pytest.raises(CheckpointError, match="1 of 2 shards named in"):
        open_source(tmp_path)


def test_a_shard_that_is_missing_is_named_without_an_index_too(tmp_path):
    directory(tmp_path, num_shards=3)
    (tmp_path / "model.safetensors.index.json").unlink()
    assert open_source(tmp_path)
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"1 of 3 shards are missing: model-00002-of-00003\.safetensors"):
        open_source(tmp_path)


@pytest.mark.parametrize("name", ["model.fp16.safetensors", "model-00001-of-00001.safetensors"])
def test_weights_beside_the_one_file_are_named_without_an_index_too(tmp_path, name):
    save_file({HEAD: np.ones(2, np.float32)}, directory(tmp_path) / name)
    with pytest.warns(CheckpointWarning, match=rf"more weights .*: model\.safetensors read, {name} left out"):
        assert open_source(tmp_path)


def test_an_index_of_files_that_do_not_exist_gives_way_to_shards_that_are_all_there(tmp_path):
    directory(tmp_path, num_shards=2)
    index_of(tmp_path, EMBEDDING, HEAD, files=("model-00001-of-00009.safetensors",))
    assert open_source(tmp_path)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"1 of 2 shards are missing"):
        open_source(tmp_path)


def test_two_models_in_one_directory_are_named_and_not_mixed(tmp_path):
    for num_shards in (2, 3):
        directory(tmp_path, num_shards=num_shards)
    (tmp_path / "model.safetensors.index.json").unlink()
    with pytest.raises(CheckpointError, match=r"is in model-\*-of-00002\.safetensors and in model-\*-of-00003\."):
        open_source(tmp_path)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "_orig_mod.module.", None])
def test_names_are_read_as_trainings_leave_them(tmp_path, prefix):
    """Wrapped, or of the body alone, which transformers reads too."""
    tensors = hf_tensors(hf_config())
    renamed = {name.removeprefix("model.") if prefix is None else prefix + name: t for name, t in tensors.items()}
    source = open_source(write_hf(tmp_path, hf_config(), renamed))
    np.testing.assert_array_equal(source.entries["final_norm.weight"].read(), tensors["model.norm.weight"])


@pytest.mark.parametrize("dtype", [np.float64, np.int32, np.bool_, np.complex64])
def test_types_that_are_not_read_are_not_called_damage_or_quantised(tmp_path, dtype):
    path = directory(tmp_path, changes={"model.norm.weight": np.zeros(HIDDEN, dtype)})
    with pytest.raises(
        UnsupportedModelError, match=r"types that are not read; convert them .*\n.*model\.norm\.weight is"
    ):
        open_source(path)


def test_a_bias_of_the_head_is_not_dropped_and_not_called_damage(tmp_path):
    path = directory(tmp_path, changes={"lm_head.bias": np.ones(VOCAB, np.float32)})
    with pytest.raises(
        CheckpointError, match=r"tensors that the architecture of its config has not.*\n.*lm_head\.bias"
    ):
        open_source(path)


def test_a_zero_bias_that_a_library_gave_a_quantised_head_is_none(tmp_path):
    checkpoint = tiny_checkpoint(CASES["gptq"])
    checkpoint.tensors["lm_head.bias"] = np.zeros(VOCAB, np.float16)
    assert open_source(checkpoint.write(tmp_path))


def changed_header(path, change):
    content = (path / "model.safetensors").read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    change(header)
    raw = json.dumps(header).encode()
    (path / "model.safetensors").write_bytes(len(raw).to_bytes(8, "little") + raw + content[8 + length :])


GATE, UP = "model.layers.0.mlp.gate_proj.weight", "model.layers.0.mlp.up_proj.weight"


def test_tensors_that_share_or_skip_bytes_are_damage_as_the_format_says(tmp_path):
    changed_header(directory(tmp_path), lambda header: header[GATE].update(data_offsets=header[UP]["data_offsets"]))
    with pytest.raises(CheckpointError, match=r"damaged: its tensors (overlap|leave a gap of 24576 bytes) at byte"):
        open_source(tmp_path)
    changed_header(directory(tmp_path, changes={"a": np.ones(4, np.float32)}), lambda header: header.pop("a"))
    with pytest.raises(CheckpointError, match="damaged: its tensors leave a gap of 16 bytes at byte"):
        open_source(tmp_path)
    content = (directory(tmp_path) / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(content + b"abc")
    with pytest.raises(CheckpointError, match="leave a gap of 3 bytes at byte"):
        open_source(tmp_path)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_file_of_a_directory_is_answered_with_the_directory(tmp_path, name):
    directory(tmp_path)
    with pytest.raises(CheckpointError, match=rf"is not a GGUF file: .*give its directory, {tmp_path}"):
        open_source(tmp_path / name)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_files_with_a_byte_order_mark_are_read(tmp_path, encoding):
    directory(tmp_path)
    for name in ("config.json", "generation_config.json"):
        (tmp_path / name).write_text(json.dumps(hf_config() | {"eos_token_id": [7, 999]}), encoding=encoding)
    assert open_source(tmp_path).config.eos_token_ids == (7,)


MODULE = "model.layers.0.mlp.up_proj"


@pytest.mark.parametrize(
    ("added", "maker"),
    [
        ({"lm_head.weight": np.zeros((VOCAB, 8), np.uint32), "lm_head.biases": 1, "lm_head.scales": 1}, "MLX"),
        ({"model.layers.0.mlp.up_proj.q_weight": 1, "model.layers.0.mlp.up_proj.q_groups": 1}, "ExLlamaV2"),
        ({"model.layers.0.mlp.up_proj.trellis": 1}, "ExLlamaV3"),
        ({"model.layers.0.mlp.up_proj.weight.absmax": 1}, "bitsandbytes"),
        ({"model.layers.0.mlp.up_proj.SCB": 1}, r"bitsandbytes \(INT8\)"),
        ({"model.layers.0.mlp.up_proj.W_q": 1}, "HQQ"),
        ({"model.norm.weight": np.zeros(HIDDEN, ml_dtypes.float8_e4m3fn)}, "floats of 8 bits"),
        ({f"{MODULE}.weight_scale_2": 1}, r"NVIDIA ModelOpt \(NVFP4\)"),
        ({f"{MODULE}.weight_packed": 1, f"{MODULE}.weight_global_scale": 1}, "compressed-tensors as NVFP4"),
        ({f"{MODULE}.codes": 1, f"{MODULE}.codebooks": 1}, "AQLM"),
        ({f"{MODULE}.weight._data": 1}, "Quanto"),
        ({f"{MODULE}.weight": np.zeros((4, 4), np.int8), f"{MODULE}.weight_scale": 1}, "a method that stores whole"),
        ({f"{MODULE}.weight": np.zeros((4, 4), np.uint8), f"{MODULE}.weight_scale": 1}, "a method that stores whole"),
        ({f"{MODULE}.weight": np.zeros((4, 4), np.uint32), f"{MODULE}.scales": 1}, "a method that stores whole"),
    ],
)
def test_what_quantised_the_tensors_is_named(tmp_path, added, maker):
    changes = {name: np.zeros(4, np.float32) if isinstance(array, int) else array for name, array in added.items()}
    with pytest.raises(UnsupportedModelError, match=rf"quantised by {maker}.*not supported; use the unquantised"):
        open_source(directory(tmp_path, changes=changes))


@pytest.mark.parametrize(
    ("case", "name", "settings"),
    [
        ("gptq", "quantize_config.json", {"bits": 4, "group_size": 32, "desc_act": False, "sym": True}),
        ("awq", "quant_config.json", {"w_bit": 4, "q_group_size": 32, "version": "GEMM", "zero_point": True}),
    ],
)
def test_settings_in_a_file_of_their_own_are_read(tmp_path, case, name, settings):
    checkpoint = tiny_checkpoint(CASES[case])
    del checkpoint.config["quantization_config"]
    checkpoint.write(tmp_path)
    (tmp_path / name).write_text(json.dumps(settings))
    assert open_source(tmp_path).entries["layers.1.mlp.up.weight"].codes
    (tmp_path / name).write_text(json.dumps(settings | {"bits": 3, "w_bit": 3}))
    with pytest.raises(UnsupportedModelError, match="=3 "):
        open_source(tmp_path)


def test_an_adapter_that_was_not_merged_is_named(tmp_path):
    path = directory(tmp_path, changes={"model.layers.0.self_attn.q_proj.lora_A.weight": np.ones((4, 4), np.float32)})
    with pytest.raises(UnsupportedModelError, match=r"an adapter's \(LoRA\), not merged; merge it"):
        open_source(path)


@pytest.mark.parametrize(("algorithm", "shown"), [("NVFP4", r" \('NVFP4'\)"), ("FP8", r" \('FP8'\)"), (None, "")])
def test_settings_of_modelopt_in_a_file_of_their_own_are_named(tmp_path, algorithm, shown):
    settings = {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": algorithm} if algorithm else [1]}
    (directory(tmp_path) / "hf_quant_config.json").write_text(json.dumps(settings))
    with pytest.raises(UnsupportedModelError, match=rf"of NVIDIA ModelOpt{shown} with .*supported: gptq"):
        open_source(tmp_path)


@pytest.mark.parametrize(
    ("packing", "case"),
    [
        ("auto_round:auto_gptq", Case("gptq", 32, True)),
        ("auto_round:gptqmodel", Case("gptq", 32, False, less_one=False)),
        ("auto_round", Case("gptq", 32, True, less_one=False)),
        ("auto_round:auto_awq", Case("awq", 32, False)),
        ("auto_round:awq", Case("awq", 32, False)),
        ("auto_round:gptq", Case("gptq", 32, True)),
        (None, Case("gptq", 32, False)),
    ],
)
@pytest.mark.parametrize("method", ["auto-round", "intel/auto-round"])
def test_autoround_packs_as_gptq_and_awq_do(tmp_path, packing, case, method):
    checkpoint = tiny_checkpoint(case)
    settings = {"quant_method": method, "packing_format": packing, "bits": 4, "group_size": 32, "sym": case.symmetric}
    settings |= {"data_type": "int", "act_bits": 16, "extra_config": {"lm_head": {"bits": 16}}}
    checkpoint.config["quantization_config"] = settings
    source = open_source(checkpoint.write(tmp_path))
    decoder = loaded(source, None)
    down = np.asarray(decoder.layers[0].mlp.down.weight.get_value())
    np.testing.assert_array_equal(down[1], checkpoint.floats["model.layers.1.mlp.down_proj.weight"])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"packing_format": "auto_round:llm_compressor"}, "packing_format='auto_round:llm_compressor'"),
        (
            {"packing_format": None, "backend": "autoround:exllamav2"},
            r"backend='autoround:exllamav2' \(supported: auto",
        ),
        ({"data_type": "mx_fp"}, "data_type='mx_fp'"),
        ({"act_bits": 8}, "act_bits=8"),
        ({"extra_config": {"model.layers.0": {"bits": 8}}}, "extra_config of model.layers.0"),
        ({"extra_config": [1]}, "cannot be understood"),
        ({"bits": 2}, "bits=2"),
    ],
)
def test_other_settings_of_autoround_are_named(tmp_path, settings, message):
    checkpoint = tiny_checkpoint(CASES["gptq"])
    known = {"quant_method": "auto-round", "packing_format": "auto_round:auto_gptq", "bits": 4, "group_size": 32}
    checkpoint.config["quantization_config"] = known | settings
    with pytest.raises(UnsupportedModelError, match=message):
        open_source(checkpoint.write(tmp_path))


def loaded(source, quantization=QuantConfig()):  # noqa: B008 - frozen
    options = {"dtype": jnp.dtype("float32"), "kernels": "reference", "scan_layers": True}
    return load_decoder(source, quantization=quantization, formats=weight_formats(source, quantization), **options)


@pytest.mark.parametrize(
    ("case", "settings"),
    [
        ("awq", {"modules_to_not_convert": ["down_proj"]}),
        ("gptq", {"dynamic": {"-:.*down_proj.*": {}}}),
        ("compressed", {"ignore": ["lm_head", "re:.*down_proj"]}),
    ],
)
def test_linears_that_a_checkpoint_left_in_float_are_not_rounded_in_silence(tmp_path, case, settings):
    checkpoint = tiny_checkpoint(CASES[case])
    checkpoint.config["quantization_config"] |= settings
    checkpoint.tensors = {name: array for name, array in checkpoint.tensors.items() if "0.mlp.down_proj" not in name}
    down = "model.layers.0.mlp.down_proj.weight"
    checkpoint.tensors[down] = checkpoint.floats[down]
    source = open_source(checkpoint.write(tmp_path))
    with pytest.warns(RequantizationWarning, match=r"1 of 14 linears, layers\.0\.mlp\.down\.weight for one, are left"):
        loaded(source)
    np.testing.assert_array_equal(
        np.asarray(loaded(source, None).layers[0].mlp.down.weight)[0], checkpoint.floats[down]
    )


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("name", [EMBEDDING, "model.norm.weight", "model.layers.1.mlp.up_proj.weight"])
def test_values_that_are_not_finite_are_refused(tmp_path, value, dtype, name):
    tensors = hf_tensors(hf_config(), dtype)
    tensors[name].reshape(-1)[-1] = value
    source = open_source(write_hf(tmp_path, hf_config(), tensors))
    with pytest.raises(CheckpointError, match=r"cannot read tensor .*: its values are not all finite"):
        loaded(source, None)
