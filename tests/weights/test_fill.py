"""What loading costs beside the model itself."""

from __future__ import annotations

import dataclasses
import weakref

import jax
import jax.numpy as jnp
import pytest
from gguf import GGMLQuantizationType

from qspec_jax.errors import CheckpointError, UsageError
from qspec_jax.model.config import ActivationQuantization, ModelConfig, QuantConfig
from qspec_jax.weights.fill import load_decoder, weight_formats
from qspec_jax.weights.gguf.source import open_gguf
from qspec_jax.weights.source import TensorEntry
from tests import tiny
from tests.weights import tiny_checkpoints


def load(source, quantization, *, scan_layers):
    return load_decoder(
        source,
        quantization=quantization,
        formats=weight_formats(source, quantization),
        dtype=jnp.bfloat16,
        kernels="reference",
        scan_layers=scan_layers,
    )


@pytest.fixture
def compilations():
    """One event per program compiled while the test runs."""
    events = []

    def listen(event: str, *_, **__):
        if event.endswith("backend_compile_duration"):
            events.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield events
    jax.monitoring.unregister_event_duration_listener(listen)


@pytest.mark.parametrize("scan_layers", [True, False])
def test_weights_that_are_4_bit_already_are_loaded_without_compiling_anything(tmp_path, compilations, scan_layers):
    config = tiny_checkpoints.hf_config()
    tensors = tiny_checkpoints.gguf_tensors(config, tiny_checkpoints.hf_tensors(config))
    path = tiny_checkpoints.write_gguf(tmp_path / "model.gguf", config, tensors, linear_type=GGMLQuantizationType.Q4_1)
    load(open_gguf(path), QuantConfig(), scan_layers=scan_layers)
    assert not compilations
    jax.jit(lambda x: x + 1).lower(jax.ShapeDtypeStruct((3,), jnp.float32)).compile()
    assert len(compilations) == 1  # the event is the right one


@pytest.mark.parametrize("scan_layers", [True, False])
def test_a_tensor_is_gone_when_the_next_one_is_read(scan_layers):
    source = tiny.source(ModelConfig.from_hf(tiny.BASE_HF_CONFIG))
    read_before = []

    def watched(entry):
        def read():
            assert not any(reference() is not None for reference in read_before)
            tensor = entry.read()
            read_before.append(weakref.ref(tensor))
            return tensor

        return dataclasses.replace(entry, read=read)

    entries = {name: watched(entry) for name, entry in source.entries.items()}
    load(dataclasses.replace(source, entries=entries), None, scan_layers=scan_layers)
    assert len(read_before) == len(entries)


@pytest.mark.parametrize(("name", "options"), [("layers.1.mlp.up.weight", {}), ("lm_head.weight", {"head_bits": 8})])
def test_a_tensor_that_is_too_large_to_be_rounded_is_named(name, options):
    source = tiny.source(ModelConfig.from_hf(tiny.BASE_HF_CONFIG))
    large = TensorEntry(source.entries[name].shape, lambda: 1e8 * source.entries[name].read())
    changed = dataclasses.replace(source, entries={**source.entries, name: large})
    with pytest.raises(CheckpointError, match=rf"^cannot round tensor {name}: .*too large"):
        load(changed, QuantConfig(**options), scan_layers=True)
    assert load(changed, None, scan_layers=True)


@pytest.mark.parametrize("name", ["w4a4", "w4a8"])
def test_groups_of_activations_that_do_not_fit_are_refused_before_anything_is_read(name):
    source = tiny.source(ModelConfig.from_hf(tiny.BASE_HF_CONFIG))
    asked = QuantConfig(**{name: ActivationQuantization(group_size=48)})
    with pytest.raises(
        UsageError, match=rf"^{name} quantises activations in groups of 48, .* 64 inputs of attention.qkv"
    ):
        weight_formats(source, asked)
    assert weight_formats(source, QuantConfig(**{name: ActivationQuantization(group_size=16)}))
