"""``python -m qspec_jax.quantize`` and the recipes: what they write, what they say, and how they fail."""

from __future__ import annotations

import collections
import dataclasses
import json
import re
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import gguf
import jax
import pytest
from flax import nnx

import qspec_jax
from qspec_jax import ActivationQuantization, QuantConfig, UsageError, quantize
from qspec_jax.device import memory
from qspec_jax.device.sizes import size_text
from qspec_jax.engine.load import open_model
from qspec_jax.errors import QSpecError, RequantizationWarning
from qspec_jax.files.lock import locked
from qspec_jax.recipes import convert
from qspec_jax.recipes import files as recipe_files
from qspec_jax.recipes.catalogue import RECIPES
from qspec_jax.recipes.floats import float_entry
from qspec_jax.weights.checkpoint.manifest import FILE_NAME
from qspec_jax.weights.checkpoint.restore import open_checkpoint
from tests.commands.quantizing import assert_same_parameters, load, run, write_gguf
from tests.golden import make_demo

ROOT = Path(__file__).parents[2]


def test_keep_writes_the_codes_of_the_file_and_its_tokenizer(capsys, tmp_path, four_bit_file):
    code, out, err = run(capsys, four_bit_file, tmp_path / "out", "--recipe", "keep")
    assert code == 0
    before = size_text(four_bit_file.stat().st_size)
    assert out.startswith(f"{tmp_path / 'out'}: {before} before, ")
    assert out.endswith(" s\n")
    assert "B of memory" in err
    original, loaded = load(four_bit_file), load(tmp_path / "out")
    assert_same_parameters(loaded, original)
    assert loaded.tokenizer.encode("ABBA") == original.tokenizer.encode("ABBA")
    chat = [{"role": "user", "content": "AB"}]
    assert loaded.tokenizer.apply_chat(chat) == original.tokenizer.apply_chat(chat)
    assert loaded.stop_tokens == original.stop_tokens
    assert loaded.tokenizer.eos_token_ids == original.tokenizer.eos_token_ids


def test_rtn_writes_what_loading_would_have_rounded(capsys, tmp_path, float_directory):
    arguments = ("--recipe", "rtn", "--group-size", "row", "--symmetric")
    code, _, err = run(capsys, float_directory, tmp_path / "out", *arguments)
    assert code == 0
    assert "warning" not in err
    quantization = QuantConfig(group_size=None, symmetric=True)
    assert_same_parameters(load(tmp_path / "out"), load(float_directory, quantization=quantization))


@pytest.mark.parametrize("given", ["options", "file"])
def test_8_bits_are_nested(capsys, tmp_path, float_directory, given):
    arguments = ("--recipe", "rtn", "--group-size", "32", "--bits", "8")
    if given == "file":
        (recipe := tmp_path / "recipe.toml").write_text('recipe = "rtn"\nsymmetric = true\nbits = 8\n')
        arguments = ("--recipe", str(recipe))
    assert run(capsys, float_directory, tmp_path / "out", *arguments)[0] == 0
    model, quantization = load(tmp_path / "out"), QuantConfig(symmetric=True, bits=8)
    assert model.quantization == quantization
    assert_same_parameters(model, load(float_directory, quantization=quantization))


def test_8_bits_have_the_grid_that_loading_rounds_to(capsys, tmp_path, float_directory):
    """So have those of a file that says no grid."""
    file, with_grid = tmp_path / "recipe.toml", tmp_path / "grid.toml"
    file.write_text('recipe = "rtn"\nbits = 8\n')
    with_grid.write_text('recipe = "rtn"\nbits = 8\nsymmetric = false\n')
    for recipe, symmetric in ((file, True), (with_grid, False)):
        assert run(capsys, float_directory, tmp_path / recipe.stem, "--recipe", recipe)[0] == 0
        assert load(tmp_path / recipe.stem).quantization.symmetric is symmetric
    assert run(capsys, float_directory, tmp_path / "out", "--recipe", "rtn", "--bits", "8")[0] == 0
    asymmetric = ("--asymmetric", "--group-size", "32")
    assert run(capsys, float_directory, tmp_path / "other", "--recipe", "rtn", "--bits", "8", *asymmetric)[0] == 0
    model = load(tmp_path / "out")
    assert model.quantization.symmetric  # in the largest groups that divide all inputs, which are 32
    assert_same_parameters(model, load(float_directory, verify="w8a16"))
    assert load(tmp_path / "other").quantization == QuantConfig(bits=8)


