"""Ready-made 4-bit checkpoints: what is loaded is what their formats mean, bit for bit, or it is refused."""

import itertools
import warnings

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from qspec_jax.engine.language_model import LanguageModel
from qspec_jax.errors import CheckpointError, CheckpointWarning, RequantizationWarning
from qspec_jax.model.config import QuantConfig
from qspec_jax.model.linear import WeightFormat
from qspec_jax.model.precision import Precision
from qspec_jax.weights.codes import packed
from qspec_jax.weights.fill import load_decoder, weight_formats
from qspec_jax.weights.huggingface.unpack import (
    Unpacked,
    check_group_index,
    quantized_tensor,
    unpack_awq,
    unpack_compressed,
    unpack_gptq,
    unpack_qspec,
)
from qspec_jax.weights.resolve import open_source
from qspec_jax.weights.source import QuantizedTensor
from tests import tiny
from tests.tiny import dequantize
from tests.weights import prequantized_packers as packers
from tests.weights.prequantized_packers import CASES, random_weight, tiny_checkpoint
from tests.weights.tiny_checkpoints import HIDDEN, MLP, gguf_tensors, hf_config, hf_tensors, write_gguf, write_hf

UP = "model.layers.1.mlp.up_proj"


def loaded(source, quantization=QuantConfig(), **options):  # noqa: B008 - frozen
    formats = weight_formats(source, quantization)
    options = {"dtype": jnp.dtype("float32"), "kernels": "reference", "scan_layers": True} | options
    return load_decoder(source, quantization=quantization, formats=formats, **options)


def logits(decoder, precision):
    return tiny.logits(decoder, 3 * np.arange(12).reshape(2, 6), precision, slots=8)


def as_read_by_kernels(tensor: QuantizedTensor) -> np.ndarray:
    return np.asarray(dequantize(jax.tree.map(jnp.asarray, packed(tensor))))


@pytest.mark.parametrize(
    ("method", "symmetric", "group_size", "bits"),
    [
        *itertools.product(("gptq", "gptq_v2", "awq", "compressed"), (True, False), (32, 64, 128, None), (4,)),
        *itertools.product(("gptq", "gptq_v2", "compressed"), (True, False), (32, None), (8,)),
        ("qspec", True, None, 4),
    ],
)
def test_codes_scales_and_zero_points_are_those_that_were_packed(method, symmetric, group_size, bits):
    weight = random_weight(24, 256, group_size, symmetric=symmetric, lowest=int(method == "gptq"), bits=bits)
    if method.startswith("gptq"):
        parts = packers.gptq_parts(weight, less_one=method == "gptq")
        check_group_index(parts.pop("g_idx"), group_size=group_size or 256)
        unpacked = unpack_gptq(**parts, zeros_less_one=method == "gptq", bits=bits)
    elif method == "awq":
        unpacked = unpack_awq(**packers.awq_parts(weight))
    elif method == "compressed":
        parts = packers.compressed_parts(weight, symmetric=symmetric)
        arrays = (parts.get(f"weight_{part}") for part in ("packed", "scale", "zero_point"))
        unpacked = unpack_compressed(*arrays, bits=bits)
    else:
        unpacked = unpack_qspec(**packers.qspec_parts(weight))
    np.testing.assert_array_equal(unpacked.codes, weight.codes)
    np.testing.assert_array_equal(unpacked.scale, weight.scale)
    np.testing.assert_array_equal(2 ** (bits - 1) if unpacked.zero is None else unpacked.zero, weight.zero)
    tensor = quantized_tensor(unpacked, symmetric=symmetric, bits=bits)
    assert (tensor.offset is None) == (symmetric and bits == 4)
    np.testing.assert_array_equal(as_read_by_kernels(tensor), weight.floats)


