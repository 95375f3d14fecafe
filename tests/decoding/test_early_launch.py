"""Contracts of which loops have kernels that start early (``pallas_kernels/backends/early_launch.py``)."""

from __future__ import annotations

import dataclasses
import functools
import sys
import types
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import Layout
from pallas_kernels.backends import early_launch
from pallas_kernels.rms_norm import gpu_triton as norm_triton
from pallas_kernels.w4a16_matmul import gpu_mosaic
from pallas_kernels.w4a16_swiglu import gpu_mosaic as gated_mosaic
from pallas_kernels.w4a16_swiglu import w4a16_swiglu_is_fused
from qspec_jax.decoding.loop_settings import launches_early
from qspec_jax.decoding.plan import DecodingPlan
from qspec_jax.model.cache import KV_INT8
from qspec_jax.model.config import ModelConfig, QuantConfig
from qspec_jax.model.decoder import abstract_decoder
from qspec_jax.model.precision import Precision
from qspec_jax.model.view import View
from tests import tiny
from tests.pallas_kernels.test_cuda_lowering import abstract_weight, array

PLAIN = DecodingPlan(Precision.W4A16)
CYCLES = DecodingPlan(Precision.W4A16, Precision.W4A8, 3)
# The smallest sizes of which Mosaic kernels multiply every linear. All layers are alike.
SIZES = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64, "num_hidden_layers": 1}
QWEN_3, QWEN_2 = ({"architectures": [f"Qwen{n}ForCausalLM"], "model_type": f"qwen{n}"} for n in (3, 2))


@pytest.fixture(autouse=True)
def on_hopper(monkeypatch):
    client = types.SimpleNamespace(platform_version="cuda 13000")
    facts = {"compute_capability": "9.0", "device_kind": "NVIDIA H200", "platform": "gpu"}
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "local_devices", lambda: [types.SimpleNamespace(client=client, **facts)])
    monkeypatch.setattr(jax, "__version_info__", (0, 12, 0))


def starts_early(
    plan: DecodingPlan,
    *,
    rows: int = 1,
    kernels: str | None = "mosaic",
    kv: str | None = None,
    dtype: Any = jnp.bfloat16,
    scan_layers: bool = False,
    config: dict[str, Any] | None = None,
    **quantization: Any,
) -> bool:
    """Of a decoder of shapes alone, whose weights are symmetric unless ``quantization`` says otherwise."""
    decoder = abstract_decoder(
        ModelConfig.from_hf({**tiny.BASE_HF_CONFIG, **SIZES, **(config or {})}),
        quantization=QuantConfig(**{"group_size": 128, "symmetric": True, **quantization}),
        formats=None,
        kernels=kernels,
        dtype=dtype,
        scan_layers=scan_layers,
    )
    decoder.kv = kv or decoder.kv
    sizes = {"batch": rows, "capacity": 64, "num_blocks": plan.num_blocks}
    return launches_early(decoder, plan, jax.eval_shape(lambda: decoder.create_cache(**sizes)))


@pytest.mark.parametrize(
    ("plan", "options"),
    {
        "symmetric": (CYCLES, {}),
        "asymmetric": (CYCLES, {"symmetric": False}),  # a kernel sums the codes of activations
        "nested": (DecodingPlan(Precision.W8A16, Precision.W4A8, 3), {"bits": 8}),
        "head in 8 bits": (DecodingPlan(Precision.W4A16, View(activation_bits=8, head_bits=4), 3), {"head_bits": 8}),
        "draft head in 4 bits": (
            DecodingPlan(Precision.W4A16, View(activation_bits=8, head_bits=4), 3),
            {"draft_head": 4},
        ),
        "int8 cache": (CYCLES, {"kv": KV_INT8}),
        "floats verify": (DecodingPlan(Precision.FLOAT, Precision.W4A8, 3), {"keep_floats": True}),
        "triton": (CYCLES, {"kernels": "triton", "group_size": 32, "symmetric": False}),
        "rows that the pass pads": (CYCLES, {"rows": 11}),
        "rows that the pass pads, head in 8 bits": (PLAIN, {"rows": 11, "head_bits": 8}),
        "rows that each matmul pads": (DecodingPlan(Precision.W4A16, Precision.W4A8, 6), {"rows": 9}),
        "biases behind mosaic": (PLAIN, {"config": QWEN_2}),
    }.values(),
    ids=lambda value: str(value)[:40],
)
def test_kernels_start_early_where_our_kernels_alone_read_behind_a_signal(plan, options):
    assert starts_early(plan, **options)


@pytest.mark.parametrize(
    ("plan", "options"),
    {
        "weights cut out of an array": (PLAIN, {"scan_layers": True}),
        "norms of single heads, put together by XLA": (PLAIN, {"config": QWEN_3}),
        "biases behind a kernel that signals": (PLAIN, {"config": QWEN_2, "kernels": "triton"}),
        "more rows than the head serves": (PLAIN, {"rows": 264}),
        "XLA multiplies floats": (DecodingPlan(Precision.FLOAT, Precision.W4A8, 3), {}),
        "XLA multiplies a head of float32": (PLAIN, {"kernels": "triton", "dtype": jnp.float32}),
    }.values(),
    ids=lambda value: str(value)[:40],
)
def test_no_kernel_starts_early_where_xla_reads_behind_a_signal(plan, options):
    assert not starts_early(plan, **options)


