"""An LM head in codes by the recipe ``gptq``: rounded against what it reads, behind the layers."""

from __future__ import annotations

import collections
import dataclasses
import shutil

import jax.numpy as jnp
import numpy as np
import pytest

import qspec_jax
from pallas_kernels import upper_nibbles
from qspec_jax import QuantConfig, quantize
from qspec_jax.device.sizes import size_text
from qspec_jax.errors import CheckpointError
from qspec_jax.model.parameters import head_name
from qspec_jax.quantization.rtn import quantize_rtn
from qspec_jax.recipes import convert, layerwise
from qspec_jax.recipes.catalogue import RECIPES
from qspec_jax.recipes.observe import advance, moments_of_norms
from qspec_jax.recipes.steps import RecipeOptions
from qspec_jax.recipes.work_folder import WorkFolder, kept_bytes
from qspec_jax.weights.codes import packed
from qspec_jax.weights.fill import load_layer
from qspec_jax.weights.resolve import open_source
from qspec_jax.weights.source import TensorEntry
from tests import tiny
from tests.recipes.test_layerwise import model, text  # noqa: F401  (fixtures)
from tests.tiny import dequantize

WINDOWS = np.random.default_rng(0).integers(0, 40, (32, 32)).astype(np.int32)
TOKENS, UNSEEN = np.split(WINDOWS, 2)
HEADS = {
    "4 bits": QuantConfig(group_size=32, head_bits=4),
    "4 bits, of drafts": QuantConfig(group_size=32, draft_head=4),
    "8 bits": QuantConfig(group_size=32, head_bits=8, draft_head=4),
}


def source_of(*, tied, **changes):
    """A layer whose norms are louder in some channels than in others, as those of real models are."""
    changes = {"num_layers": 1, **changes}
    config = dataclasses.replace(tiny.decoder().config, tie_word_embeddings=tied, **changes)
    source = tiny.source(config)
    gain = np.random.default_rng(1).lognormal(0.0, 1.0, config.hidden_size).astype(np.float32)
    return with_tensor(source, "final_norm.weight", gain)


def with_tensor(source, name, value):
    entry = TensorEntry(value.shape, lambda: value)
    return dataclasses.replace(source, entries={**source.entries, name: entry})


def rounded(source, quantization, tmp_path, tokens=TOKENS):
    calibration = layerwise.Calibration(tokens, WorkFolder(tmp_path / "out", "key"))
    return layerwise.quantize_layers(source, calibration, quantization=quantization)


def last_norms(source, tokens):
    streams = layerwise.embed(source, tokens)
    for index in range(source.config.num_layers):
        streams = advance(load_layer(source, index), streams)
    x = np.concatenate(streams).reshape(-1, source.config.hidden_size)
    mean = np.square(x).mean(axis=1, keepdims=True)
    return x / np.sqrt(mean + source.config.rms_norm_eps) * source.read("final_norm.weight")


@pytest.mark.parametrize("tied", [False, True], ids=["of its own", "tied"])
@pytest.mark.parametrize("kind", HEADS)
def test_logits_are_closer_than_by_rounding_to_nearest(kind, tied, tmp_path):
    """On text that was not seen, and whatever reads the head: all of it, or its upper half."""
    quantization, source = HEADS[kind], source_of(tied=tied)
    found = rounded(source, quantization, tmp_path)
    name, norms = head_name(source.config), last_norms(found, UNSEEN)
    floats = source.read(name)
    np.testing.assert_array_equal(found.read(name), floats, err_msg="an embedding stays as it is")
    entry = found.entries[name]
    bits = quantization.head_bits or 4
    assert (entry.head_codes.bits, entry.head_codes.group_size, entry.head_codes.symmetric) == (bits, 64, True)
    head = packed(entry.read_head())
    nearest = quantize_rtn(jnp.asarray(floats), group_size=64, symmetric=True, bits=bits)

    def error(codes):
        return np.square(norms @ (np.asarray(dequantize(codes)) - floats).T).mean()

    assert error(upper_nibbles(head)) < (0.8 if bits == 4 else 0.92) * error(upper_nibbles(nearest))
    if bits == 8:
        assert error(head) < error(upper_nibbles(head)) / 50


def test_moments_are_those_of_what_the_head_reads():
    rng = np.random.default_rng(0)
    streams = [rng.standard_normal((2, 8, 64)).astype(np.float32) for _ in range(2)]
    gain = rng.standard_normal(64).astype(np.float32)
    x = np.concatenate(streams).reshape(-1, 64).astype(np.float64)
    norms = x / np.sqrt(np.square(x).mean(axis=1, keepdims=True) + 1e-5) * gain
    found = moments_of_norms([jnp.asarray(one) for one in streams], jnp.asarray(gain), epsilon=1e-5)
    np.testing.assert_allclose(found, norms.T @ norms / len(norms), rtol=1e-4, atol=1e-4)


def test_outputs_are_rounded_some_at_a_time_and_alike(tmp_path, monkeypatch):
    """As many as take the memory of the largest linear; a vocabulary may have any number."""
    source, calls = source_of(tied=False, vocab_size=1001), []

    def gptq(weight, hessian, **options):
        calls.append((weight, hessian, options))
        return original(weight, hessian, **options)

    original = layerwise.gptq
    monkeypatch.setattr(layerwise, "gptq", gptq)
    found = rounded(source, HEADS["4 bits"], tmp_path)
    *linears, first = (weight.size for weight, *_ in calls[:5])
    pieces = calls[4:]
    assert len(pieces) > 1
    assert first <= max(linears)
    assert sum(len(weight) for weight, *_ in pieces) == 1001
    _, hessian, options = pieces[0]
    whole = original(jnp.asarray(source.read("lm_head.weight")), hessian, **options)
    head = packed(found.entries["lm_head.weight"].read_head())
    np.testing.assert_array_equal(dequantize(head), dequantize(whole))


