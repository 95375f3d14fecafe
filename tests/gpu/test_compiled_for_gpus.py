"""What XLA makes of programs for NVIDIA GPUs. Its plugin for CUDA compiles for devices that are only described.

So a machine without a GPU can ask, too: with ``JAX_PLATFORMS=cpu``, ``jax-cuda13-plugin`` and ``nvidia-cuda-nvcc``.
"""

from __future__ import annotations

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.experimental import topologies
from jax.sharding import Mesh

from pallas_kernels import Int8Cache
from pallas_kernels.backends.early_launch import SIGNAL
from pallas_kernels.prefill_attention import gpu_triton as prefill_triton
from pallas_kernels.prefill_attention_int8 import gpu_triton as int8_prefill_triton
from pallas_kernels.w4a16_matmul import gpu_triton as w4a16_triton
from qspec_jax.bench.presets import PRESETS
from qspec_jax.decoding import device_graphs, loop_settings, mailboxes, packing
from qspec_jax.decoding.chunks import Shape
from qspec_jax.decoding.plan import DecodingPlan
from qspec_jax.decoding.programs import Programs
from qspec_jax.device.driver import cuda_plugin
from qspec_jax.device.mesh import AXES
from qspec_jax.model.cache import KV_INT8
from qspec_jax.model.config import QuantConfig
from qspec_jax.model.decoder import abstract_decoder
from qspec_jax.model.precision import Precision
from qspec_jax.model.shards import Shards
from qspec_jax.model.view import View
from tests.pallas_kernels.test_cuda_lowering import abstract_nested_weight, abstract_weight

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(cuda_plugin() != 13, reason="needs jax-cuda13-plugin"),
    pytest.mark.skipif(jax.default_backend() == "gpu", reason="devices that are here cannot be described as well"),
]
H200 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152 shared_memory_per_core: 233472
  threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128 block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535 block_dim_limit_z: 65535 memory_bandwidth: 4800000000000 l2_cache_size: 62914560
  clock_rate_ghz: 1.98 device_memory_size: 150000000000 shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 minor: 0 } registers_per_core_limit: 65536 registers_per_block_limit: 65536
  driver_version: "13.0.0" runtime_version: "13.0.0" compile_time_toolkit_version: "13.0.0"
  device_interconnect_info { active_links: 18 }
}
platform_name: "CUDA" dnn_version_info { major: 9 minor: 10 } runtime_version { major: 13 minor: 0 patch: 0 }
device_description_str: "NVIDIA H200"
"""
ROWS, CAPACITY, LAYERS = 16, 1024, 2
PLANS = {"plain": DecodingPlan(Precision.W4A16, None, 0), "qspec": DecodingPlan(Precision.W4A16, Precision.W4A8, 3)}


@pytest.fixture
def gpus(monkeypatch):
    """Two of them, which everything takes for those of this machine."""
    devices = topologies.get_topology_desc(platform="cuda", target_config=H200, topology="1x1x2").devices
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "local_devices", lambda *_, **__: list(devices))
    monkeypatch.setattr(jax, "devices", lambda *_, **__: list(devices))
    device_graphs.compiler_options.cache_clear()
    yield devices
    device_graphs.compiler_options.cache_clear()


@pytest.mark.parametrize("sends", ["messages", "to mailboxes"])
@pytest.mark.parametrize("name", PLANS)
def test_a_pass_sends_two_sums_for_each_layer_and_copies_no_cache(name, sends, gpus, monkeypatch):
    monkeypatch.setattr(mailboxes, "_reach_each_other", lambda _: sends == "to mailboxes")
    monkeypatch.setattr(device_graphs, "_is_known", lambda *_: True)  # one that XLA does not know is an error
    config = dataclasses.replace(PRESETS["llama-3-8b"], num_layers=LAYERS)
    mesh = Mesh(np.array(gpus).reshape(1, 2), AXES)
    options = {"dtype": jnp.bfloat16, "kernels": "triton", "scan_layers": False}
    shards = Shards.of(config, mesh, quantization=QuantConfig(group_size=128), formats=None, **options)
    program = Programs(shards.shapes(), mesh).lower_loop(PLANS[name], Shape(rows=ROWS, capacity=CAPACITY)).compile()
    text, width = program.as_text(), config.num_kv_heads * config.head_dim // 2
    cache = f"bf16[{ROWS},{CAPACITY},{width}]"
    assert cache in text
    assert not [line for line in text.splitlines() if re.search(rf"= {re.escape(cache)}\S* (copy|transpose)\(", line)]
    assert program.memory_analysis().temp_size_in_bytes < 2 * LAYERS * ROWS * CAPACITY * width * 2
    assert "KERNEL_STRATEGY_TRITON" not in text  # XLA's own kernels for messages, which one process alone would have
    sent = re.findall(r" (all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)(?:-start)?\(", text)
    passes = {"plain": 1, "qspec": 2}[name]  # a draft and the verification
    memory, addresses = r"s32\[\d+\]\S*", r"s32\[3,2\]\S*"
    written = re.findall(rf"= \(\S+ ({memory}) {addresses}\) custom-call", text)
    if sends == "messages":
        assert (len(sent), len(written)) == (passes * (2 * LAYERS + 2), 0)
        return
    assert (len(sent), len(written)) == (0, passes * (2 * LAYERS + 2))
    for array in ({shape.partition("{")[0] for shape in written}, {"s32[3,2]"}):
        [shape] = array
        made = [(name, rest.partition(")")[0]) for shapes, name, rest in operations(text) if shape in shapes]
        assert [given for name, given in made if name == "fusion"] == [""], "one fills it with zeros and reads nothing"
        assert {name for name, _ in made} <= {"fusion", *IN_PLACE}, "it stays where it is"


# Operations whose results lie where their operands do, and what is inside of a fusion that fills an array with zeros.
IN_PLACE = ("custom-call", "while", "tuple", "get-tuple-element", "parameter", "broadcast")


def operations(text: str) -> list[tuple[str, str, str]]:
    """The types, names, and operands with all behind them, of a compiled program's operations."""
    return re.findall(r"^ +(?:ROOT )?%\S+ = (\(.*?\)|\S+) ([a-z][a-z0-9-]*)\((.*)", text, re.MULTILINE)


