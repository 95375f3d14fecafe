"""Self-speculative decoding with two precisions: one cycle of QSpec, and the loop over cycles.

Algorithm (QSpec, Zhao et al., EMNLP 2025, section 3; greedy form). With ``n`` tokens in the cache and
one more, the last, that is not in it yet:

1. *draft*: starting from the last token, decode ``draft_length`` tokens ``d_1 .. d_gamma`` at the cheap
   precision. Their keys and values go into slots ``n .. n + gamma - 1``, provisionally.
2. *verify*: run the last token and all drafts in one pass at the accurate precision. It rewrites slots
   ``n .. n + gamma``, so that no entry of the draft survives, and yields the tokens ``t_1 .. t_{gamma+1}``
   that the accurate precision would have chosen after each of them.
3. *accept*: keep drafts up to the first ``d_i != t_i``; ``t`` supplies the token after them, so a cycle
   yields between 1 and ``gamma + 1`` tokens, all chosen by the accurate precision. Rejection only
   shortens the cache.

Plain decoding is the same loop with ``draft_length = 0``. Sampling is the same cycle as well: draft and verification
choose with the same noise (see :mod:`qspec_jax.sampling`).
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Int32

from qspec_jax.cache import KVCache
from qspec_jax.modeling import Decoder
from qspec_jax.sampling import Sampler, choose
from qspec_jax.types import Precision

MAX_DRAFT_LENGTH = 16


@dataclasses.dataclass(frozen=True)
class DecodingPlan:
    """What one cycle does; static under jit.

    Attributes:
        verify: the precision whose output is produced.
        draft: the precision of the drafts, None for plain decoding.
        draft_length: gamma, drafts per cycle; 0 for plain decoding.
        stop_tokens: a sequence ends with the first of these.
    """

    verify: Precision
    draft: Precision | None = None
    draft_length: int = 0
    stop_tokens: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if (self.draft is None) != (self.draft_length == 0):
            raise ValueError("a plan has a draft precision if, and only if, its draft_length is positive")
        if self.draft_length > MAX_DRAFT_LENGTH:
            raise ValueError(f"draft_length={self.draft_length} is more than {MAX_DRAFT_LENGTH}")


@typing.no_type_check  # as a pytree it also holds shapes and other stand-ins for arrays
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecodeState:
    """Everything that changes from cycle to cycle. All counts are per sequence.

    Attributes:
        cache: valid up to, and without, ``last_token``.
        last_token: ``[B]`` int32, the newest token of each sequence.
        tokens: ``[B, capacity]`` int32, the generated tokens.
        num_tokens: ``[B]`` int32, how many of them are set.
        max_new_tokens: ``[B]`` int32, at most ``capacity``.
        finished: ``[B]`` bool, a stop token was generated or ``max_new_tokens`` reached.
        accepted_lengths: ``[B, MAX_DRAFT_LENGTH + 1]`` int32, cycles run before the sequence finished, by how many
            drafts the verification agreed with. Drafts of the last cycle beyond a stop count as drafted and
            accepted although they are not emitted.
        sampler: how tokens are drawn; None for the most likely ones.
    """

    cache: KVCache
    last_token: Int32[Array, " B"]
    tokens: Int32[Array, "B capacity"]
    num_tokens: Int32[Array, " B"]
    max_new_tokens: Int32[Array, " B"]
    finished: Bool[Array, " B"]
    accepted_lengths: Int32[Array, "B lengths"]
    sampler: Sampler | None = None


def prefill(
    model: Decoder,
    prompts: Int32[Array, "B T"],
    prompt_lengths: Int32[Array, " B"],
    max_new_tokens: Int32[Array, " B"],
    sampler: Sampler | None = None,
    *,
    plan: DecodingPlan,
    slots: int,
    capacity: int,
) -> DecodeState:
    """Runs the prompts at the verify precision and chooses the first new token of each.

    Args:
        model: the decoder.
        prompts: token ids, padded on the right.
        prompt_lengths: valid tokens of each prompt, at least 1.
        max_new_tokens: tokens to generate for each, at least 1 and at most ``capacity``.
        sampler: how tokens are drawn; None for the most likely ones.
        plan: precisions and stop tokens.
        slots: cache positions per sequence.
        capacity: width of the output.
    """
    batch = prompts.shape[0]
    cache = model.create_cache(batch=batch, slots=slots)
    logits, cache = model(prompts, cache, precision=plan.verify, logits_at=prompt_lengths - 1)
    if sampler is not None:
        sampler = sampler.for_prompts(prompts, prompt_lengths, logits.shape[-1])
    first_tokens = choose(logits, sampler, first=jnp.zeros((batch,), jnp.int32))
    first = first_tokens[:, 0]
    return DecodeState(
        cache=cache.with_lengths(prompt_lengths),
        last_token=first,
        tokens=jnp.zeros((batch, capacity), jnp.int32).at[:, 0].set(first),
        num_tokens=jnp.ones((batch,), jnp.int32),
        max_new_tokens=max_new_tokens,
        finished=is_stop(first, plan.stop_tokens) | (max_new_tokens <= 1),
        accepted_lengths=jnp.zeros((batch, MAX_DRAFT_LENGTH + 1), jnp.int32),
        sampler=None if sampler is None else sampler.after(first_tokens, jnp.ones((batch, 1), bool)),
    )


def draft(
    model: Decoder,
    last_token: Int32[Array, " B"],
    cache: KVCache,
    *,
    precision: Precision,
    draft_length: int,
    sampler: Sampler | None = None,
    first: Int32[Array, " B"] | None = None,
) -> tuple[Int32[Array, "B gamma"], KVCache]:
    """Decodes ``draft_length`` tokens one by one at the cheap precision; ``first`` is the place of the first one."""

    def step(carry: tuple[Array, KVCache, Sampler | None], index: Array):
        token, cache, sampler = carry
        logits, cache = model(token[:, None], cache, precision=precision)
        tokens = choose(logits, sampler, first=None if first is None else first + index)
        if sampler is not None:
            sampler = sampler.after(tokens, jnp.ones(tokens.shape, bool))
        return (tokens[:, 0], cache, sampler), tokens[:, 0]

    indices = jnp.arange(draft_length, dtype=jnp.int32)
    (_, cache, _), tokens = lax.scan(step, (last_token, cache, sampler), indices)
    return tokens.T, cache


def verify(
    model: Decoder,
    last_token: Int32[Array, " B"],
    draft_tokens: Int32[Array, "B gamma"],
    cache: KVCache,
    *,
    precision: Precision,
    sampler: Sampler | None = None,
    first: Int32[Array, " B"] | None = None,
) -> tuple[Int32[Array, "B gamma_plus_1"], KVCache]:
    """The tokens the accurate precision chooses after the last token and after each draft.

    ``cache`` must be rolled back to before ``last_token``: its draft entries are overwritten.
    """
    tokens = jnp.concatenate([last_token[:, None], draft_tokens], axis=1)
    logits, cache = model(tokens, cache, precision=precision)
    return choose(logits, sampler, first=first, drafts=draft_tokens), cache


def accept(draft_tokens: Int32[Array, "B gamma"], target_tokens: Int32[Array, "B gamma_plus_1"]) -> Int32[Array, " B"]:
    """How many leading drafts equal the verified choice at their position."""
    agrees = (draft_tokens == target_tokens[:, :-1]).astype(jnp.int32)
    return jnp.cumprod(agrees, axis=1).sum(axis=1)


def cycle(model: Decoder, state: DecodeState, *, plan: DecodingPlan) -> DecodeState:
    """Draft, verify, accept: advances every unfinished sequence by 1 to ``draft_length + 1`` tokens."""
    start = state.cache.lengths
    cache = state.cache
    draft_tokens = jnp.zeros((start.shape[0], 0), jnp.int32)
    if plan.draft is not None:
        with jax.named_scope("draft"):
            draft_tokens, cache = draft(
                model,
                state.last_token,
                cache,
                precision=plan.draft,
                draft_length=plan.draft_length,
                sampler=state.sampler,
                first=state.num_tokens,
            )
    with jax.named_scope("verify"):
        cache = cache.with_lengths(start)
        target_tokens, cache = verify(
            model,
            state.last_token,
            draft_tokens,
            cache,
            precision=plan.verify,
            sampler=state.sampler,
            first=state.num_tokens,
        )
    with jax.named_scope("accept"):
        num_accepted = accept(draft_tokens, target_tokens)
        return emit(dataclasses.replace(state, cache=cache), start, target_tokens, num_accepted, plan=plan)


def emit(
    state: DecodeState,
    start: Int32[Array, " B"],
    target_tokens: Int32[Array, "B gamma_plus_1"],
    num_accepted: Int32[Array, " B"],
    *,
    plan: DecodingPlan,
) -> DecodeState:
    """Appends the accepted tokens and the one after them, cut at a stop token and at the token limit.

    ``start`` is the cache length before the cycle; the length after it counts the tokens kept.
    """
    batch, width = target_tokens.shape
    index = jnp.arange(width, dtype=jnp.int32)
    stops = is_stop(target_tokens, plan.stop_tokens)
    stops_seen = jnp.cumsum(stops.astype(jnp.int32), axis=1)
    up_to_stop = (stops_seen == 0) | (stops & (stops_seen == 1))
    room = state.max_new_tokens - state.num_tokens
    kept = (index <= num_accepted[:, None]) & up_to_stop & (index < room[:, None]) & ~state.finished[:, None]
    num_kept = kept.astype(jnp.int32).sum(axis=1)
    active = ~state.finished
    lengths = jnp.arange(state.accepted_lengths.shape[1], dtype=jnp.int32)
    counted = (active[:, None] & (lengths == num_accepted[:, None])).astype(jnp.int32)

    rows = jnp.arange(batch)[:, None]
    columns = jnp.where(kept, state.num_tokens[:, None] + index, state.tokens.shape[1])
    newest = jnp.take_along_axis(target_tokens, jnp.maximum(num_kept - 1, 0)[:, None], axis=1)[:, 0]
    return dataclasses.replace(
        state,
        cache=state.cache.with_lengths(start + num_kept),
        last_token=jnp.where(active, newest, state.last_token),
        tokens=state.tokens.at[rows, columns].set(target_tokens, mode="drop"),
        num_tokens=state.num_tokens + num_kept,
        finished=state.finished | (kept & stops).any(axis=1) | (num_kept >= room),
        accepted_lengths=state.accepted_lengths + counted,
        sampler=None if state.sampler is None else state.sampler.after(target_tokens, kept),
    )


def generate(
    model: Decoder,
    state: DecodeState,
    max_cycles: Int32[Array, ""],
    *,
    plan: DecodingPlan,
    advance: Callable[..., DecodeState] = cycle,
) -> DecodeState:
    """Runs cycles on the device until every sequence has finished, or ``max_cycles`` of them.

    ``advance(model, state, plan=plan)`` is what is repeated; a benchmark repeats a part of a cycle.
    """

    def unfinished(carry: tuple[Array, DecodeState]) -> Bool[Array, ""]:
        count, state = carry
        return (count < max_cycles) & ~state.finished.all()

    def one_cycle(carry: tuple[Array, DecodeState]) -> tuple[Array, DecodeState]:
        count, state = carry
        return count + 1, advance(model, state, plan=plan)

    return lax.while_loop(unfinished, one_cycle, (jnp.int32(0), state))[1]


def is_stop(tokens: Int32[Array, "*batch"], stop_tokens: tuple[int, ...]) -> Bool[Array, "*batch"]:
    """Whether each token ends its sequence."""
    stops = jnp.zeros(tokens.shape, bool)
    for token in stop_tokens:
        stops = stops | (tokens == token)
    return stops
