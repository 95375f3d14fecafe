"""Checkpoints: what is saved comes back bit for bit, and what has changed since is refused by name."""

from __future__ import annotations

import functools
import threading

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import pallas_kernels
import qspec_jax
from pallas_kernels import Layout, QuantizedWeight, dequantize
from qspec_jax import ActivationQuantization, ModelConfig, Precision, QuantConfig, UsageError
from qspec_jax.errors import CheckpointError
from qspec_jax.model.layouts import add_group_sums, lay_out
from qspec_jax.model.placement import kernels_in_use
from qspec_jax.model.view import View
from qspec_jax.weights.checkpoint import arrays
from qspec_jax.weights.checkpoint.manifest import read_manifest
from qspec_jax.weights.checkpoint.restore import open_checkpoint, restore_decoder
from qspec_jax.weights.checkpoint.save import save_checkpoint
from qspec_jax.weights.placing import Placing
from tests import tiny

FAMILIES = ["llama3_rope_scaling", "llama_with_biases", "smollm2_tied", "mistral_sliding_window", "qwen3_qk_norm"]
CONFIGS = {
    "default": QuantConfig(),
    "symmetric": QuantConfig(group_size=64, symmetric=True),
    "whole row": QuantConfig(group_size=None, w4a4=ActivationQuantization(group_size=64, clip_ratio=0.9)),
}


def save(path):
    save_checkpoint(path, tiny.decoder(), tokenizer=None, quantization=QuantConfig(), recipe={"name": "rtn"})
    return path


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A checkpoint that no test changes."""
    return save(tmp_path_factory.mktemp("saved") / "checkpoint")


W4A16, W4A8, W4A4 = (View.of(one) for one in (Precision.W4A16, Precision.W4A8, Precision.W4A4))


def assert_identical(one, other):
    """The same graph, and the same bits and dtypes."""
    (graph, state), (other_graph, other_state) = nnx.split(one), nnx.split(other)
    assert graph == other_graph
    leaves, other_leaves = jax.tree.leaves(state), jax.tree.leaves(other_state)
    assert [(leaf.shape, leaf.dtype) for leaf in leaves] == [(leaf.shape, leaf.dtype) for leaf in other_leaves]
    assert all(np.asarray(a).tobytes() == np.asarray(b).tobytes() for a, b in zip(leaves, other_leaves, strict=True))


def logits(decoder, precision):
    return tiny.logits(decoder, np.asarray([[1, 5, 9, 40], [2, 3, 7, 11]]), precision, slots=8)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("scan_layers", [True, False])
def test_every_family_comes_back_bit_for_bit_in_both_arrangements(tmp_path, family, scan_layers):
    config = ModelConfig.from_hf(tiny.hf_config(family))
    save_checkpoint(
        tmp_path / "c", tiny.decoder(config, scan_layers=scan_layers), tokenizer=None, quantization=QuantConfig()
    )
    checkpoint = open_checkpoint(tmp_path / "c")
    assert checkpoint.manifest.model == config
    for arrangement in (True, False):
        restored = restore_decoder(checkpoint, scan_layers=arrangement, kernels="reference")
        assert_identical(restored, tiny.decoder(config, scan_layers=arrangement))


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_and_quantisation_are_those_of_the_saved_model(tmp_path, name):
    quantization = CONFIGS[name]
    original = tiny.decoder(quantization=quantization, scan_layers=False)
    save_checkpoint(tmp_path / "c", original, tokenizer=None, quantization=quantization)
    checkpoint = open_checkpoint(tmp_path / "c")
    assert checkpoint.manifest.quantization == quantization
    restored = restore_decoder(checkpoint, scan_layers=False, kernels="reference")
    for decoder in (original, restored):
        add_group_sums(decoder)
    for precision in (Precision.W4A16, Precision.W4A4):
        assert np.array_equal(logits(restored, precision), logits(original, precision))


def test_the_arrangement_of_the_saved_model_leaves_no_trace(tmp_path):
    hashes = []
    for scan_layers in (True, False):
        path = tmp_path / str(scan_layers)
        written = save_checkpoint(
            path, tiny.decoder(scan_layers=scan_layers), tokenizer=None, quantization=QuantConfig()
        )
        hashes.append({name: record.sha256 for name, record in written.arrays.items()})
    assert hashes[0] == hashes[1]


def test_group_sums_are_not_stored(saved, tmp_path):
    decoder = tiny.decoder()
    assert add_group_sums(decoder)
    written = save_checkpoint(tmp_path / "c", decoder, tokenizer=None, quantization=QuantConfig())
    assert written.arrays == open_checkpoint(saved).manifest.arrays


@pytest.mark.parametrize("scan_layers", [True, False])
def test_arrays_come_from_a_device_as_they_come_from_the_host(monkeypatch, scan_layers):
    decoder = tiny.decoder(scan_layers=scan_layers)
    from_host = arrays.stored_arrays(decoder, "layers.1")
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    from_device = arrays.stored_arrays(decoder, "layers.1")
    assert from_host.keys() == from_device.keys()
    assert all(np.array_equal(from_host[name], from_device[name]) for name in from_host)


@pytest.mark.parametrize(("dtype", "stored"), [("bfloat16", "bfloat16"), ("float32", "float32")])
def test_floats_keep_their_values_and_take_the_dtype_asked_for(tmp_path, dtype, stored):
    original = tiny.decoder(dtype=dtype)
    written = save_checkpoint(tmp_path / "c", original, tokenizer=None, quantization=QuantConfig())
    assert written.arrays["embedding"].dtype == stored
    for wanted in ("float32", "bfloat16"):
        restored = restore_decoder(open_checkpoint(tmp_path / "c"), dtype=jnp.dtype(wanted))
        expected = original.embedding.get_value().astype(wanted)
        assert restored.dtype == restored.embedding.get_value().dtype == wanted
        assert np.array_equal(restored.embedding.get_value(), expected)


@pytest.fixture
def wgmma_where_it_fits(monkeypatch):
    """Layouts as on Hopper; of the tiny model's linears those of 256 inputs take the other one."""

    def choose(weight, dtype, *, implementation):
        return Layout.PLANES if weight.num_inputs % 256 else Layout.WGMMA

    def choose_for_codes(weight, *, symmetric, num_groups):
        return Layout.WGMMA if symmetric and num_groups == 1 else Layout.PLANES

    monkeypatch.setattr(pallas_kernels, "best_layout", choose)
    monkeypatch.setattr(pallas_kernels, "best_layout_for_codes", choose_for_codes)


