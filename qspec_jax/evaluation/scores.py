"""How good a quantised model is, and how often its drafts are right.

Text: perplexity of every precision, and against a baseline (the same checkpoint in floating point) the share of
positions where both choose the same token, and the Kullback-Leibler divergence ``KL(baseline || model)`` in nats per
token. Drafts: for a draft view and length, how many of the drafts a verification accepts, in all, by their place in the
draft, and by kind of task.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32, Int32

from qspec_jax.decoding.plan import DecodingPlan, missing_drafts
from qspec_jax.engine.intake import require_some
from qspec_jax.engine.language_model import LanguageModel
from qspec_jax.engine.prompts import Prompt
from qspec_jax.engine.results import GenerationResult, acceptance_by_position
from qspec_jax.errors import UsageError
from qspec_jax.model.collectives import all_logits
from qspec_jax.model.decoder import Decoder
from qspec_jax.model.precision import Precision
from qspec_jax.model.view import View

Logits = Callable[[Int32[Array, "1 T"]], Float32[Array, "1 T V"]]
TokenScores = Callable[[Int32[Array, "B T"]], tuple[Float32[Array, "B T"], Float32[Array, "B T"]]]


@dataclasses.dataclass(frozen=True)
class TextScore:
    """Figures of one precision over a text.

    Attributes:
        name: ``baseline``, or a precision.
        num_tokens: predicted tokens.
        perplexity: ``exp`` of the mean negative log-likelihood of a token.
        agreement: share of positions where the most likely token is the baseline's; None for the baseline.
        kl: ``KL(baseline || model)``, nats per token; None for the baseline.
    """

    name: str
    num_tokens: int
    perplexity: float
    agreement: float | None
    kl: float | None


@dataclasses.dataclass(frozen=True)
class DraftScore:
    """Figures of one draft view and length over some prompts.

    Attributes:
        draft: what the drafts read: a precision, and the part of the cache where it was not all.
        draft_length: drafts per cycle.
        num_prompts, num_tokens: prompts that ran, and tokens generated for them; nothing else counts in any figure.
        num_drafted: tokens drafted for them; 0 where the whole of short texts is what the target reads anyway.
        acceptance_rate: accepted over drafted tokens; 0 where nothing was drafted.
        tokens_per_cycle: accepted drafts and the token after them.
        acceptance_by_position: share of cycles in which the first, second, ... draft was accepted. One over the one
            before is the share of the cycles that came so far.
        identical: prompts whose tokens are those of plain decoding at the target.
        kind: of the prompts; None for all prompts, whatever their kind.
    """

    draft: str
    draft_length: int
    num_prompts: int
    num_tokens: int
    num_drafted: int
    acceptance_rate: float
    tokens_per_cycle: float
    acceptance_by_position: tuple[float, ...]
    identical: int
    kind: str | None = None


def score_text(
    model: LanguageModel,
    token_ids: Sequence[int],
    *,
    precisions: Sequence[Precision],
    baseline: LanguageModel | None = None,
    context: int = 512,
    progress: Callable[[Iterable[int]], Iterable[int]] = iter,
) -> list[TextScore]:
    """Scores a text in windows of ``context`` tokens that do not overlap.

    Args:
        model: with 4-bit weights.
        token_ids: the text, at least two tokens.
        precisions: of ``model``.
        baseline: the model to compare with at ``Precision.FLOAT``; None compares with ``model`` at W4A16.
        context: tokens per window; a last window of less than two tokens is left out.
        progress: wraps the iteration over windows.

    Returns:
        the baseline's score, then one per precision.

    Raises:
        UsageError: the text or the context is too short, or a precision does not fit the model.
    """
    if context < 2 or len(token_ids) < 2:
        raise UsageError(f"a text of {len(token_ids)} tokens in windows of {context}: both must be at least 2")
    for one in filter(None, (model, baseline)):
        longest = one.config.max_position_embeddings
        if min(context, len(token_ids)) > longest:
            raise UsageError(f"windows of {context} tokens do not fit {one.name}; give a context of up to {longest}")
    if baseline is not None and (size := baseline.config.vocab_size) != model.config.vocab_size:
        raise UsageError(
            f"{baseline.name} has {size} tokens and {model.name} {model.config.vocab_size}, so their logits cannot be "
            "compared; give a baseline of the same family, or none"
        )
    reference = (
        logits_function(model, Precision.W4A16) if baseline is None else logits_function(baseline, Precision.FLOAT)
    )
    functions = {precision: logits_function(model, precision) for precision in precisions}
    totals = {name: np.zeros(4) for name in ("baseline", *functions)}
    windows = list(_windows(token_ids, context))
    for start in progress(range(len(windows))):
        tokens = jnp.asarray(windows[start], jnp.int32)[None]
        expected = reference(tokens)
        totals["baseline"] += np.asarray(_compare(expected, expected, tokens))
        for precision, function in functions.items():
            totals[precision] += np.asarray(_compare(function(tokens), expected, tokens))
    first, *others = totals.values()
    return [_text_score("baseline", first, compared=False)] + [
        _text_score(precision.value, total, compared=True) for precision, total in zip(functions, others, strict=True)
    ]


def logits_function(model: LanguageModel, precision: Precision) -> Logits:
    """A compiled ``tokens [1, T] -> logits [1, T, V]`` at a precision."""
    if precision is not Precision.FLOAT and model.quantization is None:
        raise UsageError(f"precision {precision.value} needs 4-bit weights; load the model with a QuantConfig")
    model.programs.lay_out_weights(DecodingPlan(precision))
    return model.programs.function(functools.partial(_logits, precision=precision))


def _logits(decoder: Decoder, tokens: Array, *, precision: Precision) -> Array:
    cache = decoder.create_cache(batch=1, capacity=tokens.shape[1])
    return all_logits(decoder(tokens, cache, precision=precision)[0], decoder.axis)


def scores_function(model: LanguageModel, precision: Precision | View) -> TokenScores:
    """A compiled ``tokens [B, T] -> (log-likelihoods, whether each is the most likely) [B, T - 1]``."""
    model.programs.lay_out_weights(DecodingPlan(precision))
    return model.programs.function(functools.partial(_token_scores, precision=precision))


def _token_scores(decoder: Decoder, tokens: Array, *, precision: Precision | View) -> tuple[Array, Array]:
    cache = decoder.create_cache(batch=tokens.shape[0], capacity=tokens.shape[1])
    logits = all_logits(decoder(tokens, cache, precision=precision)[0][:, :-1], decoder.axis)
    chosen = jnp.take_along_axis(logits, tokens[:, 1:, None], axis=2)[..., 0]
    return chosen - jax.nn.logsumexp(logits, axis=2), jnp.argmax(logits, axis=2) == tokens[:, 1:]


def score_drafts(
    model: LanguageModel,
    prompts: Sequence[Prompt],
    plans: Sequence[DecodingPlan],
    *,
    kinds: Sequence[str | None] = (),
    max_new_tokens: int = 64,
    batch_size: int = 8,
    progress: Callable[[Iterable[DecodingPlan]], Iterable[DecodingPlan]] = iter,
    on_failure: Callable[[int, str], None] = lambda place, reason: None,
) -> list[DraftScore]:
    """Generates for the prompts with every plan, and once without drafts.

    Args:
        model: with 4-bit weights.
        prompts: texts, conversations or token ids.
        plans: with drafts, and one target; those that read the same of these prompts count once.
        kinds: of each prompt, if they are to be scored by kind too; None for a prompt of no kind.
        max_new_tokens: for each prompt.
        batch_size: prompts that run together.
        progress: wraps the iteration over plans.
        on_failure: told of each prompt that cannot run, which no score counts: its place, from 0 on, and why.

    Returns:
        for each plan, as :func:`plans_in_cache` has it for the longest prompt and its new tokens, the score of all
        prompts, then those of each kind, in the order in which they first appear.

    Raises:
        UsageError: no prompt can run.
        KeyboardInterrupt: the user pressed Ctrl-C: there is no score of a part.
    """

    def generate(plan: DecodingPlan) -> list[GenerationResult]:
        requests = [model.attempt(prompt, plan, max_new_tokens=max_new_tokens) for prompt in prompts]
        require_some(requests)
        return model.run(requests, plan, batch_size=batch_size).collect()

    plain = generate(DecodingPlan(plans[0].verify if plans else Precision.W4A16))
    failed: set[int] = set()
    _note_failures(plain, failed, on_failure)
    named = [kind for kind in dict.fromkeys(kinds) if kind is not None]
    of_kind = {kind: [index for index, each in enumerate(kinds) if each == kind] for kind in named}
    longest = max(len(one.prompt_token_ids) for one in plain if one.error is None) + max_new_tokens
    scores = []
    for plan in progress(plans_in_cache(plans, longest)):
        # Not of the cache, which has more positions: a budget for all of the longest prompt reads all of it.
        pairs = list(zip(generate(plan.in_cache(longest)), plain, strict=True))
        _note_failures([result for result, _ in pairs], failed, on_failure)
        scores.append(_draft_score(plan, pairs, None))
        scores += [_draft_score(plan, [pairs[index] for index in of_kind[kind]], kind) for kind in named]
    return scores


def plans_in_cache(plans: Iterable[DecodingPlan], capacity: int) -> list[DecodingPlan]:
    """Plans as what they are in caches of some positions, each once: of a small cache any budget is all of it.

    Those that draft nothing there stay.
    """
    return list(dict.fromkeys(one if missing_drafts(one, capacity) else one.in_cache(capacity) for one in plans))


def unscored(plans: Iterable[DecodingPlan], scores: Iterable[DraftScore]) -> list[str]:
    """What the drafts of some plans read that no prompt was long enough for, each once."""
    known = {(score.draft, score.draft_length) for score in scores if score.num_drafted}
    sources = [(str(plan.draft_source), plan.draft_length) for plan in plans if plan.draft_view is not None]
    return list(dict.fromkeys(source for source, length in sources if (source, length) not in known))


def _note_failures(
    results: Sequence[GenerationResult], known: set[int], on_failure: Callable[[int, str], None]
) -> None:
    """Tells of each prompt that could not run, once."""
    for place, result in enumerate(results):
        if result.error is not None and place not in known:
            known.add(place)
            on_failure(place, result.error)


def _draft_score(
    plan: DecodingPlan, pairs: Sequence[tuple[GenerationResult, GenerationResult]], kind: str | None
) -> DraftScore:
    """Of results with a plan, beside those without drafts."""
    ran = [(result, plain) for result, plain in pairs if result.error is plain.error is None]
    stats = [result.stats for result, _ in ran]
    drafting = [s for s in stats if s.draft is not None]  # not short ones, where drafts would be what verifies
    cycles = max(1, sum(s.cycles for s in drafting))
    drafted, accepted = sum(s.drafted for s in drafting), sum(s.accepted for s in drafting)
    none = [0] * (plan.draft_length + 1)
    lengths = np.sum([none, *(s.accepted_lengths for s in drafting)], axis=0)  # cycles by number of accepted drafts
    return DraftScore(
        draft=str(plan.draft_source),
        draft_length=plan.draft_length,
        num_prompts=len(ran),
        num_tokens=sum(s.num_tokens for s in stats),
        num_drafted=drafted,
        acceptance_rate=accepted / max(1, drafted),
        tokens_per_cycle=1 + accepted / cycles,
        acceptance_by_position=acceptance_by_position(lengths.tolist()) or (0.0,) * plan.draft_length,
        identical=sum(result.token_ids == plain.token_ids for result, plain in ran),
        kind=kind,
    )


def _windows(token_ids: Sequence[int], context: int) -> Iterator[Sequence[int]]:
    for start in range(0, len(token_ids), context):
        window = token_ids[start : start + context]
        if len(window) >= 2:
            yield window


@jax.jit
def _compare(
    logits: Float32[Array, "1 T V"], expected: Float32[Array, "1 T V"], tokens: Int32[Array, "1 T"]
) -> Float32[Array, " 4"]:
    """Sums over the predicted tokens: their number, negative log-likelihood, divergence, agreement."""
    log_p = jax.nn.log_softmax(logits[0, :-1])
    log_expected = jax.nn.log_softmax(expected[0, :-1])
    likelihood = jnp.take_along_axis(log_p, tokens[0, 1:, None], axis=1)
    divergence = jnp.sum(jnp.exp(log_expected) * (log_expected - log_p))
    agreement = jnp.sum(jnp.argmax(log_p, axis=1) == jnp.argmax(log_expected, axis=1))
    count = jnp.float32(log_p.shape[0])
    return jnp.stack([count, -likelihood.sum(), divergence, agreement.astype(jnp.float32)])


def _text_score(name: str, total: np.ndarray, *, compared: bool) -> TextScore:
    count, nll, divergence, agreement = total.tolist()
    return TextScore(
        name=name,
        num_tokens=int(count),
        perplexity=float(np.exp(nll / count)),
        agreement=agreement / count if compared else None,
        kl=divergence / count if compared else None,
    )


@dataclasses.dataclass(frozen=True)
class ModelScore:
    """All that was found out about one model.

    Attributes:
        name: what the user called it.
        text: one score per precision.
        drafts: one per draft view and length, of all prompts.
        drafts_by_kind: likewise, of the prompts of one kind; empty where no prompt has a kind.
        failed: why each prompt that could not run is in no score, and each figure that is no number.
    """

    name: str
    text: list[TextScore]
    drafts: list[DraftScore]
    drafts_by_kind: list[DraftScore] = dataclasses.field(default_factory=list)
    failed: list[str] = dataclasses.field(default_factory=list)
