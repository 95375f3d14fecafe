"""Writes tiny checkpoints of every supported architecture, as safetensors directories and GGUF files.

The names and the order of rows are those that transformers and llama.cpp's converter write, spelled out
here once more, so that a mistake in the library's own tables shows.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from safetensors.numpy import save_file

ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
GGUF_ARCHITECTURES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "llama",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
}
NUM_LAYERS, VOCAB, HIDDEN, MLP, HEADS, KV_HEADS, HEAD_DIM = 2, 48, 64, 96, 4, 2, 32

_GGUF_LAYER_NAMES = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def hf_config(architecture: str = "LlamaForCausalLM", **changes: Any) -> dict[str, Any]:
    """A ``config.json``."""
    config = {
        "architectures": [architecture],
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "intermediate_size": MLP,
        "num_hidden_layers": NUM_LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "max_position_embeddings": 256,
        "tie_word_embeddings": False,
        "sliding_window": None,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    return config | changes


def hf_tensors(config: dict[str, Any], dtype: Any = np.float32) -> dict[str, np.ndarray]:
    """Random tensors under transformers' names."""
    (architecture,) = config["architectures"]
    query, kv = HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCAB, HIDDEN), "model.norm.weight": (HIDDEN,)}
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (VOCAB, HIDDEN)
    for layer in range(NUM_LAYERS):
        names = {
            "input_layernorm.weight": (HIDDEN,),
            "post_attention_layernorm.weight": (HIDDEN,),
            "self_attn.q_proj.weight": (query, HIDDEN),
            "self_attn.k_proj.weight": (kv, HIDDEN),
            "self_attn.v_proj.weight": (kv, HIDDEN),
            "self_attn.o_proj.weight": (HIDDEN, query),
            "mlp.gate_proj.weight": (MLP, HIDDEN),
            "mlp.up_proj.weight": (MLP, HIDDEN),
            "mlp.down_proj.weight": (HIDDEN, MLP),
        }
        if architecture == "Qwen2ForCausalLM" or config.get("attention_bias"):
            names |= {f"self_attn.{part}_proj.bias": (size,) for part, size in (("q", query), ("k", kv), ("v", kv))}
        if config.get("attention_bias"):
            names["self_attn.o_proj.bias"] = (HIDDEN,)
        if config.get("mlp_bias"):
            names |= {f"mlp.{part}_proj.bias": (size,) for part, size in (("gate", MLP), ("up", MLP), ("down", HIDDEN))}
        if architecture == "Qwen3ForCausalLM":
            names |= {"self_attn.q_norm.weight": (HEAD_DIM,), "self_attn.k_norm.weight": (HEAD_DIM,)}
        shapes |= {f"model.layers.{layer}.{name}": shape for name, shape in names.items()}
    random = np.random.default_rng(0)
    return {name: random.standard_normal(shape).astype(dtype) for name, shape in shapes.items()}


def write_hf(path: Path, config: dict[str, Any], tensors: dict[str, np.ndarray], *, num_shards: int = 1) -> Path:
    """A Hugging Face directory, with an index if there are several shards."""
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(config))
    if num_shards == 1:
        save_file(tensors, path / "model.safetensors")
        return path
    weight_map = {}
    for shard in range(num_shards):
        file_name = f"model-{shard + 1:05}-of-{num_shards:05}.safetensors"
        part = {name: tensor for index, (name, tensor) in enumerate(tensors.items()) if index % num_shards == shard}
        save_file(part, path / file_name)
        weight_map |= dict.fromkeys(part, file_name)
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return path


def permute_rows(tensor: np.ndarray, heads: int) -> np.ndarray:
    """The reordering of query and key rows in llama.cpp's convert_hf_to_gguf.py."""
    halves = tensor.reshape(heads, 2, tensor.shape[0] // heads // 2, *tensor.shape[1:])
    return halves.swapaxes(1, 2).reshape(tensor.shape)


def gguf_tensors(config: dict[str, Any], tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The tensors under llama.cpp's names, in its order of rows."""
    is_llama = GGUF_ARCHITECTURES[config["architectures"][0]] == "llama"
    top = {
        "model.embed_tokens.weight": "token_embd.weight",
        "model.norm.weight": "output_norm.weight",
        "lm_head.weight": "output.weight",
    }
    renamed = {}
    for name, tensor in tensors.items():
        if name in top:
            renamed[top[name]] = tensor
            continue
        _, _, layer, rest = name.split(".", 3)
        module, kind = rest.rsplit(".", 1)
        if is_llama and module in ("self_attn.q_proj", "self_attn.k_proj"):
            tensor = permute_rows(tensor, HEADS if module == "self_attn.q_proj" else KV_HEADS)
        renamed[f"blk.{layer}.{_GGUF_LAYER_NAMES[module]}.{kind}"] = tensor
    return renamed


def write_gguf(
    path: Path,
    config: dict[str, Any],
    tensors: dict[str, np.ndarray],
    *,
    linear_type: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32,
    architecture: str | None = None,
    metadata: dict[str, Any] | None = None,
    tensors_per_part: int = 0,
) -> Path:
    """A GGUF file of tensors under llama.cpp's names. Linears and the embedding become ``linear_type``.

    With ``tensors_per_part`` it is split, and the path of no file is returned.
    """
    architecture = architecture or GGUF_ARCHITECTURES[config["architectures"][0]]
    writer = gguf.GGUFWriter(path, architecture, split_max_tensors=tensors_per_part)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_bos_token_id(config["bos_token_id"])
    writer.add_eos_token_id(config["eos_token_id"])
    for key, value in (metadata or {}).items():
        writer.kv_data[0].pop(key, None)  # a key that is there already
        if value is not None:
            _add_value(writer, key, value)
    for name, tensor in tensors.items():
        if tensor.ndim == 2 and tensor.dtype == np.float32:
            writer.add_tensor(name, gguf.quants.quantize(tensor, linear_type), raw_dtype=linear_type)
        else:
            writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add_value(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    adders = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    adders.get(type(value), writer.add_array)(key, value)
