"""Shapes, presets, and what the commands refuse before they measure anything."""

from __future__ import annotations

import argparse

import jax
import pytest

import pallas_kernels
from qspec_jax.bench import options
from qspec_jax.bench.__main__ import main
from qspec_jax.bench.kernels import names, producers
from qspec_jax.bench.presets import PRESETS, MatmulShape, linear_shapes
from qspec_jax.model.config import ModelConfig
from tests.pallas_kernels.kernel_cases import DEMO_MODEL, LLAMA_3_8B
from tests.weights import tiny_checkpoints


def selected(*arguments):
    parser = argparse.ArgumentParser()
    options.add_shape_options(parser)
    parsed = parser.parse_args([str(argument) for argument in arguments])
    return parsed, options.selected_shapes(parsed, default="llama-3-8b")


@pytest.mark.parametrize(
    ("preset", "shapes"),
    [
        ("llama-2-7b", ((4096, 12288), (4096, 4096), (4096, 22016), (11008, 4096))),
        ("llama-3-8b", LLAMA_3_8B),
        ("llama-3.1-8b", LLAMA_3_8B),
        ("llama-3-70b", ((8192, 10240), (8192, 8192), (8192, 57344), (28672, 8192))),
        ("llama-3.1-405b", ((16384, 18432), (16384, 16384), (16384, 106496), (53248, 16384))),
        ("qwen2.5-14b", ((5120, 7168), (5120, 5120), (5120, 27648), (13824, 5120))),
        ("smollm2-135m", DEMO_MODEL),
    ],
)
def test_presets_are_the_fused_linears(preset, shapes):
    assert [(shape.k, shape.n) for shape in linear_shapes(PRESETS[preset])] == list(shapes)


def test_every_preset_is_tested_above():
    llamas = {"llama-2-7b", "llama-3-8b", "llama-3.1-8b", "llama-3-70b", "llama-3.1-405b"}
    assert set(PRESETS) == {*llamas, "qwen2.5-14b", "smollm2-135m"}


def test_a_checkpoint_gives_the_shapes_of_its_config(tmp_path):
    config = tiny_checkpoints.hf_config()
    path = tiny_checkpoints.write_hf(tmp_path / "model", config, tiny_checkpoints.hf_tensors(config))
    parsed = ModelConfig.from_hf(config)
    query, key, value = parsed.qkv_sizes
    _, shapes = selected("--model", path)
    found = {name: (shape.k, shape.n) for shape in shapes for name in shape.name.split(", ")}
    assert found == {
        "model attention.qkv": (parsed.hidden_size, query + key + value),
        "model attention.output": (query, parsed.hidden_size),
        "model mlp.gate_up": (parsed.hidden_size, 2 * parsed.intermediate_size),
        "model mlp.down": (parsed.intermediate_size, parsed.hidden_size),
    }


def test_shapes_add_up_and_equal_ones_are_measured_once():
    _, shapes = selected("--preset", "llama-3-8b", "--shape", "4096X4096", "--shape", "64 x 32")
    assert [(shape.k, shape.n) for shape in shapes] == [*LLAMA_3_8B, (64, 32)]
    _, shapes = selected("--preset", "llama-2-7b", "--preset", "llama-3-8b")
    output = next(shape for shape in shapes if (shape.k, shape.n) == (4096, 4096))
    assert output.name == "llama-2-7b attention.output, llama-3-8b attention.output"
    assert [str(shape) for shape in selected()[1]] == ["4096x6144", "4096x4096", "4096x28672", "14336x4096"]


@pytest.mark.parametrize(
    ("given", "k", "sizes"),
    [
        ([], 4096, [128]),
        ([], 576, [64]),
        ([], 96, [32]),
        ([], 100, [100]),
        (["--group-size", "32,row"], 576, [32, 576]),
        (["--group-size", "64", "--group-size", "64,32"], 576, [64, 32]),
    ],
)
def test_group_sizes(given, k, sizes):
    parsed, _ = selected(*given)
    assert options.selected_group_sizes(parsed, MatmulShape(k, 64)) == sizes


@pytest.mark.parametrize("command", ["kernels", "tune"])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--preset", "llama-9"], "--preset llama-9 is unknown; use one of llama-2-7b, llama-3-8b"),
        (["--shape", "4096"], "--shape 4096 cannot be read; write KxN, inputs times outputs, such as 4096x28672"),
        (["--shape", "0x16"], "--shape 0x16 cannot be read"),
        (["--shape", "63x16"], "K=63 is odd; two 4-bit codes share a byte, so use an even K"),
        (["--shape", "64x16", "--group-size", "48"], "--group-size 48 is not supported; use 32, 64, 128, row"),
        (["--shape", "576x64", "--group-size", "128"], "K=576 is not a multiple of group_size=128; use 32 or 64"),
        (["--ops", "w4a2"], "--ops w4a2 is unknown; use some of w4a16, w"),
        (["--ops", ","], "--ops ',' is unknown"),
        (["--repeats", "0"], "--repeats 0 must be at least 1"),
    ],
)
def test_usage_errors_exit_with_2_and_one_line(capsys, command, arguments, message):
    code = main([command, *arguments])
    out, err = capsys.readouterr()
    assert (code, out) == (2, "")
    assert message in err
    assert len(err.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["kernels", "--rows", "1,x"], "--rows 1,x cannot be read; write positive whole numbers, such as --rows 1,16"),
        (["kernels", "--rows", "0"], "--rows 0 cannot be read"),
        (["kernels", "--implementations", "cutlass"], "cutlass is unknown; use some of triton, mosaic, tpu, reference"),
        (["kernels", "--json", "/nonexistent/out.json"], "there is no directory /nonexistent; create it first"),
        (["kernels", "--plot", "/"], "--plot / is a directory; give the name of a file"),
        (["tune", "--candidates", "0"], "--candidates 0 must be at least 1"),
        (["tune", "--time-limit", "nan"], "--time-limit nan must be at least 1"),
        (["tune", "--output", "/nonexistent/table.json"], "there is no directory /nonexistent; create it first"),
    ],
)
def test_usage_errors_of_single_commands(capsys, arguments, message):
    code = main(arguments)
    out, err = capsys.readouterr()
    assert (code, out) == (2, "")
    assert message in err


def test_an_unknown_checkpoint_exits_with_1(capsys):
    assert main(["kernels", "--model", "/nonexistent/model.gguf"]) == 1
    assert "no such file or directory" in capsys.readouterr().err


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="asks for GPU kernels where there is none")
def test_tuning_without_a_gpu_exits_with_2(capsys):
    assert main(["tune"]) == 2
    assert "which do not work on this cpu device; run it on an NVIDIA GPU" in capsys.readouterr().err


def test_names_that_are_checked_without_jax_are_those_that_run():
    assert (*pallas_kernels.IMPLEMENTATIONS, names.TORCH, names.PAIRS) == names.IMPLEMENTATIONS
    assert tuple(producers._PRODUCERS) == names.PRODUCERS
