"""Models, prompts and outputs of the tests that compare what ways to decode yield. Imports ask for no device."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import numpy as np

from qspec_jax.bench.presets import PRESETS
from qspec_jax.bench.synthetic import synthetic_model
from qspec_jax.model.config import QuantConfig
from tests.golden import make_demo

DTYPE = "bfloat16"
INT8 = {"kv": "int8"}
HOPPER = {"group_size": 128, "symmetric": True}  # which its kernels of large weights read


class Prompts(NamedTuple):
    """What is read and generated: texts or token ids, up to how many new tokens each, and how these are chosen."""

    prompts: list
    new_tokens: int
    capacity: int
    sampling: dict


def few_layers(quantization=None, **options):
    """Noise, but of the shapes that kernels of large weights are for."""
    config = dataclasses.replace(PRESETS["llama-3-8b"], num_layers=4)
    return synthetic_model(config, quantization=quantization or QuantConfig(**HOPPER), dtype=DTYPE, **options)


def texts(count):
    """Of the demo model: short prompts, and some behind a text of several hundred tokens."""
    some = make_demo.prompts()
    told = "The sea was calm, the wind came from the west, and nobody on board spoke a word. "
    long = [told * (8 + 7 * (index % 5)) * (index % 4 == 1) for index in range(count)]
    return Prompts([f"{one}{index}. {some[index % len(some)]}" for index, one in enumerate(long)], 48, 1024, {})


def noise(count):
    """Token ids. Each request has a seed: the likeliest tokens after noise are the same few."""
    random = np.random.default_rng(0)
    lengths = [(5, 31, 32, 33, 97, 128, 250, 600)[index % 8] for index in range(count)]
    return Prompts([random.integers(10, 2_000, length).tolist() for length in lengths], 24, 1024, {"temperature": 1.0})


def outputs(model, given, *, rows, **plan):
    batch = model.pipeline(model.plan(**plan), batch_size=rows, max_seq_len=given.capacity)
    for index, prompt in enumerate(given.prompts):
        sampling = {**given.sampling, "seed": index} if given.sampling else None
        batch.submit(prompt, max_new_tokens=given.new_tokens - index % 7, sampling=sampling)
    return [result.token_ids for result in batch.results()]
