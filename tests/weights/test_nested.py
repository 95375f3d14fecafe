"""Nested 8-bit weights on their way in and out: rounded, read from GGUF, in shard order, as checkpoints, as plans."""

from __future__ import annotations

import dataclasses
import json

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gguf import GGMLQuantizationType

from pallas_kernels import Layout, QuantizedWeight, unpack_nested, upper_nibbles, with_layout
from qspec_jax import ModelConfig, Precision, QuantConfig, UsageError, generate
from qspec_jax.bench import __main__ as bench
from qspec_jax.bench.models import chosen_quantization
from qspec_jax.bench.presets import PRESETS
from qspec_jax.bench.random_arrays import random_weight
from qspec_jax.commands import options
from qspec_jax.decoding.costs import PassBytes
from qspec_jax.decoding.plan import DecodingPlan, plan_of
from qspec_jax.engine.load import open_model
from qspec_jax.inspection.model import describe_model
from qspec_jax.model.config import held_weights
from qspec_jax.model.linear import WeightFormat
from qspec_jax.model.sharding import from_shard_order, to_shard_order
from qspec_jax.model.view import View
from qspec_jax.quantization.rtn import quantize_rtn
from qspec_jax.recipes.floats import float_entry
from qspec_jax.weights import codes as of_files
from qspec_jax.weights.checkpoint.manifest import FILE_NAME
from qspec_jax.weights.checkpoint.restore import open_checkpoint, restore_decoder
from qspec_jax.weights.checkpoint.save import save_checkpoint
from qspec_jax.weights.checkpoint.source import open_saved_source
from qspec_jax.weights.resolve import open_source
from qspec_jax.weights.source import QuantizedTensor, around_zero
from tests import tiny
from tests.tiny import dequantize
from tests.weights.tiny_checkpoints import gguf_tensors, hf_config, hf_tensors, write_gguf

NESTED = QuantConfig(group_size=32, symmetric=True, bits=8)
WEIGHT = np.random.default_rng(0).standard_normal((32, 256)).astype(np.float32) * 0.05
Q8_0, Q4_0, Q4_1, Q5_0 = (getattr(GGMLQuantizationType, name) for name in ("Q8_0", "Q4_0", "Q4_1", "Q5_0"))


@pytest.mark.parametrize("symmetric", [True, False])
def test_every_weight_is_within_half_a_step_of_its_code_and_half_a_scale_of_its_upper_nibble(symmetric):
    weight = quantize_rtn(jnp.asarray(WEIGHT), group_size=64, symmetric=symmetric, bits=8)
    scale = np.repeat(np.abs(np.asarray(weight.scale, np.float32)).T, 64, axis=1)
    ends = 1e-3 * np.abs(WEIGHT).max()  # what rounding scale and offset to float16 adds there
    assert weight.bits == 8
    assert (np.abs(dequantize(weight) - WEIGHT) <= scale / 32 + ends).all()
    upper = upper_nibbles(weight)
    assert (np.abs(dequantize(upper) - WEIGHT) <= scale * (1 / 2 + 1 / 32) + ends).all()
    assert upper.truncated is not symmetric
    if not symmetric:
        codes = np.asarray(unpack_nested(weight.packed, weight.low)).reshape(32, 4, 64)
        assert (codes.min(-1).max(), codes.max(-1).min()) == (0, 255)


def test_a_layout_and_its_inverse_move_both_nibbles():
    weight = quantize_rtn(jnp.asarray(WEIGHT), group_size=64, symmetric=True, bits=8)
    moved = with_layout(weight, Layout.WGMMA)
    assert not np.array_equal(moved.low, weight.low)
    np.testing.assert_array_equal(dequantize(moved), dequantize(weight))
    jax.tree.map(np.testing.assert_array_equal, with_layout(moved, Layout.PLANES), weight)


