"""An LM head that a GGUF file has in Q8_0: its codes in 8 bits, wherever it goes."""

from __future__ import annotations

import json

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import qspec_jax
from pallas_kernels import upper_nibbles
from qspec_jax import QuantConfig, View
from qspec_jax.engine.load import open_model
from qspec_jax.errors import CheckpointError, RequantizationWarning
from qspec_jax.inspection.model import describe_model
from qspec_jax.inspection.text import model_text
from qspec_jax.model.head import IMPORTED_HEAD
from qspec_jax.quantize import main as quantize
from qspec_jax.recipes.rotated import rotate_source
from qspec_jax.weights.checkpoint import manifest
from qspec_jax.weights.checkpoint.restore import open_checkpoint
from qspec_jax.weights.resolve import open_source
from tests.tiny import dequantize
from tests.weights.tiny_checkpoints import gguf_tensors, hf_config, hf_tensors, write_gguf

TYPES = gguf.GGMLQuantizationType
tying = pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """GGUF files whose linears are Q4_0 and whose head is of some type, written once."""
    folder = tmp_path_factory.mktemp("heads")

    def file(head, *, tied=False):
        path = folder / f"{head}-{tied}.gguf"
        if not path.exists():
            config = hf_config(tie_word_embeddings=tied)
            tensors, add = gguf_tensors(config, hf_tensors(config)), gguf.GGUFWriter.add_tensor
            name, kind = "token_embd.weight" if tied else "output.weight", TYPES[head]

            def add_tensor(self, given, tensor, **options):
                if given == name:
                    tensor, options = gguf.quants.quantize(tensors[name], kind), {"raw_dtype": kind}
                add(self, given, tensor, **options)

            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(gguf.GGUFWriter, "add_tensor", add_tensor)
                write_gguf(path, config, tensors, linear_type=TYPES.Q4_0)
        return path

    return file


def in_file(path, *, tied):
    """The values of the head, as the gguf package means them."""
    name = "token_embd.weight" if tied else "output.weight"
    tensor = next(one for one in gguf.GGUFReader(path).tensors if one.name == name)
    return gguf.quants.dequantize(tensor.data, tensor.tensor_type)


def loaded(path, **options):
    return open_model(path, "auto", **options).read(dtype=jnp.dtype("float32"), kernels="reference", scan_layers=True)


def assert_identical(one, other):
    (graph, state), (other_graph, other_state) = nnx.split(one), nnx.split(other)
    assert graph == other_graph
    for leaf, its in zip(jax.tree.leaves(state), jax.tree.leaves(other_state), strict=True):
        assert np.asarray(leaf).tobytes() == np.asarray(its).tobytes()


@tying
def test_the_codes_of_the_file_are_kept_and_drafts_read_their_upper_half(files, tied):
    path = files("Q8_0", tied=tied)
    made, expected = loaded(path, head_bits=8, draft_head=4), in_file(path, tied=tied)
    head = made.quantized_head.get_value()
    assert (head.group_size, head.symmetric, head.bits, head.scale.dtype) == (32, False, 8, jnp.float32)
    np.testing.assert_array_equal(dequantize(head), expected)
    np.testing.assert_array_equal(made.head_for(View()).packed, head.packed)
    upper = dequantize(made.head_for(View(activation_bits=8, head_bits=4)))
    np.testing.assert_array_equal(upper, dequantize(upper_nibbles(head)))
    assert np.linalg.norm(upper - expected) < 0.2 * np.linalg.norm(expected)
    if tied:
        np.testing.assert_array_equal(made.embedding.get_value(), expected)


def test_where_8_bits_are_not_asked_for_the_head_is_as_before(files):
    made = loaded(files("Q8_0"), draft_head=4)
    assert made.quantized_head.get_value().group_size == 64
    assert loaded(files("Q8_0")).quantized_head is None
    np.testing.assert_array_equal(made.lm_head.get_value(), in_file(files("Q8_0"), tied=False))


@pytest.mark.parametrize(
    ("kind", "bits", "remedy"),
    [
        ("Q8_0", 4, "head_bits=8, which keeps its codes"),
        ("Q5_0", 8, "a file whose head is Q8_0"),
        ("Q4_0", 4, "a file whose head is Q8_0"),
    ],
)
def test_a_head_that_is_rounded_again_is_named(files, kind, bits, remedy):
    words = f"the LM head is stored as {kind}; it is dequantised and rounded to {bits} bits a second time.*{remedy}"
    with pytest.warns(RequantizationWarning, match=words):
        loaded(files(kind), head_bits=bits)


@tying
def test_a_checkpoint_keeps_them_and_older_versions_say_to_upgrade(files, tied, tmp_path, monkeypatch):
    path = files("Q8_0", tied=tied)
    options = {"kernels": "reference", "dtype": "float32"}
    monkeypatch.setattr("qspec_jax.engine.load.open_tokenizer", lambda path: None)
    model = qspec_jax.load(path, head_bits=8, **options)
    qspec_jax.save(model, tmp_path / "c")
    assert_identical(loaded(tmp_path / "c"), model.decoder)
    np.testing.assert_array_equal(
        loaded(tmp_path / "c", draft_head=4).quantized_head.get_value().low,
        model.decoder.quantized_head.get_value().low,
    )
    described = describe_model(tmp_path / "c", dtype="float32", kernels="reference")
    assert described["memory"]["weight_bytes"] == model.nbytes
    assert "kept in 8 bits" in model_text(described)
    if tied:  # whose floats are there
        assert loaded(tmp_path / "c", head_bits=4).quantized_head.get_value().group_size == 64
        assert loaded(tmp_path / "c", head_bits=16).quantized_head is None
    assert json.loads((tmp_path / "c" / manifest.FILE_NAME).read_text())["format_version"] == 3
    monkeypatch.setattr(manifest, "FORMAT_VERSION", 2)
    with pytest.raises(CheckpointError, match="written in format 3"):
        open_checkpoint(tmp_path / "c")


def test_recipes_keep_them_unless_the_model_is_turned(files, tmp_path, monkeypatch):
    monkeypatch.setattr("qspec_jax.recipes.convert.open_tokenizer", lambda path: None)
    first, second = tmp_path / "first", tmp_path / "second"
    for given, out, recipe in ((files("Q8_0"), first, "rtn"), (first, second, "keep")):
        assert quantize([str(given), str(out), "--recipe", recipe, "--head-bits", "8"]) == 0
        head = loaded(out).quantized_head.get_value()
        np.testing.assert_array_equal(dequantize(head), in_file(files("Q8_0"), tied=False))
    entries = rotate_source(open_source(files("Q8_0"))).entries
    assert entries["lm_head.weight"].read_head is None


def test_memory_is_told_beforehand(files):
    options = {"head_bits": 8, "draft_head": 4}
    opened = open_model(files("Q8_0"), "auto", **options)
    assert opened.formats["quantized_head"] == IMPORTED_HEAD
    assert opened.quantization == QuantConfig(symmetric=True, **options)  # the linears of the file
    facts = describe_model(files("Q8_0"), dtype="float32", kernels="reference", heads=options)
    whole = loaded(files("Q8_0"), **options)
    assert facts["memory"]["weight_bytes"] == sum(leaf.nbytes for leaf in jax.tree.leaves(nnx.state(whole)))
