"""What a Hugging Face directory says of its quantisation besides ``config.json``, and what its tensors tell.

Old GPTQ and AWQ libraries wrote a file of their own, and some formats are told by the names of tensors alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from qspec_jax.errors import UnsupportedModelError
from qspec_jax.model.config import quantization_config
from qspec_jax.weights.huggingface.files import read_json
from qspec_jax.weights.listing import MERGE
from qspec_jax.weights.source import StoredTensor

ONLINE_HADAMARD = (
    "{} say that linears read inputs rotated by an online Hadamard transform (QuaRot), as in the checkpoints of the "
    "QSpec release; that is not supported yet. Use another checkpoint of the model: unquantised, GPTQ, AWQ, "
    "compressed-tensors or GGUF"
)
_OLD_FILES = {"quantize_config.json": "gptq", "quant_config.json": "awq"}  # of AutoGPTQ and AutoAWQ
_OF_MODELOPT = "hf_quant_config.json"
# What made a checkpoint, by how the names of some of its tensors end.
_FOREIGN_ENDINGS = {
    "q_weight": "ExLlamaV2",
    "trellis": "ExLlamaV3",
    "absmax": "bitsandbytes (NF4 or FP4)",
    "SCB": "bitsandbytes (INT8)",
    "W_q": "HQQ",
    "weight_scale_inv": "8-bit floats",
    "weight_scale_2": "NVIDIA ModelOpt (NVFP4)",
    "weight_global_scale": "compressed-tensors as NVFP4",
    "pre_quant_scale": "NVIDIA ModelOpt (AWQ)",
    "codebooks": "AQLM",
    "Qidxs": "QuIP#",
    "_data": "Quanto",
}


def complete_config(path: Path, config: Mapping[str, Any]) -> Mapping[str, Any]:
    """A parsed ``config.json`` with the quantisation settings that stand in a file beside it.

    Raises:
        CheckpointError: that file is damaged.
    """
    if quantization_config(config) is not None:
        return config
    for name, method in _OLD_FILES.items():
        if (path / name).exists():
            return {**config, "quantization_config": {"quant_method": method, **read_json(path / name)}}
    if (path / _OF_MODELOPT).exists():
        settings = read_json(path / _OF_MODELOPT).get("quantization")
        own = dict(settings) if isinstance(settings, Mapping) else {}
        return {**config, "quantization_config": {**own, "quant_method": "modelopt"}}
    return config


def refuse_online_hadamard(config: Mapping[str, Any]) -> None:
    """Raises UnsupportedModelError if ``config`` names a model class of the QSpec release or of QuaRot.

    Both (``vllm/model_executor/models/quarot_llama.py``, ``qwen2_quarot.py``) always transform online.
    """
    named = config.get("architectures") or []
    named = [*(named if isinstance(named, (list, tuple)) else [named]), config.get("model_type") or ""]
    if rotated := [name for name in map(str, named) if "quarot" in name.lower()]:
        raise UnsupportedModelError(ONLINE_HADAMARD.format(f"config.json: {', '.join(rotated)}"))


def refuse_foreign_tensors(stored: Iterable[StoredTensor]) -> None:
    """Raises UnsupportedModelError if tensors are quantised in a way that is not read, or not without its settings."""
    stored = list(stored)
    names = {tensor.name.rpartition(".")[2] for tensor in stored}
    if any(".lora_A." in tensor.name or ".base_layer." in tensor.name for tensor in stored):
        raise UnsupportedModelError(f"its tensors are a model's and an adapter's (LoRA), not merged; {MERGE}")
    if "had_rem_dim" in names:  # of QuaRot's OnlineHadamard
        raise UnsupportedModelError(ONLINE_HADAMARD.format("its tensors named had_rem_dim"))
    makers = [maker for ending, maker in _FOREIGN_ENDINGS.items() if ending in names]
    if {"scales", "biases"} <= names and any(tensor.dtype == "U32" for tensor in stored):
        makers.append("MLX")
    if any(tensor.dtype == "F4" or tensor.dtype.startswith(("F8_", "F6_")) for tensor in stored):
        makers.append("floats of 8 bits or fewer")
    whole = {tensor.dtype for tensor in stored if tensor.name.rpartition(".")[2] in ("weight", "_weight_qdata")}
    if (whole & {"I8", "U32"} and any("scale" in name for name in names)) or (
        whole & {"U8"} and "weight_scale" in names
    ):
        makers.append("a method that stores whole numbers of 8 bits or packed ones")
    if makers:
        raise UnsupportedModelError(
            f"its tensors are quantised by {makers[0]}, which is not supported; use the unquantised checkpoint, GPTQ, "
            "AWQ, compressed-tensors or a GGUF file"
        )
    if packed := names & {"qweight", "weight_packed"}:
        raise UnsupportedModelError(
            f"config.json has no quantization_config, but tensors are named {packed.pop()}; add it with its "
            f"quant_method (older libraries wrote it to {' or '.join(_OLD_FILES)})"
        )
