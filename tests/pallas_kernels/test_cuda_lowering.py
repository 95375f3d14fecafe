"""Every Triton kernel lowers for CUDA at real model shapes, on a machine that needs no GPU."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from pallas_kernels import Layout, PartialSums, QuantizedActivation, QuantizedWeight, upper_nibbles
from pallas_kernels.backends.early_launch import SIGNAL, early_launch
from pallas_kernels.decode_attention import gpu_triton as attention_triton
from pallas_kernels.float_matmul import gpu_triton as float_triton
from pallas_kernels.hadamard import gpu_triton as hadamard_triton
from pallas_kernels.quantize_activations import gpu_triton
from pallas_kernels.rms_norm import gpu_triton as plain_norm_triton
from pallas_kernels.rms_norm_quantize import gpu_triton as norm_triton
from pallas_kernels.rotate_and_write import gpu_triton as rotate_triton
from pallas_kernels.swiglu import gpu_triton as plain_swiglu_triton
from pallas_kernels.swiglu_hadamard import gpu_triton as swiglu_hadamard_triton
from pallas_kernels.swiglu_hadamard_quantize import gpu_triton as swiglu_hadamard_quantize_triton
from pallas_kernels.swiglu_quantize import gpu_triton as swiglu_triton
from pallas_kernels.w4a4_matmul import gpu_triton as w4a4_triton
from pallas_kernels.w4a4_matmul import gpu_triton_sums as sums_triton
from pallas_kernels.w4a16_matmul import gpu_mosaic as w4a16_mosaic
from pallas_kernels.w4a16_matmul import gpu_triton as w4a16_triton
from qspec_jax.device.mesh import MODEL
from qspec_jax.model.collectives import add_up
from tests.pallas_kernels.kernel_cases import DEMO_MODEL, LLAMA_3_8B, newest_jax_by_feature

SHAPES = [(k, n, 32, False) for k, n in DEMO_MODEL]
SHAPES += [(k, n, group_size or k, True) for k, n in LLAMA_3_8B for group_size in (128, 32, None)]
DTYPES = ("bfloat16", "float16", "float32")
KERNEL_CALL = "__gpu$xla.gpu.triton"


def array(*shape: int, dtype: jnp.dtype) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def abstract_weight(
    k: int, n: int, group_size: int, symmetric: bool, layout: Layout = Layout.PLANES
) -> QuantizedWeight:
    per_group, packed = array(k // group_size, n, dtype=jnp.float16), array(n, k // 2, dtype=jnp.uint8)
    return QuantizedWeight(packed, per_group, None if symmetric else per_group, per_group, layout)


def abstract_nested_weight(
    k: int, n: int, group_size: int, symmetric: bool, layout: Layout = Layout.PLANES
) -> QuantizedWeight:
    weight = abstract_weight(k, n, group_size, symmetric, layout)
    return dataclasses.replace(weight, low=weight.packed)


def described_gpu() -> contextlib.AbstractContextManager:
    """A mesh that tells JAX 0.11 and newer which GPU to lower for; 0.10 needs none."""
    if jax.__version_info__ < (0, 11):
        return contextlib.nullcontext()
    device = jax.sharding.AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", num_cores=132, platform="cuda")
    # Auto, as without a mesh: explicit axes are part of a shape, which Pallas forgets where it reduces several axes.
    axis_types = (jax.sharding.AxisType.Auto,)
    mesh = jax.sharding.AbstractMesh((1,), ("x",), axis_types=axis_types, abstract_device=device)
    return jax.sharding.use_abstract_mesh(mesh)


def cuda_program(function, *args) -> str:
    with described_gpu():
        return jax.jit(function).trace(*args).lower(lowering_platforms=("cuda",)).as_text()


def features(shape, *others):
    """What a matmul is lowered from, whatever its size: groups, zero points, and what is not of the weight."""
    k, _, group_size, symmetric = shape
    return "whole row" if group_size == k else group_size, symmetric, *others


@pytest.mark.parametrize(
    ("shape", "num_rows"), newest_jax_by_feature(itertools.product(SHAPES, [1, 64]), features), ids=str
)
def test_w4a16_lowers(shape, num_rows):
    weight = abstract_weight(*shape)
    x = array(num_rows, shape[0], dtype=jnp.bfloat16)
    assert w4a16_triton.obstacle(x.dtype, weight) is None
    assert KERNEL_CALL in cuda_program(w4a16_triton.w4a16_matmul, x, weight)


# Outputs of which 16, 32 and 64 are a tile; a row of a few steps; groups that are no power of two.
ROUNDED = [(576, 48, 32), (576, 3072, 32), (192, 16, 96), (64, 32, 32), (14336, 4096, 32)]


@pytest.mark.newest_jax
@pytest.mark.parametrize("shape", ROUNDED, ids=str)
def test_all_tiles_of_a_weight_that_programs_round_lower(shape):
    k, n, group_size = shape
    weight, tiles_of = abstract_weight(k, n, group_size, False), w4a16_triton.tiles.rounding_config
    assert w4a16_triton._rounds(weight, jnp.dtype(jnp.bfloat16))
    by_tiles = {tiles_of(rows, n, k, 32): rows for rows in (1, 17, 64, 256)}
    for tile, rows in by_tiles.items():
        program = cuda_program(w4a16_triton.w4a16_matmul, array(rows, k, dtype=jnp.bfloat16), weight)
        assert program.count(KERNEL_CALL) == 1
        assert f"grid_x = {n // tile.block_n} : i32, grid_y = {tile.split} : i32" in program


@pytest.mark.newest_jax
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16], ids=["bf16", "f16"])
def test_nested_weights_and_their_upper_nibbles_lower(dtype):
    weight, x = abstract_nested_weight(4096, 6144, 32, True), array(16, 4096, dtype=dtype)
    for one, name in ((weight, "w8a16"), (upper_nibbles(weight), "w4a16")):
        program = cuda_program(w4a16_triton.w4a16_matmul, x, one)
        assert KERNEL_CALL in program
        assert name in program


@pytest.mark.newest_jax
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32], ids=["bf16", "f32"])
@pytest.mark.parametrize("shape", [(576, 3072, 32, False), (896, 896, 896, False), (4096, 6144, 128, True)], ids=str)
def test_tiles_of_prompts_lower_and_leave_nothing_to_add(shape, dtype):
    x, multiply = array(2048, shape[0], dtype=dtype), functools.partial(w4a16_triton.w4a16_matmul, prefill=True)
    assert isinstance(jax.eval_shape(multiply, x, abstract_weight(*shape)), jax.ShapeDtypeStruct)
    assert cuda_program(multiply, x, abstract_weight(*shape)).count(KERNEL_CALL) == 1


@pytest.mark.newest_jax
def test_swiglu_of_partial_sums_lowers_to_one_kernel():
    sums = PartialSums(array(9, 4, 3072, dtype=jnp.float32), jnp.bfloat16)
    settings = {"bits": 8, "group_size": 32, "symmetric": True, "clip_ratio": 1.0, "outlier_groups": 0}
    for compute in (plain_swiglu_triton.swiglu, functools.partial(swiglu_triton.swiglu_quantize, **settings)):
        assert cuda_program(compute, sums).count(KERNEL_CALL) == 1


@pytest.mark.newest_jax
@pytest.mark.parametrize("dtype", [jnp.float16, jnp.float32], ids=["f16", "f32"])
def test_w4a16_lowers_for_other_float_types(dtype):
    weight = abstract_weight(576, 960, 32, False)
    assert KERNEL_CALL in cuda_program(w4a16_triton.w4a16_matmul, array(5, 576, dtype=dtype), weight)


@pytest.mark.newest_jax
@pytest.mark.parametrize(
    ("num_rows", "dtype", "is_kernel"), [(256, "bfloat16", 1), (257, "bfloat16", 0), (257, "float32", 1)]
)
def test_xla_multiplies_a_w4a16_prefill_of_16_bits(num_rows, dtype, is_kernel):
    program = cuda_program(w4a16_triton.w4a16_matmul, array(num_rows, 576, dtype=dtype), abstract_weight(*SHAPES[0]))
    assert program.count(KERNEL_CALL) == is_kernel


@pytest.mark.parametrize(
    ("shape", "grouped", "x_symmetric"),
    newest_jax_by_feature(
        itertools.product(SHAPES, [False, True], [True, False]),
        lambda shape, grouped, x_symmetric: (features(shape), (grouped, x_symmetric)),
    ),
    ids=str,
)
def test_w4a4_lowers(shape, grouped, x_symmetric):
    k, _, group_size, _ = shape
    weight = abstract_weight(*shape)
    per_group = array(4, k // group_size if grouped else 1, dtype=jnp.float32)
    x = QuantizedActivation(array(4, k, dtype=jnp.int8), per_group, None if x_symmetric else per_group, bits=8)
    assert w4a4_triton.obstacle(x, weight) is None
    multiply = functools.partial(w4a4_triton.w4a4_matmul, dtype=jnp.bfloat16)
    assert KERNEL_CALL in cuda_program(multiply, x, weight)
    kernel = str(jax.make_jaxpr(multiply)(x, weight))
    assert "dot_general" in kernel
    assert "reduce_sum" not in kernel  # along a row, threads would have to meet in each step


def quantized_rows(k: int, group_size: int, symmetric: bool, bits: int) -> QuantizedActivation:
    per_group = array(4, k // group_size, dtype=jnp.float32)
    return QuantizedActivation(array(4, k, dtype=jnp.int8), per_group, None if symmetric else per_group, bits=bits)


@pytest.mark.newest_jax
@pytest.mark.parametrize("bits", [4, 8])
def test_the_name_of_an_integer_kernel_says_the_bits_of_its_activations(bits):
    """Profiles show it; the two draft precisions would else be one kernel there."""
    x, weight = quantized_rows(576, 576, True, bits), abstract_weight(*SHAPES[0])
    program = cuda_program(lambda x, w: w4a4_triton.w4a4_matmul(x, w, dtype=jnp.bfloat16), x, weight)
    assert f'name = "w4a{bits}"' in program


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(
    ("group_size", "symmetric", "op"),
    [(576, True, "w4a8"), (32, False, "w4a4"), (32, True, None), (576, False, None), (64, False, None)],
)
def test_the_tuning_tables_know_activations_by_their_scales(group_size, symmetric, op, bits):
    assert w4a4_triton.tuned_op(quantized_rows(576, group_size, symmetric, bits)) == op


def kinds_of_groups(sizes, symmetric, *others):
    """What a quantiser is lowered from, whatever its size."""
    k, group_size, outlier_groups = sizes
    return (group_size == k, k >= 4096), outlier_groups > 0, symmetric, *others


QUANTIZED = [(576, 576, 0), (576, 32, 0), (576, 32, 2), (4096, 4096, 0), (14336, 14336, 0), (4096, 128, 0)]
QUANTIZED += [(14336, 32, 1)]


@pytest.mark.parametrize(
    ("sizes", "symmetric"), newest_jax_by_feature(itertools.product(QUANTIZED, [True, False]), kinds_of_groups), ids=str
)
def test_quantize_activations_lowers(sizes, symmetric):
    k, group_size, outlier_groups = sizes

    def quantize(x):
        return gpu_triton.quantize_activations(
            x, bits=4, group_size=group_size, symmetric=symmetric, clip_ratio=0.9, outlier_groups=outlier_groups
        )

    assert KERNEL_CALL in cuda_program(quantize, array(5, k, dtype=jnp.bfloat16))


PRODUCER_SHAPES = [(576, 576, 0), (576, 32, 2), (1536, 32, 0), (4096, 4096, 0), (14336, 14336, 0), (14336, 32, 1)]
PRODUCER_SHAPES += [(576, 96, 0), (4096, 128, 0)]


@pytest.mark.parametrize(
    ("sizes", "symmetric", "dtype"),
    newest_jax_by_feature(itertools.product(PRODUCER_SHAPES, [True, False], DTYPES), kinds_of_groups),
    ids=str,
)
def test_fused_producers_lower_to_one_kernel_or_two(sizes, symmetric, dtype):
    k, group_size, outlier_groups = sizes
    settings = {"bits": 4, "group_size": group_size, "symmetric": symmetric, "clip_ratio": 0.9}
    settings["outlier_groups"] = outlier_groups
    normalise = functools.partial(norm_triton.rms_norm_quantize, epsilon=1e-5, **settings)
    gate = functools.partial(swiglu_triton.swiglu_quantize, **settings)
    programs = (
        cuda_program(normalise, *(array(*shape, dtype=jnp.dtype(dtype)) for shape in ((5, k), (k,)))),
        cuda_program(gate, array(5, 2 * k, dtype=jnp.dtype(dtype))),
    )
    in_pieces = symmetric and group_size == k >= 4096
    assert [program.count(KERNEL_CALL) for program in programs] == [1, 2 if in_pieces else 1]


@pytest.mark.newest_jax
@pytest.mark.parametrize(("k", "group_size"), [(4096, 4096), (14336, 14336), (4096, 128), (576, 96)], ids=str)
def test_codes_in_the_order_of_a_wgmma_weight_take_no_kernel_more(k, group_size):
    settings = {"bits": 8, "group_size": group_size, "symmetric": True, "clip_ratio": 1.0, "outlier_groups": 0}
    settings["layout"] = Layout.WGMMA
    x = array(5, k, dtype=jnp.bfloat16)
    normalise = functools.partial(norm_triton.add_rms_norm_quantize, epsilon=1e-5, **settings)
    programs = (
        cuda_program(functools.partial(gpu_triton.quantize_activations, **settings), x),
        cuda_program(normalise, x, x, array(k, dtype=jnp.bfloat16)),
        cuda_program(functools.partial(swiglu_triton.swiglu_quantize, **settings), array(5, 2 * k, dtype=jnp.bfloat16)),
    )
    assert [program.count(KERNEL_CALL) for program in programs] == [1, 1, 2 if group_size == k >= 4096 else 1]
    assert not any("transpose" in program or "gather" in program for program in programs)


@pytest.mark.parametrize(
    ("shape", "dtype"),
    newest_jax_by_feature(itertools.product([(1, 14336), (3, 5, 1536), (70000, 18944), (5, 99)], DTYPES)),
    ids=str,
)
def test_swiglu_lowers_to_one_kernel_that_reads_the_halves_in_place(shape, dtype):
    gate_up = array(*shape[:-1], 2 * shape[-1], dtype=jnp.dtype(dtype))
    program = cuda_program(plain_swiglu_triton.swiglu, gate_up)
    assert program.count(KERNEL_CALL) == 1
    assert "stablehlo.slice" not in program
    assert "stablehlo.convert" not in program


# Outputs, inputs: the heads of Llama 3 and of the demo model, an odd number of outputs, one for offsets of 64 bits, an
# odd number of inputs; and other linears of both models.
FLOAT_MATMULS = [
    (128256, 4096, "bfloat16"),
    (49152, 576, "bfloat16"),
    (50257, 768, "float16"),
    (152064, 8192, "bfloat16"),
    (1000, 72, "float16"),
    (4096, 14336, "bfloat16"),
    (28672, 4096, "bfloat16"),
    (960, 576, "float16"),
]


@pytest.mark.parametrize(
    ("sizes", "num_rows"), newest_jax_by_feature(itertools.product(FLOAT_MATMULS, [1, 17, 64, 256])), ids=str
)
def test_float_matmul_lowers(sizes, num_rows):
    n, k, dtype = *sizes[:2], jnp.dtype(sizes[2])
    x, weight = array(num_rows, k, dtype=dtype), array(n, k, dtype=dtype)
    assert float_triton.obstacle(num_rows, dtype) is None
    call = functools.partial(float_triton.float_matmul, dtype=dtype)
    assert cuda_program(call, x, weight).count(KERNEL_CALL) == 1


NORMS = [(1, 576), (64, 4096), (1, 4, 8, 128), (1, 1, 9, 64), (3, 8192), (5, 96)]


@pytest.mark.parametrize(
    ("shape", "dtype"),
    newest_jax_by_feature(
        itertools.product(NORMS, DTYPES), lambda shape, dtype: ((len(shape), shape[-1] > 4096), dtype)
    ),
    ids=str,
)
def test_norms_and_the_sums_before_them_lower_to_one_kernel(shape, dtype):
    x, gain = array(*shape, dtype=jnp.dtype(dtype)), array(shape[-1], dtype=jnp.dtype(dtype))
    settings = {"bits": 8, "group_size": shape[-1], "symmetric": True, "clip_ratio": 1.0, "outlier_groups": 0}
    programs = (
        cuda_program(functools.partial(plain_norm_triton.rms_norm, epsilon=1e-5), x, gain),
        cuda_program(functools.partial(plain_norm_triton.add_rms_norm, epsilon=1e-5), x, x, gain),
        cuda_program(functools.partial(norm_triton.add_rms_norm_quantize, epsilon=1e-5, **settings), x, x, gain),
    )
    assert [program.count(KERNEL_CALL) for program in programs] == [1, 1, 1]


@pytest.mark.newest_jax
@pytest.mark.parametrize("num_parts", [2, 4])
def test_norms_add_partial_sums_without_a_kernel_more(num_parts):
    x, gain = array(1, 1, 4096, dtype=jnp.bfloat16), array(4096, dtype=jnp.bfloat16)
    update = PartialSums(array(num_parts, 1, 1, 4096, dtype=jnp.float32), jnp.dtype(jnp.bfloat16))
    settings = {"bits": 8, "group_size": 4096, "symmetric": True, "clip_ratio": 1.0, "outlier_groups": 0}
    programs = (
        cuda_program(functools.partial(plain_norm_triton.add_rms_norm, epsilon=1e-5), x, update, gain),
        cuda_program(functools.partial(norm_triton.add_rms_norm_quantize, epsilon=1e-5, **settings), x, update, gain),
    )
    assert [program.count(KERNEL_CALL) for program in programs] == [1, 1]
    assert not any("stablehlo.add" in program or "stablehlo.convert" in program for program in programs)


@pytest.mark.parametrize(
    ("k", "dtype"),
    newest_jax_by_feature(
        [*((1536, dtype) for dtype in DTYPES), *((k, "bfloat16") for k in (14336, 11008, 18944))],
        lambda k, dtype: (k == 1536, dtype),
    ),
    ids=str,
)
def test_hadamard_lowers(k, dtype):
    assert hadamard_triton.obstacle(k) is None
    assert cuda_program(hadamard_triton.hadamard, array(5, k, dtype=jnp.dtype(dtype))).count(KERNEL_CALL) == 1


@pytest.mark.newest_jax
@pytest.mark.parametrize(
    ("k", "block", "dtype", "num_kernels"),
    [
        (1536, 1536, jnp.float32, 1),
        (14336, 14336, jnp.bfloat16, 2),
        (14336, 32, jnp.float16, 1),
        (28672, 28672, jnp.bfloat16, 2),
    ],
    ids=str,
)
def test_swiglu_hadamard_lowers(k, block, dtype, num_kernels):
    rotate = functools.partial(swiglu_hadamard_triton.swiglu_hadamard, block=block)
    assert cuda_program(rotate, array(5, 2 * k, dtype=dtype)).count(KERNEL_CALL) == num_kernels


@pytest.mark.parametrize(
    ("k", "block", "group_size", "outlier_groups", "symmetric", "num_kernels"),
    newest_jax_by_feature(
        [
            (1536, 1536, 1536, 0, True, 1),
            (1536, 32, 32, 10, False, 1),
            (14336, 14336, 14336, 0, True, 3),
            (14336, 14336, 128, 0, False, 2),
            (14336, 32, 14336, 0, True, 2),
            (14336, 32, 32, 1, False, 2),
            (14336, 32, 32, 0, False, 1),
            (11008, 11008, 11008, 0, True, 3),
            (18944, 18944, 32, 1, False, 3),
            (27648, 27648, 96, 0, True, 3),
            (29568, 29568, 29568, 0, True, 3),
        ],
        lambda k, block, group_size, outlier_groups, symmetric, num_kernels: (
            (block == k, group_size == k, num_kernels),
            outlier_groups > 0,
            symmetric,
        ),
    ),
    ids=str,
)
def test_swiglu_hadamard_quantize_lowers(k, block, group_size, outlier_groups, symmetric, num_kernels):
    settings = {"bits": 8, "group_size": group_size, "symmetric": symmetric, "clip_ratio": 0.9}
    layout = Layout.WGMMA if group_size % 64 == 0 else Layout.PLANES
    rotate = functools.partial(
        swiglu_hadamard_quantize_triton.swiglu_hadamard_quantize,
        block=block,
        outlier_groups=outlier_groups,
        layout=layout,
        **settings,
    )
    assert cuda_program(rotate, array(5, 2 * k, dtype=jnp.bfloat16)).count(KERNEL_CALL) == num_kernels


@pytest.mark.newest_jax
def test_kernels_let_the_next_one_start_early_unless_xla_reads_what_they_write():
    """Pallas must not remove the signal as code without effect, and it is there in no other program."""
    x, gain, gate_up = (array(*shape, dtype=jnp.bfloat16) for shape in ((3, 4096), (4096,), (3, 28672)))
    query, cache, qkv = (array(2, *s, dtype=jnp.bfloat16) for s in ((4, 32, 128), (1024, 8, 128), (4, 48, 128)))
    rotation, lengths = array(2, 4, 64, dtype=jnp.float32), array(2, dtype=jnp.int32)
    settings = {"bits": 8, "symmetric": True, "clip_ratio": 1.0, "outlier_groups": 0}
    whole, norm = {"group_size": 4096, **settings}, {"epsilon": 1e-5}
    narrow, floats, weight = (*(array(n, 576, dtype=jnp.bfloat16) for n in (4, 960)), abstract_weight(*SHAPES[0]))
    codes = quantized_rows(576, 576, True, 8)
    rotate_and_quantize = swiglu_hadamard_quantize_triton.swiglu_hadamard_quantize
    attend = functools.partial(attention_triton.decode_attention, window=None)
    programs = [
        (1, functools.partial(plain_norm_triton.rms_norm, **norm), [x, gain]),
        (1, functools.partial(norm_triton.rms_norm_quantize, **norm, **whole), [x, gain]),
        (1, functools.partial(gpu_triton.quantize_activations, **whole), [x]),
        (1, plain_swiglu_triton.swiglu, [gate_up]),
        (2, functools.partial(swiglu_triton.swiglu_quantize, group_size=14336, **settings), [gate_up]),
        # The transform does not signal, what computes its input and quantises its result does.
        (1, functools.partial(swiglu_hadamard_triton.swiglu_hadamard, block=14336), [gate_up]),
        (0, functools.partial(swiglu_hadamard_triton.swiglu_hadamard, block=32), [gate_up]),
        (2, functools.partial(rotate_and_quantize, block=14336, group_size=14336, **settings), [gate_up]),
        (2, functools.partial(rotate_and_quantize, block=14336, group_size=128, **settings), [gate_up]),
        (1, functools.partial(rotate_and_quantize, block=32, group_size=14336, **settings), [gate_up]),
        (1, functools.partial(rotate_and_quantize, block=32, group_size=32, **settings), [gate_up]),
        (2, attend, [query, cache, cache, lengths]),
        (1, rotate_triton.rotate_and_write, [qkv, rotation, rotation, cache, cache, lengths]),
        (1, w4a16_triton.w4a16_matmul, [narrow, weight]),
        (1, functools.partial(w4a4_triton.w4a4_matmul, dtype=jnp.bfloat16), [codes, weight]),
        (1, functools.partial(sums_triton.sums_of_codes, num_groups=18, factor=1.0, num_rows=16), [codes.codes]),
        (1, functools.partial(float_triton.float_matmul, dtype=jnp.bfloat16), [narrow, floats]),
        # XLA reads the logits of a head.
        (0, functools.partial(w4a16_triton.w4a16_matmul, dtype=jnp.float32), [narrow, weight]),
        (0, float_triton.float_matmul, [narrow, floats]),
    ]
    for num_signals, function, args in programs:
        with early_launch():
            early = cuda_program(function, *args)
        assert early.count(SIGNAL) == num_signals
        assert "griddepcontrol" not in cuda_program(function, *args)


@pytest.mark.newest_jax
@pytest.mark.parametrize("layout", Layout)
def test_kernels_of_several_devices_lower_with_the_sum_between_them(layout):
    """A matmul of some inputs, the gathered sums of all, and the norm that adds them in order as it loads them."""
    multiply = {Layout.PLANES: w4a16_triton, Layout.WGMMA: w4a16_mosaic}[layout].w4a16_matmul

    def of_device(x, weight, stream, gain):
        update = add_up(multiply(x, weight), MODEL)
        assert len(update.parts) == 2
        return plain_norm_triton.add_rms_norm(stream, update, gain, epsilon=1e-5)

    axis_types = (jax.sharding.AxisType.Auto,)
    described = jax.sharding.AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", num_cores=132, platform="cuda")
    mesh = jax.sharding.AbstractMesh((2,), (MODEL,), axis_types=axis_types, abstract_device=described)
    specs = QuantizedWeight(P(None, MODEL), P(MODEL), None, P(MODEL), layout)
    in_specs = P(None, MODEL), specs, P(), P()
    program = jax.shard_map(of_device, mesh=mesh, in_specs=in_specs, out_specs=P(), check_vma=False)
    rows, gain = array(4, 4096, dtype=jnp.bfloat16), array(4096, dtype=jnp.bfloat16)
    weight = abstract_weight(8192, 4096, 128, True, layout)
    lowered = jax.jit(program).trace(array(4, 8192, dtype=jnp.bfloat16), weight, rows, gain)
    text = lowered.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("stablehlo.all_gather") == 1
    assert KERNEL_CALL in text
    assert ("mosaic_gpu" in text) == (layout is Layout.WGMMA)
