"""Self-speculative decoding with two views of one model: one cycle of QSpec, and the loop over cycles.

Algorithm (QSpec, Zhao et al., EMNLP 2025, section 3; greedy form). With ``n`` tokens in the cache and
one more, the last, that is not in it yet:

1. *draft*: starting from the last token, decode ``draft_length`` tokens ``d_1 .. d_gamma`` by the cheap
   view. Their keys and values go into positions ``n .. n + gamma - 1``, provisionally.
2. *verify*: run the last token and all drafts in one pass by the target view. It rewrites positions
   ``n .. n + gamma``, so that no entry of the draft survives, and yields the tokens ``t_1 .. t_{gamma+1}``
   that the target would have chosen after each of them.
3. *accept*: keep drafts up to the first ``d_i != t_i``; ``t`` supplies the token after them, so a cycle
   yields between 1 and ``gamma + 1`` tokens, all chosen by the target. Rejection only shortens the cache.

A request with *typical acceptance* gives that up: where ``d_i`` is likely enough, it is ``t_i``.

Drafts may come from the text itself instead (:mod:`qspec_jax.decoding.lookup`). Plain decoding is the same loop with
``draft_length = 0``. Sampling is the same cycle as well: draft and verification choose with the same noise (see
:mod:`qspec_jax.decoding.sampling`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float32, Int32

from qspec_jax.decoding.lookup import look_up, rewrite, write
from qspec_jax.decoding.plan import DecodingPlan, Plan, static
from qspec_jax.decoding.sampling import Sampler, as_chosen_from, choose, is_stop
from qspec_jax.decoding.state import DecodeState, TokenScores
from qspec_jax.decoding.values import shown
from qspec_jax.errors import UsageError
from qspec_jax.model.cache import KVCache
from qspec_jax.model.collectives import meet, sum_over
from qspec_jax.model.decoder import Decoder
from qspec_jax.model.view import View


class Verification(NamedTuple):
    """What a verification finds: the target's tokens and logits, the cache it wrote, what the blocks of it weighed."""

    tokens: Int32[Array, "B gamma_plus_1"]
    logits: Float32[Array, "B gamma_plus_1 V_of_device"]
    cache: KVCache
    masses: Float32[Array, "B L KH NB"] | None


def draft(
    model: Decoder,
    last_token: Int32[Array, " B"],
    cache: KVCache,
    *,
    view: View,
    draft_length: int,
    sampler: Sampler | None = None,
    first: Int32[Array, " B"] | None = None,
    idle: Bool[Array, " B"] | None = None,
) -> tuple[Int32[Array, "B gamma"], KVCache]:
    """Decodes ``draft_length`` tokens one by one by the cheap view; ``first`` is the place of the first one.

    ``idle`` is as in :meth:`Decoder.run`.
    """

    def step(carry: tuple[Array, KVCache, Sampler | None], index: Array):
        token, cache, sampler = carry
        logits, cache = model(token[:, None], cache, precision=view, idle=idle)
        logits, axis = as_chosen_from(logits, model.axis, sampler, scored=False)
        tokens = choose(logits, sampler, first=None if first is None else first + index, axis=axis)
        if sampler is not None:
            sampler = sampler.after(tokens, jnp.ones(tokens.shape, bool))
        return (tokens[:, 0], cache, sampler), tokens[:, 0]

    indices = jnp.arange(draft_length, dtype=jnp.int32)
    (_, cache, _), tokens = lax.scan(step, (last_token, cache, sampler), indices)
    return tokens.T, cache


def propose(model: Decoder, state: DecodeState, *, plan: DecodingPlan) -> tuple[Int32[Array, "B gamma"], KVCache]:
    """The drafts of a cycle, from where the plan says, and the cache with what making them wrote."""

    def draft_by_model(cache: KVCache) -> tuple[Array, KVCache]:
        if plan.draft_view is None:
            return jnp.zeros((cache.lengths.shape[0], plan.draft_length), jnp.int32), cache
        return draft(
            model,
            state.last_token,
            cache,
            view=plan.draft_view,
            draft_length=plan.draft_length,
            sampler=state.sampler,
            first=state.num_tokens,
            idle=state.finished,
        )

    if state.history is None or not plan.lookup:
        return draft_by_model(state.cache)
    found, tokens = look_up(state.history, state.cache.lengths, draft_length=plan.draft_length)
    if plan.draft_view is None:
        return tokens, state.cache
    # The model drafts for all rows or for none: a pass costs the same for one row as for all of them.
    no_drafts = jax.tree.map(jnp.zeros_like, tokens)
    nobody_needs_it = (found | state.finished).all()
    drafted, cache = lax.cond(nobody_needs_it, lambda cache: (no_drafts, cache), draft_by_model, state.cache)
    return jnp.where(found[:, None], tokens, drafted), cache.with_lengths(state.cache.lengths)


