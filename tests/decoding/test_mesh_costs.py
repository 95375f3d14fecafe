"""The formulas of a mesh: against what one GPU measured, and what a compiled program sends."""

from __future__ import annotations

import dataclasses
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from qspec_jax import DecodingPlan, ModelConfig, QuantConfig, SamplingParams, View
from qspec_jax.bench.presets import PRESETS
from qspec_jax.bench.scaling.hardware import HARDWARE, NCCL
from qspec_jax.decoding.chunks import Shape
from qspec_jax.decoding.costs import PassBytes
from qspec_jax.decoding.mesh_costs import Drafting, Traffic, decode_traffic, device_bytes, position_bytes, predict
from qspec_jax.decoding.programs import Programs
from qspec_jax.decoding.sampling_params import SamplingFeatures
from qspec_jax.device.mesh import AXES, MeshShape, make_mesh
from qspec_jax.model.cache import KV_INT8
from qspec_jax.model.decoder import abstract_decoder, num_bytes
from qspec_jax.model.shards import Shards
from tests import tiny

LLAMA = PRESETS["llama-3-8b"]
ONE = MeshShape()
ROOT = Path(__file__).parents[2]
ROWS = 8


def local(config, split=1, group_size=128):
    quantization = QuantConfig(group_size=group_size, symmetric=True)
    options = {"dtype": "bfloat16", "kernels": "reference", "scan_layers": True, "split": split}
    return abstract_decoder(config, quantization=quantization, formats=None, **options)


# Rows, context, drafts; plain step and cycle as docs/results.md has them.
MEASURED = [
    (1, 512, 3, 2.43, 9.81),
    (16, 512, 3, 2.96, 12.71),
    (32, 4096, 3, 9.07, 2.60 * 9.07),
    (32, 4096, 5, 9.07, 3.78 * 9.07),
    (16, 8000, 5, 8.82, 3.25 * 8.82),
    (16, 16384, 5, 15.02, 2.44 * 15.02),
    (1, 32768, 3, 4.52, 2.84 * 4.52),
]


@pytest.mark.parametrize(("rows", "context", "drafts", "step_ms", "cycle_ms"), MEASURED)
def test_on_one_gpu_it_is_within_a_sixth_of_what_was_measured(rows, context, drafts, step_ms, cycle_ms):
    settings = {"rows": rows, "context": context, "drafting": Drafting(drafts)}
    found = predict(local(LLAMA), ONE, HARDWARE["h100"], **settings)
    assert 1e3 * found.step_s == pytest.approx(step_ms, rel=1 / 6)
    assert 1e3 * found.cycle_s == pytest.approx(cycle_ms, rel=1 / 6)
    assert found.traffic == Traffic(0, 0)


# Model, mesh, links, rows; plain step on H200s with 512 tokens of context, as docs/scaling.md has it.
LETTERS, TWO = HARDWARE["h200"].links, MeshShape(1, 2)
ON_H200S = [
    ("llama-3-8b", ONE, LETTERS, 1, 2.26),
    ("llama-3-8b", ONE, LETTERS, 16, 2.64),
    ("llama-3-8b", ONE, LETTERS, 64, 4.46),
    ("llama-3-8b", MeshShape(2, 1), LETTERS, 128, 4.57),
    ("llama-3-8b", TWO, LETTERS, 1, 1.81),
    ("llama-3-8b", TWO, LETTERS, 16, 2.08),
    ("llama-3-8b", TWO, NCCL, 1, 2.27),
    ("llama-3-8b", TWO, NCCL, 16, 2.56),
    ("llama-3-8b", TWO, NCCL, 64, 4.16),
    ("llama-3-70b", TWO, NCCL, 1, 10.02),
]


