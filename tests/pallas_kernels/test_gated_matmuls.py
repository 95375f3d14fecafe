"""Contracts of the matmuls that gate their outputs which need no GPU; their bits are those of tests/gpu."""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import (
    Layout,
    QuantizedActivation,
    dispatch,
    quantize_activations,
    swiglu,
    swiglu_quantize,
    upper_nibbles,
    w4a4_matmul,
    w4a4_swiglu_quantize,
    w4a4_swiglu_quantize_is_fused,
    w4a16_matmul,
    w4a16_swiglu,
    w4a16_swiglu_is_fused,
)
from pallas_kernels.backends import gating
from pallas_kernels.backends.early_launch import early_launch
from pallas_kernels.backends.mosaic import matmul as hopper
from pallas_kernels.backends.mosaic import pipeline as pipelines
from pallas_kernels.swiglu import gpu_triton as swiglu_triton
from pallas_kernels.w4a4_swiglu_quantize import gpu_mosaic as w4a4_mosaic
from pallas_kernels.w4a16_matmul import gpu_mosaic as matmul_mosaic
from pallas_kernels.w4a16_swiglu import gpu_mosaic as w4a16_mosaic
from tests.pallas_kernels.kernel_cases import newest_jax_by_feature, random_rows, random_weight
from tests.pallas_kernels.test_cuda_lowering import (
    abstract_nested_weight,
    abstract_weight,
    array,
    cuda_program,
    described_gpu,
)

