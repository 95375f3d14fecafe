"""The anatomy of a layer is that of the modules that are built, and every parameter says where it is in them."""

from __future__ import annotations

import pytest
from flax import nnx

from qspec_jax.model.blocks import RMSNorm
from qspec_jax.model.config import ModelConfig
from qspec_jax.model.decoder import abstract_decoder
from qspec_jax.model.linear import Linear
from qspec_jax.model.parameters import expected_parameters, layer_anatomy
from tests import tiny


def unrolled(family):
    config = ModelConfig.from_hf(tiny.hf_config(family))
    return config, abstract_decoder(config, quantization=None, formats=None, scan_layers=False)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_the_modules_of_a_layer_are_those_of_its_anatomy(family):
    config, decoder = unrolled(family)
    modules = {".".join(map(str, path)): module for path, module in nnx.iter_modules(decoder.layers[1])}
    linears = {path: module for path, module in modules.items() if isinstance(module, Linear)}
    norms = {path: module for path, module in modules.items() if isinstance(module, RMSNorm)}
    anatomy = layer_anatomy(config)
    assert {path: linear.weight.get_value().shape for path, linear in linears.items()} == {
        path: (spec.num_outputs, spec.num_inputs) for path, spec in anatomy.linears.items()
    }
    assert {path: linear.bias is not None for path, linear in linears.items()} == {
        path: spec.bias for path, spec in anatomy.linears.items()
    }
    assert {path: norm.weight.get_value().shape for path, norm in norms.items()} == {
        path: (size,) for path, size in anatomy.norms.items()
    }


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_parameters_cover_the_arrays_of_a_decoder_once(family):
    config, decoder = unrolled(family)
    state = nnx.to_flat_state(nnx.state(decoder, nnx.Param))
    rows = {".".join(map(str, path)): [0] * parameter.get_value().shape[0] for path, parameter in state}
    for spec in expected_parameters(config).values():
        for row in range(spec.rows.start, spec.rows.stop):
            rows[spec.path][row] += 1
    assert all(times == 1 for path in rows for times in rows[path])


def test_what_reads_the_residual_stream_names_the_gain_of_the_norm_before_it():
    config = ModelConfig.from_hf(tiny.hf_config("qwen3_qk_norm"))
    specs = expected_parameters(config)
    assert specs["layers.1.attention.key.weight"].norm_before == "layers.1.attention_norm.weight"
    assert specs["layers.0.mlp.up.weight"].norm_before == "layers.0.mlp_norm.weight"
    assert specs["lm_head.weight"].norm_before == "final_norm.weight"
    assert {specs[spec.norm_before].stream for spec in specs.values() if spec.norm_before is not None} == {"reads"}
    writers = {spec.part for spec in specs.values() if spec.stream == "writes"}
    assert writers == {"embedding", "attention.output", "mlp.down"}
    assert specs["layers.1.attention.query_norm.weight"].stream is None


def test_layers_differ_in_nothing_but_their_number():
    config = ModelConfig.from_hf(tiny.hf_config("llama_with_biases"))
    first, second = (
        [
            (spec.part, spec.shape, spec.array, spec.rows)
            for spec in expected_parameters(config).values()
            if spec.layer == layer
        ]
        for layer in range(2)
    )
    assert first == second
