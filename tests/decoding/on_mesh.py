"""Models on meshes of eight devices, for ``on_eight_devices_*.py``."""

from __future__ import annotations

import dataclasses
import functools

import jax.numpy as jnp
from tokenizers import Tokenizer as Words
from tokenizers import models, pre_tokenizers

from qspec_jax.decoding.sampling_params import SamplingParams
from qspec_jax.device.mesh import make_mesh
from qspec_jax.engine.language_model import LanguageModel
from qspec_jax.model.config import ModelConfig, QuantConfig
from qspec_jax.model.shards import Shards
from qspec_jax.tokenizer.backend import PlainBackend
from qspec_jax.tokenizer.tokenizer import Tokenizer
from qspec_jax.weights.fill import load_decoder, weight_formats
from qspec_jax.weights.placing import MeshPlacing, Placing
from tests import tiny

# What eight devices can share: two heads of keys and values are on several of them.
SHAPE = {"num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 32, "intermediate_size": 256}
FAMILIES = tiny.FAMILIES | {
    "window_and_biases": tiny.FAMILIES["mistral_sliding_window"] | tiny.FAMILIES["llama_with_biases"],
}
PROMPTS = [
    [5, 6, 7],
    list(range(10, 25)),
    [90],
    [11, 12, 13, 14, 15, 16, 17],
    [3] * 30,
    list(range(31)),
    [8, 9],
    [2, 50],
]
# Greedy ones beside others: rows of a program with a sampler.
SAMPLED = [
    SamplingParams(temperature=0.9 * (index % 3), top_p=0.9, seed=index, repetition_penalty=1 + index % 2 / 5)
    for index in range(len(PROMPTS))
]


@functools.cache
def model(
    family="llama2",
    mesh=None,
    *,
    scan_layers=True,
    dtype="float32",
    with_text=False,
    kv="model",
    quantization=QuantConfig(),  # noqa: B008 - frozen
):
    """A tiny model of a family, on one device or a mesh."""
    config = ModelConfig.from_hf({**tiny.BASE_HF_CONFIG, **FAMILIES[family], **SHAPE})
    source = tiny.source(dataclasses.replace(config, eos_token_ids=()))
    formats, on = weight_formats(source, quantization), make_mesh(mesh)
    options = {"quantization": quantization, "formats": formats, "kernels": "reference"}
    options |= {"dtype": jnp.dtype(dtype), "scan_layers": scan_layers}
    placing = Placing() if on is None else MeshPlacing(Shards.of(source.config, on, **options))
    with tiny.compiled_quickly():
        decoder = load_decoder(source, placing=placing, **options)
    decoder.kv = kv
    options = {"quantization": quantization, "kernels": "reference", "name": "tiny", "mesh": on}
    return LanguageModel(decoder, _characters() if with_text else None, **options)


def _characters():
    """Every token is a character."""
    words = Words(models.WordLevel({chr(256 + index): index for index in range(96)}, unk_token=chr(256)))
    words.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return Tokenizer(PlainBackend(words))


def tokens(results):
    return [result.token_ids for result in results]
