"""What is said of directories without a model that is read: what they hold instead, and what to do."""

import json
import os

import numpy as np
import pytest
from safetensors.numpy import save_file

from qspec_jax.errors import CheckpointError, UnsupportedModelError
from qspec_jax.weights.resolve import open_source, resolve_model
from tests.weights.tiny_checkpoints import gguf_tensors, hf_config, hf_tensors, write_gguf, write_hf

CONFIG = hf_config()


def files(path, *names):
    for name in names:
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_text(json.dumps(CONFIG) if name == "config.json" else "")
    return path


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["adapter_config.json", "adapter_model.safetensors"], r"holds an adapter \(LoRA\) and no model; merge it"),
        (["adapter_config.json", "adapter_model.bin"], r"holds an adapter \(LoRA\) and no model; merge it"),
        (["consolidated.safetensors", "params.json"], r"format of Mistral only .*convert_mistral_weights_to_hf\.py"),
        (["consolidated.00.pth", "params.json"], r"format of Meta only .*convert_llama_weights_to_hf\.py"),
        (["onnx/model_q4.onnx"], r"weights of ONNX only \(model_q4\.onnx\)"),
        (["model.onnx"], r"weights of ONNX only"),
        (["openvino_model.xml", "openvino_model.bin"], "weights of OpenVINO only"),
        (["ggml-model-q4_0.bin"], r"weights of GGML \(2023\) only"),
        (["mlc-chat-config.json", "params_shard_0.bin"], "weights of MLC LLM only"),
        (["weights.npz"], r"weights of MLX only \(weights\.npz\), which are not read"),
        (["flax_model.msgpack"], "weights of Flax only"),
        (["tf_model.h5"], "weights of TensorFlow only"),
    ],
)
@pytest.mark.parametrize("config", [[], ["config.json"]])
def test_what_is_not_read_is_named_with_and_without_a_config(tmp_path, names, message, config):
    with pytest.raises(UnsupportedModelError, match=message):
        open_source(files(tmp_path, *names, *config))


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["pytorch_model.bin"], r"PyTorch weights only \(pytorch_model\.bin\), .*save_pretrained"),
        (["config.json", "optimizer.pt", "training_args.bin", "m.bin"], r"PyTorch weights only \(m\.bin\)"),
        (["config.json", "optimizer.pt", "rng_state.pth"], r"a config\.json but no \*\.safetensors; fetch"),
        (["config.json", "tokenizer.json"], r"a config\.json but no \*\.safetensors; fetch"),
        ([], r"has no config\.json; give a Hugging Face directory"),
        (["._m.gguf", "._model.safetensors"], r"has no config\.json; give a Hugging Face directory"),
    ],
)
def test_what_is_missing_is_named(tmp_path, names, message):
    with pytest.raises(CheckpointError, match=message):
        open_source(files(tmp_path, *names))


def test_the_folders_that_hold_models_are_named(tmp_path):
    files(tmp_path, "refs", "Q4/m.gguf", ".hidden/m.gguf", "empty/config.json", "checkpoint-10/config.json")
    files(tmp_path, "checkpoint-10/model.safetensors")
    with pytest.raises(CheckpointError, match=r"no model itself, but its folders do: Q4, checkpoint-10; give"):
        open_source(tmp_path)


def test_checkpoints_are_named_from_above_and_from_within(tmp_path):
    files(tmp_path, "one/qspec.json", "two/qspec.json", "one/data-0/x")
    with pytest.raises(CheckpointError, match=r"no model itself, but its folders do: one, two; give the path of one"):
        open_source(tmp_path)
    with pytest.raises(CheckpointError, match=rf"is a part of the checkpoint {tmp_path / 'one'}; give that path"):
        open_source(tmp_path / "one" / "data-0")


def test_the_snapshots_of_a_cache_are_named(tmp_path):
    (tmp_path / "snapshots").mkdir()
    write_hf(tmp_path / "snapshots" / "abc", CONFIG, hf_tensors(CONFIG))
    with pytest.raises(CheckpointError, match=r"its folders do: snapshots/abc; give the path of one"):
        open_source(tmp_path)


@pytest.mark.parametrize(
    "names",
    [
        ["m.gguf-split-a", "m.gguf-split-b"],
        ["m.gguf.part1of2", "m.gguf.part2of2"],
        ["m.gguf.part-a", "m.gguf.part-b"],
        ["m.gguf.001", "m.gguf.002"],
        ["m.gguf.aa", "m.gguf.ab"],
    ],
)
def test_pieces_of_a_file_are_named_with_how_to_join_them(tmp_path, names):
    whole = write_gguf(tmp_path / "m.gguf", CONFIG, gguf_tensors(CONFIG, hf_tensors(CONFIG)))
    content = whole.read_bytes()
    whole.unlink()
    for name, part in zip(names, (content[:9000], content[9000:]), strict=True):
        (tmp_path / name).write_bytes(part)
    for path in (tmp_path, *(tmp_path / name for name in names)):
        with pytest.raises(CheckpointError, match=rf"one piece of m\.gguf; join .*: cat {' '.join(names)} > m\.gguf"):
            open_source(path)


@pytest.mark.parametrize("other", ["adapter_model.safetensors", "consolidated.safetensors", "._model.safetensors"])
def test_what_is_no_model_does_not_stand_before_one(tmp_path, other):
    file = write_gguf(tmp_path / "M.GGUF", CONFIG, gguf_tensors(CONFIG, hf_tensors(CONFIG)))
    files(tmp_path, other, "._m.gguf", "config.json", "pytorch_model.bin")
    (tmp_path / "folder.gguf").mkdir()
    assert resolve_model(tmp_path) == open_source(tmp_path).path == file


@pytest.mark.parametrize("other", ["consolidated.safetensors", "adapter_model.safetensors", "._w.safetensors"])
def test_what_is_no_model_does_not_join_one(tmp_path, other):
    write_hf(tmp_path, CONFIG, hf_tensors(CONFIG))
    (tmp_path / "model.safetensors").rename(tmp_path / "w.safetensors")
    save_file({"x": np.zeros(4, np.float32)}, tmp_path / other)
    assert open_source(tmp_path)


def test_a_pipe_is_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "m.gguf")
    for path in (tmp_path, tmp_path / "m.gguf"):
        with pytest.raises(CheckpointError, match="no regular file"):
            open_source(path)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja"])
def test_a_pipe_in_a_directory_is_refused_and_not_waited_for(tmp_path, name):
    write_hf(tmp_path, CONFIG, hf_tensors(CONFIG))
    (tmp_path / name).unlink(missing_ok=True)
    os.mkfifo(tmp_path / name)
    with pytest.raises(CheckpointError, match=f"{name} is no regular file"):
        open_source(resolve_model(tmp_path))


def test_a_git_lfs_pointer_is_named_wherever_it_stands(tmp_path):
    write_hf(tmp_path, CONFIG, hf_tensors(CONFIG))
    for name in ("model.safetensors", "config.json"):
        (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
        with pytest.raises(CheckpointError, match=rf"{name} is a Git LFS pointer; run `git lfs pull`"):
            open_source(tmp_path)
