"""Ready-made 4-bit checkpoints that cannot be loaded exactly: each is refused with what is wrong and what works."""

import jax.numpy as jnp
import numpy as np
import pytest

from qspec_jax.errors import CheckpointError, UnsupportedModelError
from qspec_jax.weights.fill import load_decoder
from qspec_jax.weights.resolve import open_source
from tests.weights import prequantized_packers as packers
from tests.weights.prequantized_packers import CASES, tiny_checkpoint
from tests.weights.tiny_checkpoints import HIDDEN, MLP

UP = "model.layers.1.mlp.up_proj"


def activation_order(checkpoint):
    index = checkpoint.tensors["model.layers.0.self_attn.q_proj.g_idx"]
    index[[0, 40]] = index[[40, 0]]


def wrong_symmetry(checkpoint):
    checkpoint.tensors["model.layers.0.self_attn.q_proj.qzeros"][0, 0] = 0


def infinite_scale(checkpoint):
    checkpoint.tensors["model.layers.0.self_attn.q_proj.scales"][0, 0] = np.inf


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (activation_order, r"activation order \(desc_act\): g_idx puts input 0 into group 1, not 0; .*desc_act=false"),
        (wrong_symmetry, r"says that it is symmetric, but 8 of 256 zero points are not 8 \(the first is 1\)"),
        (infinite_scale, "scales are not all finite"),
    ],
)
def test_what_only_the_arrays_tell_is_refused_when_they_are_read(tmp_path, damage, message):
    checkpoint = tiny_checkpoint(CASES["gptq"])
    damage(checkpoint)
    source = open_source(checkpoint.write(tmp_path))
    with pytest.raises(ValueError, match=message):
        source.entries["layers.0.attention.query.weight"].read()


def test_activation_order_without_an_index_is_incomplete(tmp_path):
    checkpoint = tiny_checkpoint(CASES["gptq"])
    checkpoint.tensors = {name: array for name, array in checkpoint.tensors.items() if "g_idx" not in name}
    assert open_source(checkpoint.write(tmp_path))
    checkpoint.config["quantization_config"]["desc_act"] = True
    with pytest.raises(
        CheckpointError, match=r"quantised parts \(14\): model\.layers\.0\.mlp\.down_proj\.g_idx is miss"
    ):
        open_source(checkpoint.write(tmp_path))