def test_a_gptq_zero_point_of_zero_comes_back_from_its_borrow():
    """GPTQModel writes format 1 by subtracting 0x11111111 from the words of format 2, borrows and all."""
    zero = np.array([[0, 5, 15, 0, 0, 1, 8, 3]])
    stored = (packers.pack_words(zero).view(np.uint32) - np.uint32(0x11111111)).view(np.int32)
    unpacked = unpack_gptq(np.zeros((4, 8), np.int32), stored, np.ones((1, 8), np.float16), zeros_less_one=True)
    np.testing.assert_array_equal(unpacked.zero, zero)


def test_scales_are_float16_where_that_is_exact_and_float32_where_it_is_not():
    codes, zero = np.zeros((1, 8), np.uint8), np.array([[3]], np.uint8)
    coarse, fine = np.array([[0.75]], np.float16), np.array([[0.7]], np.float16)
    tiny = np.array([[1.0e-9]], ml_dtypes.bfloat16)
    assert quantized_tensor(Unpacked(codes, coarse.astype(ml_dtypes.bfloat16), None), symmetric=True).scale == coarse
    dtypes = [
        quantized_tensor(Unpacked(codes, scale, zeros), symmetric=zeros is None).scale.dtype
        for scale, zeros in ((coarse, None), (coarse, zero), (fine, None), (fine, zero), (tiny, None))
    ]
    assert dtypes == [np.float16, np.float16, np.float16, np.float32, np.float32]