@pytest.mark.parametrize("scan_layers", [True, False])
def test_the_layout_that_kernels_read_leaves_no_trace(tmp_path, request, scan_layers):
    config = ModelConfig.from_hf({**tiny.BASE_HF_CONFIG, "intermediate_size": 512})
    plain = tiny.decoder(config, scan_layers=scan_layers)
    save_one = functools.partial(save_checkpoint, tokenizer=None, quantization=QuantConfig())
    written = save_one(tmp_path / "plain", plain)
    request.getfixturevalue("wgmma_where_it_fits")
    loaded = tiny.decoder(config, scan_layers=scan_layers)
    restored = restore_decoder(open_checkpoint(tmp_path / "plain"), scan_layers=scan_layers, kernels="reference")
    assert_identical(restored, loaded)
    assert save_one(tmp_path / "ordered", loaded).arrays == written.arrays
    down, other = (one.layers[0].mlp.down.weight.get_value() for one in (loaded, plain))
    assert (down.layout, other.layout) == (Layout.WGMMA, Layout.PLANES)
    assert loaded.layers[0].mlp.gate_up.weight.get_value().layout is Layout.PLANES
    assert not np.array_equal(down.packed, other.packed)
    for decoder in (plain, loaded):
        add_group_sums(decoder)
    for precision in (Precision.W4A16, Precision.W4A8):
        assert np.array_equal(logits(loaded, precision), logits(plain, precision))


def test_a_draft_that_a_layout_does_not_serve_has_the_weights_laid_out_anew(wgmma_where_it_fits):
    decoder = tiny.decoder(ModelConfig.from_hf({**tiny.BASE_HF_CONFIG, "intermediate_size": 512}), kernels=None)
    add_group_sums(decoder)
    down = decoder.layers[0].mlp.down
    expected = {precision: logits(decoder, precision) for precision in (Precision.W4A16, Precision.W4A4)}
    assert not lay_out(decoder, (W4A16, W4A8))
    assert down.weight.get_value().layout is Layout.WGMMA
    assert kernels_in_use(decoder, "reference") == "mosaic, reference"
    values = dequantize(down.weight.get_value())
    assert lay_out(decoder, (W4A16, W4A4))
    assert down.weight.get_value().layout is Layout.PLANES
    assert np.array_equal(dequantize(down.weight.get_value()), values)
    assert kernels_in_use(decoder, "reference") == "reference"
    for precision, out in expected.items():  # a program per layout, which XLA may add up in an order of its own
        np.testing.assert_allclose(logits(decoder, precision), out, rtol=0, atol=1e-4)
    assert not lay_out(decoder, (W4A16, W4A8))  # nor back, which would compile anew each time