def test_a_run_goes_on_with_the_head_and_does_not_round_it_twice(tmp_path, monkeypatch):
    source, quantization = source_of(tied=False), HEADS["4 bits"]

    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(layerwise, "_quantize_head", interrupted)
        with pytest.raises(KeyboardInterrupt):
            rounded(source, quantization, tmp_path)
    work = WorkFolder(tmp_path / "out", "key")
    assert work.num_finished() == source.config.num_layers
    assert not work.has("head")
    with monkeypatch.context() as patched:
        patched.setattr(layerwise, "_quantize_layer", lambda *_: pytest.fail("these are finished"))
        codes = rounded(source, quantization, tmp_path).entries["lm_head.weight"].read_head().codes
    assert work.has("head")
    assert work.num_finished() == source.config.num_layers
    estimate = convert._estimate(source, RECIPES["gptq"], RecipeOptions(quantization)).kept
    assert estimate < kept_bytes(tmp_path / "out") < estimate + 2 * 4 * 3 * 512, "what files have besides arrays"
    monkeypatch.setattr(layerwise, "_quantize_head", lambda *_: pytest.fail("it is finished"))
    again = rounded(source, quantization, tmp_path).entries["lm_head.weight"].read_head().codes
    np.testing.assert_array_equal(again, codes)


def test_a_head_that_has_its_codes_keeps_them(tmp_path):
    source = source_of(tied=False)
    name, head = head_name(source.config), layerwise.head_to_round(source, HEADS["8 bits"])
    entry = dataclasses.replace(source.entries[name], read_head=lambda: pytest.fail("read"), head_codes=head)
    source = dataclasses.replace(source, entries={**source.entries, name: entry})
    assert layerwise.head_to_round(source, HEADS["8 bits"]) is None
    assert rounded(source, HEADS["8 bits"], tmp_path).entries[name] is entry
    assert layerwise.head_to_round(source, HEADS["4 bits"]).bits == 4  # of other bits
    assert layerwise.head_to_round(source, QuantConfig()) is None


def test_what_the_head_reads_must_be_finite(tmp_path):
    source = source_of(tied=False)
    source = with_tensor(source, "final_norm.weight", np.full(64, 1e30, np.float32))
    with pytest.raises(CheckpointError, match="inputs of the LM head are not finite on the calibration text"):
        rounded(source, HEADS["4 bits"], tmp_path)


def test_a_head_that_is_too_large_to_be_rounded_is_named(tmp_path):
    source = source_of(tied=False)
    source = with_tensor(source, "lm_head.weight", 1e8 * source.read("lm_head.weight"))
    with pytest.raises(CheckpointError, match=r"^cannot round the LM head: .*too large"):
        rounded(source, HEADS["4 bits"], tmp_path)


def test_the_estimate_knows_the_head():
    config = dataclasses.replace(tiny.decoder().config, vocab_size=100_000)
    without, needed = (layerwise.calibration_bytes(config, (8, 32), with_head=head) for head in (False, True))
    floats = 4 * config.vocab_size * config.hidden_size
    assert without + 4 * 6 * config.hidden_size**2 < needed < without + floats


def test_the_disk_holds_finished_parts_and_the_checkpoint(model, text, tmp_path, capsys, monkeypatch):  # noqa: F811
    """Until that is complete, which is said before any work; what an earlier run has left there counts."""
    usage, free = collections.namedtuple("usage", "total used free"), []
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10, 9, free[0]))
    monkeypatch.setattr(convert, "open_calibration", lambda *_, **__: pytest.fail("began to work"))
    options = RecipeOptions(QuantConfig(draft_head=4), calibration=text)
    needed = convert._estimate(open_source(model), RECIPES["gptq"], options)
    assert convert._estimate(open_source(model), RECIPES["rtn"], options).kept == 0
    given = ("--recipe", "gptq", "--calibration", text, "--draft-head", 4)
    command = [str(one) for one in (model, tmp_path / "out", *given)]
    free.append(needed.finished + needed.kept + (1 << 20) - 1)
    assert quantize.main(command) == 1
    assert f"needs up to {size_text(free[0] + 1)} and" in capsys.readouterr().err
    left = WorkFolder(tmp_path / "out", "key")
    left.path.mkdir()
    (left.path / "layer-0000.npz").write_bytes(b"1")
    with pytest.raises(BaseException, match="began to work"):
        quantize.main(command)


@pytest.mark.parametrize("beside_floats", [False, True])
def test_drafts_of_exact_mode_read_the_head_that_was_calibrated(model, text, beside_floats, tmp_path):  # noqa: F811
    """From a checkpoint that has the floats, or beside a model's own floats (``--draft-model``)."""
    out = tmp_path / "out"
    options = ["--recipe", "gptq", "--calibration", text, "--calibration-tokens", 1024, "--draft-head", 4]
    options += ["--keep-floats"] if beside_floats else []
    assert quantize.main([str(argument) for argument in (model, out, *options)]) == 0
    given = {"dtype": "float32", "kernels": "reference", "verify": "float"}
    loaded = qspec_jax.load(out, **given) if beside_floats else qspec_jax.load(model, draft_model=out, **given)
    nearest = qspec_jax.load(model, quantization=QuantConfig(group_size=32, draft_head=4), **given)
    head, rounded_head = (one.decoder.quantized_head.get_value() for one in (loaded, nearest))
    stored = packed(open_source(out).entries[head_name(loaded.decoder.config)].read_head())
    np.testing.assert_array_equal(dequantize(head), dequantize(stored))
    assert not np.array_equal(dequantize(head), dequantize(rounded_head))
