"""Which chunks of prompts share a pass, by the kernels and devices of a model."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import jax
import numpy as np
import pytest

import pallas_kernels
from qspec_jax.decoding import packing
from qspec_jax.decoding.packing import longest_packed
from qspec_jax.decoding.programs import Programs
from qspec_jax.model.cache import KV_INT8
from qspec_jax.model.config import ModelConfig, QuantConfig
from qspec_jax.model.layouts import linears
from tests import tiny

CONFIG = dataclasses.replace(ModelConfig.from_hf(tiny.BASE_HF_CONFIG), max_position_embeddings=1024)


def test_the_reference_is_read_one_by_one():
    """Its sums depend on how many rows a pass has."""
    assert longest_packed(tiny.decoder()) == 0


def test_what_triton_multiplies_is_read_together_if_it_is_little(monkeypatch):
    nvidia = SimpleNamespace(platform_version="cuda 13000")
    ada = SimpleNamespace(client=nvidia, compute_capability="8.9", device_kind="NVIDIA L4")
    decoder, by_reference = tiny.decoder(CONFIG, kernels=None), tiny.decoder(CONFIG)
    of_floats = tiny.decoder(CONFIG, kernels=None, quantization=None)
    both = QuantConfig(keep_floats=True)
    verified_by_floats, in_float32 = (
        tiny.decoder(CONFIG, kernels=None, quantization=both, dtype=dtype) for dtype in ("bfloat16", "float32")
    )
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "local_devices", lambda: [ada])
    assert longest_packed(decoder) == 512
    assert longest_packed(by_reference) == longest_packed(of_floats) == 0
    assert longest_packed(verified_by_floats) == 512
    assert longest_packed(in_float32) == 0, "a library multiplies"
    weights = [linear.weight.get_value() for linear in linears(decoder)]
    count = CONFIG.num_layers * sum(weight.num_outputs * weight.num_inputs for weight in weights)
    monkeypatch.setattr(packing, "_FEW_IN_PIECES", count)
    monkeypatch.setattr(packing, "_MOST_IN_PIECES", count)
    assert longest_packed(decoder) == 512
    monkeypatch.setattr(packing, "_FEW_IN_PIECES", count - 1)
    assert longest_packed(decoder) == longest_packed(verified_by_floats) == 256  # others by a library, one by one
    monkeypatch.setattr(packing, "_MOST_IN_PIECES", count - 1)
    assert longest_packed(decoder) == 0


@pytest.mark.parametrize(
    ("platform", "devices", "processes", "split", "of_16_bits", "of_others"),
    [
        ("cpu", 4, 2, 2, 512, 512),
        ("gpu", 1, 1, 1, 512, 512),
        ("gpu", 4, 1, 1, 512, 0),
        ("gpu", 4, 2, 1, 0, 0),
        ("gpu", 4, 1, 2, 0, 0),
    ],
    ids=str,
)
def test_gpus_read_prompts_one_by_one_where_several_have_never_read_them_together(
    platform, devices, processes, split, of_16_bits, of_others, monkeypatch
):
    """Several processes, parts of weights; and on several GPUs floats that verify, and a cache of int8."""
    of_mesh = [SimpleNamespace(platform=platform, process_index=index % processes) for index in range(devices)]
    monkeypatch.setattr(Programs, "mesh", SimpleNamespace(devices=np.array(of_mesh).reshape(-1, split)))
    monkeypatch.setattr(packing, "longest_packed", lambda _: 512)
    decoders = [tiny.decoder(CONFIG, quantization=QuantConfig(keep_floats=keep)) for keep in (False, False, True)]
    decoders[1].kv = KV_INT8
    for decoder, expected in zip(decoders, (of_16_bits, of_others, of_others), strict=True):
        decoder.split = split
        programs = Programs(decoder)
        assert programs.longest_packed == expected
        programs.packing = True
        assert programs.longest_packed == 512


def test_kernels_say_whether_a_cache_of_int8_may_be_read_into_together(monkeypatch):
    model = tiny.language_model(CONFIG)
    model.decoder.kv = KV_INT8
    monkeypatch.setattr(pallas_kernels, "rows_alike", lambda *_, **__: None)
    monkeypatch.setattr(pallas_kernels, "prefill_is_alike", lambda _: False)
    for alike in (False, True):
        monkeypatch.setattr(pallas_kernels, "prefill_int8_is_alike", lambda *_, alike=alike: alike)
        assert longest_packed(model.decoder) == (512 if alike else 0)
    assert model.programs.longest_packed == 512