@pytest.mark.parametrize(("shape", "messages"), [((2, 1), 1), ((1, 2), 2 * 2 * LAYERS + 2)], ids=["data=2", "model=2"])
def test_devices_read_prompts_together_and_copy_no_cache(shape, messages, gpus, monkeypatch):
    """With Hopper's kernels, into rows of their own, or with parts of all weights, whose sums are sent in two."""
    monkeypatch.setattr(device_graphs, "_is_known", lambda *_: True)
    config = dataclasses.replace(PRESETS["llama-3-8b"], num_layers=LAYERS)
    mesh = Mesh(np.array(gpus).reshape(shape), AXES)
    options = {"dtype": jnp.bfloat16, "kernels": None, "scan_layers": False}
    shards = Shards.of(config, mesh, quantization=QuantConfig(group_size=128), formats=None, **options)
    programs = Programs(shards.shapes(), mesh)
    assert packing.longest_packed(programs.decoder) == 512
    programs.packing = True
    program = programs.lower_pieces(PLANS["plain"], Shape(rows=ROWS, capacity=CAPACITY), 16).compile()
    text, (data, split) = program.as_text(), shape
    cache = f"bf16[{ROWS // data},{CAPACITY},{config.num_kv_heads * config.head_dim // split}]"
    assert cache in text
    assert not [line for line in text.splitlines() if re.search(rf"= {re.escape(cache)}\S* (copy|transpose)\(", line)]
    assert "mosaic" in text
    sent = re.findall(r" (all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)(?:-start)?\(", text)
    assert len(sent) == messages


