"""Models so small that a command runs in no time, and commands that find one already loaded."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import qspec_jax
from qspec_jax.weights.tokenizers import load_tokenizer
from tests.commands.quantizing import write_gguf
from tests.weights import tiny_checkpoints


@pytest.fixture(scope="module")
def tiny_path(tmp_path_factory):
    """A checkpoint with 48 words."""
    config = tiny_checkpoints.hf_config(eos_token_id=47)
    path = tmp_path_factory.mktemp("tiny") / "model"
    tiny_checkpoints.write_hf(path, config, tiny_checkpoints.hf_tensors(config))
    words = Tokenizer(models.WordLevel({f"w{index}": index for index in range(48)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0", eos_token="w47").save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def model(tiny_path):
    return qspec_jax.load(tiny_path)


@pytest.fixture
def loaded(model, monkeypatch):
    """Commands find the model already loaded."""
    monkeypatch.setattr(qspec_jax, "load", lambda *arguments, **options: model)


@pytest.fixture(scope="module")
def four_bit_file(tmp_path_factory):
    """A GGUF file whose linears are 4-bit codes, with a vocabulary and a chat template."""
    return write_gguf(tmp_path_factory.mktemp("gguf") / "model.gguf")


@pytest.fixture(scope="module")
def float_directory(tmp_path_factory, four_bit_file):
    """A Hugging Face directory of float weights, with the same vocabulary."""
    config = tiny_checkpoints.hf_config()
    path = tmp_path_factory.mktemp("hf")
    load_tokenizer(four_bit_file).save(path)
    return tiny_checkpoints.write_hf(path, config, tiny_checkpoints.hf_tensors(config))
