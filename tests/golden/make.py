"""Writes ``logits.npz``: what Hugging Face transformers computes for the tiny models of ``tests/tiny.py``.

Run ``python -m tests.golden.make`` from the repository root, where torch is installed.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from tests import tiny

GOLDEN = Path(__file__).with_name("logits.npz")
TOKENS = np.random.default_rng(7).integers(0, tiny.BASE_HF_CONFIG["vocab_size"], (2, 40))

_HF_NAMES = {
    "embedding.weight": "model.embed_tokens.weight",
    "final_norm.weight": "model.norm.weight",
    "lm_head.weight": "lm_head.weight",
    ".attention_norm.": ".input_layernorm.",
    ".mlp_norm.": ".post_attention_layernorm.",
    ".attention.query.": ".self_attn.q_proj.",
    ".attention.key.": ".self_attn.k_proj.",
    ".attention.value.": ".self_attn.v_proj.",
    ".attention.output.": ".self_attn.o_proj.",
    ".attention.query_norm.": ".self_attn.q_norm.",
    ".attention.key_norm.": ".self_attn.k_norm.",
    ".mlp.gate.": ".mlp.gate_proj.",
    ".mlp.up.": ".mlp.up_proj.",
    ".mlp.down.": ".mlp.down_proj.",
}


def hf_name(name: str) -> str:
    """The Hugging Face name of a canonical parameter."""
    for ours, theirs in _HF_NAMES.items():
        name = name.replace(ours, theirs)
    return f"model.{name}" if name.startswith("layers.") else name


def hf_model(family: str):
    """The transformers model of a family, with the tiny weights."""
    import torch
    import transformers

    config_json = tiny.hf_config(family)
    config = getattr(transformers, config_json["architectures"][0].replace("ForCausalLM", "Config"))(
        **{key: value for key, value in config_json.items() if key != "architectures"}, attn_implementation="eager"
    )
    model = getattr(transformers, config_json["architectures"][0])(config).eval()
    arrays = tiny.weights(tiny.ModelConfig.from_hf(config_json))
    loaded = model.load_state_dict({hf_name(name): torch.from_numpy(a) for name, a in arrays.items()}, strict=False)
    assert not loaded.unexpected_keys, loaded
    assert set(loaded.missing_keys) <= {"lm_head.weight"}, loaded
    model.tie_weights()
    return model


def hf_logits(family: str) -> np.ndarray:
    """``[2, 40, V]`` float32 logits of transformers for ``TOKENS``."""
    import torch

    with torch.inference_mode():
        return hf_model(family)(torch.from_numpy(TOKENS)).logits.numpy()


if __name__ == "__main__":
    np.savez_compressed(GOLDEN, **{family: hf_logits(family).astype(np.float32) for family in tiny.FAMILIES})
