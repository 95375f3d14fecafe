"""On a GPU, in bfloat16: every way to decode yields the tokens of its own plain decoding of one row at a time.

The demo model has real text, and kernels for small weights. Four layers of Llama-3-8B have the kernels of Hopper, and
prompts that are read together.
"""

from __future__ import annotations

import functools
import gc
from typing import NamedTuple

import jax
import pytest

import qspec_jax
from qspec_jax.decoding.packing import longest_packed
from qspec_jax.model.config import QuantConfig
from tests.gpu.serving import DTYPE, HOPPER, INT8, few_layers, noise, outputs, texts

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.demo,
    pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs an NVIDIA GPU"),
]


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
    "llama, floats": Way("llama, floats", "float", OTHER_TARGET),
    "llama, 8 bits": Way("llama, 8 bits", "w8a16", OTHER_TARGET),
}


def load(name, request):
    def demo(**options):
        return qspec_jax.load(request.getfixturevalue("demo_gguf"), dtype=DTYPE, **options)

    return {
        "demo": demo,
        "demo, int8 cache": functools.partial(demo, **INT8),
        "demo, floats": functools.partial(demo, verify="float"),
        "llama": few_layers,
        "llama, int8 cache": functools.partial(few_layers, **INT8),
        "llama, floats": functools.partial(few_layers, QuantConfig(**HOPPER, keep_floats=True)),
        "llama, 8 bits": functools.partial(few_layers, QuantConfig(**HOPPER, bits=8, head_bits=8, draft_head=4)),
    }[name]()


@pytest.mark.parametrize("name", WAYS)
def test_every_plan_yields_the_tokens_of_plain_decoding_alone(name, request):
    way = WAYS[name]
    given = texts(96) if name.startswith("demo") else noise(64)
    different = {}
    for packing in (None, False, True):
        model = load(way.model, request)
        is_usual, may_be = bool(model.programs.longest_packed), bool(longest_packed(model.decoder))
        if packing is not None and (packing == is_usual or not may_be):
            continue  # as before, or no kernels for it
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