# (K, N, group size, symmetric): of Llama 3 8B, Llama 2 7B, Llama 3.2 1B.
GATE_UP = (4096, 28672, 128, True)
SHAPES = [GATE_UP, (4096, 28672, 128, False), (4096, 22016, 4096, True), (2048, 16384, 32, False)]
ROWS = (1, 8, 32, 64)
FORMATS = [(jnp.bfloat16, 4), (jnp.float16, 4), (jnp.bfloat16, 8)]
CASES = [  # every other number of rows with each shape
    (shape, num_rows, *FORMATS[(index + place // 2) % 3])
    for index, shape in enumerate(SHAPES)
    for place, num_rows in enumerate(ROWS)
    if (index + place) % 2 == 0
]
SETTINGS = {"bits": 8, "symmetric": True, "clip_ratio": 1.0, "outlier_groups": 0, "layout": Layout.WGMMA}


def codes_for(num_rows, k):
    codes, scale = array(num_rows, k, dtype=jnp.int8), array(num_rows, 1, dtype=jnp.float32)
    return QuantizedActivation(codes, scale, None, bits=8, layout=Layout.WGMMA)


def draft(dtype=jnp.bfloat16, num_outputs=14336):
    return functools.partial(w4a4_mosaic.w4a4_swiglu_quantize, dtype=dtype, group_size=num_outputs, **SETTINGS)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["f32", "bf16"])
def test_without_a_kernel_for_both_they_are_the_two_operations(dtype):
    weight, x = random_weight(64, 128, 64, symmetric=False), random_rows(2, 3, 128, dtype=dtype)
    assert not w4a16_swiglu_is_fused(x, weight)
    expected = jax.jit(lambda x: swiglu(w4a16_matmul(x, weight)))(x)
    for name in (None, dispatch.REFERENCE):
        np.testing.assert_array_equal(jax.jit(lambda x, n=name: w4a16_swiglu(x, weight, implementation=n))(x), expected)
    codes = quantize_activations(x, bits=8)
    assert not w4a4_swiglu_quantize_is_fused(codes, weight, dtype=dtype)
    settings = {"bits": 4, "clip_ratio": 0.9, "layout": Layout.WGMMA}
    expected = jax.jit(lambda x: swiglu_quantize(w4a4_matmul(x, weight, dtype=dtype), **settings))(codes)
    out = jax.jit(lambda x: w4a4_swiglu_quantize(x, weight, dtype=dtype, **settings))(codes)
    jax.tree.map(np.testing.assert_array_equal, out, expected)


def test_bad_operands_are_named():
    weight, x = random_weight(64, 128, 64, symmetric=False), random_rows(2, 128)
    codes = quantize_activations(x, bits=8)
    with pytest.raises(ValueError, match="w4a16_swiglu: "):
        w4a16_swiglu(x[:, :64], weight)
    with pytest.raises(ValueError, match="w4a16_swiglu: x is float8_e4m3fn; use float32, bfloat16 or float16"):
        w4a16_swiglu(x.astype(jnp.float8_e4m3fn), weight)
    odd = jax.tree.map(lambda a: a[..., :63] if a.shape[-1] == 64 and a.ndim == 2 and len(a) == 2 else a[:63], weight)
    with pytest.raises(ValueError, match="w4a16_swiglu: the weight has 63 outputs; use 2 \\* F"):
        w4a16_swiglu(x, odd)
    with pytest.raises(ValueError, match="w4a4_swiglu_quantize: the weight has 63 outputs; use 2 \\* F"):
        w4a4_swiglu_quantize(codes, odd, dtype=x.dtype, bits=8)
    with pytest.raises(ValueError, match="w4a4_swiglu_quantize: bits=3; use 4 or 8"):
        w4a4_swiglu_quantize(codes, weight, dtype=x.dtype, bits=3)


@pytest.mark.parametrize(
    ("shape", "num_rows", "dtype", "bits"),
    newest_jax_by_feature(CASES),
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_they_lower_to_one_kernel_and_that_of_codes(shape, num_rows, dtype, bits):
    weight = (abstract_weight if bits == 4 else abstract_nested_weight)(*shape, Layout.WGMMA)
    x = array(num_rows, shape[0], dtype=dtype)
    assert w4a16_mosaic.obstacle(num_rows, x.dtype, weight) is None
    program = cuda_program(w4a16_mosaic.w4a16_swiglu, x, weight)
    assert f"w{bits}a16_swiglu_mosaic_gpu" in program
    assert not any(f"stablehlo.{op}" in program for op in ("transpose", "gather", "add", "multiply"))
    codes, weight = codes_for(num_rows, shape[0]), upper_nibbles(weight)
    if w4a4_mosaic.obstacle(codes, weight, dtype) is not None:
        assert shape[2] == 32
        return
    program = cuda_program(draft(dtype, shape[1] // 2), codes, weight)
    assert "w4a8_swiglu_mosaic_gpu" in program
    assert program.count("__gpu$xla.gpu.triton") == 1
    with described_gpu():
        out = jax.eval_shape(draft(dtype, shape[1] // 2), codes, weight)
    assert (out.codes.shape, out.scale.shape, out.layout) == ((num_rows, shape[1] // 2), (num_rows, 1), Layout.WGMMA)


def test_every_kernel_gates_by_the_same_instructions():
    """The bits of outputs do not depend on which kernel gated them, and so not on the number of rows."""
    instructions = gating.GATED.replace("$0", "").splitlines()[2:-1]
    names = [one.split()[0] for one in instructions]
    assert {one for one in names if one.startswith(("mul", "add", "fma"))} == {"mul.rn.f32", "add.rn.f32", "fma.rn.f32"}
    assert "rcp.rn.f32" not in names  # of which a part is a call, beside which products run one after the other
    gate_up, x = array(4, 28672, dtype=jnp.bfloat16), array(4, 4096, dtype=jnp.bfloat16)
    programs = [
        cuda_program(swiglu_triton.swiglu, gate_up),
        cuda_program(w4a16_mosaic.w4a16_swiglu, x, abstract_weight(*GATE_UP, Layout.WGMMA)),
    ]
    for program in programs:
        assert all(one in program for one in instructions)


@pytest.mark.newest_jax
def test_what_follows_may_start_early_where_it_could_follow_the_gate():
    weight, x = abstract_weight(*GATE_UP, Layout.WGMMA), array(4, 4096, dtype=jnp.bfloat16)
    for call, rows in ((w4a16_mosaic.w4a16_swiglu, x), (draft(), codes_for(4, 4096))):
        with early_launch():
            early = cuda_program(call, rows, weight)
        assert "griddepcontrol.launch_dependents" in early
        assert "griddepcontrol.wait" in early
        assert "griddepcontrol" not in cuda_program(call, rows, weight)
    with early_launch():  # nothing gates there, and others write what XLA may read
        assert "launch_dependents" not in cuda_program(matmul_mosaic.w4a16_matmul, x, weight)


def scratch_of(num_rows, epilogue):
    k, n, group_size, _ = GATE_UP
    problem = hopper.Problem(num_rows, n, k, k // group_size, jnp.bfloat16, jnp.bfloat16, epilogue=epilogue)
    config = hopper.with_most_stages(matmul_mosaic.default_config(num_rows, n, k), problem, num_columns=1)
    scratch = pipelines._scratch(problem, config, [(jnp.float16, True)], alone=True)
    return config, [one for one in jax.tree.leaves(scratch) if hasattr(one, "dtype")]


@pytest.mark.parametrize("num_rows", [1, 16, 40, 64])
def test_gating_takes_no_shared_memory(num_rows):
    sizes = [
        (config, sum(math.prod(one.shape) * jnp.dtype(one.dtype).itemsize for one in arrays))
        for config, arrays in (scratch_of(num_rows, epilogue) for epilogue in hopper.Epilogue)
    ]
    assert sizes == [sizes[0]] * len(hopper.Epilogue)
    config, _ = sizes[0]
    words = hopper.ROWS * config.block_m // 2  # of a warpgroup's product in 16 bits
    assert 4 * words <= hopper.ROWS * hopper.TILE


def test_what_the_kernels_cannot_serve_is_said():
    weight, bfloat16 = abstract_weight(*GATE_UP, Layout.WGMMA), jnp.dtype(jnp.bfloat16)
    obstacle = functools.partial(w4a16_mosaic.obstacle, 64, bfloat16)
    assert obstacle(weight) is None
    assert w4a16_mosaic.obstacle(65, bfloat16, weight) == "needs 1 to 64 rows; these are 65"
    shared = abstract_weight(4096, 14336, 128, True, Layout.WGMMA)
    assert "whose sums nobody shares; this is 14336" in obstacle(shared)
    uneven = abstract_weight(4096, 28672 + 128, 128, True, Layout.WGMMA)
    assert "to be a multiple of 256; this is 28800" in obstacle(uneven)
    assert "needs a weight in layout 'wgmma'" in obstacle(abstract_weight(*GATE_UP))
    assert "needs bfloat16 or float16 rows" in w4a16_mosaic.obstacle(4, jnp.dtype(jnp.float32), weight)
    codes = codes_for(4, 4096)
    assert w4a4_mosaic.obstacle(codes, weight, jnp.bfloat16) is None
    assert "needs a product in bfloat16 or float16" in w4a4_mosaic.obstacle(codes, weight, jnp.float32)
    assert "needs 1 to 64 rows; these are 65" in w4a4_mosaic.obstacle(codes_for(65, 4096), weight, jnp.bfloat16)
    asymmetric = dataclasses.replace(codes, offset=codes.scale)
    assert "symmetric activations" in w4a4_mosaic.obstacle(asymmetric, weight, jnp.bfloat16)


@pytest.mark.parametrize("k", [256, 4096, 14336])
def test_whoever_lets_a_weight_pass_has_programs_that_hold_gate_and_up(k):
    """Whatever the shape: as many warpgroups for either, none of which shares a sum."""
    served = 0
    for n in range(128, 40_000, 128):
        for num_rows in (1, 33, 64):
            weight = abstract_weight(k, n, 128, True, Layout.WGMMA)
            if hopper.gated_obstacle(num_rows, weight) is None:
                served += 1
                for nested in (False, True):
                    config = matmul_mosaic.default_config(num_rows, n, k, nested=nested)
                    assert (config.slices, config.warpgroups_n % 2, n % config.block_n) == (1, 0, 0)
                    assert n // 2 % (config.block_n // 2) == 0
    assert served > 100