@pytest.mark.parametrize(("name", "mesh", "links", "rows", "step_ms"), ON_H200S, ids=str)
def test_on_one_and_two_h200s_it_is_within_a_sixth_of_what_was_measured(name, mesh, links, rows, step_ms):
    settings = {"rows": rows, "context": 512, "drafting": Drafting()}
    hardware = dataclasses.replace(HARDWARE["h200"], links=links)
    found = predict(local(PRESETS[name], mesh.model), mesh, hardware, **settings)
    assert 1e3 * found.step_s == pytest.approx(step_ms, rel=1 / 6)


@pytest.mark.parametrize(
    ("tokens", "split", "megabytes"),
    [(1, 2, 0.53), (1, 4, 1.6), (1, 8, 3.7), (16, 2, 8.5), (16, 4, 25), (16, 8, 59), (64, 2, 34), (64, 8, 236)],
)
def test_traffic_is_mostly_the_sums_of_two_linears_a_layer(tokens, split, megabytes):
    found = decode_traffic(LLAMA, split, tokens=tokens, dtype_bytes=2)
    assert found.messages == 2 * 32 + 2
    assert found.num_bytes / 1e6 == pytest.approx(megabytes, rel=0.03)
    drawn = decode_traffic(LLAMA, split, tokens=tokens, dtype_bytes=2, draws=True)
    logits = 4 * tokens * LLAMA.vocab_size * (split - 1) // split
    assert drawn.num_bytes - found.num_bytes == logits - 8 * (split - 1) * tokens


def test_devices_share_weights_and_cache_and_repeat_heads_where_there_are_too_few():
    whole, eighth = local(LLAMA), local(LLAMA, 8)
    assert num_bytes(eighth) == pytest.approx(num_bytes(whole) / 8, rel=0.01)
    sizes = [position_bytes(LLAMA, split, dtype_bytes=2) for split in (1, 2, 8, 16, 32)]
    assert sizes == [131072, 65536, 16384, 16384, 16384]
    held = device_bytes(eighth, MeshShape(2, 8), rows=32, context=1000)
    assert held.cache == 16 * 1024 * 16384
    assert held.total == held.weights + held.cache + held.temporaries
    more = device_bytes(eighth, MeshShape(2, 8), rows=33, context=1000)
    assert more.cache == held.cache * 17 // 16
    for whole.kv, capacity in (("model", 64), (KV_INT8, 128)):
        cache = jax.eval_shape(lambda capacity=capacity: whole.create_cache(batch=4, capacity=capacity))
        taken = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(cache.layers))
        assert device_bytes(whole, ONE, rows=4, context=capacity).cache == taken


@pytest.mark.parametrize(
    ("name", "split", "kv", "tokens", "sums", "logits"),
    [
        ("llama-3-8b", 1, "model", 64 * 32, 0, 32),  # 64 pieces of 32 tokens, of 32 prompts
        ("llama-3-8b", 8, "model", 64 * 32, 2, 32),  # each device adds up some tokens
        ("smollm2-135m", 3, "model", 64 * 32, 3, 32),  # 32 do not divide among three: each adds up all
        ("smollm2-135m", 3, KV_INT8, 512, 3, 1),  # no pass reads several prompts into a cache of int8
    ],
)
def test_prompts_take_what_the_pass_takes_that_reads_them(name, split, kv, tokens, sums, logits):
    config = PRESETS[name]
    one = local(config, split, group_size=32)
    one.kv = kv
    hidden, intermediate, vocabulary = config.hidden_size, config.intermediate_size // split, config.vocab_size // split
    expected = tokens * ((2 + sums) * hidden + 3 * intermediate) * 2 + logits * vocabulary * 4
    found = [device_bytes(one, MeshShape(2, split), rows=64, context=context).temporaries for context in (1000, 9000)]
    assert found == [expected, expected]