def test_wide_scales_stay_wide_in_either_arrangement(tmp_path):
    """Some formats bring float32 scales; here those of one linear of the second layer."""
    original = tiny.decoder(scan_layers=False)
    linear = original.layers[1].mlp.down
    weight = linear.weight.get_value()
    wide = (array.astype(jnp.float32) * jnp.float32(1.0001) for array in (weight.scale, weight.offset))
    linear.weight.set_value(QuantizedWeight(weight.packed, *wide))
    save_checkpoint(tmp_path / "c", original, tokenizer=None, quantization=QuantConfig())
    checkpoint = open_checkpoint(tmp_path / "c")
    assert_identical(restore_decoder(checkpoint, scan_layers=False, kernels="reference"), original)
    stacked = restore_decoder(checkpoint, scan_layers=True).layers[0].mlp.down.weight.get_value()
    for layer in range(2):
        expected = original.layers[layer].mlp.down.weight.get_value()
        assert stacked.scale.dtype == stacked.offset.dtype == jnp.float32
        assert np.array_equal(stacked.scale[layer], expected.scale.astype(jnp.float32))
        assert np.array_equal(stacked.offset[layer], expected.offset.astype(jnp.float32))


@pytest.mark.parametrize(
    ("values", "stored"),
    [
        ([1.0, 0.5, -0.0, 2.0**127], "bfloat16"),
        ([1.0, 1.0 + 2**-10], "float16"),
        ([1.0, 1.0 + 2**-20], "float32"),
        ([1e-40, 1.0 + 2**-9], "float32"),
        ([70000.0, 1.0 + 2**-9], "float32"),
        ([float("inf"), float("nan"), 1.0], "bfloat16"),
    ],
)
def test_floats_are_stored_in_sixteen_bits_only_if_that_is_exact(values, stored):
    array = np.asarray(values, np.float32)
    narrow = arrays.narrowed(array)
    assert narrow.dtype.name == stored
    assert narrow.astype(np.float32).tobytes() == array.tobytes()


def test_a_later_value_that_needs_more_bits_is_noticed():
    array = np.ones(10_000, np.float32)
    array[-1] = 1.0 + 2**-20
    assert arrays.narrowed(array).dtype == np.float32
    array[-1] = 1.0 + 2**-5
    assert arrays.narrowed(array).dtype == ml_dtypes.bfloat16


class Halves(Placing):
    """Rows of packed weights in reverse, and cut in as many parts as a mesh has devices."""

    def __init__(self, num_devices):
        self.mesh = jax.make_mesh((num_devices,), ("model",), axis_types=(AxisType.Auto,))
        self.asked = {}

    def arranged(self, path, array, layout=Layout.PLANES):
        self.asked[path] = array.shape
        return array[::-1] if path.endswith(".packed") else array

    def sharding(self, path, shape):
        rows = ("model",) if path.endswith(".packed") else ()
        return NamedSharding(self.mesh, PartitionSpec(*rows))


