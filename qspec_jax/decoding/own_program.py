"""The way into the cycle from a JAX program of your own: read prompts, then repeat :func:`speculative.cycle`.

Everything here may be traced. The engine has more: rows that requests enter one by one, prompts in chunks, text.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Int32

from qspec_jax.decoding import speculative
from qspec_jax.decoding.draft_record import DraftRecord
from qspec_jax.decoding.plan import Plan, static
from qspec_jax.decoding.prefill import prefill
from qspec_jax.decoding.sampling import Sampler, padded_tokens
from qspec_jax.decoding.sampling_params import (
    MAX_STOP_TOKENS,
    SamplingFeatures,
    SamplingParams,
    all_stop_tokens,
    sampling_of_each,
    stop_tokens_of,
)
from qspec_jax.decoding.state import DecodeState, PromptChunk, TokenScores
from qspec_jax.decoding.values import at_least_1, shown, truth
from qspec_jax.errors import TooLongError, UsageError
from qspec_jax.model.collectives import check_varying
from qspec_jax.model.config import ModelConfig
from qspec_jax.model.decoder import Decoder


def begin_decoding(
    decoder: Decoder | Any,
    tokens: Int32[Array, "B T"] | Any,
    num_tokens: Int32[Array, " B"] | Any,
    *,
    plan: Plan | Any,
    max_new_tokens: int | Any,
    stop_tokens: Sequence[int] | Any = (),
    sampling: SamplingParams | Mapping[str, Any] | Sequence[Any] | Any = None,
    keep_drafts: bool | Any = False,
) -> DecodeState:
    """Reads prompts, and chooses the first new token of each: the state before the first cycle.

    Args:
        decoder: of :meth:`LanguageModel.decoder_for`, which has the weights as the plan reads them.
        tokens: prompts, padded on the right; of any dtype of whole numbers.
        num_tokens: of each prompt, at least 1.
        plan: what each cycle does, none that chooses; where drafts have a budget, one ``in_cache`` of ``T +
            max_new_tokens`` positions.
        max_new_tokens: of each sequence.
        stop_tokens: a sequence ends with the first of them, unless its sampling has ``ignore_eos``; up to 16.
        sampling: of all sequences, whose seeds then count up from the one given, or of each: as of
            :meth:`LanguageModel.generate`. Stop strings have no meaning here, where there is no text.
        keep_drafts: keep what each cycle drafts, in ``record``.

    Raises:
        UsageError: an argument makes no sense. Of arrays that are traced, values are not known and not checked. Or the
            program is one of a ``jax.shard_map`` that checks what varies: use ``check_vma=False``.
    """
    plan = static(plan)
    speculative.check_decoder(decoder)
    for view in plan.views:
        decoder.check_view(view)
    _check_prompts(tokens, num_tokens, decoder.config, max_new_tokens=at_least_1("max_new_tokens", max_new_tokens))
    (batch, width), max_new_tokens = tokens.shape, int(max_new_tokens)
    tokens, num_tokens = jnp.asarray(tokens, jnp.int32), jnp.asarray(num_tokens, jnp.int32)
    given = sampling_of_each(sampling, batch)
    params = [SamplingParams.of({} if one is None else one).with_seed_after(later) for one, later in given]
    own = stop_tokens_of("stop_tokens", stop_tokens)
    stops = padded_tokens([all_stop_tokens(one, own, decoder.config.vocab_size) for one in params], MAX_STOP_TOKENS)
    features = SamplingFeatures.of(params)
    capacity = width + max_new_tokens
    if plan.in_cache(capacity) != plan:
        raise UsageError(
            f"drafts of {plan.label} would read all of a cache of {capacity}; use plan.in_cache({capacity})"
        )
    cache = decoder.create_cache(batch=batch, capacity=capacity, num_blocks=plan.num_blocks)
    check_varying(tokens, cache)
    state = DecodeState.idle(cache, lookup=plan.lookup)
    if features.scores:
        state = dataclasses.replace(state, scores=TokenScores.zeros(batch, capacity))
    if truth("keep_drafts", keep_drafts, "True or False") and plan.draft_length:
        state = dataclasses.replace(state, record=DraftRecord.idle(batch, capacity, plan.draft_length))
    chunk = PromptChunk(
        tokens=tokens,
        num_tokens=num_tokens,
        start=jnp.zeros((batch,), jnp.int32),
        last=jnp.ones((batch,), bool),
        max_new_tokens=jnp.full((batch,), max_new_tokens, jnp.int32),
        stop_tokens=jnp.asarray(stops),
        sampler=Sampler.create(params, features),
        prompt=tokens if features.penalises else None,
    )
    state, chunk = jax.tree.map(jnp.asarray, (state, chunk))
    return prefill(decoder, state, chunk, plan=plan)


def _check_prompts(
    tokens: Int32[Array, "B T"] | Any, num_tokens: Int32[Array, " B"] | Any, config: ModelConfig, *, max_new_tokens: int
) -> None:
    """Raises UsageError for what are no prompts; of arrays that are traced, shapes and dtypes alone are known."""
    for name, array, axes in (("tokens", tokens, "[B, T]"), ("num_tokens", num_tokens, "[B]")):
        shape, dtype = getattr(array, "shape", None), getattr(array, "dtype", None)
        if shape is None or dtype is None:
            raise UsageError(f"{name}={shown(array)}: use an array of whole numbers, {axes} int32")
        if len(shape) != axes.count(",") + 1 or 0 in shape or not jnp.issubdtype(dtype, jnp.integer):
            raise UsageError(f"{name} is {dtype}{list(shape)}; use {axes} int32, with at least one token")
    batch, width = tokens.shape
    if num_tokens.shape != (batch,):
        raise UsageError(f"num_tokens is of {num_tokens.shape[0]} prompts and tokens of {batch}; give one for each")
    longest = 1
    if not isinstance(num_tokens, Tracer):
        counts = np.asarray(num_tokens)
        if counts.min() < 1 or counts.max() > width:
            raise UsageError(f"num_tokens={shown(counts.tolist())}: each prompt has between 1 and {width} tokens here")
        longest = int(counts.max())
    context = config.max_position_embeddings
    if longest + max_new_tokens > context:
        told = f"a prompt of {longest} tokens and max_new_tokens={max_new_tokens} do not fit the model's context"
        raise TooLongError(f"{told} of {context}; shorten the prompt or lower max_new_tokens")
    if not isinstance(tokens, Tracer) and not isinstance(num_tokens, Tracer):
        read = np.asarray(tokens)[np.arange(width) < np.asarray(num_tokens)[:, None]]  # padding may be anything
        if read.min() < 0 or read.max() >= config.vocab_size:
            raise UsageError(f"tokens has a token id outside 0..{config.vocab_size - 1}")
