"""Which files of a directory are a model's, by their names, and what it holds instead where there are none.

Nothing but names is read, so that a directory of any size is answered at once.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from qspec_jax.errors import CheckpointError, QSpecError, UnsupportedModelError

# Of a GGUF file that `split` cut into pieces, which are no files of the format by themselves.
_PIECE = re.compile(r"(.+\.gguf)[.-](?:split-?[a-z\d]+|part-?[a-z\d]+|\d{1,3}|a[a-z])", re.IGNORECASE)
_OF_CHECKPOINT = "qspec.json"  # of weights/checkpoint/manifest.py
_NO_WEIGHTS = ("optimizer", "scheduler", "rng_state", "training_args", "scaler")  # pickles of a training
_INSTEAD = "use the model's safetensors or a GGUF file"
MERGE = "merge it into its model: load both with peft, and call merge_and_unload() and save_pretrained(PATH)"
_ADAPTERS = ("adapter_config.json", "adapter_model.*")
_FORMATS = {
    "openvino*.xml": "OpenVINO",
    "ggml-*.bin": "GGML (2023)",
    "*ggmlv3*.bin": "GGML (2023)",
    "mlc-chat-config.json": "MLC LLM",
    "params_shard_*.bin": "MLC LLM",
    "model_index.json": "diffusers",
    "*.npz": "MLX",
    "*.onnx": "ONNX",
    "onnx/*.onnx": "ONNX",
    "*.msgpack": "Flax",
    "*.h5": "TensorFlow",
    "*.tflite": "TensorFlow Lite",
    "*.mlpackage": "Core ML",
    "*.nemo": "NeMo",
    "*.engine": "TensorRT",
}


def safetensors_files(path: Path) -> list[Path]:
    """The safetensors of a directory that may be its model's: no adapter, and no copy in the format of Mistral."""
    found = [file for file in sorted(path.glob("*.safetensors")) if not _is_hidden(file)]
    return [file for file in found if not file.name.startswith(("consolidated", "adapter_model"))]


def gguf_files(path: Path) -> list[Path]:
    """The GGUF files of a directory, whatever is in them."""
    found = (file for file in sorted(path.iterdir()) if file.suffix.lower() == ".gguf" and not _is_hidden(file))
    return [file for file in found if not file.is_dir()]


def piece_remedy(path: Path) -> str | None:
    """What to do with a file that is a piece of a GGUF file, cut without regard to its contents; None if it is none."""
    if (matched := _PIECE.fullmatch(path.name)) is None:
        return None
    others = (_PIECE.fullmatch(file.name) for file in sorted(path.parent.iterdir()))
    pieces = " ".join(other[0] for other in others if other and other[1] == matched[1])
    return f"it is one piece of {matched[1]}; join the pieces: cat {pieces} > {matched[1]}"


def missing_weights(path: Path, missing: str) -> QSpecError:
    """What to say of a directory without the weights of a model, or without its ``config.json``.

    Args:
        path: the directory.
        missing: what it lacks and what to do, where it holds nothing else that is known.
    """
    if _first(path, _ADAPTERS) is not None:
        return UnsupportedModelError(f"{path} holds an adapter (LoRA) and no model; {MERGE}")
    if (piece := next((file for file in sorted(path.iterdir()) if _PIECE.fullmatch(file.name)), None)) is not None:
        return CheckpointError(f"{path} holds no whole model, but {piece.name}: {piece_remedy(piece)}")
    if (own := _first(path, ("consolidated*.safetensors", "consolidated*.pth"))) is not None:
        maker, script = ("Mistral", "mistral") if own.suffix == ".safetensors" else ("Meta", "llama")
        return UnsupportedModelError(
            f"{path} has weights in the format of {maker} only ({own.name}), which are not read; {_INSTEAD}, or "
            f"convert them with transformers' convert_{script}_weights_to_hf.py"
        )
    for pattern, maker in _FORMATS.items():
        if (other := _first(path, (pattern,))) is not None:
            return UnsupportedModelError(
                f"{path} has weights of {maker} only ({other.name}), which are not read; {_INSTEAD}"
            )
    pickles = [file for pattern in ("*.bin", "*.pt", "*.pth") for file in sorted(path.glob(pattern))]
    if pickles := [file.name for file in pickles if not file.name.startswith(_NO_WEIGHTS)]:
        return CheckpointError(
            f"{path} has PyTorch weights only ({pickles[0]}), which are not read; convert them to safetensors: "
            "load the model with transformers and call model.save_pretrained(PATH)"
        )
    if (path.parent / _OF_CHECKPOINT).exists():
        return CheckpointError(f"{path} is a part of the checkpoint {path.parent}; give that path")
    if folders := _folders_with_models(path):
        listed = ", ".join(str(folder.relative_to(path)) for folder in folders[:8])
        return CheckpointError(f"{path} holds no model itself, but its folders do: {listed}; give the path of one")
    return CheckpointError(f"{path} {missing}")


def _folders_with_models(path: Path) -> list[Path]:
    """Of the folders below, as a hub's cache, a training or ``quantize`` leaves them, those with a model."""
    folders = [folder for pattern in ("*", "snapshots/*") for folder in sorted(path.glob(pattern)) if folder.is_dir()]
    return [folder for folder in folders if not _is_hidden(folder) and _may_hold_model(folder)]


def _may_hold_model(folder: Path) -> bool:
    try:
        return bool(
            gguf_files(folder)
            or (folder / _OF_CHECKPOINT).exists()
            or ((folder / "config.json").exists() and safetensors_files(folder))
        )
    except OSError:
        return False


def _first(path: Path, patterns: Sequence[str]) -> Path | None:
    found = (file for pattern in patterns for file in sorted(path.glob(pattern)))
    return next((file for file in found if not _is_hidden(file)), None)


def _is_hidden(path: Path) -> bool:
    """Such as the files ``._NAME`` that macOS leaves on other systems' disks."""
    return path.name.startswith(".")