def test_floats_of_packed_prompts_are_multiplied_by_one_kernel(gpus, monkeypatch):
    """Whose tiles are the same for any number of rows. A library's would not be."""
    monkeypatch.setattr(device_graphs, "_is_known", lambda *_: True)
    config = dataclasses.replace(PRESETS["llama-3-8b"], num_layers=LAYERS)
    quantization = QuantConfig(group_size=128, keep_floats=True)
    options = {"quantization": quantization, "dtype": jnp.bfloat16, "kernels": None, "scan_layers": False}
    mesh = Mesh(np.array(gpus[:1]).reshape(1, 1), AXES)
    programs = Programs(Shards.of(config, mesh, formats=None, **options).shapes(), mesh)
    assert programs.longest_packed == 512
    plan = DecodingPlan(Precision.FLOAT, None, 0)
    text = programs.lower_pieces(plan, Shape(rows=ROWS, capacity=CAPACITY), 16).compile().as_text()
    rows = ROWS * packing.PIECE
    products = re.findall(rf"bf16\[1,{rows},\d+\]\S* custom-call\(.*float_matmul", text)
    assert len(products) == 4 * LAYERS
    assert " dot(" not in text
    assert set(re.findall(r'custom_call_target="([^"]*)"', text)) == {"__gpu$xla.gpu.triton"}


W8A16_AND_DRAFTS = DecodingPlan(Precision.W8A16, Precision.W4A8, 3)
WITH_A_BUDGET = DecodingPlan(Precision.W4A16, View(activation_bits=8, cache_budget=512), 3)
EARLY = {
    "triton": ("smollm2-135m", {"group_size": 32, "symmetric": False}, PLANS["qspec"]),
    "asymmetric": ("llama-3-8b", {"group_size": 128, "symmetric": False}, PLANS["qspec"]),
    "nested": ("llama-3-8b", {"group_size": 128, "symmetric": True, "bits": 8}, W8A16_AND_DRAFTS),
    "budget": ("llama-3-8b", {"group_size": 128, "symmetric": True}, WITH_A_BUDGET),
    "budget, int8 cache": ("llama-3-8b", {"group_size": 128, "symmetric": True}, WITH_A_BUDGET),
}


@pytest.mark.parametrize("rows", [4, 12])
@pytest.mark.parametrize("kind", EARLY)
def test_xla_reads_nothing_that_a_kernel_wrote_which_signals(kind, rows, gpus, monkeypatch):
    """Once XLA has fused, copied and scheduled, too; and weights that are read early are arguments still.

    Of 12 rows no layer makes whole tiles: the pass did.
    """
    monkeypatch.setattr(loop_settings, "_FEW_ROWS", rows)  # also where it does not pay
    monkeypatch.setattr(jax, "__version_info__", max(jax.__version_info__, (0, 12, 0)))  # with Mosaic kernels as well
    monkeypatch.setattr(device_graphs, "_is_known", lambda *_: True)
    preset, quantization, plan = EARLY[kind]
    config, quantization = dataclasses.replace(PRESETS[preset], num_layers=LAYERS), QuantConfig(**quantization)
    options = {"quantization": quantization, "formats": None, "dtype": jnp.bfloat16, "scan_layers": False}
    decoder = abstract_decoder(config, **options)
    decoder.kv = KV_INT8 if "int8" in kind else decoder.kv
    graph, state = nnx.split(decoder)
    place = jax.sharding.SingleDeviceSharding(gpus[0])
    state = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=place), state)
    described = jax.sharding.AbstractDevice(device_kind=gpus[0].device_kind, num_cores=132, platform="cuda")
    axis_types = (jax.sharding.AxisType.Auto,)
    mesh = jax.sharding.AbstractMesh((1,), ("x",), axis_types=axis_types, abstract_device=described)
    with jax.sharding.use_abstract_mesh(mesh):
        shape = Shape.of(plan, rows=rows, capacity=CAPACITY)
        text = Programs(nnx.merge(graph, state)).lower_loop(plan, shape).compile().as_text()
    signalled, others, read_early = _behind_signals(text)
    assert "padded_rows" not in text
    assert signalled > 10 * LAYERS
    assert not others
    assert set(read_early) <= {"get-tuple-element"}  # of the loop's arguments
    assert bool(read_early) == (kind != "triton")


