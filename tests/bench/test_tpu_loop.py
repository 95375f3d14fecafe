"""The whole generation loop, compiled for TPUs by their own compiler: no cache is copied. It needs libtpu."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

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
from qspec_jax.model.cache import KV_INT8, KV_OF_MODEL
from qspec_jax.model.config import ModelConfig, QuantConfig
from qspec_jax.model.decoder import abstract_decoder
from qspec_jax.model.precision import Precision
from qspec_jax.model.shards import Shards
from qspec_jax.model.view import View
from tests.conftest import THOROUGH

pytest.importorskip("libtpu")

from qspec_jax.bench.tpu.compiler import GENERATIONS, described, described_devices

# Programs in float32, whose kernels take longest to compile, have one layer: several are those of bfloat16.
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


ROWS, CAPACITY = 8, 8192


def small_program(
    plan: DecodingPlan,
    quantization: QuantConfig,
    *,
    generation: str,
    kv: str = KV_OF_MODEL,
    config: ModelConfig = SMALL,
    dtype: Any = jnp.bfloat16,
    prefill: int | None = None,
    capacity: int = CAPACITY,
) -> jax.stages.Compiled:
    """The loop of a plan for one device, or the program that reads chunks of so many tokens."""
    device = described_devices(generation)[0]
    options = {"dtype": dtype, "scan_layers": False, "kernels": None}
    decoder = abstract_decoder(config, quantization=quantization, formats=None, **options)
    decoder.kv = kv
    sharding = jax.sharding.SingleDeviceSharding(device)
    placed = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding), nnx.state(decoder))
    nnx.update(decoder, placed)
    shape, programs = Shape(ROWS, capacity, num_blocks=plan.num_blocks), Programs(decoder)
    with described(device):
        lowered = programs.lower_loop(plan, shape) if prefill is None else programs.lower_prefill(plan, shape, prefill)
    return lowered.compile()


def assert_no_cache_is_copied(
    program: jax.stages.Compiled,
    *,
    dtype: str = "bf16",
    itemsize: int = 2,
    num_layers: int = SMALL.num_layers,
    capacity: int = CAPACITY,
) -> None:
    """Within a fusion nothing is: what it calls a copy there is another order of the tiles that it reads or writes."""
    width = SMALL.num_kv_heads * SMALL.head_dim
    fused = set(re.findall(r"calls=%([\w.-]+)", program.as_text()))
    parts = re.split(r"^%([\w.-]+) \(", program.as_text(), flags=re.MULTILINE)
    outside = [parts[0], *[text for name, text in zip(parts[1::2], parts[2::2], strict=True) if name not in fused]]
    lines = [line for text in outside for line in text.splitlines() if f"{dtype}[{ROWS},{capacity},{width}]" in line]
    assert lines
    assert not [line for line in lines if " copy(" in line or " transpose(" in line]
    keys, arrays = ROWS * capacity * width * itemsize, 2 * num_layers
    # Half as many bytes hide less: of int8, a copy of a layer's keys alone is what must not fit.
    most = keys if itemsize == 1 else keys * arrays / 20
    assert program.memory_analysis().temp_size_in_bytes < most
    assert program.memory_analysis().alias_size_in_bytes >= keys * arrays


def kernels(program: jax.stages.Compiled, *names: str) -> dict[str, int]:
    """How many of them there are."""
    text = program.as_text()
    return {name: len(re.findall(rf"%{name}[.\d]* = .* custom-call\(", text)) for name in names}


@pytest.mark.contract
@pytest.mark.parametrize("generation", GENERATIONS if THOROUGH else ["v6e"])
def test_the_loop_needs_a_twentieth_of_its_cache_at_most(generation):
    """Drafts from a budget, verification, attention and writes: each copy of a layer's keys would be an eighth."""
    plan = DecodingPlan(Precision.W4A16, View(activation_bits=8, cache_budget=512), 3)
    program = small_program(plan, QuantConfig(group_size=128), generation=generation)
    assert_no_cache_is_copied(program)
    # Each layer, of the draft and of the verification: four matmuls, attention and a write; and each pass, the LM head.
    assert program.as_text().count('custom_call_target="tpu_custom_call"') == 2 * (6 * SMALL.num_layers + 1)
    assert len(re.findall(r"%block_attention[.\d]* = ", program.as_text())) == SMALL.num_layers


@pytest.mark.contract
@pytest.mark.parametrize("generation", GENERATIONS if THOROUGH else ["v5e"])
def test_nested_weights_and_heads_are_read_by_kernels_and_copied_nowhere(generation):
    plan = DecodingPlan(Precision.W8A16, View(activation_bits=8, head_bits=4), 3)
    quantization = QuantConfig(group_size=128, symmetric=True, bits=8, head_bits=8, draft_head=4)
    program = small_program(plan, quantization, generation=generation)
    assert_no_cache_is_copied(program)
    # The draft reads four linears of each layer as integers, and its head with floats; verification reads both planes.
    per_pass = {"w8a16": 4 * SMALL.num_layers + 1, "w4a8": 4 * SMALL.num_layers, "w4a16": 1}
    assert kernels(program, *per_pass) == per_pass


