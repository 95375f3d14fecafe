"""A cache of int8 on meshes: run by ``test_on_mesh.py``, in a process with eight devices."""

from __future__ import annotations

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qspec_jax.decoding import chunks
from qspec_jax.decoding.chunks import Shape
from qspec_jax.decoding.programs import Programs
from qspec_jax.decoding.sampling_params import SamplingParams
from qspec_jax.engine.prefixes import HeldChunks
from qspec_jax.engine.requests import Request
from qspec_jax.engine.scheduler import Scheduler
from qspec_jax.evaluation.scores import logits_function
from qspec_jax.model.cache import KV_FORMATS, KV_INT8, position_bytes, row_bytes
from qspec_jax.model.config import QuantConfig
from qspec_jax.model.precision import Precision
from qspec_jax.model.sharding import local_config
from tests.decoding.on_mesh import model

CAPACITY, NEW, ROWS = 256, 20, 4
# Blocks of 128 end within prompts, at their ends, and among the drafts. No choice of a token is nearer than 0.04 to
# another one: on a mesh, where sums in another order turn a few codes, logits are others by up to 0.004.
_RNG = np.random.default_rng(7)
PROMPTS = [_RNG.integers(0, 96, size).tolist() for size in (120, 125, 128, 230)]
SEEDED = SamplingParams(temperature=1.0, seed=3)
NESTED = QuantConfig(bits=8, symmetric=True)
EXACT = QuantConfig(group_size=32, symmetric=True, keep_floats=True)


@pytest.fixture(autouse=True)
def _few_widths(monkeypatch):
    """Fewer programs, and prompts of several chunks."""
    monkeypatch.setattr(chunks, "CHUNK_WIDTHS", (128,))


def scheduler_of(one, mode, **options):
    return Scheduler(one.programs, one.plan(mode, **options), rows=ROWS, capacity=CAPACITY)


def finish(scheduler, requests):
    sequences = [scheduler.add(one) for one in requests]
    while scheduler.busy:
        scheduler.advance(4)
    return [sequence.token_ids for sequence in sequences]


def asked(prompt, sampling=SEEDED, **options):
    return Request(prompt, NEW, sampling, **options)


WANTED = [asked(prompt, SEEDED if place % 2 else SamplingParams()) for place, prompt in enumerate(PROMPTS)]


@pytest.mark.parametrize(
    ("mesh", "family", "quantization", "plain", "drafting"),
    [
        pytest.param("data=2,model=2", "qwen3_qk_norm", EXACT, "float", {"mode": "qspec"}, id="2x2"),
        # Two devices have the same head of keys and values.
        pytest.param(
            "model=4", "qwen2_qkv_bias", NESTED, "w8a16", {"mode": "lookup-qspec", "draft_context": 112}, id="1x4"
        ),
    ],
)
def test_qspec_equals_plain_and_one_device_and_no_device_has_all_of_the_cache(
    mesh, family, quantization, plain, drafting
):
    options = {"scan_layers": mesh == "model=4", "kv": KV_INT8, "quantization": quantization}
    on_mesh = model(family, mesh, **options)
    scheduler = scheduler_of(on_mesh, plain)
    expected = finish(scheduler, WANTED)
    drafts = scheduler_of(on_mesh, **drafting, draft="w4a8", draft_length=5)
    assert finish(drafts, WANTED) == expected
    assert drafts.totals.cycles < scheduler.totals.cycles  # 10 and 20 of 23: most drafts are kept, and most rejected
    assert finish(scheduler_of(model(family, **options), plain), WANTED) == expected
    assert_shared(on_mesh, scheduler._state.cache, CAPACITY)
    larger = on_mesh.programs.idle_state(drafts.shape._replace(capacity=384))
    grown = on_mesh.programs.with_rows_of(larger, drafts._state).cache
    leaves = (map(np.asarray, jax.tree.leaves(cache.layers)) for cache in (grown, drafts._state.cache))
    for ours, theirs in zip(*leaves, strict=True):
        np.testing.assert_array_equal(ours[..., : theirs.shape[-2], : theirs.shape[-1]], theirs)
        assert theirs.any()
    assert_shared(on_mesh, grown, 384)


