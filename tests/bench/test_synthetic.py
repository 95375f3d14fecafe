"""Synthetic models: arranged as loaded ones, with weights that are no weights of zeros."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from pallas_kernels import QuantizedWeight, dequantize, unpack_codes
from qspec_jax.bench.presets import PRESETS
from qspec_jax.bench.synthetic import synthetic_model
from qspec_jax.errors import OutOfMemoryError
from qspec_jax.model.config import ModelConfig, QuantConfig
from qspec_jax.model.decoder import abstract_decoder
from qspec_jax.model.precision import Precision
from tests import tiny

CONFIGS = {
    "tied": ModelConfig.from_hf({**tiny.hf_config("smollm2_tied"), "hidden_size": 128, "intermediate_size": 256}),
    "biases and query norms": dataclasses.replace(
        ModelConfig.from_hf(tiny.hf_config("llama_with_biases")), qk_norm=True
    ),
}
CASES = {
    "4-bit": ("tied", QuantConfig(64)),
    "floats": ("biases and query norms", None),
}


@functools.cache
def made(case):
    name, quantization = CASES[case]
    return synthetic_model(CONFIGS[name], quantization=quantization, dtype="bfloat16")


def leaves(decoder):
    return jax.tree.leaves_with_path(nnx.state(decoder))


def linears(decoder):
    found = jax.tree.leaves(nnx.state(decoder), is_leaf=lambda leaf: isinstance(leaf, QuantizedWeight))
    return [leaf for leaf in found if isinstance(leaf, QuantizedWeight)]


@pytest.mark.parametrize("case", CASES)
def test_every_array_is_as_declared_and_the_logits_are_finite(case):
    model, (name, quantization) = made(case), CASES[case]
    arrangement = {"dtype": jnp.bfloat16, "scan_layers": model.decoder.scan_layers}
    declared = abstract_decoder(CONFIGS[name], quantization=quantization, formats=None, **arrangement)
    assert [(path, a.shape, a.dtype) for path, a in leaves(model.decoder)] == [
        (path, a.shape, a.dtype) for path, a in leaves(declared)
    ]
    precision = Precision.FLOAT if quantization is None else Precision.W4A16
    cache = model.decoder.create_cache(batch=2, capacity=8)
    tokens = jnp.array([[1, 2, 3], [4, 5, 6]], jnp.int32)
    logits, _ = jax.jit(lambda tokens, cache: model.decoder(tokens, cache, precision=precision))(tokens, cache)
    assert np.isfinite(logits).all()
    assert 0.1 < float(logits.std()) < 10


def test_weights_use_all_codes_are_of_one_over_root_k_and_differ():
    weights = linears(made("4-bit").decoder)
    assert len(weights) == 4
    for weight in weights:
        assert set(np.unique(unpack_codes(weight.packed))) == set(range(16))
        assert float(dequantize(weight).std()) * weight.num_inputs**0.5 == pytest.approx(1.2, rel=0.1)
        assert not np.array_equal(weight.packed[0], weight.packed[1])
    assert not np.array_equal(weights[0].packed[0, :64, :64], weights[1].packed[0, :64, :64])


def test_a_shape_that_does_not_fit_is_refused_before_it_is_made(monkeypatch):
    monkeypatch.setattr("qspec_jax.device.memory.available_bytes", lambda: 10**9)
    with pytest.raises(OutOfMemoryError, match=r"the weights of llama need \d+\.\d+ GB"):
        synthetic_model(PRESETS["llama-3-8b"], quantization=QuantConfig(128, symmetric=True), name="llama")
