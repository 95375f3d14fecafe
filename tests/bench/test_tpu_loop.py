"""The whole generation loop, compiled for TPUs by their own compiler: no cache is copied. It needs libtpu."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import Mesh

from qspec_jax.decoding.chunks import Shape
from qspec_jax.decoding.plan import DecodingPlan
from qspec_jax.decoding.programs import Programs
from qspec_jax.device.mesh import AXES
from qspec_jax.model.config import ModelConfig, QuantConfig
from qspec_jax.model.decoder import abstract_decoder
from qspec_jax.model.precision import Precision
from qspec_jax.model.shards import Shards
from qspec_jax.model.view import View
from tests.conftest import THOROUGH

pytest.importorskip("libtpu")

from qspec_jax.bench.tpu.compiler import GENERATIONS, described, described_devices

SMALL = ModelConfig(
    vocab_size=1024,
    hidden_size=512,
    intermediate_size=1024,
    num_layers=2,
    num_heads=8,
    num_kv_heads=2,
    head_dim=128,
    max_position_embeddings=8192,
)


@pytest.mark.contract
@pytest.mark.parametrize("generation", GENERATIONS if THOROUGH else ["v6e"])
def test_the_loop_needs_a_twentieth_of_its_cache_at_most(generation):
    """Drafts from a budget, verification, attention and writes: each copy of a layer's keys would be an eighth."""
    (device, *_), rows, capacity = described_devices(generation), 8, 8192
    options = {"dtype": jnp.bfloat16, "scan_layers": False, "kernels": None}
    decoder = abstract_decoder(SMALL, quantization=QuantConfig(group_size=128), formats=None, **options)
    sharding = jax.sharding.SingleDeviceSharding(device)
    placed = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding), nnx.state(decoder))
    nnx.update(decoder, placed)
    plan = DecodingPlan(Precision.W4A16, View(activation_bits=8, cache_budget=512), 3)
    with described(device):
        lowered = Programs(decoder).lower_loop(plan, Shape(rows, capacity, num_blocks=plan.num_blocks))
    program = lowered.compile()
    width = SMALL.num_kv_heads * SMALL.head_dim
    cache = 2 * SMALL.num_layers * rows * capacity * width * 2
    copies = [line for line in program.as_text().splitlines() if f"bf16[{rows},{capacity},{width}]" in line]
    assert not [line for line in copies if " copy(" in line or " transpose(" in line]
    assert program.memory_analysis().temp_size_in_bytes < cache / 20
    # Each layer, of the draft and of the verification: four matmuls, attention and a write; and each pass, the LM head.
    assert program.as_text().count('custom_call_target="tpu_custom_call"') == 2 * (6 * SMALL.num_layers + 1)
    assert len(re.findall(r"%block_attention[.\d]* = ", program.as_text())) == SMALL.num_layers


@pytest.mark.contract
def test_the_loop_of_four_devices_copies_no_cache_and_sends_two_sums_for_each_layer():
    """Besides, each pass sends a row of the embedding and a choice: of the draft and of the verification."""
    devices, rows, capacity = described_devices("v6e")[:4], 8, 8192
    mesh = Mesh(np.array(devices).reshape(1, 4), AXES)
    options = {"dtype": jnp.bfloat16, "scan_layers": False, "kernels": None}
    shards = Shards.of(SMALL, mesh, quantization=QuantConfig(group_size=128), formats=None, **options)
    plan = DecodingPlan(Precision.W4A16, Precision.W4A8, 3)
    program = Programs(shards.shapes(), mesh).lower_loop(plan, Shape(rows=rows, capacity=capacity)).compile()
    text, width = program.as_text(), SMALL.head_dim  # one head of each device
    lines = [line for line in text.splitlines() if f"bf16[{rows},{capacity},{width}]" in line]
    assert lines
    assert not [line for line in lines if " copy(" in line or " transpose(" in line]
    assert program.memory_analysis().temp_size_in_bytes < 2 * SMALL.num_layers * rows * capacity * width * 2 / 10
    sent = re.findall(r" (all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)(?:-start)?\(", text)
    assert len(sent) == 2 * (2 * SMALL.num_layers + 2)
    assert text.count('custom_call_target="tpu_custom_call"') == 2 * (6 * SMALL.num_layers + 1)