def test_rounding_once_more_is_done_with_a_warning(capsys, tmp_path, four_bit_file):
    code, _, err = run(capsys, four_bit_file, tmp_path / "out", "--recipe", "rtn", "--symmetric")
    assert code == 0
    assert "warning: 14 of 14 linears are quantised already and are rounded once more, which loses accuracy" in err
    weight = load(tmp_path / "out").decoder.layers[0].mlp.down.weight.get_value()
    assert weight.symmetric
    recipe = open_checkpoint(tmp_path / "out").manifest.recipe
    assert recipe == {"name": "rtn", "group_size": 32, "symmetric": True, "dtype": "float32"}


@pytest.mark.filterwarnings("default")
def test_warnings_of_loading_are_shown_as_lines(capsys, tmp_path, four_bit_file, monkeypatch):
    def load_with_warning(*arguments, **options):
        warnings.warn("twice rounded", RequantizationWarning, stacklevel=1)
        return load_decoder(*arguments, **options)

    load_decoder = convert.load_decoder
    monkeypatch.setattr(convert, "load_decoder", load_with_warning)
    code, _, err = run(capsys, four_bit_file, tmp_path / "out", "--recipe", "keep")
    assert code == 0
    assert "\nwarning: twice rounded\n" in err
    assert "test_quantize" not in err.replace(str(tmp_path), "")


@pytest.mark.parametrize(("kind", "symmetric", "bits"), [("Q4_0", True, 4), ("Q4_1", False, 4), ("Q8_0", False, 8)])
def test_what_is_recorded_of_kept_codes_is_their_own_grid(capsys, tmp_path, kind, symmetric, bits):
    path = write_gguf(tmp_path / "model.gguf", gguf.GGMLQuantizationType[kind])
    grid = QuantConfig(group_size=32, symmetric=symmetric, bits=bits)
    for asked in ((), ("--group-size", "64", "--asymmetric" if symmetric else "--symmetric")):
        assert run(capsys, path, tmp_path / "out", "--recipe", "keep", "--overwrite", *asked)[0] == 0
        manifest = open_checkpoint(tmp_path / "out").manifest
        assert json.loads((tmp_path / "out" / FILE_NAME).read_text())["quantization"]["symmetric"] == symmetric
        assert manifest.quantization == grid
        assert (manifest.recipe["group_size"], manifest.recipe["symmetric"]) == (32, symmetric)
        assert manifest.recipe.get("bits", 4) == bits
    for model in (path, tmp_path / "out"):
        for given in ("auto", QuantConfig(group_size=64, symmetric=not symmetric)):
            assert open_model(model, given).quantization == grid


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("Q4_1", ("--recipe", "rtn", "--bits", 8, "--head-bits", 8, "--draft-head", 4)),
        ("Q4_1", ("--recipe", "keep", "--draft-head", 4)),
        ("Q8_0", ("--recipe", "keep", "--head-bits", 8)),
        ("Q8_0", ("--recipe", "rtn", "--symmetric", "--head-bits", 8)),
        ("Q8_0", ("--recipe", "rtn", "--keep-floats")),
        ("Q8_0", ("--recipe", "quarot-rtn", "--bits", 8, "--head-bits", 8)),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(map(str, value)),
)
@pytest.mark.filterwarnings("ignore::qspec_jax.errors.RequantizationWarning")
def test_as_much_is_foretold_as_is_written(capsys, tmp_path, monkeypatch, kind, options):
    foretold = []
    original = convert._estimate
    monkeypatch.setattr(convert, "_estimate", lambda *given: foretold.append(original(*given)) or foretold[-1])
    model = write_gguf(tmp_path / "model.gguf", gguf.GGMLQuantizationType[kind])
    assert run(capsys, model, tmp_path / "out", *options)[0] == 0
    made = nnx.state(load(tmp_path / "out").decoder)
    assert foretold[0].finished == sum(leaf.nbytes for leaf in jax.tree.leaves(made))


def test_keep_of_float_weights_says_to_round(capsys, tmp_path, float_directory):
    code, out, err = run(capsys, float_directory, tmp_path / "out", "--recipe", "keep")
    assert (code, out) == (2, "")
    assert "has no 4-bit weights to keep; use --recipe rtn" in err
    assert not (tmp_path / "out").exists()


def test_bits_of_codes_that_are_kept_are_not_asked_for(capsys, tmp_path, four_bit_file):
    code, out, err = run(capsys, four_bit_file, tmp_path / "out", "--recipe", "keep", "--bits", "8")
    assert (code, out) == (2, "")
    assert "--recipe keep leaves codes the bits that they have; leave --bits out, or use --recipe rtn" in err


def test_keep_of_a_mixed_file_says_what_is_rounded(capsys, tmp_path, four_bit_file, monkeypatch):
    opened = convert.open_source(four_bit_file)
    name = "layers.0.mlp.down.weight"
    entry = float_entry(opened.entries[name])
    mixed = dataclasses.replace(opened, entries={**opened.entries, name: entry})
    monkeypatch.setattr(convert, "open_source", lambda *_, **__: mixed)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        code, _, err = run(capsys, four_bit_file, tmp_path / "out", "--recipe", "keep")
    assert code == 0
    assert f"warning: model.gguf: 1 of 14 linears, {name} for one, are left in floating point" in err


