"""Floats and a 4-bit copy in one checkpoint: what is saved comes back bit for bit, or the part that is asked for."""

from __future__ import annotations

import dataclasses
import json

import jax
import numpy as np
import pytest
from flax import nnx

import qspec_jax
from qspec_jax import QuantConfig, UsageError, View, quantize
from qspec_jax.errors import CheckpointError
from qspec_jax.inspection.model import describe_model
from qspec_jax.inspection.text import model_text
from qspec_jax.recipes.catalogue import RECIPES
from qspec_jax.weights.checkpoint import manifest
from qspec_jax.weights.checkpoint.restore import Checkpoint, open_checkpoint
from qspec_jax.weights.resolve import open_source
from tests import tiny
from tests.weights.test_checkpoint import assert_identical
from tests.weights.tiny_checkpoints import hf_config, hf_tensors, write_hf

EXACT = QuantConfig(group_size=32, symmetric=True, keep_floats=True)
CODES = dataclasses.replace(EXACT, keep_floats=False)
OTHER = QuantConfig(group_size=64)


def load(path, **options):
    return qspec_jax.load(path, kernels="reference", dtype="float32", **options)


@pytest.fixture(scope="module")
def model():
    return tiny.language_model(quantization=EXACT)


@pytest.fixture(scope="module")
def saved(model, tmp_path_factory):
    """A checkpoint that no test changes."""
    path = tmp_path_factory.mktemp("saved") / "both"
    qspec_jax.save(model, path)
    return path


@pytest.mark.parametrize(
    ("asked", "target"),
    [
        ({}, View(weight_bits=None)),
        ({"verify": "float"}, View(weight_bits=None)),
        ({"quantization": EXACT}, View(weight_bits=None)),
        ({"mesh": "data=1"}, View(weight_bits=None)),
        ({"verify": "w4a16"}, View()),
    ],
    ids=["auto", "float", "QuantConfig", "mesh", "w4a16"],
)
def test_what_is_asked_for_comes_back_bit_for_bit(asked, target, model, saved, monkeypatch):
    quantization = EXACT if target.weight_bits is None else CODES
    expected = model if quantization == EXACT else tiny.language_model(quantization=CODES)
    monkeypatch.setattr("qspec_jax.weights.codes.rounded", None)  # nothing is rounded again
    loaded = load(saved, **asked)
    assert (loaded.quantization, loaded.plan().verify) == (quantization, target)
    leaves, others = (jax.tree.leaves(nnx.state(one.decoder)) for one in (loaded, expected))
    assert all(np.asarray(a).tobytes() == np.asarray(b).tobytes() for a, b in zip(leaves, others, strict=True))


def test_the_arrangement_of_layers_leaves_no_trace(saved, tmp_path):
    unrolled = tiny.decoder(open_checkpoint(saved).manifest.model, quantization=EXACT, scan_layers=False)
    qspec_jax.save(qspec_jax.LanguageModel(unrolled, None, quantization=EXACT, kernels="reference"), tmp_path / "c")
    assert open_checkpoint(tmp_path / "c").manifest.arrays == open_checkpoint(saved).manifest.arrays


def test_floats_alone_are_those_of_the_model(saved, model):
    assert_identical(load(saved, quantization=None).decoder, tiny.decoder(model.config, quantization=None))


def test_draft_activations_may_be_chosen_anew_and_weights_stay(saved, model):
    loaded = load(saved, quantization=OTHER)
    assert loaded.quantization == dataclasses.replace(OTHER, group_size=32, symmetric=True, keep_floats=True)
    down, expected = (one.decoder.layers[0].mlp.down for one in (loaded, model))
    np.testing.assert_array_equal(down.weight.get_value().packed, expected.weight.get_value().packed)


@pytest.mark.parametrize(
    ("asked", "groups"),
    [
        ({"verify": "w4a16"}, {"model", "layers.0", "layers.1"}),
        ({}, {"model", *(f"{k}.{n}" for k in ("layers", "floats") for n in "01")}),
    ],
    ids=["copy", "both"],
)
def test_the_copy_alone_reads_the_copy_alone(asked, groups, saved, monkeypatch):
    read, seen = Checkpoint.read_group, []
    monkeypatch.setattr(Checkpoint, "read_group", lambda self, group: seen.append(group) or read(self, group))
    load(saved, **asked)
    assert {*seen} == groups
    assert len(seen) == len(groups)


def test_either_part_serves_beside_another_model(saved, model, tmp_path):
    """Its copy drafts for floats from elsewhere, and other codes for its floats."""
    qspec_jax.save(tiny.language_model(quantization=OTHER), tmp_path / "other")
    other = load(saved, verify="float", draft_model=tmp_path / "other").decoder
    assert other.layers[0].mlp.down.weight.get_value().group_size == 64
    np.testing.assert_array_equal(
        other.layers[0].mlp.down.floats.get_value(), model.decoder.layers[0].mlp.down.floats.get_value()
    )
    assert_identical(load(saved, verify="float", draft_model=saved).decoder, model.decoder)
    with pytest.raises(UsageError, match="verify='w8a16' reads 8-bit weights, and those of both are 4-bit codes"):
        load(saved, verify="w8a16")


def test_a_head_for_drafts_is_kept_and_one_of_fewer_bits_is_for_the_copy(saved, tmp_path):
    with_head = load(saved, draft_head=4)
    qspec_jax.save(with_head, tmp_path / "c")
    assert_identical(load(tmp_path / "c").decoder, with_head.decoder)
    with pytest.raises(UsageError, match="keeps a model's own output; use draft_head"):
        load(saved, head_bits=8)
    assert load(saved, head_bits=8, verify="w4a16").decoder.lm_head is None


