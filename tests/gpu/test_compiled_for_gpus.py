"""What XLA makes of programs for NVIDIA GPUs. Its plugin for CUDA compiles for devices that are only described.

So a machine without a GPU can ask, too: with ``JAX_PLATFORMS=cpu``, ``jax-cuda13-plugin`` and ``nvidia-cuda-nvcc``.
"""

from __future__ import annotations

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import Mesh

from qspec_jax.bench.presets import PRESETS
from qspec_jax.decoding import device_graphs
from qspec_jax.decoding.chunks import Shape
from qspec_jax.decoding.plan import DecodingPlan
from qspec_jax.decoding.programs import Programs
from qspec_jax.device.driver import cuda_plugin
from qspec_jax.device.mesh import AXES
from qspec_jax.model.config import QuantConfig
from qspec_jax.model.precision import Precision
from qspec_jax.model.shards import Shards

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


@pytest.mark.parametrize("name", PLANS)
def test_a_pass_sends_two_sums_for_each_layer_and_copies_no_cache(name, gpus, monkeypatch):
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
    assert len(sent) == passes * (2 * LAYERS + 2)