def check_placing(saved, num_devices):
    whole = restore_decoder(open_checkpoint(saved), scan_layers=True).layers[0].mlp.down.weight.get_value()
    for scan_layers in (True, False):
        halves = Halves(num_devices)
        decoder = restore_decoder(open_checkpoint(saved), placing=halves, scan_layers=scan_layers)
        assert halves.asked["embedding"] == (96, 64)
        assert halves.asked[f"layers.{1 - scan_layers}.mlp.down.weight.packed"] == (64, 64)
        packed = decoder.layers[0].mlp.down.weight.get_value().packed
        assert packed.addressable_data(0).shape[-2:] == (64 // num_devices, 64), packed.sharding
        np.testing.assert_array_equal(packed[0] if scan_layers else packed, whole.packed[0][::-1])
        assert decoder.embedding.get_value().is_fully_replicated


def test_arrays_go_where_they_are_placed(saved):
    """One device is not enough to tell that they are split: ``tests/weights/test_placing.py`` has two."""
    check_placing(saved, 1)


def test_load_and_save_give_the_same_tokens(tmp_path):
    quantization = QuantConfig(w4a4=ActivationQuantization(group_size=64))
    model = tiny.language_model(quantization=quantization)
    qspec_jax.save(model, tmp_path / "c", recipe={"name": "test"})
    loaded = qspec_jax.load(tmp_path / "c", kernels="reference", dtype="float32")
    assert loaded.quantization == quantization
    assert (loaded.tokenizer, loaded.name) == (None, "c")
    assert_identical(loaded.decoder, tiny.language_model(quantization=quantization).decoder)
    prompts = [[1, 2, 3], [9, 8, 7, 6]]
    options = {"mode": "w4a16", "max_new_tokens": 12}
    ids = [[result.token_ids for result in each.generate(prompts, **options)] for each in (model, loaded)]
    assert ids[0] == ids[1]
    assert open_checkpoint(tmp_path / "c").manifest.recipe == {"name": "test"}


def test_what_made_the_weights_is_still_known_when_they_are_saved_again(saved, tmp_path):
    model = qspec_jax.load(saved)
    assert model.recipe == {"name": "rtn"}
    qspec_jax.save(model, tmp_path / "again")
    assert read_manifest(tmp_path / "again").recipe == {"name": "rtn"}
    qspec_jax.save(model, tmp_path / "told", recipe={"name": "mine"})
    assert read_manifest(tmp_path / "told").recipe == {"name": "mine"}
    qspec_jax.save(tiny.language_model(), tmp_path / "made")
    assert read_manifest(tmp_path / "made").recipe == {"name": "unknown"}


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ("rtn", "recipe='rtn': use a mapping of JSON values"),
        ({"loss": np.float32(1)}, "recipe is no JSON: Object of type float32"),
        ({"loss": float("nan")}, "recipe is no JSON: Out of range float values"),
        ({("a", 1): 2}, "recipe is no JSON: keys must be"),
    ],
    ids=str,
)
def test_a_recipe_that_is_no_json_is_refused_before_anything_is_written(tmp_path, recipe, message):
    with pytest.raises(UsageError, match=message):
        qspec_jax.save(tiny.language_model(), tmp_path / "c", recipe=recipe)
    assert not list(tmp_path.iterdir())


def test_a_few_groups_are_read_at_once_and_no_more():
    """The host holds those alone, however large the model."""
    all_run, begun = threading.Barrier(3, timeout=60), []

    def read(group):
        begun.append(group)
        if group in "abc":
            all_run.wait()  # for the two others of the first three
        return group.upper()

    results = []
    for result in arrays._in_threads(read, list("abcdefgh"), at_once=3):
        results.append(result)
        assert len(begun) <= len(results) + 2
    assert sorted(results) == list("ABCDEFGH")
    assert list(arrays._in_threads(str.upper, list("abcdefgh"), at_once=1)) == list("ABCDEFGH")


def test_draft_activations_may_be_chosen_anew(saved):
    other = QuantConfig(group_size=64, symmetric=True, w4a8=ActivationQuantization(group_size=32))
    model = qspec_jax.load(saved, quantization=other, kernels="reference", dtype="float32")
    as_stored = QuantConfig(w4a8=other.w4a8)
    assert model.quantization == model.decoder.layers[0].mlp.down.quantization == as_stored
    weight = model.decoder.layers[0].mlp.down.weight.get_value()
    assert (weight.group_size, weight.symmetric) == (32, False)


def test_a_checkpoint_can_be_read_as_floats(saved):
    model = qspec_jax.load(saved, quantization=None, kernels="reference", dtype="float32")
    weight = model.decoder.layers[0].attention.qkv.weight.get_value()
    assert not isinstance(weight, QuantizedWeight)
    expected = logits(tiny.decoder(), Precision.FLOAT)
    np.testing.assert_allclose(logits(model.decoder, Precision.FLOAT), expected, rtol=1e-4, atol=1e-4)


def test_float_weights_are_not_saved(tmp_path):
    with pytest.raises(UsageError, match="only quantised weights are saved"):
        save_checkpoint(tmp_path / "c", tiny.decoder(quantization=None), tokenizer=None, quantization=None)
    with pytest.raises(UsageError, match=r"attention\.qkv is floating point"):
        save_checkpoint(tmp_path / "c", tiny.decoder(quantization=None), tokenizer=None, quantization=QuantConfig())
    assert not list(tmp_path.iterdir())


def test_a_disk_that_fills_up_is_one_line_and_leaves_nothing(tmp_path, monkeypatch):
    """TensorStore, which writes the arrays, raises ValueError."""
    import orbax.checkpoint as ocp

    def fail(*arguments, **options):
        raise ValueError("OUT_OF_RANGE: Failed to write 4354 bytes to file 15: File too large [os_error_code='27']")

    monkeypatch.setattr(ocp.Checkpointer, "save", fail)
    with pytest.raises(CheckpointError, match=r"cannot write the checkpoint .*: File too large$"):
        save_checkpoint(tmp_path / "c", tiny.decoder(), tokenizer=None, quantization=QuantConfig())
    assert list(tmp_path.iterdir()) == []
