"""No product within a kernel depends on ``jax.default_matmul_precision``, which a decoder in float32 raises around it.

Mosaic refuses the highest precision for operands of 8 and 16 bits on TPUs. Triton takes any, and heeds it for float32
alone. Kernels are traced and lowered; neither a TPU, a GPU nor libtpu is needed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from pallas_kernels import QuantizedActivation, dispatch, upper_nibbles, w4a4_matmul, w4a16_matmul
from pallas_kernels.arrays.weight import Layout
from pallas_kernels.dispatch import TPU, TRITON, operations
from pallas_kernels.w4a16_matmul import gpu_mosaic as w4a16_mosaic
from qspec_jax.inspection.kernel_case import DEMO, LLAMA_8B, KernelCase
from qspec_jax.inspection.kernel_cases import kernel_cases
from tests.pallas_kernels.test_cuda_lowering import (
    KERNEL_CALL,
    abstract_nested_weight,
    abstract_weight,
    array,
    cuda_program,
)
from tests.pallas_kernels.tpu_cases import DEVICE_KINDS, described_tpu, tpu_program

EXACT, DEFAULT = ((precision, precision) for precision in (lax.Precision.HIGHEST, lax.Precision.DEFAULT))
MULTIPLY = {"matmul", "attention", "hadamard"}  # in the names of operations whose kernels do


def cases_of(backend: str) -> list[KernelCase]:
    """The calls of the self-test in float32 with products in a kernel of a backend, and its LM head of bfloat16."""
    cases = [case for case in kernel_cases(DEMO, "float32") if any(word in case.op for word in MULTIPLY)]
    cases = [case for case in cases if case.function not in ("float_matmul", "choose_blocks")]
    cases += [case for case in kernel_cases(LLAMA_8B, "bfloat16") if case.op == "float_matmul"]
    return [case for case in cases if backend in operations()[case.op].modules]


def products(function: Callable[..., Any], *args: Any) -> list[tuple[Any, set[str]]]:
    """Of each product within the kernels of a call: its precision, and the dtypes that it multiplies."""
    return list(_products(jax.make_jaxpr(function)(*args).jaxpr, in_kernel=False))


def _products(jaxpr: Any, *, in_kernel: bool) -> Iterator[tuple[Any, set[str]]]:
    for equation in jaxpr.eqns:
        if in_kernel and equation.primitive.name == "dot_general":
            yield equation.params["precision"], {one.aval.dtype.name for one in equation.invars}
        for value in jax.tree.leaves(equation.params, is_leaf=lambda value: hasattr(value, "jaxpr")):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from _products(inner, in_kernel=in_kernel or equation.primitive.name == "pallas_call")


def assert_each_says_its_own(found: list[tuple[Any, set[str]]]) -> None:
    assert found
    for precision, dtypes in found:
        assert precision == (EXACT if "float32" in dtypes else DEFAULT), dtypes


@pytest.mark.parametrize("case", cases_of(TPU), ids=lambda case: f"{case.function}-{case.shape}")
def test_each_product_of_a_tpu_kernel_says_its_own_precision(case):
    """The highest one of float32, as in the reference; that of others is exact without."""
    operands = jax.eval_shape(case.operands)
    with described_tpu():
        assert_each_says_its_own(products(lambda *operands: case.call(operands, TPU), *operands))


@pytest.mark.parametrize("generation", DEVICE_KINDS)
def test_so_do_those_of_nested_weights_and_asymmetric_activations(generation):
    weight, per_group = abstract_nested_weight(576, 960, 32, False), array(4, 18, dtype=jnp.float32)
    codes = QuantizedActivation(array(4, 576, dtype=jnp.int8), per_group, per_group, bits=4)
    with described_tpu(generation):
        found = products(w4a16_matmul, array(4, 576, dtype=jnp.float32), weight)
        found += products(lambda x, w: w4a4_matmul(x, w, dtype=jnp.float32), codes, upper_nibbles(weight))
    assert_each_says_its_own(found)
    integers = "bfloat16" if generation == "7x" else "int8"
    assert set.union(*(dtypes for _, dtypes in found)) == {"bfloat16", "float32", integers}


def test_a_tpu_kernel_is_the_same_under_any_default():
    """As far as lowering goes, which compares what Mosaic gets."""
    weight, x = abstract_weight(576, 960, 32, False), array(4, 576, dtype=jnp.float32)
    program = tpu_program(w4a16_matmul, x, weight)
    with jax.default_matmul_precision("highest"):
        assert tpu_program(w4a16_matmul, x, weight) == program


@pytest.mark.parametrize("case", cases_of(TRITON), ids=lambda case: f"{case.function}-{case.shape}")
def test_a_default_reaches_no_float32_within_a_triton_kernel(case, monkeypatch):
    """Products of 8 and 16 bits may leave theirs open: what they then get says how to multiply float32."""
    monkeypatch.setattr(dispatch, "_platform_obstacle", lambda *_: None)
    operands, call = jax.eval_shape(case.operands), lambda *operands: case.call(operands, TRITON)
    found = products(call, *operands)
    assert found
    assert all(precision == EXACT for precision, dtypes in found if "float32" in dtypes)
    if any(precision is None for precision, _ in found):
        with jax.default_matmul_precision("highest"):
            assert KERNEL_CALL in cuda_program(call, *operands)


def test_a_mosaic_gpu_kernel_is_the_same_under_any_default():
    weight, x = abstract_weight(4096, 6144, 128, True, Layout.WGMMA), array(16, 4096, dtype=jnp.bfloat16)
    program = cuda_program(w4a16_mosaic.w4a16_matmul, x, weight)
    with jax.default_matmul_precision("highest"):
        assert cuda_program(w4a16_mosaic.w4a16_matmul, x, weight) == program
