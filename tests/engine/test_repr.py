"""What a notebook shows of the objects of this library is a short line each, without the values of arrays."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import PartialSums, QuantizedActivation
from qspec_jax.decoding.sampling_params import SamplingParams
from qspec_jax.decoding.state import DecodeState
from qspec_jax.device.sizes import size_text
from qspec_jax.engine.language_model import LanguageModel
from qspec_jax.engine.requests import Request
from qspec_jax.engine.results import GenerationResult, GenerationStats, RunTotals
from qspec_jax.model.config import ModelConfig, QuantConfig
from qspec_jax.model.decoder import abstract_decoder, num_bytes
from tests import tiny

CONFIG = ModelConfig.from_hf(tiny.BASE_HF_CONFIG)
STATS = GenerationStats("qspec", "w4a8", 3, (1, 0, 1, 2), 13, 12, 0.1, 0.5, 0.0, "cpu", "reference")


@pytest.fixture(scope="module")
def shell():
    """A model of shapes, which has no value to show."""
    decoder = abstract_decoder(CONFIG, quantization=QuantConfig(), formats=None, scan_layers=False)
    return LanguageModel(decoder, None, quantization=QuantConfig(), kernels="reference", name="tiny")


def test_of_a_model_its_parts_and_its_batch(shell):
    decoder = "Decoder(2 layers, hidden 64, MLP 128, 96 tokens, float32)"
    assert repr(shell.decoder) == decoder
    size = size_text(num_bytes(shell.decoder))
    assert repr(shell) == f"LanguageModel(tiny: {decoder}, {size} of 4-bit weights, reference kernels)"
    weight = "QuantizedWeight(packed=uint8[128,32], scale=float16[2,128], offset=float16[2,128], layout=<Layout"
    assert repr(shell.decoder.layers[0].attention.qkv).startswith(f"Linear({weight}")
    batch = shell.pipeline(batch_size=2, max_seq_len=64)
    assert repr(batch) == "Pipeline(2 rows of 64 positions, 0 results to take, RunTotals(2 rows, 0 requests, 0 tokens))"


def test_of_a_cache_and_what_is_decoded(shell):
    layer = "LayerCache(keys=float32[2,64,32], values=float32[2,64,32])"
    cache = f"KVCache(2 layers of {layer}, lengths=int32[2])"
    made = jax.eval_shape(lambda: shell.decoder.create_cache(batch=2, capacity=64))
    assert repr(made) == cache
    assert repr(DecodeState.idle(made)).startswith(
        f"DecodeState(cache={cache}, last_token=int32[2], tokens=int32[2,64]"
    )


def test_of_results_and_requests():
    result = GenerationResult("p", [1] * 99, "a text " * 99, [2] * 13, "stop", STATS)
    assert repr(result) == f"GenerationResult('{('a text ' * 9)[:57]}...', 13 tokens, stop)"
    failed = GenerationResult("p", [], "", [], "error", STATS, error="too long")
    assert repr(failed) == "GenerationResult('', 0 tokens, error: too long)"
    figures = "qspec, w4a8 drafts of 3, 13 tokens, 24.00 tokens/s, 0.67 acceptance, cpu, reference kernels"
    assert repr(STATS) == f"GenerationStats({figures})"
    assert repr(RunTotals(4, tokens=9, decode_s=3.0)) == "RunTotals(4 rows, 0 requests, 9 tokens, 3.00 tokens/s)"
    assert repr(Request([1] * 500, 7, SamplingParams())).startswith("Request(500 tokens, 7 new ones at most, SamplingP")


def test_of_arrays_that_have_no_values_yet():
    seen = []

    def trace(x):
        seen.extend([PartialSums(x, jnp.dtype(jnp.bfloat16)), QuantizedActivation(x, x, None, bits=8)])
        return x

    jax.eval_shape(trace, jax.ShapeDtypeStruct((2, 3), jnp.float32))
    assert repr(seen[0]) == "PartialSums(parts=float32[2,3], dtype=dtype(bfloat16))"
    assert repr(seen[1]).startswith("QuantizedActivation(codes=float32[2,3], scale=float32[2,3], bits=8, layout=<")
    assert "object at" in repr(QuantizedActivation(object(), 1, None, bits=8))
