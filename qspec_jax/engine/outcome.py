"""What a sequence has yielded, as a result for the user."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import jax

from qspec_jax.decoding.plan import Plan
from qspec_jax.engine.drafts import Drafts
from qspec_jax.engine.prompts import Prompt
from qspec_jax.engine.results import FinishReason, GenerationResult, GenerationStats, RunTotals
from qspec_jax.engine.sequence import RunningSequence
from qspec_jax.errors import UsageError

if TYPE_CHECKING:
    from qspec_jax.tokenizer.tokenizer import Tokenizer


def result_of(
    sequence: RunningSequence,
    plan: Plan,
    totals: RunTotals,
    *,
    tokenizer: Tokenizer | None,
    kernels: str,
) -> GenerationResult:
    """What a sequence has yielded; it was ``interrupted`` if it is not finished, or was cancelled."""
    sampling, token_ids, watch = sequence.request.sampling, list(sequence.token_ids), sequence.watch
    text = tokenizer.decode(token_ids) if tokenizer else ""
    return GenerationResult(
        prompt=sequence.request.prompt,
        prompt_token_ids=list(sequence.request.token_ids),
        text=watch.text if watch is not None and watch.stopped else text,
        token_ids=token_ids,
        finish_reason=finish_reason_of(sequence),
        stats=dataclasses.replace(statistics(plan, sequence, kernels=kernels), compile_s=totals.compile_s),
        logprobs=None if sampling.logprobs is None else sequence.logprobs,
        top_logprobs=sequence.top_logprobs if sampling.logprobs else None,
        drafts=None if sequence.drafted is None else Drafts.of(token_ids, sequence.drafted, tokenizer),
    )


def finish_reason_of(sequence: RunningSequence) -> FinishReason:
    """Why no more tokens come of a sequence."""
    if not sequence.finished or sequence.cancelled:
        return "interrupted"
    stopped = sequence.watch is not None and sequence.watch.stopped
    return "stop" if stopped or sequence.token_ids[-1] in sequence.request.sampling.stop_token_ids else "length"


def statistics(plan: Plan, sequence: RunningSequence | None = None, *, kernels: str) -> GenerationStats:
    """Figures of a sequence, or of one that never ran."""
    lengths = [] if sequence is None else sequence.accepted_lengths
    seconds = {"prefill_s": 0.0, "decode_s": 0.0} | ({} if sequence is None else sequence.seconds())
    return GenerationStats(
        mode=plan.mode,
        draft=plan.draft_source,
        draft_length=plan.draft_length,
        accepted_lengths=tuple([*lengths, *[0] * (plan.draft_length + 1)][: plan.draft_length + 1]),
        num_tokens=0 if sequence is None else len(sequence.token_ids),
        drafted=0 if sequence is None else sum(n * one.draft_length for one, n in sequence.cycles_of.items()),
        choices={} if sequence is None else {one.label: n for one, n in sequence.cycles_of.items()},
        reused_prompt_tokens=0 if sequence is None else sequence.num_reused,
        compile_s=0.0,
        device=jax.local_devices()[0].device_kind,
        kernels=kernels,
        **seconds,
    )


def failure(prompt: Prompt, error: UsageError, stats: GenerationStats) -> GenerationResult:
    """The result of a request that cannot be served."""
    text = prompt if isinstance(prompt, str) else None
    return GenerationResult(text, [], "", [], "error", stats, error=str(error))