def verify(
    model: Decoder,
    last_token: Int32[Array, " B"],
    draft_tokens: Int32[Array, "B gamma"],
    cache: KVCache,
    *,
    view: View,
    weigh: int | None = None,
    sampler: Sampler | None = None,
    first: Int32[Array, " B"] | None = None,
    idle: Bool[Array, " B"] | None = None,
    scored: bool = False,
) -> Verification:
    """The tokens the target chooses after the last token and after each draft.

    ``cache`` must be rolled back to before ``last_token``: its draft entries are overwritten. ``weigh`` and ``idle``
    are as in :meth:`Decoder.run`. With ``scored``, the logits that are returned are those of the whole vocabulary in
    any case.
    """
    tokens = jnp.concatenate([last_token[:, None], draft_tokens], axis=1)
    logits, cache, masses = model.run(tokens, cache, precision=view, weigh=weigh, idle=idle)
    logits, axis = as_chosen_from(logits, model.axis, sampler, scored=scored)
    return Verification(choose(logits, sampler, first=first, drafts=draft_tokens, axis=axis), logits, cache, masses)


def accept(draft_tokens: Int32[Array, "B gamma"], target_tokens: Int32[Array, "B gamma_plus_1"]) -> Int32[Array, " B"]:
    """How many leading drafts equal the verified choice at their position."""
    agrees = (draft_tokens == target_tokens[:, :-1]).astype(jnp.int32)
    return jnp.cumprod(agrees, axis=1).sum(axis=1, dtype=jnp.int32)


def check_decoder(given: Any) -> None:
    """Refuses what is no decoder, such as the model that has it.

    Raises:
        UsageError: it is none.
    """
    if not isinstance(given, Decoder):
        raise UsageError(f"decoder={shown(given)}: use that of LanguageModel.decoder_for(plan)")


def cycle(model: Decoder | Any, state: DecodeState | Any, *, plan: Plan | Any) -> DecodeState:
    """Draft, verify, accept: advances every unfinished sequence by 1 to ``draft_length + 1`` tokens.

    What a cycle keeps true, of each row::

        before              [ t t t t t t ]          every token but the newest is in the cache; its length is `start`
        draft writes        [ t t t t t t n d d ]    gamma provisional entries: the newest token, gamma - 1 drafts
        with_lengths(start) [ t t t t t t|. . . ]    forgets them; what lies beyond the length is never read
        verify writes       [ t t t t t t N D D D ]  the same places and one more, as the target computes them
        after, 2 kept       [ t t t t t t N D|. . ]  the new length is `start` + tokens kept: again all but the newest

    Where drafts have a budget, the verification has also weighed the blocks of the cache. The heaviest are those that
    the drafts of the next cycle read; the target always reads everything.

    Raises:
        UsageError: the plan is a choice, or none, or has longer drafts than the state keeps; or something else is no
            decoder or no state.
    """
    plan = static(plan)
    check_decoder(model)
    if not isinstance(state, DecodeState):
        raise UsageError(f"state={shown(state)}: use what begin_decoding or cycle returned")
    if state.record is not None and plan.draft_length > (kept := state.record.drafts.shape[2]):
        raise UsageError(
            f"the state keeps {kept} drafts of a cycle, and the plan has {plan.draft_length}; begin with it"
        )
    start = state.cache.lengths
    with jax.named_scope("draft"):
        draft_tokens, cache = propose(model, state, plan=plan)
    with jax.named_scope("verify"):
        cache = cache.with_lengths(start)
        target_tokens, logits, cache, masses = verify(
            model,
            state.last_token,
            draft_tokens,
            cache,
            view=plan.verify,
            weigh=plan.weigh,
            sampler=state.sampler,
            first=state.num_tokens,
            idle=state.finished,
            scored=state.scores is not None,
        )
    with jax.named_scope("accept"):
        num_accepted = accept(draft_tokens, target_tokens)
        scores = None if state.scores is None else TokenScores.of(logits, target_tokens)
        if (record := state.record) is not None:
            record = record.after(state.num_tokens, ~state.finished, draft_tokens, num_accepted)
        state = dataclasses.replace(state, cache=cache, record=record)
        state = emit(state, start, target_tokens, num_accepted, scores)
    if masses is None or plan.draft_view is None:
        return state
    with jax.named_scope("choose_blocks"):
        return dataclasses.replace(state, cache=model.with_chosen_blocks(state.cache, masses, view=plan.draft_view))