def assert_shared(on_mesh, cache, capacity):
    """Each device has its rows and heads of keys, values and scales, as the estimate says, and no others."""
    data, split = on_mesh.mesh.devices.shape
    held = dict.fromkeys(on_mesh.mesh.devices.flat, 0)
    for array in jax.tree.leaves(cache.layers):
        for part in array.addressable_shards:
            assert part.data.size * data * split == array.size
            held[part.device] += part.data.nbytes
    local, sizes = local_config(on_mesh.config, split), {"dtype_bytes": 4, "kv": KV_INT8}
    estimated = ROWS // data * (capacity * position_bytes(local, **sizes) + row_bytes(local, **sizes))
    assert set(held.values()) == {estimated}
    first = cache.layers[0] if isinstance(cache.layers, tuple) else cache.layers
    assert first.value_scales.addressable_shards[0].data.shape[-2] == local.num_kv_heads


def test_scores_of_a_text_are_those_of_one_device():
    """But for codes that sums in another order turn."""
    options = {"scan_layers": True, "kv": KV_INT8, "quantization": NESTED}
    text = jnp.asarray([PROMPTS[3][:200]], jnp.int32)
    together, alone = (
        np.asarray(logits_function(one, Precision.W8A16)(text))
        for one in (model("qwen2_qkv_bias", "model=4", **options), model("qwen2_qkv_bias", **options))
    )
    np.testing.assert_allclose(together, alone, atol=2e-3 * np.abs(alone).max())


def test_rows_that_begin_alike_and_texts_of_a_session_change_no_token():
    on_mesh = model("qwen3_qk_norm", "data=2,model=2", scan_layers=False, kv=KV_INT8, quantization=EXACT)
    prefix = PROMPTS[3][:128]
    wanted = [asked([*prefix, *range(index, 5 * index + 3)], prefix_length=128) for index in range(1, 6)]
    together, apart = (scheduler_of(on_mesh, "float") for _ in range(2))
    yielded = finish(together, wanted)
    assert together.totals.reused_prompt_tokens == 3 * 128  # all but the first one of each part of the rows
    for one, tokens in zip(wanted, yielded, strict=True):
        apart._rows.held = HeldChunks(ROWS, 2)
        assert finish(apart, [one]) == [tokens]
    first, second = (asked([*PROMPTS[3][:140], *end], session="a") for end in ((5, 5), (7, 7)))
    finish(together, [first])
    reused = together.totals.reused_prompt_tokens
    apart._rows.held = HeldChunks(ROWS, 2)
    assert finish(together, [second]) == finish(apart, [dataclasses.replace(second, session=None)])
    assert together.totals.reused_prompt_tokens == reused + 128  # the ring has no older keys of a longer text


def test_devices_send_no_more_than_with_the_cache_of_the_model():
    on_mesh = model("qwen3_qk_norm", "data=2,model=2", scan_layers=False, kv=KV_INT8, quantization=EXACT)
    plan = on_mesh.plan("qspec", draft="w4a8", draft_context=112)
    sent = []
    for kv in KV_FORMATS:
        programs = Programs(on_mesh.decoder, on_mesh.mesh)
        programs.decoder.kv = kv
        shape = Shape(ROWS, CAPACITY, num_blocks=plan.num_blocks)
        text = [programs.lower_loop(plan, shape).as_text(), programs.lower_prefill(plan, shape, 128).as_text()]
        sent.append([re.findall(r"stablehlo\.(all_\w+|collective_\w+|reduce_scatter)", one) for one in text])
    assert sent[0] == sent[1]
    assert all(sent[0])
