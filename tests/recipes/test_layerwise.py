"""The recipe ``gptq``: quantising layer by layer on calibration text, stopping and going on, and its refusals."""

from __future__ import annotations

import dataclasses
import functools
import os
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

import qspec_jax
from qspec_jax import QuantConfig, quantize
from qspec_jax.device import memory
from qspec_jax.device.sizes import size_text
from qspec_jax.errors import CheckpointError, UsageError
from qspec_jax.model.parameters import layer_anatomy
from qspec_jax.model.precision import Precision
from qspec_jax.quantization.rtn import quantize_rtn
from qspec_jax.recipes import convert, layerwise, moments
from qspec_jax.recipes import files as recipe_files
from qspec_jax.recipes.observe import advance, linear_of, second_moments
from qspec_jax.recipes.steps import GPTQ, Progress, RecipeContext, RecipeOptions
from qspec_jax.recipes.text import token_windows
from qspec_jax.recipes.work_folder import WorkFolder, fingerprint, remove_work_folders
from qspec_jax.weights.checkpoint.restore import open_checkpoint
from qspec_jax.weights.checkpoint.save import check_destination
from qspec_jax.weights.fill import load_layer
from qspec_jax.weights.resolve import open_source
from qspec_jax.weights.source import TensorEntry
from qspec_jax.weights.tokenizers import load_tokenizer
from tests import tiny
from tests.commands.test_quantize import run, write_gguf
from tests.tiny import dequantize
from tests.weights import tiny_checkpoints