def emit(
    state: DecodeState,
    start: Int32[Array, " B"],
    target_tokens: Int32[Array, "B gamma_plus_1"],
    num_accepted: Int32[Array, " B"],
    scores: TokenScores | None = None,
) -> DecodeState:
    """Appends the accepted tokens and the one after them, cut at a stop token and at the token limit.

    ``start`` is the cache length before the cycle; the length after it counts the tokens kept. ``scores`` are those of
    the target tokens, where they are kept.
    """
    batch, width = target_tokens.shape
    index = jnp.arange(width, dtype=jnp.int32)
    stops = is_stop(target_tokens, state.stop_tokens)
    stops_seen = jnp.cumsum(stops.astype(jnp.int32), axis=1)
    # Kept are the accepted drafts and the token after them, ...
    accepted = index <= num_accepted[:, None]
    # ... up to the first stop token and with it, ...
    up_to_stop = (stops_seen == 0) | (stops & (stops_seen == 1))
    # ... as many as the request asks for, and nothing in rows that had finished before.
    room = state.max_new_tokens - state.num_tokens
    active = ~state.finished
    #   target_tokens  5  8  </s>  2      num_accepted = 3: all four are the target's own choice
    #   stops          0  0   1    0
    #   kept           1  1   1    0      with room for three or more; with room for two: 1 1 0 0
    kept = accepted & up_to_stop & (index < room[:, None]) & active[:, None]
    num_kept = kept.sum(axis=1, dtype=jnp.int32)
    # An active row counts one cycle under the number of its accepted drafts, kept or not.
    lengths = jnp.arange(state.accepted_lengths.shape[1], dtype=jnp.int32)
    counted = (active[:, None] & (lengths == num_accepted[:, None])).astype(jnp.int32)

    rows = jnp.arange(batch, dtype=jnp.int32)[:, None]
    # What is not kept goes to a column that does not exist, where `mode="drop"` drops it.
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
        scores=jax.tree.map(lambda a, b: a.at[rows, columns].set(b, mode="drop"), state.scores, scores),
        history=None if state.history is None else write(state.history, start + 1, target_tokens, kept),
    )


def generate(
    model: Decoder,
    state: DecodeState,
    max_cycles: Int32[Array, ""],
    until_finished: Int32[Array, ""] | None = None,
    *,
    plan: DecodingPlan,
    cycles_per_check: int = 1,
    advance: Callable[..., DecodeState] = cycle,
    rows_over: str | None = None,
) -> tuple[DecodeState, Int32[Array, ""]]:
    """Runs cycles on the device until enough sequences have finished, or ``max_cycles`` of them.

    Args:
        model: the decoder.
        state: where to go on.
        max_cycles: at most so many, rounded up to a multiple of ``cycles_per_check``.
        until_finished: as soon as so many rows are finished or idle; None for all.
        plan: where drafts come from, and how many.
        cycles_per_check: cycles between two looks at whether to go on; a GPU's host waits for each look. Those after
            the last sequence has finished change nothing.
        advance: ``advance(model, state, plan=plan)`` is what is repeated; a benchmark repeats a part of a cycle.
        rows_over: the axis of a mesh whose devices have some rows each; all of them run as many cycles.

    Returns:
        the state after the cycles, and their number.
    """
    enough = state.finished.shape[0] if until_finished is None else until_finished
    if until_finished is None and rows_over is not None:
        enough *= lax.axis_size(rows_over)
    state, others = _needed(state, plan)

    def finished(state: DecodeState) -> Int32[Array, ""]:
        return state.finished.sum(dtype=jnp.int32)

    def of_all_devices(state: DecodeState) -> Int32[Array, ""] | None:
        return None if rows_over is None else sum_over(finished(state), rows_over)

    def unfinished(carry: tuple[Array, Array | None, DecodeState]) -> Bool[Array, ""]:
        count, known, state = carry
        return (count < max_cycles) & ((finished(state) if known is None else known) < enough)

    def one_cycle(carry: tuple[Array, Array | None, DecodeState]) -> tuple[Array, Array | None, DecodeState]:
        count, _, state = carry
        meet()
        state = lax.fori_loop(0, cycles_per_check, lambda _, state: advance(model, state, plan=plan), state)
        return count + cycles_per_check, of_all_devices(state), state

    count, _, state = lax.while_loop(unfinished, one_cycle, (jnp.int32(0), of_all_devices(state), state))
    return _with_others(state, others), count


def _needed(state: DecodeState, plan: DecodingPlan) -> tuple[DecodeState, DecodeState]:
    """What the cycles of a plan read, and the state with what only those of other plans do: it costs them nothing."""
    cache = state.cache if plan.weigh is not None else dataclasses.replace(state.cache, blocks=None)
    return dataclasses.replace(state, cache=cache, history=state.history if plan.lookup else None), state


def _with_others(state: DecodeState, others: DecodeState) -> DecodeState:
    """The state after cycles, with what they did not need as the next ones of another plan may need it."""
    if state.cache.blocks is None:  # what was chosen before does not have the tokens of these cycles
        cache = dataclasses.replace(state.cache, blocks=others.cache.blocks).with_everything_listed()
        state = dataclasses.replace(state, cache=cache)
    if state.history is None and others.history is not None:
        history = rewrite(others.history, state.cache.lengths, state.tokens, state.num_tokens)
        state = dataclasses.replace(state, history=history)
    return state
