"""On a GPU, in bfloat16: every way to decode yields the tokens of its own plain decoding of one row at a time.

The demo model has real text, and kernels for small weights. Four layers of Llama-3-8B have the kernels of Hopper, and
prompts that are read together.
"""

from __future__ import annotations

import dataclasses
import functools
import gc
from typing import NamedTuple

import jax
import numpy as np
import pytest

import qspec_jax
from qspec_jax.bench.presets import PRESETS
from qspec_jax.bench.synthetic import synthetic_model
from qspec_jax.model.config import QuantConfig
from tests.golden import make_demo

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.demo,
    pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs an NVIDIA GPU"),
]
DTYPE = "bfloat16"
INT8 = {"kv": "int8"}
HOPPER = {"group_size": 128, "symmetric": True}  # which its kernels of large weights read


class Prompts(NamedTuple):
    """What is read and generated: texts or token ids, up to how many new tokens each, and how these are chosen."""

    prompts: list
    new_tokens: int
    capacity: int
    sampling: dict


class Way(NamedTuple):
    """A model, the mode whose tokens count, and plans that must yield them, each with its rows."""

    model: str
    plain: str
    plans: dict[str, tuple[dict, tuple[int, ...]]]


QSPEC = {"mode": "qspec", "draft_length": 3}
USUAL = {
    "plain": ({}, (8, 32)),
    "qspec": (QSPEC, (1, 8, 32)),
    "7 drafts": ({**QSPEC, "draft_length": 7}, (32,)),
    "budget": ({**QSPEC, "draft_length": 5, "draft_context": 256}, (8, 32)),
    "auto": ({"mode": "auto"}, (1, 32)),
}
OTHER_TARGET = {name: plans for name, plans in USUAL.items() if name not in ("budget", "auto")}
WAYS = {
    "demo": Way("demo", "w4a16", {**USUAL, "lookup": ({"mode": "lookup"}, (8,))}),
    "demo, int8 cache": Way("demo, int8 cache", "w4a16", USUAL),
    "demo, floats": Way("demo, floats", "float", OTHER_TARGET),
    "llama": Way("llama", "w4a16", USUAL),
    "llama, int8 cache": Way("llama, int8 cache", "w4a16", USUAL),
    "llama, 8 bits": Way("llama, 8 bits", "w8a16", OTHER_TARGET),
}


def few_layers(quantization=None, **options):
    """Noise, but of the shapes that kernels of large weights are for."""
    config = dataclasses.replace(PRESETS["llama-3-8b"], num_layers=4)
    return synthetic_model(config, quantization=quantization or QuantConfig(**HOPPER), dtype=DTYPE, **options)


def load(name, demo_gguf):
    demo = functools.partial(qspec_jax.load, demo_gguf, dtype=DTYPE)
    return {
        "demo": demo,
        "demo, int8 cache": functools.partial(demo, **INT8),
        "demo, floats": functools.partial(demo, verify="float"),
        "llama": few_layers,
        "llama, int8 cache": functools.partial(few_layers, **INT8),
        "llama, 8 bits": functools.partial(few_layers, QuantConfig(**HOPPER, bits=8, head_bits=8, draft_head=4)),
    }[name]()


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


@pytest.mark.parametrize("name", WAYS)
def test_every_plan_yields_the_tokens_of_plain_decoding_alone(name, demo_gguf, record_property):
    way = WAYS[name]
    given = texts(96) if name.startswith("demo") else noise(64)
    different = {}
    for packing in (None, False):
        model = load(way.model, demo_gguf)
        if packing is False and not model.programs.longest_packed:
            continue  # as before
        model.programs.packing = packing
        plain = outputs(model, given, rows=1, mode=way.plain)
        assert len({tuple(ids) for ids in plain}) > len(plain) / 2
        for plan, (options, all_rows) in way.plans.items():
            for rows in all_rows:
                found = outputs(model, given, rows=rows, **{"mode": way.plain, **options})
                count = sum(one != other for one, other in zip(found, plain, strict=True))
                print(f"{name}, {plan}, {rows} rows, packing={packing}: {count} of {len(plain)} differ", flush=True)
                if count:
                    different[plan, rows, packing] = f"{count} of {len(plain)}"
        del model
        gc.collect()
    assert not different