def test_lower_nibbles_are_shared_among_devices_as_the_upper_ones_are():
    config, codes = (
        ModelConfig.from_hf(tiny.BASE_HF_CONFIG),
        np.random.default_rng(0).integers(0, 256, (8, 64), np.uint8),
    )
    for path in ("layers.0.mlp.down.weight", "layers.0.attention.qkv.weight"):
        rows = np.resize(codes, (128, 64))
        upper, lower = (to_shard_order(f"{path}.{part}", rows, config, 2) for part in ("packed", "low"))
        np.testing.assert_array_equal(lower, upper)
        np.testing.assert_array_equal(from_shard_order(f"{path}.low", lower, config, 2), rows)


@pytest.fixture
def model_file(tmp_path):
    """Writes a GGUF file whose linears are of some type, but for single tensors."""

    def write(linear_type, **others):
        config = hf_config()
        tensors = gguf_tensors(config, hf_tensors(config))
        writer = {"add_tensor": gguf.GGUFWriter.add_tensor}["add_tensor"]

        def add_tensor(self, name, tensor, **options):
            kind = next((kind for part, kind in others.items() if part in name), None)
            if kind is not None:
                tensor, options = gguf.quants.quantize(tensors[name], kind), {"raw_dtype": kind}
            writer(self, name, tensor, **options)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(gguf.GGUFWriter, "add_tensor", add_tensor)
            write_gguf(tmp_path / "model.gguf", config, tensors, linear_type=linear_type)
        return tmp_path / "model.gguf"

    return write


def as_in_file(source, name):
    """The floats that the gguf package makes of a tensor, in the order of the model."""
    entry = source.entries[name]
    return np.asarray(float_entry(entry).read())


def loaded(path):
    return open_model(path, "auto").read(dtype=jnp.dtype("float32"), kernels="reference", scan_layers=True)


def test_q8_0_is_bit_exact_and_verifies(model_file):
    path = model_file(Q8_0)
    raw = gguf.GGUFReader(path)
    tensor = next(one for one in raw.tensors if one.name == "blk.1.ffn_down.weight")
    expected = gguf.quants.dequantize(tensor.data, Q8_0)
    weight = loaded(path).layers[0].mlp.down.weight.get_value()
    np.testing.assert_array_equal(dequantize(weight)[1], expected)
    assert held_weights(open_model(path, "auto").quantization) == (8, 4)


def test_a_scale_that_16_times_overflows_float16_is_kept_in_float32():
    blocks = np.zeros((1, 34), np.uint8)
    blocks[0, :2] = np.asarray([5000], "<f2").view(np.uint8)
    blocks[0, 2] = np.uint8(256 - 3)
    shape = type("Tensor", (), {"shape": (32, 1), "data": blocks, "tensor_type": Q8_0})()
    from qspec_jax.weights.gguf.values import read_codes

    tensor = read_codes(shape)
    assert tensor.scale.dtype == np.float32
    assert float(dequantize(jax.tree.map(jnp.asarray, of_files.packed(tensor)))[0, 0]) == -15000


@pytest.mark.parametrize("largest", [(127, -3), (3, -127), (127, -127), (120, -120), (119, -128), (-128, 5)])
def test_codes_around_128_stay_exact_and_their_upper_nibbles_have_a_zero(largest):
    """But of a group that needs both ends of the grid: its other weights are not small beside its largest."""
    signed = np.array([[*largest, 0, 1, -1, 30, -30, 7]], np.int16)
    step = np.array([[0.125]], np.float32)
    tensor = around_zero((signed + 128).astype(np.uint8), step)
    weight = jax.tree.map(jnp.asarray, of_files.packed(tensor))
    np.testing.assert_array_equal(dequantize(weight), step * signed)
    small = np.asarray(dequantize(upper_nibbles(weight)))[0, 2:5] / step[0]
    both_ends = max(largest) > 119 and min(largest) < -119
    assert (np.abs(small) <= 8).all() if both_ends else (small == 0).all()