@pytest.mark.parametrize(
    ("case", "settings", "message"),
    [
        ("gptq", {"bits": 2}, r"gptq quantization_config asks for bits=2 \(supported: 4, 8\)"),
        (
            "gptq",
            {"group_size": 16, "bits": 3},
            r"bits=3 \(supported: 4, 8\); group_size=16 \(supported: 32, 64, 128, -1",
        ),
        ("gptq", {"checkpoint_format": "marlin"}, r"checkpoint_format='marlin' \(supported: gptq, gptq_v2\)"),
        ("gptq", {"rotation": "hadamard"}, r"rotation='hadamard' \(supported: none\)"),
        ("gptq", {"pack_dtype": "int16"}, r"pack_dtype='int16' \(supported: int32\)"),
        (
            "gptq",
            {"dynamic": {"+:.*down.*": {"bits": 8}, "-:lm_head": {}}},
            r"dynamic=\+:\.\*down\.\* \(supported: one",
        ),
        ("awq", {"version": "gemv"}, r"awq quantization_config asks for version='gemv' \(supported: gemm\)"),
        ("awq", {"version": "GEMV_FAST"}, r"version='GEMV_FAST' \(supported: gemm\)"),
        ("awq", {"backend": "llm-awq"}, r"backend='llm-awq'"),
        ("awq", {"bits": None, "w_bit": 3}, r"w_bit=3 \(supported: 4\)"),
        ("compressed", {"format": "int-quantized"}, r"format='int-quantized' \(supported: pack-quantized\)"),
        ("compressed", {"kv_cache_scheme": {"num_bits": 8}}, r"kv_cache_scheme \(supported: none\)"),
        ("compressed", {"transform_config": {"config_groups": {}}}, r"transform_config \(supported: none\)"),
        ("compressed", {"sparsity_config": {"format": "sparse-24-bitmask"}}, "'sparse-24-bitmask'.*supported: dense"),
        ("compressed", {"config_groups": {}}, r"0 config_groups .*one scheme"),
    ],
)
def test_options_that_are_not_supported_are_named_with_those_that_are(tmp_path, case, settings, message):
    checkpoint = tiny_checkpoint(CASES[case])
    checkpoint.config["quantization_config"] |= settings
    with pytest.raises(UnsupportedModelError, match=message):
        open_source(checkpoint.write(tmp_path))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weights": {"num_bits": 2}}, r"num_bits=2 \(supported: 4, 8\)"),
        ({"weights": {"type": "float"}}, r"type='float' \(supported: int\)"),
        ({"weights": {"actorder": "group"}}, r"actorder='group' \(supported: weight, static, False\)"),
        ({"weights": {"strategy": "tensor"}}, r"strategy='tensor' \(supported: group, channel\)"),
        ({"weights": {"group_size": 16}}, r"group_size=16 \(supported: 32, 64, 128\)"),
        ({"format": "nvfp4-pack-quantized"}, r"format='nvfp4-pack-quantized' \(supported: pack-quantized\)"),
        ({"input_activations": {"num_bits": 8}}, r"input_activations \(supported: none"),
    ],
)
def test_compressed_schemes_that_are_not_supported_are_named(tmp_path, change, message):
    checkpoint = tiny_checkpoint(CASES["compressed"])
    group = checkpoint.config["quantization_config"]["config_groups"]["group_0"]
    group |= change | {"weights": group["weights"] | change.get("weights", {})}
    with pytest.raises(UnsupportedModelError, match=message):
        open_source(checkpoint.write(tmp_path))


def test_an_index_of_groups_in_compressed_tensors_is_not_ignored(tmp_path):
    checkpoint = tiny_checkpoint(CASES["compressed"])
    checkpoint.tensors[f"{UP}.weight_g_idx"] = np.zeros(HIDDEN, np.int32)
    with pytest.raises(CheckpointError, match=rf"unknown \(1\): {UP}\.weight_g_idx"):
        open_source(checkpoint.write(tmp_path))


@pytest.mark.parametrize("case", ["gptq", "awq", "compressed"])
def test_quantised_tensors_without_a_quantization_config_are_named(tmp_path, case):
    checkpoint = tiny_checkpoint(CASES[case])
    del checkpoint.config["quantization_config"]
    with pytest.raises(UnsupportedModelError, match=r"no quantization_config, but .* (qweight|weight_packed); add it"):
        open_source(checkpoint.write(tmp_path))


@pytest.mark.parametrize(
    "config",
    [
        {"architectures": ["QuarotLlamaForCausalLM"], "model_type": "llama_quarot"},
        {"architectures": ["Qwen2QuaRotForCausalLM"]},
        {"architectures": None, "model_type": "qwen2_quarot"},
    ],
)
def test_models_that_need_an_online_hadamard_transform_are_refused(tmp_path, config):
    checkpoint = tiny_checkpoint(CASES["qspec"])
    checkpoint.config |= config
    with pytest.raises(
        UnsupportedModelError, match=r"(?i)quarot.* say that .*online Hadamard transform.*not supported yet"
    ):
        open_source(checkpoint.write(tmp_path))


def test_the_matrices_of_an_online_hadamard_transform_are_refused(tmp_path):
    checkpoint = tiny_checkpoint(CASES["qspec"])
    checkpoint.tensors["model.layers.0.mlp.online_hadamard.had_rem_dim"] = np.ones((28, 28), np.float16)
    with pytest.raises(UnsupportedModelError, match=r"tensors named had_rem_dim say .*online Hadamard transform"):
        open_source(checkpoint.write(tmp_path))


