"""What ``/stats`` says."""

from __future__ import annotations

from qspec_jax.dialogue.conversation import Conversation
from qspec_jax.engine.results import GenerationResult


def figures(conversation: Conversation) -> list[str]:
    """Lines about the last answer, the cache and the context."""
    used, most, totals = conversation.num_tokens, conversation.session.max_seq_len, conversation.session.totals
    read, reused = totals.computed_prompt_tokens, totals.reused_prompt_tokens
    lines = [] if conversation.last is None else _of_answer(conversation.last)
    return [
        *(lines or ["no answer yet"]),
        f"since the start  {totals.tokens} tokens in {totals.requests} answers; prompts: {read} tokens read, "
        f"{reused} reused from the cache",
        f"context          {used} of {most} tokens used ({used / most:.0%})",
    ]


def _of_answer(result: GenerationResult) -> list[str]:
    stats, prompt = result.stats, len(result.prompt_token_ids)
    speed = [f"{stats.num_tokens} tokens"]
    if stats.tokens_per_s is not None:
        speed.append(f"{stats.tokens_per_s:.1f} tokens/s")
    speed.append(f"the first after {stats.prefill_s + stats.waited_s:.2f} s")
    if result.finish_reason == "interrupted":
        speed.append("stopped")
    lines = [
        f"last answer      {', '.join(speed)}",
        f"its prompt       {prompt - stats.reused_prompt_tokens} of {prompt} tokens read, "
        f"{stats.reused_prompt_tokens} reused from the cache",
    ]
    if stats.acceptance_rate is not None:
        per_cycle = stats.tokens_per_cycle or 1.0
        lines.append(f"its drafts       {stats.acceptance_rate:.0%} accepted, {per_cycle:.2f} tokens per cycle")
    if stats.choices:
        plans = ", ".join(f"{cycles} of {name}" for name, cycles in stats.choices.items())
        lines.append(f"its cycles       {plans}")
    return lines