@pytest.mark.contract
@pytest.mark.parametrize("generation", GENERATIONS if THOROUGH else ["v5e"])
def test_a_cache_of_int8_is_read_and_written_by_kernels_and_copied_nowhere(generation):
    """Drafts from a budget, of which verification weighs the blocks."""
    plan = DecodingPlan(Precision.W4A16, View(activation_bits=8, cache_budget=512), 3)
    program = small_program(plan, QuantConfig(group_size=128), generation=generation, kv=KV_INT8)
    assert_no_cache_is_copied(program, dtype="s8", itemsize=1)
    layers = SMALL.num_layers
    expected = {"decode_attention_int8": layers, "block_attention_int8": layers}
    expected |= {"quantize_keys": 2 * layers, "write_slots": 2 * layers}
    assert kernels(program, *expected) == expected


@pytest.mark.contract
@pytest.mark.parametrize("kv", [KV_OF_MODEL, KV_INT8] if THOROUGH else [KV_INT8])
@pytest.mark.parametrize("generation", GENERATIONS if THOROUGH else ["v5e"])
def test_chunks_of_prompts_are_read_into_a_row_and_no_cache_is_copied(generation, kv):
    """A row of the cache is cut out and written back, which takes the same beside any number of rows.

    XLA attends to chunks of 32, and compiles that for 8,192 slots twice as long as for 2,048.
    """
    capacity = 2048
    plan = DecodingPlan(Precision.W4A16, Precision.W4A8, 3)
    program = small_program(
        plan, QuantConfig(group_size=128), generation=generation, kv=kv, prefill=32, capacity=capacity
    )
    stored = {"dtype": "s8", "itemsize": 1} if kv == KV_INT8 else {"dtype": "bf16", "itemsize": 2}
    assert_no_cache_is_copied(program, capacity=capacity, **stored)


@pytest.mark.contract
@pytest.mark.parametrize("generation", GENERATIONS if THOROUGH else ["v5e"])
def test_the_loop_of_a_rotated_decoder_in_float32_is_one_of_kernels(generation):
    """Its precision is the highest, which Mosaic refuses for operands of 8 and 16 bits. The LM head is XLA's."""
    plan = DecodingPlan(Precision.W4A16, View(activation_bits=8, cache_budget=512), 3)
    config, layers = dataclasses.replace(SMALL, num_layers=1, down_hadamard=True), 1
    options = {"generation": generation, "kv": KV_INT8, "config": config, "dtype": jnp.float32}
    program = small_program(plan, QuantConfig(group_size=128), **options)
    assert_no_cache_is_copied(program, dtype="s8", itemsize=1, num_layers=layers)
    expected = {"w4a16": 4 * layers, "w4a8": 4 * layers, "hadamard": 2 * layers}
    expected |= {"decode_attention_int8": layers, "block_attention_int8": layers, "write_slots": 2 * layers}
    assert kernels(program, *expected) == expected


@pytest.mark.contract
@pytest.mark.parametrize("generation", GENERATIONS if THOROUGH else ["v6e"])
def test_nested_weights_are_read_by_kernels_in_float32_too(generation):
    plan = DecodingPlan(Precision.W8A16, View(activation_bits=8, head_bits=4), 3)
    quantization = QuantConfig(group_size=128, symmetric=True, bits=8, head_bits=8, draft_head=4)
    options = {"config": dataclasses.replace(SMALL, num_layers=1), "dtype": jnp.float32}
    program = small_program(plan, quantization, generation=generation, **options)
    assert_no_cache_is_copied(program, dtype="f32", itemsize=4, num_layers=1)
    per_pass = {"w8a16": 4 + 1, "w4a8": 4, "w4a16": 1}
    assert kernels(program, *per_pass) == per_pass


@pytest.mark.contract
@pytest.mark.parametrize(("kv", "stored"), [(KV_OF_MODEL, ("bf16", 2)), (KV_INT8, ("s8", 1))])
def test_the_loop_of_four_devices_copies_no_cache_and_sends_two_sums_for_each_layer(kv, stored):
    """Besides, each pass sends a row of the embedding and a choice: of the draft and of the verification."""
    devices, rows, capacity = described_devices("v6e")[:4], 8, 8192
    mesh = Mesh(np.array(devices).reshape(1, 4), AXES)
    options = {"dtype": jnp.bfloat16, "scan_layers": False, "kernels": None}
    shards = Shards.of(SMALL, mesh, quantization=QuantConfig(group_size=128), formats=None, **options)
    decoder, (dtype, itemsize) = shards.shapes(), stored
    decoder.kv = kv
    plan = DecodingPlan(Precision.W4A16, Precision.W4A8, 3)
    program = Programs(decoder, mesh).lower_loop(plan, Shape(rows=rows, capacity=capacity)).compile()
    text, width = program.as_text(), SMALL.head_dim  # one head of each device
    lines = [line for line in text.splitlines() if f"{dtype}[{rows},{capacity},{width}]" in line]
    assert lines
    assert not [line for line in lines if " copy(" in line or " transpose(" in line]
    cache = 2 * SMALL.num_layers * rows * capacity * width * itemsize
    assert program.memory_analysis().temp_size_in_bytes < cache / 10
    sent = re.findall(r" (all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)(?:-start)?\(", text)
    assert len(sent) == 2 * (2 * SMALL.num_layers + 2)
    calls = 7 if kv == KV_INT8 else 6  # of a layer: four matmuls, attention, a write, and of int8 the rounding of keys
    assert text.count('custom_call_target="tpu_custom_call"') == 2 * (calls * SMALL.num_layers + 1)
