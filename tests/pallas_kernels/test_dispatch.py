"""Contracts of the implementation names."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from pallas_kernels import available_implementations, quantize_activations, w4a4_matmul, w4a16_matmul
from pallas_kernels.dispatch import select_implementation
from tests.pallas_kernels.kernel_cases import random_rows, random_weight

on_cpu = pytest.mark.skipif(jax.default_backend() != "cpu", reason="asks what a CPU answers")


def calls(implementation):
    weight, x = random_weight(32, 128, 64, symmetric=True), random_rows(2, 128)
    codes = quantize_activations(x, bits=8)
    return {
        "w4a16_matmul": lambda: w4a16_matmul(x, weight, implementation=implementation),
        "w4a4_matmul": lambda: w4a4_matmul(codes, weight, dtype=x.dtype, implementation=implementation),
        "quantize_activations": lambda: quantize_activations(x, bits=8, implementation=implementation).codes,
    }


OPS = ("w4a16_matmul", "w4a4_matmul", "quantize_activations")


@on_cpu
@pytest.mark.parametrize("op", OPS)
def test_a_named_implementation_runs_or_raises(op):
    with pytest.raises(NotImplementedError) as error:
        calls("triton")[op]()
    assert str(error.value) == (
        f"{op}: implementation 'triton' needs an NVIDIA GPU; this is cpu; use 'reference' or None"
    )


@pytest.mark.parametrize("op", OPS)
def test_an_unknown_name_lists_the_known_ones(op):
    with pytest.raises(ValueError, match=rf"{op}: unknown implementation 'cuda'; use one of triton, reference"):
        calls("cuda")[op]()


@on_cpu
@pytest.mark.parametrize("op", OPS)
def test_none_works_everywhere(op):
    np.testing.assert_array_equal(calls(None)[op](), calls("reference")[op]())


def test_available_implementations_are_listed_best_first():
    assert available_implementations("cpu") == ("reference",)
    assert available_implementations("tpu") == ("reference",)
    assert available_implementations("cuda") == ("triton", "reference")
    assert available_implementations()[-1] == "reference"


def test_an_obstacle_in_the_shapes_is_told_only_where_the_platform_fits(monkeypatch):
    monkeypatch.setattr("pallas_kernels.dispatch._platform_obstacle", lambda name, platform: None)
    unfit = lambda: "needs N to be a multiple of 16; this is 24"  # noqa: E731
    assert select_implementation("op", None, triton_obstacle=lambda: None) == "triton"
    assert select_implementation("op", None, triton_obstacle=unfit) == "reference"
    with pytest.raises(NotImplementedError, match=r"op: implementation 'triton' needs N .* 24; use 'reference'"):
        select_implementation("op", "triton", triton_obstacle=unfit)