def test_a_recipe_file_sets_everything_and_options_override_it(capsys, tmp_path, float_directory):
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(
        'recipe = "rtn"\ngroup_size = "row"\nsymmetric = true\ndtype = "bfloat16"\n'
        '[w4a4]\ngroup_size = "row"\noutlier_groups = 0\nsymmetric = true\nclip_ratio = 0.9\n'
        "[w4a8]\ngroup_size = 32\n"
    )
    assert run(capsys, float_directory, tmp_path / "a", "--recipe", recipe)[0] == 0
    assert load(tmp_path / "a").quantization == QuantConfig(
        group_size=None,
        symmetric=True,
        w4a4=ActivationQuantization(group_size=None, symmetric=True, clip_ratio=0.9),
        w4a8=ActivationQuantization(group_size=32),
    )
    manifest = open_checkpoint(tmp_path / "a").manifest
    assert manifest.recipe == {"name": "rtn", "group_size": "row", "symmetric": True, "dtype": "bfloat16"}
    assert manifest.arrays["embedding"].dtype == "bfloat16"
    options = ("--group-size", 32, "--asymmetric", "--dtype", "float32")
    assert run(capsys, float_directory, tmp_path / "b", "--recipe", recipe, *options)[0] == 0
    weight = load(tmp_path / "b").decoder.layers[0].mlp.down.weight.get_value()
    assert (weight.group_size, weight.symmetric) == (32, False)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("recipe = ", "is not valid TOML"),
        ("", 'recipe is none; write recipe = "NAME" with one of keep, rtn, gptq, quarot-rtn, quarot-gptq'),
        ('recipe = "gptx"', "recipe is 'gptx'; write"),
        ('recipe = "rtn"\nbit = 8', "the recipe has unknown keys: bit; known: recipe, group_size"),
        ('recipe = "keep"\nbits = 8', "--recipe keep leaves codes the bits that they have"),
        ('recipe = "rtn"\nbits = 3', "bits=3 is not supported; use 4, or 8 for nested weights"),
        ('recipe = "rtn"\ngroup_size = 48', "group_size=48 is not supported; use 32, 64, 128 or None"),
        ('recipe = "rtn"\ngroup_size = "all"', "group_size='all' is not supported; use a number or 'row'"),
        ('recipe = "rtn"\ngroup_size = true', "group_size = True must be of type int or str"),
        ('recipe = "rtn"\nsymmetric = 1', "symmetric = 1 must be of type bool"),
        ('recipe = "rtn"\ndtype = "int8"', "dtype='int8' is not supported"),
        ('recipe = "rtn"\n[w4a4]\nclip_ratio = 2', "[w4a4]: clip_ratio=2.0 must be in (0, 1]"),
        ('recipe = "rtn"\n[w4a8]\nbits = 6', "[w4a8] has unknown keys: bits"),
    ],
)
def test_a_recipe_file_that_is_wrong_says_where(tmp_path, text, message):
    path = tmp_path / "recipe.toml"
    path.write_text(text)
    with pytest.raises(UsageError) as caught:
        recipe_files.read_recipe(str(path))
    assert str(caught.value).startswith(str(path))
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        (
            "gptx",
            "recipe 'gptx' is unknown; use keep, rtn, gptq, quarot-rtn, quarot-gptq, atom, resq, or the path of",
        ),
        ("no/such.toml", "cannot read recipe no/such.toml: No such file or directory"),
    ],
)
def test_an_unknown_recipe_exits_with_2_before_anything_is_read(capsys, tmp_path, monkeypatch, recipe, message):
    monkeypatch.setattr(convert, "resolve_model", lambda _: pytest.fail("looked for a model"))
    code, out, err = run(capsys, "default", tmp_path / "out", "--recipe", recipe)
    assert (code, out) == (2, "")
    assert message in err


def test_help_and_documents_say_of_each_recipe_what_the_catalogue_says(capsys):
    with pytest.raises(SystemExit):
        quantize.main(["--help"])
    shown = " ".join(capsys.readouterr().out.split())
    documented = (ROOT / "docs" / "quantization.md").read_text()
    rows = [f"| `{recipe.name}` | {recipe.summary} |" for recipe in RECIPES.values()]
    assert "\n".join(rows) in documented
    assert all(f"{recipe.name}: {recipe.summary}" in shown for recipe in RECIPES.values())


@pytest.mark.parametrize(
    "arguments", [["m"], ["m", "o"], ["m", "o", "--recipe", "rtn", "--symmetric", "--asymmetric"], ["m", "o", "--x"]]
)
def test_wrong_usage_exits_with_2(arguments):
    with pytest.raises(SystemExit) as raised:
        quantize.main(arguments)
    assert raised.value.code == 2