@pytest.mark.parametrize("other", [Q4_0, Q4_1])
def test_codes_in_4_bits_beside_others_in_8_stay_exact(model_file, other):
    path = model_file(Q8_0, **{"attn_q": other, "blk.0.ffn_down": other})
    source = open_source(path)
    decoder = loaded(path)
    qkv, down = (module.weight.get_value() for module in (decoder.layers[0].attention.qkv, decoder.layers[0].mlp.down))
    for layer in range(2):
        parts = [as_in_file(source, f"layers.{layer}.attention.{part}.weight") for part in ("query", "key", "value")]
        np.testing.assert_array_equal(dequantize(qkv)[layer], np.concatenate(parts))
        np.testing.assert_array_equal(dequantize(down)[layer], as_in_file(source, f"layers.{layer}.mlp.down.weight"))
    rows = as_in_file(source, "layers.0.attention.query.weight")  # and are all that drafts read
    np.testing.assert_allclose(dequantize(upper_nibbles(qkv))[0, : len(rows)], rows, rtol=1e-3, atol=1e-6)


def test_fewer_bits_beside_q8_0_are_rounded_to_8_without_a_warning(model_file):
    source = open_source(path := model_file(Q8_0, attn_k=Q5_0))
    weight = loaded(path).layers[0].attention.qkv.weight.get_value()
    rows = slice(source.specs["layers.0.attention.key.weight"].first_row, None)
    floats = as_in_file(source, "layers.0.attention.key.weight")
    distance = np.abs(dequantize(weight)[0, rows][: len(floats)] - floats).max()
    assert 0 < distance < np.abs(floats).max() / 200


def test_mixed_files_have_8_bits_where_the_file_has(model_file):
    opened = open_model(model_file(Q4_0, ffn_up=Q8_0), "auto")
    assert {name: one.bits for name, one in opened.formats.items()} == {
        "attention.qkv": 4,
        "attention.output": 4,
        "mlp.gate_up": 8,
        "mlp.down": 4,
    }
    assert opened.quantization == QuantConfig(bits=8)


def test_floats_are_nested_at_load_and_4_bit_codes_are_not(model_file):
    path = model_file(Q4_0)
    with pytest.raises(UsageError, match=r"those of model.gguf are 4-bit codes already; use verify='w4a16', a"):
        open_model(path, "auto", verify="w8a16")
    with pytest.raises(UsageError, match=r"those of model.gguf are 4-bit codes already"):
        describe_model(path, verify="w8a16")
    floats = open_model(model_file(GGMLQuantizationType.F32), "auto", verify="w8a16")
    assert floats.quantization == QuantConfig(group_size=32, symmetric=True, bits=8)
    assert {one.bits for one in floats.formats.values()} == {8}
    with pytest.raises(UsageError, match=r"bits=8 .* keep_floats=True .* are two ways"):
        QuantConfig(bits=8, keep_floats=True)
    with pytest.raises(UsageError, match="bits=6 is not supported; use 4, or 8"):
        QuantConfig(bits=6)


def test_a_4_bit_copy_of_q8_0_beside_its_floats_is_rounded(model_file):
    exact = open_model(model_file(Q8_0), "auto", verify="float")
    assert {one.bits for one in exact.formats.values()} == {4}
    assert exact.quantization == QuantConfig(keep_floats=True)
    tensor = QuantizedTensor(np.full((32, 32), 200, np.uint8), np.ones((1, 32), np.float16), None, bits=8)
    rounded = of_files.as_format(tensor, WeightFormat(32, symmetric=True))
    np.testing.assert_allclose(dequantize(jax.tree.map(jnp.asarray, rounded)), 200 / 16 - 8.5, rtol=1e-3)