@pytest.mark.parametrize(("data", "split", "kv", "position"), [(2, 16, "model", 16384), (4, 4, KV_INT8, 16896)])
def test_what_a_pass_reads_on_a_mesh_is_what_one_device_has(data, split, kv, position):
    """As `auto` guesses by: one of eight key/value heads on each of 16 devices, and a share of the rows."""
    options = {"formats": None, "dtype": jnp.bfloat16, "kernels": "reference", "scan_layers": True}
    quantization = QuantConfig(group_size=32, symmetric=True, bits=8, head_bits=8, draft_head=4)
    mesh = Mesh(np.full((data, split), jax.devices()[0]), AXES)  # of whose devices the shape is all that counts
    shards = Shards.of(LLAMA, mesh, quantization=quantization, **options)
    of_mesh, of_device = shards.shapes(), shards.local
    of_mesh.kv = of_device.kv = kv
    found, local = PassBytes.of(of_mesh), PassBytes.of(of_device)
    assert found == dataclasses.replace(local, places=data)
    assert found.position == position
    plan = DecodingPlan(View(weight_bits=8), View(activation_bits=8, head_bits=4), 3)
    cycle = found.of_cycle(plan, rows=8 * data - 1, context=1000)
    assert cycle == local.of_cycle(plan, rows=8, context=1000)
    assert cycle == found.weights_of(plan.verify) + 3 * found.weights_of(plan.draft_view) + 4 * 8 * 1000 * position


def test_replicas_decode_as_one_and_a_slow_link_costs():
    hardware, settings = HARDWARE["h100"], {"context": 512, "drafting": Drafting()}
    one = predict(local(LLAMA), ONE, hardware, rows=16, **settings)
    two = predict(local(LLAMA), MeshShape(2, 1), hardware, rows=32, **settings)
    assert two.tokens_per_s == pytest.approx(2 * one.tokens_per_s)
    shared = predict(local(LLAMA, 2), MeshShape(1, 2), hardware, rows=16, **settings)
    slow = dataclasses.replace(hardware, links=hardware.network)
    assert predict(local(LLAMA, 2), MeshShape(1, 2), slow, rows=16, **settings).link_s > 1.5 * shared.link_s
    assert one.step_s / 2 < shared.step_s < one.step_s
    across = predict(local(LLAMA, 16), MeshShape(1, 16), hardware, rows=1, **settings)
    assert across.link_s == pytest.approx(across.traffic.seconds(hardware.network))


def test_traffic_is_what_a_compiled_program_sends():
    """In a process with four devices: nothing is run there."""
    code = "from tests.decoding import test_mesh_costs; test_mesh_costs.check_traffic()"
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "4"}
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, env=environment, timeout=300)


def check_traffic():
    drafting = DecodingPlan(View(), View(activation_bits=8), 3)
    check_loop("model=2", drafting, SamplingParams(), passes=[1, 4])
    check_loop("model=4", DecodingPlan(View()), SamplingParams(temperature=1.0), passes=[1])


def check_loop(text, plan, sampling, *, passes):
    """The drafts of a loop are one pass in its program, and the verification is another."""
    mesh, config = make_mesh(text), ModelConfig.from_hf(tiny.hf_config("wide_heads"))
    options = {"formats": None, "dtype": "float32", "kernels": "reference", "scan_layers": False}
    shards = Shards.of(config, mesh, quantization=QuantConfig(32, symmetric=True), **options)
    shape = Shape(ROWS, 64, features=SamplingFeatures.of([sampling]))
    program = Programs(shards.shapes(), mesh).lower_loop(plan, shape).compile().as_text()
    split, draws = mesh.size, sampling.temperature > 0
    expected = [decode_traffic(config, split, tokens=ROWS * new, dtype_bytes=4, draws=draws) for new in passes]
    assert sent(program, split) == Traffic(
        sum(one.messages for one in expected), sum(one.num_bytes for one in expected)
    )


def sent(program, split):
    """Of the collectives in a program of devices that all share a model, what each receives."""
    received = []
    for bits, sizes, kind in re.findall(r" = [a-z]+(\d+)\[([\d,]*)\]\S* ([\w-]+)\(.*replica_groups=", program):
        size = math.prod(int(one) for one in sizes.split(",") if one) * int(bits) // 8
        received.append(size * (split - 1) // split * {"all-gather": 1, "all-reduce": 2}[kind])
    return Traffic(len(received), sum(received))
