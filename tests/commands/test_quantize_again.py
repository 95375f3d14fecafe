"""``quantize`` of checkpoints that it wrote: what they have in codes stays, and what is lost is said."""

from __future__ import annotations

import dataclasses
import warnings
from unittest.mock import ANY

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qspec_jax
from pallas_kernels import dequantize
from qspec_jax import ActivationQuantization
from qspec_jax.errors import RequantizationWarning
from qspec_jax.inspection.model import describe_model
from qspec_jax.quantization.rtn import quantize_rtn
from qspec_jax.recipes.catalogue import RECIPES
from qspec_jax.recipes.convert import convert
from qspec_jax.recipes.steps import RecipeOptions
from qspec_jax.weights.checkpoint.restore import open_checkpoint
from qspec_jax.weights.tokenizers import load_tokenizer
from tests.commands.quantizing import assert_same_parameters, load, run
from tests.weights import tiny_checkpoints


def test_sizes_before_and_after_count_the_same_files(tmp_path, four_bit_file):
    first = convert(four_bit_file, tmp_path / "first", recipe=RECIPES["keep"], options=RecipeOptions())
    second = convert(first.path, tmp_path / "second", recipe=RECIPES["keep"], options=RecipeOptions())
    assert first.bytes_after == second.bytes_before
    assert second.bytes_after == describe_model(second.path)["disk_bytes"]


@pytest.mark.parametrize("is_file", [False, True])
def test_keep_of_a_checkpoint_keeps_its_heads_and_draft_activations(capsys, tmp_path, float_directory, is_file):
    """Also as a file says it, as far as that says nothing else."""
    saved, again, other = (tmp_path / name for name in ("saved", "again", "other"))
    file, keep, changed = (tmp_path / f"{name}.toml" for name in ("recipe", "keep", "changed"))
    file.write_text(
        'recipe = "rtn"\nbits = 8\nhead_bits = 8\ndraft_head = 4\n[w4a4]\noutlier_groups = 2\nclip_ratio = 0.5\n'
    )
    keep.write_text('recipe = "keep"\n')
    changed.write_text('recipe = "keep"\nhead_bits = 4\n[w4a4]\noutlier_groups = 1\n')
    assert run(capsys, float_directory, saved, "--recipe", file)[0] == 0
    assert run(capsys, saved, again, "--recipe", keep if is_file else "keep") == (0, ANY, ANY)
    made, kept = open_checkpoint(saved).manifest, open_checkpoint(again).manifest
    assert kept.quantization == made.quantization
    assert (kept.quantization.head_bits, kept.quantization.w4a4.outlier_groups) == (8, 2)
    assert (kept.recipe["head_bits"], kept.recipe["draft_head"]) == (8, 4)
    assert_same_parameters(load(again), load(saved))
    options = (changed,) if is_file else ("keep", "--head-bits", 4, "--outlier-groups", 1)
    with warnings.catch_warnings(action="ignore", category=RequantizationWarning):
        assert run(capsys, saved, other, "--recipe", *options) == (0, ANY, ANY)
    w4a4 = dataclasses.replace(kept.quantization.w4a4, outlier_groups=1)
    expected = dataclasses.replace(kept.quantization, head_bits=4, draft_head=None, w4a4=w4a4)
    assert open_checkpoint(other).manifest.quantization == expected


def test_what_is_beside_floats_is_asked_for_with_what_a_checkpoint_has(capsys, tmp_path, float_directory):
    """The remedy that is named is one."""
    for name, options, remedy in (("8", ("--bits", 8), "rtn"), ("head", ("--head-bits", 8), "--head-bits 16")):
        saved = tmp_path / name
        assert run(capsys, float_directory, saved, "--recipe", "rtn", *options)[0] == 0
        code, _, err = run(capsys, saved, tmp_path / "out", "--recipe", "keep", "--keep-floats")
        assert code == 2
        assert remedy in err
    assert "8 has 8-bit weights" in run(capsys, tmp_path / "8", tmp_path / "o", "--recipe", "keep", "--keep-floats")[2]
    again = (tmp_path / "head", tmp_path / "floats", "--recipe", "keep", "--keep-floats", "--head-bits", 16)
    assert run(capsys, *again)[0] == 0
    assert load(tmp_path / "floats").quantization.keep_floats
    left, kept = "warning: the floats that floats has beside its 4-bit weights are left out; --keep-floats keeps", []
    for name, options in (("copy", ()), ("both", ("--keep-floats",))):
        code, _, err = run(capsys, tmp_path / "floats", tmp_path / name, "--recipe", "keep", *options)
        kept.append((code, left in err, load(tmp_path / name).quantization.keep_floats))
    assert kept == [(0, True, False), (0, False, True)]