@pytest.mark.parametrize("quantization", [NESTED, QuantConfig()], ids=["8", "4"])
def test_a_checkpoint_says_its_bits_and_one_of_4_is_what_it_was(tmp_path, quantization):
    decoder = tiny.decoder(quantization=quantization)
    save_checkpoint(tmp_path / "out", decoder, tokenizer=None, quantization=dataclasses.replace(quantization, bits=4))
    text = json.loads((tmp_path / "out" / FILE_NAME).read_text())
    assert text["format_version"] == (2 if quantization.bits == 8 else 1)
    assert ("bits" in text["quantization"]) == ("bits" in text["formats"]["mlp.down"]) == (quantization.bits == 8)
    checkpoint = open_checkpoint(tmp_path / "out")
    assert checkpoint.manifest.quantization == quantization
    how = {"quantization": quantization, "dtype": jnp.dtype("float32"), "kernels": "reference"}
    back = restore_decoder(checkpoint, scan_layers=True, **how)
    weights = [one.layers[0].mlp.down.weight.get_value() for one in (decoder, back)]
    jax.tree.map(np.testing.assert_array_equal, *weights)
    entry = open_saved_source(checkpoint).entries["layers.1.mlp.down.weight"]
    assert entry.codes == WeightFormat(32, quantization.symmetric, quantization.bits)
    np.testing.assert_array_equal(float_entry(entry).read(), dequantize(weights[0])[1])


def test_nested_weights_verify_unless_somebody_says_otherwise():
    held = held_weights(NESTED)
    assert plan_of("qspec", held=held).verify == View.of(Precision.W8A16)
    assert plan_of("qspec", held=held, verify="w4a16").verify == View.of(Precision.W4A16)
    assert plan_of("lookup", held=held).verify == plan_of("auto", held=held).verify == View.of(Precision.W8A16)
    assert plan_of("w8a16", held=held) == DecodingPlan(Precision.W8A16)
    assert plan_of("w4a16", held=held) == DecodingPlan(Precision.W4A16)
    for held in ((4,), (4, None)):
        with pytest.raises(UsageError, match="mode='w8a16' needs 8-bit weights; load the model"):
            plan_of("w8a16", held=held)
        with pytest.raises(UsageError, match="verify='w8a16' needs weights that this model does not hold"):
            plan_of("qspec", held=held, verify="w8a16")


def test_drafts_read_half_of_the_bytes_of_the_linears():
    decoder = tiny.decoder(quantization=NESTED)
    low = sum(w.low.nbytes for w in jax.tree.leaves(decoder, is_leaf=is_weight) if is_weight(w))
    of = PassBytes.of(decoder)
    assert of.weights_of(View.of(Precision.W8A16)) - of.weights_of(View.of(Precision.W4A8)) == low > 0


def is_weight(value):
    return isinstance(value, QuantizedWeight)


def test_qspec_of_nested_weights_gives_the_tokens_of_plain_w8a16():
    model = tiny.language_model(quantization=NESTED)
    assert "nested 8-bit weights" in repr(model)
    prompts, length = [[5, 9, 17, 3], [80, 81, 2]], {"max_new_tokens": 16}
    plain = model.generate(prompts, mode="w8a16", **length)
    drafted = model.generate(prompts, mode="qspec", **length)
    assert [one.token_ids for one in drafted] == [one.token_ids for one in plain]
    four_bit = model.generate(prompts, mode="w4a16", **length)
    assert [one.token_ids for one in four_bit] != [one.token_ids for one in plain]


@pytest.mark.parametrize("arguments", [["--verify", "w8a16"], ["--mode", "w8a16"]])
def test_commands_load_the_weights_that_are_asked_for(arguments):
    parsed = generate.build_parser().parse_args(["--prompt", "a", *arguments])
    assert options.weights_of(parsed)["verify"] == "w8a16"


def test_synthetic_weights_are_nested_too():
    parser = bench.build_parser().parse_args(["decode", "--preset", "smollm2-135m", "--verify", "w8a16"])
    quantization = chosen_quantization(parser, PRESETS["smollm2-135m"])
    assert (quantization.bits, quantization.symmetric) == (8, True)
    weight = random_weight(jax.random.key(0), k=64, n=8, group_size=32, symmetric=True, bits=8)
    assert weight.bits == 8
    assert not np.array_equal(weight.low, weight.packed)