@pytest.mark.parametrize(("kernels", "rows", "early"), [("triton", 4, True), ("triton", 5, False), ("mosaic", 5, True)])
def test_many_rows_start_early_for_weights_that_are_read_ahead(kernels, rows, early):
    assert starts_early(PLAIN, kernels=kernels, rows=rows) is early


def test_a_weight_that_the_program_computes_is_not_read_early():
    def computed(x, weight):
        return gpu_mosaic.w4a16_matmul(x, jax.tree.map(lambda a: a + a if a.dtype == "uint8" else a, weight))

    def scaled(x, weight):
        return gpu_mosaic.w4a16_matmul(x, dataclasses.replace(weight, scale=weight.scale * 2))

    x, weight = array(4, 256, dtype=jnp.float16), abstract_weight(256, 256, 128, True, Layout.WGMMA)
    functions = gpu_mosaic.w4a16_matmul, computed, scaled
    with early_launch.early_launch():
        given, *others = (jax.make_jaxpr(function)(x, weight) for function in functions)
        halved = jax.make_jaxpr(lambda x, weight: gpu_mosaic.w4a16_matmul(x / 2, weight))(x, weight)
    assert early_launch.obstacle(given) is None
    assert early_launch.obstacle(halved) is None  # rows may be computed
    for made in others:
        assert "no argument" in early_launch.obstacle(made)


def test_a_matmul_signals_where_it_gates_too():
    """So XLA may add to what a matmul has written, and not to what one has that stands for the gate as well."""
    x, weight = array(4, 4096, dtype=jnp.bfloat16), abstract_weight(4096, 16384, 128, True, Layout.WGMMA)
    with early_launch.early_launch():
        alone, gating = (
            jax.make_jaxpr(lambda x, weight, multiply=multiply: multiply(x, weight) + 1)(x, weight)
            for multiply in (gpu_mosaic.w4a16_matmul, gated_mosaic.w4a16_swiglu)
        )
    assert early_launch.obstacle(alone) is None
    assert "XLA computes add" in early_launch.obstacle(gating)


def test_kernels_in_a_loop_within_a_pass_do_not_signal():
    normalise = functools.partial(norm_triton.rms_norm, gain=jnp.ones(256, jnp.bfloat16), epsilon=1e-5)

    def looped(x):
        return jax.lax.fori_loop(0, 3, lambda _, y: normalise(y), x)

    with early_launch.early_launch():
        once, often = (jax.make_jaxpr(one)(array(4, 256, dtype=jnp.bfloat16)) for one in (normalise, looped))
    assert early_launch.obstacle(once) is None
    assert "within" in early_launch.obstacle(often)


@pytest.mark.parametrize(
    ("version", "kernels", "early"),
    [((0, 12, 0), "mosaic", True), ((0, 11, 2), "mosaic", False), ((0, 11, 2), "triton", True)],
)
def test_before_jax_0_12_only_triton_kernels_start_early(monkeypatch, version, kernels, early):
    """A CUDA graph held a Mosaic kernel as one of its own."""
    monkeypatch.setattr(jax, "__version_info__", version)
    assert starts_early(PLAIN, kernels=kernels) is early


def test_a_jax_without_triton_starts_nothing_early_and_gates_all_rows_alike(monkeypatch):
    """There XLA gates what the kernel that multiplies does not, and its bits are others."""
    told = []

    def ask(x, weight):
        told.append(w4a16_swiglu_is_fused(x, weight))
        return x

    x, weight = array(8, 4096, dtype=jnp.bfloat16), abstract_weight(4096, 28672, 128, True, Layout.WGMMA)
    jax.eval_shape(ask, x, weight)
    assert told == [True]
    assert early_launch.is_supported()
    monkeypatch.setitem(sys.modules, "jax.experimental.pallas.triton", None)
    monkeypatch.delattr("jax.experimental.pallas.triton")
    monkeypatch.delitem(sys.modules, "pallas_kernels.w4a16_swiglu.gpu_mosaic", raising=False)
    monkeypatch.delitem(sys.modules, "pallas_kernels.swiglu.gpu_triton")
    monkeypatch.delattr(sys.modules["pallas_kernels.swiglu"], "gpu_triton")
    assert not early_launch.is_supported()
    jax.eval_shape(lambda *arrays: ask(*arrays), x, weight)
    assert told == [True, False]


@pytest.mark.parametrize(
    ("backend", "version", "capability", "supported"),
    [
        ("gpu", (0, 11, 0), "9.0", True),
        ("gpu", (0, 10, 2), "9.0", False),  # XLA has no kernel wait
        ("gpu", (0, 12, 0), "8.0", False),
        ("gpu", (0, 12, 0), "10.0", False),
        ("cpu", (0, 12, 0), None, False),
    ],
)
def test_kernels_start_early_on_hopper_from_jax_0_11_on(monkeypatch, backend, version, capability, supported):
    device = types.SimpleNamespace(**({} if capability is None else {"compute_capability": capability}))
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    monkeypatch.setattr(jax, "local_devices", lambda: [device])
    monkeypatch.setattr(jax, "__version_info__", version)
    assert early_launch.is_supported() is supported