@pytest.mark.parametrize(("tied", "heads"), [(False, {"head_bits": 8, "draft_head": 4}), (True, {"head_bits": 8})])
def test_a_head_that_a_checkpoint_has_in_codes_is_not_rounded_again(capsys, tmp_path, four_bit_file, tied, heads):
    """Not even one whose values would not be rounded to themselves."""
    config = tiny_checkpoints.hf_config(tie_word_embeddings=tied)
    tensors = tiny_checkpoints.hf_tensors(config)
    name = "model.embed_tokens.weight" if tied else "lm_head.weight"
    tensors[name] = unstable_rows(*tensors[name].shape)
    load_tokenizer(four_bit_file).save(tmp_path / "hf")
    saved = tmp_path / "saved"
    qspec_jax.save(load(tiny_checkpoints.write_hf(tmp_path / "hf", config, tensors), **heads), saved)
    codes = load(saved).decoder.quantized_head.get_value()
    options = [f"--{key.replace('_', '-')}={bits}" for key, bits in heads.items()]
    for recipe in ("keep", "rtn"):
        assert run(capsys, saved, tmp_path / recipe, "--recipe", recipe, *options) == (0, ANY, ANY)
        jax.tree.map(np.testing.assert_array_equal, load(tmp_path / recipe).decoder.quantized_head.get_value(), codes)


def unstable_rows(count, size):
    """Rows of floats that are rounded to other codes in 8 bits once they have been rounded to some."""
    floats = np.random.default_rng(1).standard_normal((1 << 14, size)).astype(np.float32)
    once = quantize_rtn(jnp.asarray(floats), group_size=64, symmetric=True, bits=8)
    twice = quantize_rtn(dequantize(once), group_size=64, symmetric=True, bits=8)
    return floats[np.flatnonzero(np.any(once.packed != twice.packed, axis=1))[:count]]


@pytest.mark.filterwarnings("always::qspec_jax.errors.RequantizationWarning")
def test_a_head_in_codes_that_is_rounded_to_others_is_named(capsys, tmp_path, float_directory):
    saved = tmp_path / "saved"
    assert run(capsys, float_directory, saved, "--recipe", "rtn", "--head-bits", 8)[0] == 0
    code, _, err = run(capsys, saved, tmp_path / "out", "--recipe", "keep", "--head-bits", 4)
    assert code == 0
    assert "the LM head is stored as 8-bit codes; it is dequantised and rounded to 4 bits a second time" in err
    assert "Use head_bits=16, or head_bits=8, which keeps its codes" in err
    for options in (("--head-bits", 16), ()):
        code, _, err = run(capsys, saved, tmp_path / "out", "--recipe", "keep", "--overwrite", *options)
        assert (code, "warning" in err) == (0, False)


def test_a_checkpoint_is_a_model_too(capsys, tmp_path, four_bit_file):
    """Kept with other draft activations, rounded once more, and written over itself."""
    first, second = tmp_path / "first", tmp_path / "second"
    assert run(capsys, four_bit_file, first, "--recipe", "keep")[0] == 0
    recipe = tmp_path / "recipe.toml"
    recipe.write_text('recipe = "keep"\n[w4a8]\ngroup_size = 32\n')
    assert run(capsys, first, second, "--recipe", recipe)[0] == 0
    assert_same_parameters(load(second), load(first))
    assert load(second).quantization.w4a8 == ActivationQuantization(group_size=32)
    assert run(capsys, first, first, "--recipe", "rtn", "--overwrite")[0] == 0
    rounded = tmp_path / "rounded"
    assert run(capsys, four_bit_file, rounded, "--recipe", "rtn")[0] == 0
    assert_same_parameters(load(first), load(rounded))


def test_a_rotated_model_is_saved_and_opened_as_one(capsys, tmp_path, float_directory):
    """Its head is its own and its MLP transforms; rounding it once more keeps that, rotating it again is refused."""
    rotated, again = tmp_path / "rotated", tmp_path / "again"
    arguments = ("--recipe", "quarot-rtn", "--group-size", 32, "--symmetric")
    assert run(capsys, float_directory, rotated, *arguments)[0] == 0
    manifest = open_checkpoint(rotated).manifest
    assert manifest.recipe == {"name": "quarot-rtn", "group_size": 32, "symmetric": True, "dtype": "float32"}
    assert (manifest.model.down_hadamard, manifest.model.tie_word_embeddings) == (True, False)
    model = load(rotated)
    assert model.decoder.layers[0].mlp.down_hadamard
    assert model.decoder.layers[0].mlp.down.weight.get_value().symmetric
    results = [model.generate([[5, 6, 7]], mode=mode, max_new_tokens=4)[0] for mode in ("qspec", "w4a16")]
    assert results[0].token_ids == results[1].token_ids
    assert run(capsys, rotated, again, "--recipe", "rtn")[0] == 0
    assert open_checkpoint(again).manifest.model.down_hadamard
    code, _, err = run(capsys, rotated, tmp_path / "twice", "--recipe", "quarot-rtn")
    assert code == 2
    assert "this model is rotated already; use a recipe that does not rotate" in err
