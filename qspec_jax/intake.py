"""What a user asks for, checked: the way from prompts and options to requests."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from qspec_jax.errors import UsageError
from qspec_jax.requests import Prompt, Request
from qspec_jax.results import GenerationResult, GenerationStats
from qspec_jax.sampling_params import SamplingParams


def is_conversation(prompt: Prompt | Sequence[Prompt]) -> bool:
    """Whether a prompt is a list of messages."""
    return not isinstance(prompt, str) and bool(prompt) and all(isinstance(one, Mapping) for one in prompt)


def listed(prompts: Prompt | Sequence[Prompt]) -> list[Any]:
    """Prompts as a list; a text or a conversation is one.

    Raises:
        UsageError: there is none.
    """
    given: list[Any] = [prompts] if isinstance(prompts, str) or is_conversation(prompts) else list(prompts)
    if not given:
        raise UsageError("there is no prompt; give at least one")
    return given


def require_some(requests: Sequence[Request | GenerationResult]) -> None:
    """Refuses requests of which none can be served.

    Raises:
        UsageError: the error of the first of them.
    """
    if not any(isinstance(request, Request) for request in requests):
        raise UsageError(next((one.error for one in requests if isinstance(one, GenerationResult)), None))


def sampling_of_each(
    sampling: SamplingParams | Sequence[SamplingParams] | None, num_prompts: int, num_samples: int = 1
) -> list[SamplingParams]:
    """The parameters of each sample of each prompt. Seeds count up: over all that share parameters.

    Raises:
        UsageError: there are some for another number of prompts.
    """
    given = SamplingParams() if sampling is None else sampling
    if isinstance(given, SamplingParams):
        return [_with_seed_after(given, row) for row in range(num_prompts * num_samples)]
    if len(given) != num_prompts:
        raise UsageError(f"there are {len(given)} sampling parameters for {num_prompts} prompts; give one for each")
    return [_with_seed_after(one, sample) for one in given for sample in range(num_samples)]


def _with_seed_after(sampling: SamplingParams, count: int) -> SamplingParams:
    return dataclasses.replace(sampling, seed=(sampling.seed + count) % 2**32)


def check_length(num_tokens: int, max_new_tokens: int, *, max_seq_len: int | None, context: int) -> None:
    """Refuses a prompt that has no room for its new tokens.

    Args:
        num_tokens: of the prompt.
        max_new_tokens: that are to follow.
        max_seq_len: cache positions; None for as many as the model allows.
        context: that the model allows.

    Raises:
        UsageError: it does not fit, or ``max_seq_len`` makes no sense.
    """
    if max_seq_len is not None and not 1 <= max_seq_len <= context:
        raise UsageError(f"max_seq_len={max_seq_len} must be between 1 and the model's context of {context}")
    if num_tokens + max_new_tokens > (max_seq_len or context):
        what = f"max_seq_len={max_seq_len}" if max_seq_len else f"the model's context of {context}"
        raise UsageError(
            f"a prompt of {num_tokens} tokens and max_new_tokens={max_new_tokens} do not fit {what}; "
            f"shorten the prompt, lower max_new_tokens" + (" or raise max_seq_len" if max_seq_len else "")
        )


def failure(prompt: Prompt, error: UsageError, stats: GenerationStats) -> GenerationResult:
    """The result of a request that cannot be served."""
    text = prompt if isinstance(prompt, str) else None
    return GenerationResult(text, [], "", [], "error", stats, error=str(error))
