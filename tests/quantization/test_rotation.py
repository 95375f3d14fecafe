"""A rotated model is the same function: in floating point to rounding, in few bits with smaller errors."""

from __future__ import annotations

import collections
import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels
from qspec_jax.errors import UsageError
from qspec_jax.model.config import ModelConfig, QuantConfig
from qspec_jax.model.layouts import add_group_sums
from qspec_jax.model.precision import Precision
from qspec_jax.quantization.rotation import random_orthogonal, random_rotation, rotated_config
from qspec_jax.recipes.rotated import rotate_source
from qspec_jax.weights.fill import load_decoder, weight_formats
from qspec_jax.weights.source import TensorEntry
from tests import tiny

TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 96, (2, 12)), jnp.int32)
# Cores of 36, 84 and 12; and a hidden size and heads without a Hadamard matrix.
ODD_SIZES = {"hidden_size": 144, "intermediate_size": 336, "head_dim": 24}
NO_MATRIX = {"hidden_size": 92, "intermediate_size": 96, "head_dim": 46}


def tiny_config(family="llama2", **changes):
    return ModelConfig.from_hf({**tiny.hf_config(family), **changes})


def decoder_of(source, quantization=None, *, scan_layers=True):
    made = load_decoder(
        source,
        quantization=quantization,
        formats=weight_formats(source, quantization),
        dtype=jnp.float32,
        kernels="reference",
        scan_layers=scan_layers,
    )
    add_group_sums(made)
    return made


def logits_of(decoder, precision=Precision.FLOAT):
    # One program is compiled sooner than its operations one by one.
    run = jax.jit(lambda tokens, cache: decoder(tokens, cache, precision=precision)[0])
    return np.asarray(run(TOKENS, decoder.create_cache(batch=2, capacity=16)))


_unused_slots = itertools.count(1000)


def trace(decoder, precision):
    """Runs the decoder's Python alone, for a cache as long as no other: nothing is found that was traced before."""
    slots = next(_unused_slots)
    jax.eval_shape(lambda: decoder(TOKENS, decoder.create_cache(batch=2, capacity=slots), precision=precision)[0])


def with_outliers(source):
    """The source with four loud channels in the residual stream, as trained models have them."""
    embedding = source.entries["embedding.weight"].read()
    embedding[:, [3, 17, 40, 55]] *= 30
    return dataclasses.replace(
        source,
        entries={**source.entries, "embedding.weight": TensorEntry(embedding.shape, lambda: embedding)},
    )


@pytest.mark.parametrize(
    ("family", "sizes"),
    [
        ("llama_with_biases", ODD_SIZES),
        ("smollm2_tied", NO_MATRIX),
        ("qwen2_qkv_bias", ODD_SIZES),
        ("qwen3_qk_norm", ODD_SIZES),
    ],
    ids=["llama_with_biases", "tied", "qwen2", "qwen3"],
)
def test_float_logits_are_the_same_before_and_after(family, sizes):
    source = tiny.source(tiny_config(family, **sizes))
    rotated = rotate_source(source)
    before, after = (logits_of(decoder_of(each)) for each in (source, rotated))
    np.testing.assert_allclose(after, before, atol=2e-4)
    assert not rotated.config.tie_word_embeddings
    for name in ("embedding.weight", "layers.1.attention.value.weight", "layers.1.mlp.down.weight"):
        assert np.abs(rotated.entries[name].read() - source.entries[name].read()).max() > 0.1, name
    for name in ("layers.0.attention_norm.weight", "layers.1.mlp_norm.weight", "final_norm.weight"):
        np.testing.assert_array_equal(rotated.entries[name].read(), np.ones(source.config.hidden_size))


@pytest.mark.parametrize("size", [16, 24, 46, 576])
def test_rotations_are_orthogonal_and_follow_the_seed(size):
    def matrix(seed):
        return random_orthogonal(size, np.random.default_rng(seed))(np.eye(size, dtype=np.float32)).T

    first = matrix(0)
    np.testing.assert_allclose(first @ first.T, np.eye(size), atol=1e-5)
    np.testing.assert_array_equal(first, matrix(0))
    assert np.abs(first - matrix(1)).max() > 1 / size


@pytest.fixture(scope="module")
def quantized():
    """A rotated model in 4 bits, by whether its layers are scanned."""
    source = rotate_source(tiny.source(tiny_config()))
    return {scan_layers: decoder_of(source, QuantConfig(), scan_layers=scan_layers) for scan_layers in (True, False)}


@pytest.mark.parametrize(
    ("precision", "bound"), [(Precision.W4A4, 0.3), (Precision.W4A8, 0.03), (Precision.W4A16, 1e-5)]
)
def test_every_precision_computes_what_the_rotated_weights_expect(quantized, precision, bound):
    """Without the transform before ``down``, or with it at one precision alone, nothing would be near."""
    exact = logits_of(quantized[True])
    for decoder in quantized.values():
        found = logits_of(decoder, precision)
        assert np.linalg.norm(found - exact) / np.linalg.norm(exact) < bound


@pytest.mark.parametrize(
    ("precision", "operation"),
    [(Precision.W4A8, "swiglu_hadamard_quantize"), (Precision.W4A16, "swiglu_hadamard")],
    ids=["draft", "verify"],
)
def test_the_transform_runs_once_a_layer_at_every_precision(monkeypatch, quantized, precision, operation):
    calls = collections.Counter()

    def count(operation, *arguments, **settings):
        calls[operation.__name__, settings["implementation"]] += 1
        return operation(*arguments, **settings)

    for name in ("swiglu_hadamard", "swiglu_hadamard_quantize", "hadamard"):
        monkeypatch.setattr(pallas_kernels, name, functools.partial(count, getattr(pallas_kernels, name)))
    trace(tiny.decoder(), Precision.FLOAT)
    assert not calls
    trace(quantized[False], precision)
    assert calls == {(operation, "reference"): 2}


def test_loud_channels_cost_less_after_the_rotation():
    source = with_outliers(tiny.source(tiny_config()))
    errors = []
    for each in (source, rotate_source(source)):
        decoder = decoder_of(each, QuantConfig())
        errors.append(np.square(logits_of(decoder, Precision.W4A8) - logits_of(decoder, Precision.W4A16)).mean())
    assert errors[1] < errors[0] / 4


def test_a_model_is_rotated_once():
    rotated = rotate_source(tiny.source(tiny_config()))
    with pytest.raises(UsageError, match="rotated already; use a recipe that does not rotate"):
        rotate_source(rotated)


def test_an_mlp_without_a_hadamard_matrix_is_refused_by_its_size():
    config = tiny_config(intermediate_size=46)
    with pytest.raises(UsageError, match=r"intermediate_size=46\): hadamard: no Hadamard matrix for K=46 .* use 368"):
        rotated_config(config)
    assert random_rotation(config).stream.signs.shape == (64,)
