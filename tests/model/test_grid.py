"""What is said of a model's grid is what its codes are on."""

from __future__ import annotations

import dataclasses
import json

import pytest

from qspec_jax import LanguageModel, QuantConfig, UsageError
from qspec_jax.model.config import ModelConfig
from qspec_jax.model.grid import formats_in, with_grid_of
from qspec_jax.model.linear import WeightFormat
from qspec_jax.model.parameters import layer_anatomy
from qspec_jax.weights.checkpoint.manifest import FILE_NAME, checksum, read_manifest
from qspec_jax.weights.checkpoint.save import save_checkpoint
from tests import tiny

CONFIG = ModelConfig.from_hf(tiny.BASE_HF_CONFIG)
LINEARS = layer_anatomy(CONFIG).linears
ROW = {name: WeightFormat(linear.num_inputs, symmetric=True) for name, linear in LINEARS.items()}
SMALL, LARGE = WeightFormat(32, symmetric=False), WeightFormat(64, symmetric=True)
ASKED = QuantConfig(group_size=128)


@pytest.mark.parametrize(
    ("formats", "expected"),
    [
        (dict.fromkeys(LINEARS, LARGE), QuantConfig(64, True)),
        (ROW, QuantConfig(None, True)),
        (ROW | {"mlp.down": SMALL}, QuantConfig(None, True)),
        (dict.fromkeys(LINEARS, SMALL) | {"mlp.down": LARGE}, QuantConfig(32)),
        (dict.fromkeys(LINEARS, LARGE) | {"mlp.down": dataclasses.replace(SMALL, bits=8)}, QuantConfig(32, bits=8)),
        (None, ASKED),
        ({"quantized_head": LARGE}, ASKED),
    ],
    ids=["groups", "rows", "most rows", "most", "most bits", "floats", "head"],
)
def test_a_configuration_says_the_grid_of_the_linears(formats, expected):
    assert with_grid_of(ASKED, formats, CONFIG) == expected


def test_what_no_configuration_can_say_is_refused():
    with pytest.raises(UsageError, match="group_size=16 is not supported"):
        with_grid_of(ASKED, dict.fromkeys(LINEARS, WeightFormat(16, symmetric=True)), CONFIG)


@pytest.mark.parametrize("quantization", [QuantConfig(None, True), QuantConfig(64, True, bits=8), QuantConfig(32)])
def test_a_record_that_contradicts_its_codes_is_neither_made_nor_believed(quantization, tmp_path):
    decoder = tiny.decoder(quantization=quantization)
    assert with_grid_of(quantization, formats_in(decoder), decoder.config) == quantization
    wrong = QuantConfig(128)
    model = LanguageModel(decoder, None, quantization=wrong, kernels="reference")
    manifest = save_checkpoint(tmp_path / "out", decoder, tokenizer=None, quantization=wrong)
    assert manifest.quantization == model.quantization == quantization
    content = json.loads((tmp_path / "out" / FILE_NAME).read_text())
    assert content["quantization"]["group_size"] != 128
    content["quantization"] |= {"group_size": 128, "symmetric": not quantization.symmetric}  # as older versions wrote
    del content["sha256"]
    (tmp_path / "out" / FILE_NAME).write_text(json.dumps({"sha256": checksum(content), **content}))
    assert read_manifest(tmp_path / "out").quantization == quantization