@pytest.mark.parametrize("case", CASES)
def test_a_loaded_model_holds_the_weights_that_its_file_means(tmp_path, case):
    checkpoint = tiny_checkpoint(CASES[case])
    source = open_source(checkpoint.write(tmp_path / "quantised"))
    four_bit = source.entries["layers.1.mlp.up.weight"].codes
    kind = CASES[case]
    symmetric = kind.symmetric and kind.bits == 4
    assert four_bit == WeightFormat(kind.group_size or HIDDEN, symmetric, kind.bits, wide=not symmetric)
    decoder = loaded(source, scan_layers=False)
    weight = decoder.layers[1].mlp.gate_up.weight.get_value()
    np.testing.assert_array_equal(weight.packed.shape, (2 * MLP, HIDDEN // 2))
    np.testing.assert_array_equal(np.asarray(dequantize(weight))[MLP:], checkpoint.floats[f"{UP}.weight"])
    qkv = np.concatenate([checkpoint.floats[f"model.layers.0.self_attn.{part}_proj.weight"] for part in "qkv"])
    np.testing.assert_array_equal(dequantize(decoder.layers[0].attention.qkv.weight.get_value()), qkv)


@pytest.mark.parametrize(
    ("case", "scan_layers"),
    [("gptq", True), ("awq", True), ("awq", False), ("compressed_asymmetric", True), ("qspec", True)],
)
def test_logits_equal_those_of_the_float_model_with_the_dequantised_weights(tmp_path, case, scan_layers):
    checkpoint = tiny_checkpoint(CASES[case], "Qwen3ForCausalLM")
    source = open_source(checkpoint.write(tmp_path / "quantised", num_shards=3))
    config = {key: value for key, value in checkpoint.config.items() if key != "quantization_config"}
    plain = open_source(packers.write_hf(tmp_path / "float", config, checkpoint.floats))
    expected = logits(loaded(plain, None), Precision.FLOAT)
    np.testing.assert_allclose(logits(loaded(source, scan_layers=scan_layers), Precision.W4A16), expected, atol=1e-4)
    np.testing.assert_array_equal(logits(loaded(source, None), Precision.FLOAT), expected)


def test_drafts_read_the_same_weights(tmp_path):
    source = open_source(tiny_checkpoint(CASES["awq"]).write(tmp_path))
    model = LanguageModel(loaded(source), None, quantization=QuantConfig(), kernels="reference", name="tiny")
    prompts = [[5, 6, 7], [8, 9]]
    plain = model.generate(prompts, mode="w4a16", max_new_tokens=12)
    drafted = model.generate(prompts, draft="w4a4", max_new_tokens=12)
    assert [result.token_ids for result in drafted] == [result.token_ids for result in plain]
    assert sum(result.stats.accepted for result in drafted) > 0


@pytest.mark.parametrize("case", ["gptq", "awq", "compressed"])
def test_a_quantised_lm_head_is_dequantised(tmp_path, case):
    checkpoint = tiny_checkpoint(CASES[case])
    weight = CASES[case].weight(48, HIDDEN)
    del checkpoint.tensors["lm_head.weight"]
    checkpoint.tensors |= {f"lm_head.{part}": array for part, array in CASES[case].parts(weight).items()}
    source = open_source(checkpoint.write(tmp_path))
    assert source.entries["lm_head.weight"].codes is None
    np.testing.assert_array_equal(source.entries["lm_head.weight"].read(), weight.floats)
    np.testing.assert_array_equal(loaded(source).lm_head.get_value(), weight.floats)


def test_linears_that_the_checkpoint_leaves_in_float_are_read_as_floats(tmp_path):
    checkpoint = tiny_checkpoint(CASES["awq"])
    checkpoint.config["quantization_config"]["modules_to_not_convert"] = ["down_proj"]
    down = "model.layers.0.mlp.down_proj"
    for part in ("qweight", "qzeros", "scales"):
        del checkpoint.tensors[f"{down}.{part}"]
    checkpoint.tensors[f"{down}.weight"] = checkpoint.floats[f"{down}.weight"]
    source = open_source(checkpoint.write(tmp_path))
    assert source.entries["layers.0.mlp.down.weight"].codes is None
    np.testing.assert_array_equal(
        source.entries["layers.0.mlp.down.weight"].read(), checkpoint.floats[f"{down}.weight"]
    )


def test_settings_of_quantisation_with_floats_alone_are_told(tmp_path, recwarn):
    """They are rounded as others are, which nobody expects who chose a quantised checkpoint."""
    settings = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": True}
    config, tensors = hf_config(), hf_tensors(hf_config())
    floats = open_source(write_hf(tmp_path / "floats", config, tensors))
    assert not recwarn.list
    told = r"its quantization_config says gptq, but all 14 linears are floats; .* or remove the quantization_config"
    with pytest.warns(CheckpointWarning, match=told):
        source = open_source(write_hf(tmp_path / "named", {**config, "quantization_config": settings}, tensors))
    for name, entry in floats.entries.items():
        np.testing.assert_array_equal(source.entries[name].read(), entry.read())


def test_the_zero_biases_that_autogptq_adds_are_ignored_and_others_are_not(tmp_path):
    checkpoint = tiny_checkpoint(CASES["gptq"])
    checkpoint.tensors[f"{UP}.bias"] = np.zeros(MLP, np.float16)
    assert "layers.1.mlp.up.bias" not in open_source(checkpoint.write(tmp_path)).entries
    checkpoint.tensors[f"{UP}.bias"][3] = 1
    with pytest.raises(CheckpointError, match=rf"unknown \(1\): {UP}\.bias"):
        open_source(checkpoint.write(tmp_path))


def test_biases_of_the_model_are_read(tmp_path):
    source = open_source(tiny_checkpoint(CASES["gptq"], "Qwen2ForCausalLM").write(tmp_path))
    assert source.entries["layers.0.attention.query.bias"].read().any()


def test_norms_that_the_qspec_format_folds_away_are_ones(tmp_path):
    checkpoint = tiny_checkpoint(CASES["qspec"])
    checkpoint.tensors = {name: array for name, array in checkpoint.tensors.items() if "norm" not in name}
    source = open_source(checkpoint.write(tmp_path))
    np.testing.assert_array_equal(source.entries["layers.1.mlp_norm.weight"].read(), np.ones(HIDDEN))


def test_opening_reads_no_linear(tmp_path):
    source = open_source(tiny_checkpoint(CASES["gptq"]).write(tmp_path))
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(OSError, match=r"model\.safetensors"):
        source.entries["layers.0.mlp.up.weight"].read()


def test_activation_order_with_groups_of_consecutive_inputs_is_accepted(tmp_path):
    checkpoint = tiny_checkpoint(CASES["gptq"])
    checkpoint.config["quantization_config"]["desc_act"] = True  # as with static_groups
    source = open_source(checkpoint.write(tmp_path))
    expected = checkpoint.floats[f"{UP}.weight"]
    np.testing.assert_array_equal(as_read_by_kernels(source.entries["layers.1.mlp.up.weight"].read()), expected)


@pytest.mark.parametrize("actorder", ["weight", "static", None])
def test_an_order_of_calibration_alone_is_accepted(tmp_path, actorder):
    checkpoint = tiny_checkpoint(CASES["compressed"])
    checkpoint.config["quantization_config"]["config_groups"]["group_0"]["weights"]["actorder"] = actorder
    assert open_source(checkpoint.write(tmp_path)).entries["layers.0.mlp.up.weight"].codes


@pytest.mark.parametrize("case", ["compressed", "compressed_asymmetric", "compressed_whole_row_asymmetric"])
def test_weights_equal_those_of_the_compressed_tensors_library(tmp_path, case):
    torch = pytest.importorskip("torch")
    pytest.importorskip("compressed_tensors", reason="the library that defines the format")
    from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
    from compressed_tensors.quantization import QuantizationScheme

    checkpoint, bfloat16 = tiny_checkpoint(CASES[case]), torch.bfloat16
    scheme = QuantizationScheme(**checkpoint.config["quantization_config"]["config_groups"]["group_0"])
    weight = CASES[case].weight(MLP, HIDDEN, seed=5)
    state = {
        "weight": torch.from_numpy(weight.floats),
        "weight_scale": torch.from_numpy(weight.scale.T.astype(np.float32)).to(bfloat16),
        "weight_zero_point": torch.from_numpy((weight.zero.T - 8).astype(np.int8)),
    }
    state["weight"] = state["weight"].to(bfloat16)
    compressed = PackedQuantizationCompressor.compress(state, scheme)
    theirs = PackedQuantizationCompressor.decompress(compressed, scheme)["weight"]
    for name, array in compressed.items():
        as_numpy = array.float().numpy().astype(ml_dtypes.bfloat16) if array.dtype == bfloat16 else array.numpy()
        checkpoint.tensors[f"{UP}.{name}"] = np.ascontiguousarray(as_numpy)
    ours = as_read_by_kernels(open_source(checkpoint.write(tmp_path)).entries["layers.1.mlp.up.weight"].read())
    # The library multiplies in bfloat16, ours is the exact product before that rounding.
    np.testing.assert_array_equal(ours.astype(ml_dtypes.bfloat16).astype(np.float32), theirs.float().numpy())


@pytest.mark.parametrize(
    ("kind", "warned"), [("Q5_0", True), ("Q8_0", False), ("Q4_0", False), ("Q4_1", False), ("F16", False)]
)
def test_a_gguf_file_whose_codes_cannot_be_kept_warns_once(tmp_path, kind, warned):
    import gguf

    config, linear_type = hf_config(), gguf.GGMLQuantizationType[kind]
    tensors = gguf_tensors(config, hf_tensors(config))
    source = open_source(write_gguf(tmp_path / "model.gguf", config, tensors, linear_type=linear_type))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        loaded(source)
    ours = [str(warning.message) for warning in caught if warning.category is RequantizationWarning]
    assert len(ours) == int(warned)
    assert not warned or "model.gguf: 14 of 14 linears are stored as Q5_0; they are dequantised and rounded" in ours[0]
    loaded(source, None)  # keeps the floats, so nothing is rounded: a warning would be an error here
