"""Rotations and orders of channels from calibration text: the same function, with its loud channels in few groups."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from qspec_jax import ActivationQuantization, QuantConfig, quantize
from qspec_jax.device import memory
from qspec_jax.errors import OutOfMemoryError, UsageError
from qspec_jax.model.precision import Precision
from qspec_jax.quantization.principal import principal_config, principal_rotation, salience_order
from qspec_jax.recipes.moments import measure_moments
from qspec_jax.recipes.rotated import rotate_source
from qspec_jax.weights.checkpoint.restore import open_checkpoint
from qspec_jax.weights.source import TensorEntry
from tests import tiny
from tests.quantization.test_rotation import decoder_of, logits_of, tiny_config, with_outliers
from tests.recipes.test_layerwise import model, options, text  # noqa: F401 - fixtures

TOKENS = np.random.default_rng(1).integers(0, 96, (4, 64)).astype(np.int32)


def turned(source, make):
    moments = measure_moments(source, TOKENS, fold_gains=make is principal_rotation)
    return rotate_source(source, make(moments))


@pytest.mark.parametrize("make", [principal_rotation, salience_order])
@pytest.mark.parametrize("family", ["llama_with_biases", "smollm2_tied"])
def test_float_logits_are_the_same_before_and_after(family, make):
    source = tiny.source(tiny_config(family, intermediate_size=144))
    after = turned(source, make)
    np.testing.assert_allclose(logits_of(decoder_of(after)), logits_of(decoder_of(source)), atol=2e-4)
    for name in ("embedding.weight", "layers.1.attention.value.weight", "layers.1.mlp.down.weight"):
        assert np.abs(after.entries[name].read() - source.entries[name].read()).max() > 0.1, name


@pytest.mark.parametrize("make", [principal_rotation, salience_order])
def test_groups_hold_less_and_less(make):
    after = turned(with_outliers(tiny.source(tiny_config("smollm2_tied", hidden_size=96))), make)
    moments = measure_moments(after, TOKENS, fold_gains=False)
    stream = np.diag(moments.stream).reshape(-1, 32).sum(1)
    assert (np.diff(stream) < 0).all()
    assert stream[0] > 0.5 * stream.sum()
    # The transform in the model mixes what the order has sorted: the energy of a whole group stays.
    assert all((np.diff(mlp.reshape(-1, 32).sum(1)) < 0).all() for mlp in moments.mlp)


def test_an_order_of_channels_moves_numbers_and_changes_none():
    source = tiny.source(tiny_config("smollm2_tied"))
    after = turned(source, salience_order)
    assert after.config == source.config
    for name, entry in source.entries.items():
        np.testing.assert_array_equal(np.sort(after.entries[name].read(), None), np.sort(entry.read(), None), name)


def test_drafts_with_one_group_in_8_bits_are_nearer_on_principal_axes_than_on_random_ones():
    source = with_low_rank_stream(tiny.source(tiny_config(hidden_size=128)))
    draft = QuantConfig(w4a4=ActivationQuantization(group_size=32, symmetric=False, outlier_groups=1))
    errors = []
    for each in (rotate_source(source), turned(source, principal_rotation)):
        decoder = decoder_of(each, draft)
        exact, found = (logits_of(decoder, precision) for precision in (Precision.W4A16, Precision.W4A4))
        errors.append(np.square(found - exact).mean())
    assert errors[1] < 0.7 * errors[0]


def with_low_rank_stream(source):
    """The source with an embedding that is loud on 16 axes, none of them a channel."""
    embedding = source.entries["embedding.weight"].read()
    axes = np.linalg.qr(np.random.default_rng(5).standard_normal((embedding.shape[1], 16)))[0].astype(np.float32)
    louder = embedding + 8 * (embedding @ axes) @ axes.T
    entry = TensorEntry(louder.shape, lambda: louder)
    return dataclasses.replace(source, entries={**source.entries, "embedding.weight": entry})


@pytest.mark.parametrize("make", [principal_rotation, salience_order])
def test_a_rotated_model_is_refused(make):
    rotated = rotate_source(tiny.source(tiny_config()))
    with pytest.raises(UsageError, match="rotated already"):
        turned(rotated, make)
    with pytest.raises(UsageError, match="rotated already"):
        principal_config(rotated.config)


def test_what_cannot_be_measured_in_memory_is_refused_with_numbers(monkeypatch):
    monkeypatch.setattr(memory, "available_bytes", lambda: 10**6)
    with pytest.raises(OutOfMemoryError, match=r"measuring tiny on 256 tokens, need \d+ MB and .* has 1\.00 MB free"):
        turned(tiny.source(tiny_config()), principal_rotation)


@pytest.mark.parametrize(("recipe", "block"), [("atom", None), ("resq", 32)])
def test_the_recipes_write_what_they_turned(model, options, tmp_path, recipe, block):  # noqa: F811
    command = (model, tmp_path / "out", *options[2:], "--recipe", recipe, "--outlier-groups", 2)
    assert quantize.main([str(argument) for argument in command]) == 0
    manifest = open_checkpoint(tmp_path / "out").manifest
    assert (manifest.model.hadamard_block, manifest.model.down_hadamard) == (block, block is not None)
    assert manifest.quantization.w4a4.outlier_groups == 2
    assert manifest.quantization.w4a8.group_size == block  # the drafts that the recipe asks for
    assert manifest.recipe["name"] == recipe