TOKENS = np.random.default_rng(0).integers(0, 40, (4, 32)).astype(np.int32)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A Hugging Face directory of float weights with a tokenizer of one token per character."""
    config = tiny_checkpoints.hf_config()
    path = tmp_path_factory.mktemp("hf")
    load_tokenizer(write_gguf(tmp_path_factory.mktemp("gguf") / "model.gguf")).save(path)
    tensors = tiny_checkpoints.hf_tensors(config)
    scaled = {name: tensor / 8 if tensor.ndim == 2 else tensor for name, tensor in tensors.items()}
    return tiny_checkpoints.write_hf(path, config, scaled)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    characters = np.random.default_rng(1).integers(ord("A"), ord("A") + 40, 3000)
    path.write_text("".join(chr(character) for character in characters))
    return path


@pytest.fixture(scope="module")
def options(text):
    return ("--recipe", "gptq", "--calibration", text, "--calibration-tokens", 1024)


@pytest.fixture(scope="module")
def quantised(model, options, tmp_path_factory):
    """A checkpoint by the recipe, without interruption."""
    path = tmp_path_factory.mktemp("quantised") / "out"
    assert quantize.main([str(argument) for argument in (model, path, *options)]) == 0
    return path


def arrays_of(path):
    return {name: record.sha256 for name, record in open_checkpoint(path).manifest.arrays.items()}


def test_the_checkpoint_is_closer_to_the_float_model_than_by_rounding_to_nearest(model, quantised, text):
    tokens = token_windows(text, load_tokenizer(model), num_tokens=2048, context=256)[4:]  # the second half is unseen
    source = open_source(model)

    def rounded(index):
        layer = load_layer(source, index)
        for name in layer_anatomy(source.config).linears:
            weight = linear_of(layer, name).weight
            weight.set_value(dequantize(quantize_rtn(weight.get_value(), group_size=32)))
        return layer

    def last_stream(layers):
        streams = layerwise.embed(source, tokens)
        for layer in layers:
            streams = advance(layer, streams)
        return np.concatenate(streams)

    saved = open_source(quantised)
    exact = last_stream(load_layer(source, index) for index in range(2))
    error = np.square(last_stream(load_layer(saved, index) for index in range(2)) - exact).mean()
    assert error < 0.8 * np.square(last_stream(rounded(index) for index in range(2)) - exact).mean()


def test_rotation_and_gptq_together_are_closer_to_the_float_model_than_rotation_and_rounding(
    model, text, options, tmp_path
):
    tokens = token_windows(text, load_tokenizer(model), num_tokens=2048, context=256)[4:]

    def logits(path, **settings):
        decoder = qspec_jax.load(path, kernels="reference", dtype="float32", **settings).decoder
        precision = Precision.FLOAT if settings else Precision.W4A16
        return tiny.logits(decoder, tokens, precision, slots=256)

    exact, errors = logits(model, quantization=None), {}
    for recipe, arguments in (("quarot-gptq", options[2:]), ("quarot-rtn", ())):
        command = (model, tmp_path / recipe, "--recipe", recipe, *arguments)
        assert quantize.main([str(argument) for argument in command]) == 0
        errors[recipe] = np.square(logits(tmp_path / recipe) - exact).mean()
    assert errors["quarot-gptq"] < 0.8 * errors["quarot-rtn"]


def test_recipe_and_text_are_recorded_and_no_work_folder_is_left(quantised):
    assert open_checkpoint(quantised).manifest.recipe == {
        "name": "gptq",
        "group_size": 32,
        "symmetric": False,
        "dtype": "float32",
        "calibration": "text.txt",
        "calibration_tokens": 1024,
    }
    assert [path.name for path in quantised.parent.iterdir()] == [quantised.name]


def test_an_interrupted_run_goes_on_and_writes_the_same(capsys, tmp_path, model, options, quantised, monkeypatch):
    rounded = []

    def gptq(*arguments, **settings):
        if len(rounded) == 5:  # in the second of two layers
            rounded.append(None)
            raise KeyboardInterrupt
        rounded.append(None)
        return original(*arguments, **settings)

    original = layerwise.gptq
    monkeypatch.setattr(layerwise, "gptq", gptq)
    code, _, err = run(capsys, model, tmp_path / "out", *options)
    assert code == 130
    assert "the same command goes on with what is finished" in err
    (folder,) = tmp_path.iterdir()
    (folder / "layer-0001.unfinished").write_bytes(b"half a file")
    code, _, err = run(capsys, model, tmp_path / "out", *options)
    assert code == 0
    assert f"1 of 2 layers are finished already: {folder}" in err
    assert len(rounded) == 6 + 4
    assert arrays_of(tmp_path / "out") == arrays_of(quantised)
    assert not folder.exists()


def test_finished_layers_are_only_those_of_the_same_model_text_and_settings(model, tmp_path):
    source = open_source(model)
    keys = [
        fingerprint(source, TOKENS, {"group_size": 32}),
        fingerprint(source, TOKENS, {"group_size": 64}),
        fingerprint(source, TOKENS[::-1], {"group_size": 32}),
        fingerprint(source, TOKENS.reshape(8, 16), {"group_size": 32}),
        fingerprint(dataclasses.replace(source, path=tmp_path), TOKENS, {"group_size": 32}),
    ]
    assert len(set(keys)) == len(keys)
    assert fingerprint(open_source(model), TOKENS.copy(), {"group_size": 32}) == keys[0]
    hidden = model / ".cache" / "huggingface" / "model.lock"
    hidden.parent.mkdir(parents=True)
    hidden.touch()
    assert fingerprint(source, TOKENS, {"group_size": 32}) == keys[0]
    weights = model / "model.safetensors"
    before = weights.stat()
    os.utime(weights, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    assert fingerprint(source, TOKENS, {"group_size": 32}) != keys[0]
    os.utime(weights, ns=(before.st_atime_ns, before.st_mtime_ns))


def test_a_damaged_layer_is_named_with_what_to_do(tmp_path):
    work = WorkFolder(tmp_path / "out", "key")
    work.path.mkdir()
    (work.path / "layer-0000.npz").write_bytes(b"PK\x03\x04 no more")
    with pytest.raises(ValueError, match=r"layer-0000.npz is damaged .*; remove it and run the same command again"):
        work.read(0, "mlp.down", slice(None))


@pytest.mark.parametrize("there", [True, False])
def test_layers_lie_within_a_folder_beside_which_nobody_may_write(tmp_path, monkeypatch, there):
    output = tmp_path / "out"
    if there:
        output.mkdir()
    monkeypatch.setattr("os.access", lambda folder, mode: folder != tmp_path)  # whoever runs the tests
    work = WorkFolder(output, "key")
    assert work.path.parent == (output if there else tmp_path)
    work.path.mkdir()
    if there:
        check_destination(output, 0, overwrite=False)  # it is as good as empty
    remove_work_folders(output)
    assert not work.path.exists()


def test_second_moments_are_those_of_what_a_linear_reads():
    source = tiny.source(dataclasses.replace(tiny.decoder().config, num_layers=1))
    layer = load_layer(source, 0)
    stream = jnp.asarray(np.random.default_rng(0).standard_normal((2, 16, source.config.hidden_size)), jnp.float32)
    inputs = np.asarray(layer.attention_norm(stream), np.float64).reshape(32, -1)
    found = second_moments(layer, [stream[:1], stream[1:]], "attention.qkv")
    np.testing.assert_allclose(found, inputs.T @ inputs / 32, rtol=1e-4, atol=1e-5)


def on_tokens(tokens, tmp_path):
    """What runs a model on tokens: GPTQ, and what recipes that turn a model measure first."""
    calibration = layerwise.Calibration(tokens, WorkFolder(tmp_path / "out", "key"))
    return (
        lambda source: layerwise.quantize_layers(source, calibration, quantization=QuantConfig()),
        lambda source: moments.measure_moments(source, tokens, fold_gains=False),
        lambda source: moments.channel_maxima(source, tokens, "mlp.down"),
    )


def damaged(source, name):
    """The source with a value that is not finite in a tensor."""

    def read():
        raise ValueError("its values are not all finite; fetch the file again")

    return dataclasses.replace(source, entries={**source.entries, name: TensorEntry(source.specs[name].shape, read)})


def test_tokens_of_another_model_are_refused_by_all_that_runs_on_them(tmp_path):
    source = tiny.source(tiny.decoder().config)
    for run_on in on_tokens(TOKENS + 90, tmp_path):
        with pytest.raises(
            UsageError, match=r"token 129 is not among the 96 of the model; its tokenizer is of another"
        ):
            run_on(source)


def test_a_damaged_embedding_is_named_by_all_that_runs_on_it(tmp_path):
    source = damaged(tiny.source(tiny.decoder().config), "embedding.weight")
    for run_on in on_tokens(TOKENS, tmp_path):
        with pytest.raises(
            CheckpointError, match=r"cannot read tensor embedding.weight: its values are not all finite"
        ):
            run_on(source)


@pytest.mark.parametrize("name", ["final_norm.weight", "lm_head.weight"])
def test_what_is_read_last_is_looked_at_first(tmp_path, monkeypatch, name):
    monkeypatch.setattr(layerwise, "load_layer", lambda *_: pytest.fail("began to quantise"))
    quantise, *_ = on_tokens(TOKENS, tmp_path)
    with pytest.raises(CheckpointError, match=f"cannot read tensor {name}"):
        quantise(damaged(tiny.source(tiny.decoder().config), name))


def test_activations_that_are_not_finite_are_refused(tmp_path):
    source = tiny.source(tiny.decoder().config)
    name = "layers.0.attention_norm.weight"
    broken = TensorEntry(source.entries[name].shape, lambda: np.full(64, np.nan, np.float32))
    source = dataclasses.replace(source, entries={**source.entries, name: broken})
    calibration = layerwise.Calibration(TOKENS, WorkFolder(tmp_path / "out", "key"))
    with pytest.raises(CheckpointError, match=r"inputs of layer 0 attention.qkv are not finite"):
        layerwise.quantize_layers(source, calibration, quantization=QuantConfig())
    assert not list(tmp_path.iterdir())


def test_a_linear_that_is_too_large_to_be_rounded_is_named(tmp_path):
    source = tiny.source(dataclasses.replace(tiny.decoder().config, num_layers=1))
    name = "layers.0.attention.query.weight"
    large = 1e8 * source.entries[name].read()
    entry = TensorEntry(large.shape, lambda: large)
    source = dataclasses.replace(source, entries={**source.entries, name: entry})
    calibration = layerwise.Calibration(TOKENS, WorkFolder(tmp_path / "out", "key"))
    with pytest.raises(CheckpointError, match=r"^cannot round layer 0 attention.qkv: .*too large"):
        layerwise.quantize_layers(source, calibration, quantization=QuantConfig())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "recipe gptq runs the model on text, and none is given; use --calibration FILE"),
        (("--calibration", "absent.txt"), "cannot read the calibration text absent.txt"),
        (("--calibration-tokens", 0, "--calibration", "absent.txt"), "calibration_tokens=0 must be at least 1"),
        (("--recipe", "rtn", "--calibration", "absent.txt"), "recipe rtn reads no calibration text"),
    ],
)
def test_wrong_calibration_exits_with_2(capsys, tmp_path, model, arguments, message):
    code, out, err = run(capsys, model, tmp_path / "out", "--recipe", "gptq", *arguments)
    assert (code, out) == (2, "")
    assert message in err
    assert not list(tmp_path.iterdir())


def test_too_little_text_says_how_much_there_is(capsys, tmp_path, model, text):
    arguments = ("--recipe", "gptq", "--calibration", text, "--calibration-tokens", 4096)
    code, _, err = run(capsys, model, tmp_path / "out", *arguments)
    assert code == 2
    message = "has 3000 tokens, and 4096 are asked for; give more text, or --calibration-tokens 2816"
    assert f"error: calibration text {text} {message}" in err


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("A" * 200, "has 200 tokens, and 512 are asked for; give more text, or --calibration-tokens 200"),
        ("", "has no tokens, and 512 are asked for; give a text"),
    ],
)
def test_a_text_below_one_window_names_what_it_has(capsys, tmp_path, model, content, message):
    text = tmp_path / "text.txt"
    text.write_text(content)
    given = ("--recipe", "gptq", "--calibration", text, "--calibration-tokens")
    code, _, err = run(capsys, model, tmp_path / "out", *given, 512)
    assert code == 2
    assert message in err


@pytest.mark.parametrize("num_tokens", [63, 64])
def test_too_few_tokens_to_learn_from_are_said(monkeypatch, num_tokens):
    source, said = tiny.source(tiny.decoder().config), []
    monkeypatch.setattr(layerwise, "quantize_layers", lambda source, *_, **__: source)
    calibration = layerwise.Calibration(np.zeros((1, num_tokens), np.int32), WorkFolder(Path("absent"), "key"))
    assert GPTQ.apply(source, RecipeContext(RecipeOptions(), Progress(say=said.append), calibration)) is source
    expected = ["warning: 63 tokens say little of linears with 64 inputs and more"] if num_tokens == 63 else []
    assert [line.split(",")[0] for line in said if "warning" in line] == expected


def test_what_cannot_fit_is_refused_with_numbers(capsys, tmp_path, model, options, monkeypatch):
    needed = layerwise.calibration_bytes(open_source(model).config, (4, 256))
    monkeypatch.setattr(convert, "check_memory", lambda *_, **__: None)
    monkeypatch.setattr(memory, "available_bytes", lambda: needed - 1)
    monkeypatch.setattr(layerwise, "load_layer", lambda *_: pytest.fail("began to quantise"))
    code, _, err = run(capsys, model, tmp_path / "out", *options)
    assert code == 1
    assert f"about {size_text(needed)} of memory" in err
    assert "the largest layer and its Hessians, for calibrating" in err
    assert f"{size_text(needed - 1)} free" in err


def test_the_estimate_grows_with_what_is_held():
    config = tiny.decoder().config
    base = layerwise.calibration_bytes(config, (8, 32))
    wide = dataclasses.replace(config, intermediate_size=8 * config.intermediate_size)
    assert layerwise.calibration_bytes(wide, (8, 32)) >= base + 4 * 6 * (wide.intermediate_size // 2) ** 2
    assert layerwise.calibration_bytes(config, (16, 32)) == base + 4 * 2 * 8 * 32 * config.hidden_size


def test_jsonl_is_a_text_per_line(tmp_path, model):
    tokenizer = load_tokenizer(model)
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "ABCD"}\n\n{"text": "EFGH"}\n{"prompt": "IJKL"}\n')
    expected = [token for text in ("ABCD", "EFGH") for token in tokenizer.encode(text)]
    windows = token_windows(path, tokenizer, num_tokens=len(expected), context=len(expected) // 2)
    np.testing.assert_array_equal(windows, np.reshape(expected, (2, -1)))
    path.write_text('{"prompt": "A"}\n{"answer": "B"}\n')
    with pytest.raises(ValueError, match=r"prompts.jsonl:2 has no text; a line is"):
        token_windows(path, tokenizer, num_tokens=8)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('"text": "B"}', "2 is not JSON"),
        ('"B"', "2 is a text, not an object"),
        ('{"text": ' + "[" * 100_000, "2 nests lists and objects deeper"),
        ('{"text": "\\ud83d"}', "2 has half of a surrogate pair"),
    ],
    ids=["a lost brace", "a text", "deep", "half a surrogate"],
)
def test_a_line_of_jsonl_that_is_no_text_is_named(tmp_path, model, line, message):
    path = tmp_path / "prompts.JSONL"
    path.write_text(f'{{"prompt": "A"}}\n{line}\n')
    with pytest.raises(UsageError, match=f"prompts.JSONL:{message}"):
        token_windows(path, load_tokenizer(model), num_tokens=8)


def test_text_of_another_encoding_is_the_same_text(tmp_path, model):
    tokenizer, windows = load_tokenizer(model), []
    for encoding in ("utf-8", "utf-8-sig", "utf-16"):
        (tmp_path / "text.txt").write_text("ABCDEFGH", encoding=encoding)
        windows.append(token_windows(tmp_path / "text.txt", tokenizer, num_tokens=4).tolist())
    assert windows[0] == windows[1] == windows[2]


def test_a_recipe_file_gives_the_text_beside_it(tmp_path):
    path = tmp_path / "recipe.toml"
    path.write_text('recipe = "gptq"\ncalibration = "text.txt"\ncalibration_tokens = 512\n')
    recipe, options = recipe_files.read_recipe(str(path))
    assert (recipe.name, options.calibration, options.calibration_tokens) == ("gptq", tmp_path / "text.txt", 512)


def test_where_there_is_no_terminal_lines_say_how_long_it_takes(capsys, monkeypatch):
    clock = iter([0.0, 0.0, 40.0, 50.0, 100.0])
    monkeypatch.setattr(quantize.time, "monotonic", functools.partial(next, clock))
    assert list(quantize._lines(["a", "b", "c", "d"], "calibrating")) == ["a", "b", "c", "d"]
    assert capsys.readouterr().err.splitlines() == [
        "calibrating ...",
        "calibrating: 1 of 4, 2 min left",
        "calibrating: 3 of 4, 33 s left",
    ]
