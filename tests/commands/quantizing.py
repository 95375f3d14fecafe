"""What tests of ``quantize`` share: the command, a small vocabulary, and how models are loaded and compared."""

from __future__ import annotations

import gguf
import jax
import numpy as np
from flax import nnx

import qspec_jax
from qspec_jax import quantize
from tests.weights import tiny_checkpoints

Q4_1 = gguf.GGMLQuantizationType.Q4_1
VOCABULARY = {
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "gpt-2",
    "tokenizer.ggml.tokens": [chr(ord("A") + index) for index in range(tiny_checkpoints.VOCAB)],
    "tokenizer.ggml.token_type": [1] * tiny_checkpoints.VOCAB,
    "tokenizer.ggml.merges": ["A B"],
    "tokenizer.chat_template": "{% for message in messages %}{{ message['content'] }}{% endfor %}",
}
VOCABULARY["tokenizer.ggml.tokens"][-1] = "AB"


def run(capsys, *arguments):
    """Exit code, standard output, standard error."""
    code = quantize.main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def write_gguf(path, linear_type=Q4_1):
    config = tiny_checkpoints.hf_config()
    tensors = tiny_checkpoints.gguf_tensors(config, tiny_checkpoints.hf_tensors(config))
    return tiny_checkpoints.write_gguf(path, config, tensors, linear_type=linear_type, metadata=VOCABULARY)


def load(path, **options):
    return qspec_jax.load(path, kernels="reference", dtype="float32", **options)


def assert_same_parameters(one, other):
    leaves, others = (jax.tree.leaves(nnx.state(model.decoder)) for model in (one, other))
    assert len(leaves) == len(others)
    assert all(np.asarray(a).tobytes() == np.asarray(b).tobytes() for a, b in zip(leaves, others, strict=True))
