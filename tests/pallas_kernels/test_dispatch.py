"""Contracts of the implementation names."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import (
    Layout,
    QuantizedWeight,
    available_implementations,
    best_layout,
    best_layout_for_codes,
    decode_attention,
    float_matmul,
    prefill_attention,
    quantize_activations,
    rms_norm,
    rms_norm_quantize,
    rotate_and_write,
    swiglu,
    swiglu_quantize,
    w4a4_matmul,
    w4a4_swiglu_quantize,
    w4a16_matmul,
    w4a16_swiglu,
    with_layout,
)
from pallas_kernels.dispatch import BACKENDS, IMPLEMENTATIONS, Backend, Implementations, interpreted, order_of_trial
from tests.pallas_kernels.kernel_cases import random_rows, random_weight

pytestmark = pytest.mark.newest_jax

on_cpu = pytest.mark.skipif(jax.default_backend() != "cpu", reason="asks what a CPU answers")


def calls(implementation):
    weight, x = random_weight(32, 128, 64, symmetric=True), random_rows(2, 128)
    codes, gain = quantize_activations(x, bits=8), random_rows(128)
    heads, cache, lengths = random_rows(1, 2, 4, 16), random_rows(1, 8, 1, 16), jnp.asarray([3], jnp.int32)
    angles = random_rows(1, 2, 8)
    named = {"bits": 8, "implementation": implementation}
    return {
        "w4a16_matmul": lambda: w4a16_matmul(x, weight, implementation=implementation),
        "w4a4_matmul": lambda: w4a4_matmul(codes, weight, dtype=x.dtype, implementation=implementation),
        "w4a16_swiglu": lambda: w4a16_swiglu(x, weight, implementation=implementation),
        "w4a4_swiglu_quantize": lambda: w4a4_swiglu_quantize(codes, weight, dtype=x.dtype, **named).codes,
        "float_matmul": lambda: float_matmul(x, random_rows(32, 128), implementation=implementation),
        "quantize_activations": lambda: quantize_activations(x, **named).codes,
        "rms_norm": lambda: rms_norm(x, gain, epsilon=1e-5, implementation=implementation),
        "rms_norm_quantize": lambda: rms_norm_quantize(x, gain, epsilon=1e-5, **named).codes,
        "swiglu": lambda: swiglu(x, implementation=implementation),
        "swiglu_quantize": lambda: swiglu_quantize(x, **named).codes,
        "decode_attention": lambda: decode_attention(heads, cache, cache, lengths, implementation=implementation),
        "prefill_attention": lambda: prefill_attention(
            heads, cache, cache, lengths, lengths, implementation=implementation
        ),
        "rotate_and_write": lambda: rotate_and_write(
            heads, angles, angles, cache, cache, lengths, implementation=implementation
        )[0],
    }


OPS = (
    "w4a16_matmul",
    "w4a4_matmul",
    "w4a16_swiglu",
    "w4a4_swiglu_quantize",
    "float_matmul",
    "quantize_activations",
    "rms_norm",
    "rms_norm_quantize",
    "swiglu",
    "swiglu_quantize",
    "decode_attention",
    "prefill_attention",
    "rotate_and_write",
)


@on_cpu
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(
    ("name", "device"), [("triton", "an NVIDIA GPU"), ("mosaic", "an NVIDIA GPU"), ("tpu", "a TPU")]
)
def test_a_named_implementation_runs_or_raises(op, name, device):
    with pytest.raises(NotImplementedError) as error:
        calls(name)[op]()
    assert str(error.value) == f"{op}: implementation '{name}' needs {device}; this is cpu; use 'reference' or None"


@on_cpu
def test_kernels_are_those_of_32_bits_where_jax_has_64():
    """Their numbers would be int64 otherwise, which Pallas divides by none of 32 bits."""
    x, weight = random_rows(3, 576, dtype=jnp.bfloat16), random_weight(32, 576, 32, symmetric=False)
    with interpreted():
        expected = w4a16_matmul(x, weight, implementation="triton")
        with jax.enable_x64(True):
            found = w4a16_matmul(x, weight, implementation="triton")
    assert found.dtype == expected.dtype
    np.testing.assert_array_equal(found.astype(np.float32), expected.astype(np.float32))


@pytest.mark.parametrize("op", OPS)
def test_an_unknown_name_lists_the_known_ones(op):
    with pytest.raises(
        ValueError, match=rf"{op}: unknown implementation 'cuda'; use one of triton, mosaic, tpu, reference"
    ):
        calls("cuda")[op]()


@on_cpu
@pytest.mark.parametrize("op", OPS)
def test_none_works_everywhere(op):
    np.testing.assert_array_equal(jax.jit(calls(None)[op])(), jax.jit(calls("reference")[op])())


def test_available_implementations_are_listed_in_the_order_of_trial():
    assert available_implementations("cpu") == ("reference",)
    assert available_implementations("tpu") == ("tpu", "reference")
    assert available_implementations("cuda") == ("triton", "mosaic", "reference")
    assert available_implementations()[-1] == "reference"


@pytest.fixture
def any_platform(monkeypatch):
    monkeypatch.setattr("pallas_kernels.dispatch._platform_obstacle", lambda name, platform: None)


def fits():
    return None


def unfit():
    return "needs N to be a multiple of 16; this is 24"


@pytest.fixture
def op_with(monkeypatch):
    """Makes an operation of modules by name, each an ``obstacle``, or None for one that cannot be imported."""

    def make(**obstacles):
        for name, obstacle in {**obstacles, "reference": fits}.items():
            module = None if obstacle is None else SimpleNamespace(name=name, obstacle=obstacle)
            monkeypatch.setitem(sys.modules, f"pallas_kernels.op.{name}", module)
        implementations = Implementations("pallas_kernels.op", {name: name for name in obstacles})
        return lambda name, **options: implementations.select(name, lambda module: module.obstacle(), **options).name

    return make


def test_an_obstacle_in_the_shapes_is_told_only_where_the_platform_fits(any_platform, op_with):
    assert op_with(triton=fits)(None) == "triton"
    select = op_with(triton=unfit)
    assert select(None) == "reference"
    with pytest.raises(NotImplementedError, match=r"op: implementation 'triton' needs N .* 24; use 'reference'"):
        select("triton")


def test_triton_is_first_and_mosaic_where_triton_cannot_serve_or_be_imported(any_platform, op_with):
    both = op_with(triton=fits, mosaic=fits)
    assert (both(None), both("mosaic"), both("reference")) == ("triton", "mosaic", "reference")
    assert op_with(triton=unfit, mosaic=fits)(None) == "mosaic"
    assert op_with(triton=None, mosaic=fits)(None) == "mosaic"
    assert op_with(triton=None, mosaic=None)(None) == "reference"
    with pytest.raises(NotImplementedError, match="op: implementation 'mosaic' does not exist for this operation"):
        op_with(triton=fits)("mosaic")


def test_a_large_weight_takes_mosaic_first_and_whoever_serves_it_else(any_platform, op_with):
    large = order_of_trial(4096, 4096)
    assert (order_of_trial(3072, 576)[0], large[0]) == ("triton", "mosaic")
    assert sorted(large) == sorted(IMPLEMENTATIONS)
    assert op_with(triton=fits, mosaic=unfit)(None, order=large) == "triton"
    assert op_with(triton=fits, mosaic=None)(None, order=large) == "triton"
    both = op_with(triton=fits, mosaic=fits)
    assert (both(None, order=large), both("triton", order=large)) == ("mosaic", "triton")


@on_cpu
def test_a_new_backend_is_a_row_of_the_table_a_file_and_an_entry(monkeypatch):
    """The row is once for all operations; no other function needs to know the name."""
    file = SimpleNamespace(
        LAYOUT=Layout.WGMMA,
        obstacle=lambda dtype, weight: None if weight.layout is Layout.WGMMA else "needs tiles",
        w4a16_matmul=lambda x, weight, *, dtype: jnp.full((*x.shape[:-1], weight.num_outputs), 7, x.dtype),
    )
    monkeypatch.setitem(sys.modules, "pallas_kernels.w4a16_matmul.npu", file)
    implementations = sys.modules["pallas_kernels.w4a16_matmul"]._IMPLEMENTATIONS
    monkeypatch.setitem(implementations.modules, "npu", "pallas_kernels.w4a16_matmul.npu")
    monkeypatch.setitem(BACKENDS, "npu", Backend(("npu",), "an NPU"))
    weight, x = random_weight(64, 256, 64, symmetric=True), random_rows(2, 256)

    with pytest.raises(NotImplementedError, match="w4a16_matmul: implementation 'npu' needs an NPU; this is cpu; use"):
        w4a16_matmul(x, weight, implementation="npu")
    with pytest.raises(
        ValueError, match="unknown implementation 'cuda'; use one of triton, mosaic, tpu, npu, reference"
    ):
        w4a16_matmul(x, weight, implementation="cuda")
    assert available_implementations("npu") == ("npu", "reference")

    monkeypatch.setattr(jax, "default_backend", lambda: "npu")
    with pytest.raises(NotImplementedError, match="w4a16_matmul: implementation 'npu' needs tiles; use 'reference'"):
        w4a16_matmul(x, weight, implementation="npu")
    assert best_layout(weight, x.dtype) is best_layout(weight, x.dtype, implementation="npu") is Layout.WGMMA
    tiled = with_layout(weight, Layout.WGMMA)
    assert w4a16_matmul(x, tiled).tolist() == w4a16_matmul(x, tiled, implementation="npu").tolist() == [[7] * 64] * 2
    with pytest.raises(NotImplementedError, match="rms_norm: implementation 'npu' does not exist for this operation"):
        rms_norm(x, x[0], epsilon=1e-5, implementation="npu")
    np.testing.assert_array_equal(
        rms_norm(x, x[0], epsilon=1e-5), rms_norm(x, x[0], epsilon=1e-5, implementation="reference")
    )


@pytest.mark.parametrize(
    ("name", "capability", "told"),
    [
        ("triton", "7.5", "needs an NVIDIA GPU of compute capability 8.0 or newer; this one has 7.5"),
        ("triton", "8.0", None),
        ("triton", "12.0", None),
        ("mosaic", "8.9", "needs an NVIDIA GPU of compute capability 9.x (Hopper); this one has 8.9"),
        ("mosaic", "9.0", None),
        ("mosaic", "10.0", "needs an NVIDIA GPU of compute capability 9.x (Hopper); this one has 10.0"),
        ("triton", "rocm", "needs an NVIDIA GPU; this is an AMD GPU"),
    ],
)
def test_a_device_is_examined_by_its_compute_capability(monkeypatch, op_with, name, capability, told):
    version = "rocm 60300" if capability == "rocm" else "cuda 13000"
    device = SimpleNamespace(client=SimpleNamespace(platform_version=version), compute_capability=capability)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "local_devices", lambda: [device])
    select = op_with(**{name: fits})
    assert (name in available_implementations()) == (told is None)
    assert select(None) == ("reference" if told else name)
    if told is None:
        assert select(name) == name
        return
    with pytest.raises(NotImplementedError) as error:
        select(name)
    assert str(error.value) == f"op: implementation '{name}' {told}; use 'reference' or None"


def test_a_device_of_a_mesh_is_examined_as_well(monkeypatch):
    """In a program of several devices JAX describes them, as it does those that are not there."""
    client = SimpleNamespace(platform_version="cuda 13000")
    ada = SimpleNamespace(client=client, compute_capability="8.9", device_kind="NVIDIA L4")
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "local_devices", lambda: [ada])

    def available(kind):
        described = jax.sharding.AbstractDevice(device_kind=kind, num_cores=None, platform="gpu")
        mesh = SimpleNamespace(abstract_device=described)
        with monkeypatch.context() as patch:
            patch.setattr(jax.sharding, "get_abstract_mesh", lambda: mesh)
            return available_implementations()

    assert available(ada.device_kind) == ("triton", "reference")
    assert available("NVIDIA H100 80GB HBM3") == ("triton", "mosaic", "reference")


@on_cpu
def test_a_backend_that_cannot_be_imported_is_passed_over(any_platform, monkeypatch):
    """JAX has deprecated the Triton backend, and its Mosaic GPU interface changes."""
    weight, x = random_weight(64, 256, 64, symmetric=True), random_rows(2, 256)
    for name in ("gpu_triton", "gpu_mosaic", "tpu"):
        monkeypatch.setitem(sys.modules, f"pallas_kernels.w4a16_matmul.{name}", None)
    expected = w4a16_matmul(x, weight, implementation="reference")
    np.testing.assert_array_equal(w4a16_matmul(x, weight), expected)
    with pytest.raises(NotImplementedError, match="w4a16_matmul: implementation 'mosaic' cannot be imported"):
        w4a16_matmul(x, weight, implementation="mosaic")


@pytest.mark.parametrize(
    ("shape", "group_size", "for_rows", "for_codes_of_a_token"),
    [
        ((4096, 1024), 128, Layout.WGMMA, Layout.WGMMA),
        ((4096, 1024), 32, Layout.WGMMA, Layout.PLANES),  # the integer kernel has no such groups
        ((256, 512), 128, Layout.PLANES, Layout.PLANES),  # small
    ],
)
def test_the_best_layout_is_that_of_the_kernel_that_none_takes(
    any_platform, shape, group_size, for_rows, for_codes_of_a_token
):
    pytest.importorskip("pallas_kernels.backends.mosaic.registers", exc_type=ImportError)
    n, k = shape
    per_group = jnp.zeros((k // group_size, n), jnp.float16)
    weight = QuantizedWeight(jnp.zeros((n, k // 2), jnp.uint8), per_group)
    assert best_layout(weight, jnp.bfloat16) is for_rows
    assert best_layout(weight, jnp.float32) is Layout.PLANES
    assert best_layout_for_codes(weight, symmetric=True, num_groups=1) is for_codes_of_a_token
    assert best_layout_for_codes(weight, symmetric=False, num_groups=k // 32) is Layout.PLANES
    assert best_layout(weight, jnp.bfloat16, implementation="mosaic") is Layout.WGMMA
    assert best_layout(weight, jnp.bfloat16, implementation="triton") is Layout.PLANES
    wide = QuantizedWeight(weight.packed, per_group.astype(jnp.float32))
    assert best_layout(wide, jnp.bfloat16) is Layout.PLANES