def test_what_is_at_the_destination_is_checked_before_the_work(capsys, tmp_path, four_bit_file, monkeypatch):
    done, other = tmp_path / "done", tmp_path / "other"
    assert run(capsys, four_bit_file, done, "--recipe", "keep")[0] == 0
    other.mkdir()
    (other / "notes.txt").write_text("mine")
    monkeypatch.setattr(convert, "load_decoder", lambda *_, **__: pytest.fail("began to quantise"))
    code, _, err = run(capsys, four_bit_file, done, "--recipe", "keep")
    assert code == 2
    assert "is a checkpoint already; give another path, or --overwrite" in err
    code, _, err = run(capsys, four_bit_file, other, "--recipe", "keep", "--overwrite")
    assert code == 1
    assert "is not a qspec-jax checkpoint, so it is not overwritten" in err


def test_what_cannot_fit_is_refused_with_numbers_before_the_work(capsys, tmp_path, four_bit_file, monkeypatch):
    monkeypatch.setattr(convert, "load_decoder", lambda *_, **__: pytest.fail("began to quantise"))
    with monkeypatch.context() as patch:
        patch.setattr(memory, "available_bytes", lambda: 1000)
        code, _, err = run(capsys, four_bit_file, tmp_path / "out", "--recipe", "keep")
    assert code == 1
    needs = r"the weights of model.gguf and the copies that quantising takes need (\S+) kB and .* has (\S+) kB free"
    told = re.search(needs, err)
    assert told is not None
    assert float(told[1]) > float(told[2]) == 1
    usage = collections.namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10, 9, 1000))
    code, _, err = run(capsys, four_bit_file, tmp_path / "out", "--recipe", "keep")
    assert code == 1
    assert "has 1.00 kB free" in err
    assert not list(tmp_path.iterdir())


def test_a_second_run_to_one_place_is_refused_at_once(capsys, tmp_path, four_bit_file, monkeypatch):
    monkeypatch.setattr(convert, "load_decoder", lambda *_, **__: pytest.fail("began to quantise"))
    model = qspec_jax.load(four_bit_file, kernels="reference")
    with locked(tmp_path / "out"):
        code, out, err = run(capsys, four_bit_file, tmp_path / "out", "--recipe", "keep")
        with pytest.raises(QSpecError, match="out is being written by another run"):
            qspec_jax.save(model, tmp_path / "out")
    assert (code, out) == (1, "")
    assert f"error: {tmp_path / 'out'} is being written by another run; wait for it, or give another path" in err
    assert list(tmp_path.iterdir()) == []


def test_an_interruption_changes_nothing(capsys, tmp_path, four_bit_file, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(convert, "load_decoder", interrupt)
    code, out, err = run(capsys, four_bit_file, tmp_path / "out", "--recipe", "keep")
    assert (code, out) == (130, "")
    assert (
        err.splitlines()[-1] == "interrupted; nothing was changed, and the same command goes on with what is finished"
    )
    assert list(tmp_path.iterdir()) == []


def test_a_missing_model_exits_with_1(capsys, tmp_path):
    code, out, err = run(capsys, tmp_path / "absent.gguf", tmp_path / "out", "--recipe", "rtn")
    assert (code, out) == (1, "")
    assert "no such file or directory" in err


def test_the_process_reports_an_error_without_a_traceback_unless_asked(tmp_path):
    command = [sys.executable, "-m", "qspec_jax.quantize", "no/such.gguf", str(tmp_path / "out"), "--recipe", "rtn"]
    plain = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert (plain.returncode, plain.stdout) == (1, "")
    assert plain.stderr.strip().splitlines()[-1].startswith("error: ")
    assert "Traceback" not in plain.stderr
    debug = subprocess.run([*command, "--debug"], capture_output=True, text=True, cwd=ROOT)
    assert debug.returncode != 0
    assert "Traceback" in debug.stderr


@pytest.mark.demo
@pytest.mark.usefixtures("demo_gguf")
def test_the_demo_model_has_the_same_parameters_and_texts_in_its_checkpoint(capsys, tmp_path):
    code, _, _ = run(capsys, "default", tmp_path / "out", "--recipe", "keep")
    assert code == 0
    original, loaded = load(None), load(tmp_path / "out")
    assert_same_parameters(loaded, original)
    assert loaded.config == original.config
    for prompt in make_demo.prompts():
        requests = (model.intake.request(prompt, max_new_tokens=16) for model in (original, loaded))
        ids, expected = (list(request.token_ids) for request in requests)
        assert ids == expected
        assert loaded.tokenizer.decode(ids) == original.tokenizer.decode(ids)