@pytest.mark.parametrize("case", ["gptq", "awq", "compressed_asymmetric", "qspec"])
def test_parts_that_are_missing_misshapen_or_mistyped_are_listed_together(tmp_path, case):
    checkpoint = tiny_checkpoint(CASES[case])
    codes, scale = {
        "gptq": ("qweight", "scales"),
        "awq": ("qweight", "scales"),
        "compressed_asymmetric": ("weight_packed", "weight_scale"),
        "qspec": ("weight", "weight_scales"),
    }[case]
    tensors, shapes = checkpoint.tensors, {}
    del tensors[f"model.layers.0.self_attn.q_proj.{scale}"]
    for module in ("self_attn.k_proj", "mlp.gate_proj"):
        shapes[module] = list(tensors[f"model.layers.0.{module}.{codes}"].shape)
    tensors[f"model.layers.0.self_attn.k_proj.{codes}"] = tensors[f"model.layers.0.self_attn.k_proj.{codes}"][:, :4]
    gate = tensors[f"model.layers.0.mlp.gate_proj.{codes}"]
    tensors[f"model.layers.0.mlp.gate_proj.{codes}"] = gate.astype(np.int64)
    for part in [name for name in tensors if name.startswith("model.layers.1.mlp.down_proj.")]:
        del tensors[part]
    tensors["score.weight"] = np.zeros(4, np.float16)
    with pytest.raises(CheckpointError) as caught:
        open_source(checkpoint.write(tmp_path))
    for part in (
        "unknown (1): score.weight",
        "missing (1): layers.1.mlp.down.weight",
        "quantised parts (3)",
        f"model.layers.0.self_attn.q_proj.{scale} is missing",
        f"expected {'U8' if case == 'qspec' else 'I32'} {shapes['self_attn.k_proj']}",
        f"model.layers.0.mlp.gate_proj.{codes} is I64 {shapes['mlp.gate_proj']}",
    ):
        assert part in str(caught.value)


def test_groups_that_do_not_divide_a_linear_are_named(tmp_path):
    checkpoint = tiny_checkpoint(CASES["gptq"])
    checkpoint.config["quantization_config"]["group_size"] = 64
    with pytest.raises(CheckpointError, match=r"0\.mlp\.down_proj has 96 inputs, which groups of 64 do not divide"):
        open_source(checkpoint.write(tmp_path))


def test_a_part_in_two_files_is_named_with_both(tmp_path):
    checkpoint = tiny_checkpoint(CASES["gptq"])
    checkpoint.write(tmp_path, num_shards=2)
    packers.write_hf(tmp_path / "again", checkpoint.config, {f"{UP}.scales": checkpoint.tensors[f"{UP}.scales"]})
    for shard in (1, 2):
        (tmp_path / f"model-0000{shard}-of-00002.safetensors").rename(tmp_path / f"{shard}.safetensors")
    (tmp_path / "again" / "model.safetensors").rename(tmp_path / "3.safetensors")
    (tmp_path / "model.safetensors.index.json").unlink()
    with pytest.raises(CheckpointError, match=rf"{UP}\.scales is in [12]\.safetensors and in 3\."):
        open_source(tmp_path)


def test_truncated_files_are_refused(tmp_path):
    file = tiny_checkpoint(CASES["awq"]).write(tmp_path) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-64])
    with pytest.raises(CheckpointError, match=r"truncated: its header places \S+ at bytes"):
        open_source(tmp_path)


def test_a_shape_that_contradicts_the_codes_is_refused(tmp_path):
    checkpoint = tiny_checkpoint(CASES["compressed"])
    checkpoint.tensors[f"{UP}.weight_shape"] = np.array([MLP, HIDDEN - 1])
    source = open_source(checkpoint.write(tmp_path))
    with pytest.raises(CheckpointError, match=r"mlp\.up\.weight: weight_shape says \[96, 63\], .*holds \[96, 64\]"):
        load_decoder(source, quantization=None, formats=None, dtype=jnp.float32, kernels="reference", scan_layers=True)