_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?([\w.\-]+) = (.*?) ([\w\-]+)\((.*)$")


def _behind_signals(text: str) -> tuple[int, list[str], list[str]]:
    """Kernels that signal, instructions of XLA's that read what these wrote, and whence Mosaic's 4-bit weights are."""
    signalled, others, read_early = 0, [], []
    made: dict[str, tuple[str, str, list[str]]] = {}
    behind: set[str] = set()
    for line in text.splitlines():
        if (found := _INSTRUCTION.match(line)) is None:
            behind = behind if "->" not in line else set()  # another computation
            continue
        name, shape, op, rest = found.groups()
        operands = re.findall(r"%([\w.\-]+)", rest.split("), ")[0])
        made[name] = shape, op, operands
        reads = not behind.isdisjoint(operands)
        if op == "custom-call" and ("xla.gpu.triton" in line or "mosaic" in line):
            if SIGNAL in line:
                signalled += 1
                behind.add(name)
            for operand in operands if "mosaic" in line else ():
                while made[operand][1] == "bitcast":
                    [operand] = made[operand][2]
                if made[operand][0].startswith("u8["):
                    read_early.append(made[operand][1])
        elif op in ("get-tuple-element", "bitcast", "tuple"):
            behind |= {name} if reads else set()
        elif reads:
            others.append(line)
    return signalled, others, read_early


ADA = """
  shared_memory_per_block_optin: 101376 shared_memory_per_core: 102400 core_count: 58
  cuda_compute_capability { major: 8 minor: 9 }
"""


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32], ids=["bf16", "f32"])
def test_kernels_of_prompts_and_rounded_weights_fit_the_shared_memory_of_an_ada_gpu(dtype, monkeypatch):
    """XLA refuses what does not fit: 99 KB, of which the tiles for many rows and large heads take most."""
    config = re.sub(r"shared_memory_per_\w+_optin: \d+|shared_memory_per_core: \d+|core_count: \d+", "", H200)
    config = re.sub(r"cuda_compute_capability \{.*?\}", ADA, config).replace("H200", "L4")
    devices = topologies.get_topology_desc(platform="cuda", target_config=config, topology="1x1x1").devices
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "local_devices", lambda *_, **__: list(devices))
    mesh, here = Mesh(np.array(devices), ("x",)), jax.sharding.PartitionSpec()

    def compile_for_it(kernel, *arrays):
        sharding = jax.sharding.NamedSharding(mesh, here)
        arrays = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding), arrays)
        program = jax.shard_map(kernel, mesh=mesh, in_specs=here, out_specs=here, check_vma=False)
        jax.jit(program).trace(*arrays).lower().compile()

    def array(*shape, dtype=dtype):
        return jax.ShapeDtypeStruct(shape, dtype)

    multiply = functools.partial(w4a16_triton.w4a16_matmul, prefill=True)
    for k, n, group_size, symmetric in ((576, 3072, 32, False), (2048, 2048, 128, True), (576, 576, 576, False)):
        compile_for_it(multiply, array(512, k), abstract_weight(k, n, group_size, symmetric))
    compile_for_it(multiply, array(512, 2048), abstract_nested_weight(2048, 2048, 64, False))
    for k, n, group_size in ((576, 3072, 32), (1536, 576, 32), (576, 48, 32), (576, 576, 576), (14336, 4096, 32)):
        for rows in (1, 17, 256):  # of new tokens, whose tiles are up to as high as those of prompts
            compile_for_it(w4a16_triton.w4a16_matmul, array(rows, k), abstract_weight(k, n, group_size, False))
    for head_dim in (64, 128, 256):
        query, cache = array(1, 512, 8, head_dim), array(1, 2048, 2, head_dim)
        attend = lambda q, k, v, starts: prefill_triton.prefill_attention(q, k, v, None, starts, window=None)  # noqa: E731
        compile_for_it(attend, query, cache, cache, array(1, dtype=jnp.int32))
        if int8_prefill_triton.obstacle(head_dim, dtype) is not None:
            continue
        of_int8 = jax.eval_shape(
            functools.partial(Int8Cache.zeros, batch=1, capacity=2048, num_kv_heads=2, head_dim=head_dim, dtype=dtype)
        )
        attend = functools.partial(int8_prefill_triton.prefill_attention_int8, window=None)
        pieces, table = (array(16, 32, 8, head_dim), array(16, 32, 2 * head_dim)), array(16, dtype=jnp.int32)
        compile_for_it(attend, *pieces, of_int8, table, table)