def test_versions_that_know_no_floats_beside_codes_say_to_upgrade(saved, monkeypatch):
    assert json.loads((saved / manifest.FILE_NAME).read_text())["format_version"] == 3
    monkeypatch.setattr(manifest, "FORMAT_VERSION", 2)
    with pytest.raises(CheckpointError, match=r"written in format 3 by a newer version.*pip install --upgrade"):
        load(saved)


def test_altered_floats_are_named(model, tmp_path):
    qspec_jax.save(model, tmp_path / "c")
    file = max((tmp_path / "c").glob("data-*/arrays/floats.1/**/*"), key=lambda file: file.stat().st_size)
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"floats\.1"):
        load(tmp_path / "c")


def test_info_says_what_both_parts_take(saved, model):
    facts = describe_model(saved, dtype="float32", kernels="reference")
    assert facts["memory"]["weight_bytes"] == model.nbytes
    assert facts["quantization"]["linears"] == {"4-bit codes and floats, kept": 14}
    assert "verify          float" in model_text(facts)
    facts = describe_model(saved, dtype="float32", kernels="reference", verify="w4a16")
    assert facts["memory"]["weight_bytes"] == load(saved, verify="w4a16").nbytes
    assert "verify          float" not in model_text(facts)


# Made by ``quantize``.
@pytest.fixture(scope="module")
def floats(tmp_path_factory):
    return write_hf(tmp_path_factory.mktemp("float") / "model", hf_config(), hf_tensors(hf_config()))


@pytest.fixture
def run(monkeypatch, capsys):
    """Exit code, and what is said on the standard error stream."""
    monkeypatch.setattr("qspec_jax.recipes.convert.open_tokenizer", lambda path: None)
    monkeypatch.setattr("qspec_jax.engine.load.open_tokenizer", lambda path: None)

    def run(*arguments):
        code = quantize.main([*map(str, arguments)])
        return code, capsys.readouterr().err

    return run


@pytest.mark.parametrize("given", ["option", "file"])
def test_quantize_keeps_the_floats_that_loading_would(given, floats, tmp_path, run):
    (tmp_path / "recipe.toml").write_text('recipe = "rtn"\nsymmetric = true\nkeep_floats = true\n')
    line = ("--recipe", "rtn", "--group-size", "32", "--keep-floats") if given == "option" else ()
    assert run(floats, tmp_path / "out", *(line or ("--recipe", tmp_path / "recipe.toml")))[0] == 0
    assert_identical(load(tmp_path / "out").decoder, load(floats, verify="float").decoder)
    assert open_checkpoint(tmp_path / "out").manifest.recipe["keep_floats"] is True


def test_recipes_read_the_floats_of_a_checkpoint_of_both_and_keep_its_copy(floats, tmp_path, run):
    run(floats, tmp_path / "both", "--recipe", "rtn", "--asymmetric", "--keep-floats")
    both = load(tmp_path / "both")
    code, err = run(tmp_path / "both", tmp_path / "again", "--recipe", "rtn", "--symmetric")
    assert (code, "warning" in err) == (0, False)
    assert_identical(load(tmp_path / "again").decoder, load(floats, quantization=CODES).decoder)
    assert run(tmp_path / "both", tmp_path / "copy", "--recipe", "keep")[0] == 0
    assert_identical(load(tmp_path / "copy").decoder, load(tmp_path / "both", verify="w4a16").decoder)
    assert run(tmp_path / "both", tmp_path / "kept", "--recipe", "keep", "--keep-floats")[0] == 0
    assert_identical(load(tmp_path / "kept").decoder, both.decoder)


@pytest.mark.parametrize("name", [name for name in RECIPES if name not in ("keep", "rtn", "gptq")])
def test_recipes_that_change_what_linears_read_keep_no_floats(name, floats, tmp_path, run, monkeypatch):
    monkeypatch.setattr("qspec_jax.recipes.convert.convert", None)  # nothing long starts
    code, err = run(floats, tmp_path / "out", "--recipe", name, "--keep-floats")
    assert code == 2
    assert f"recipe {name} rotates or sorts" in err
    assert "Leave --keep-floats (keep_floats) out, or use keep, rtn or gptq" in err


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (
            ("rtn", "--bits", "8"),
            "(--bits 8) and keep_floats=True (--keep-floats) are two ways to verify a 4-bit draft",
        ),
        (("rtn", "--head-bits", "8"), "keeps a model's own output; use draft_head"),
        (("keep",), "has 8-bit weights, and beside floats (--keep-floats) are 4-bit ones; use --recipe rtn"),
    ],
)
def test_floats_beside_8_bits_are_refused(line, words, tmp_path, run):
    if line == ("keep",):
        qspec_jax.save(tiny.language_model(quantization=QuantConfig(bits=8)), tmp_path / "8")
    code, err = run(tmp_path / "8", tmp_path / "out", "--keep-floats", "--recipe", *line)
    assert code == 2
    assert words in err
    assert not (tmp_path / "out").exists()


def test_a_source_of_both_gives_either(saved):
    for floats, is_codes in ((True, False), (False, True)):
        entry = open_source(saved, floats=floats).entries["layers.1.mlp.gate.weight"]
        assert (entry.codes is not None) == is_codes
