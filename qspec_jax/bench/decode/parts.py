"""What the decode benchmark repeats: a plain step, a draft step, a verification, a whole cycle; and the bytes of each.

The functions are those of ``decoding.speculative``. After each repetition the cache is rolled back to the context,
so that all repetitions cost the same and no sequence finishes.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any, Literal, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding
from jaxtyping import Array

from qspec_jax.bench.description import quantized_weights
from qspec_jax.bench.random_arrays import random_codes, random_normal
from qspec_jax.decoding import speculative
from qspec_jax.decoding.chunks import fitting_capacity
from qspec_jax.decoding.costs import PassBytes
from qspec_jax.decoding.plan import AUTO, DecodingPlan, drafts_that_gain, static
from qspec_jax.decoding.state import DecodeState
from qspec_jax.engine.language_model import LanguageModel
from qspec_jax.model.cache import KV_INT8, KVCache
from qspec_jax.model.decoder import Decoder
from qspec_jax.model.layouts import num_bytes
from qspec_jax.model.linear import activation_quantization
from qspec_jax.model.view import View

PartName = Literal["step", "draft", "verify", "cycle"]


@dataclasses.dataclass(frozen=True)
class Setting:
    """What is in the cache: ``batch`` sequences of ``context`` tokens, with room for ``capacity`` positions each."""

    batch: int
    context: int
    capacity: int

    def __str__(self) -> str:
        return f"batch {self.batch}, context {self.context}"

    @classmethod
    def create(cls, *, batch: int, context: int, longest_draft: int) -> Setting:
        """With the capacity that generation would use to go on by one cycle."""
        return cls(batch, context, fitting_capacity(context + longest_draft + 1))


@dataclasses.dataclass(frozen=True)
class Part:
    """Something that a generation repeats.

    Attributes:
        name: ``step`` is plain decoding of one token; ``draft``, ``verify`` and ``cycle`` are QSpec's, a draft being
            one of the ``draft_length`` that are made in a row.
        plan: views and draft length. Verification does not depend on the view of the drafts.
    """

    name: PartName
    plan: DecodingPlan

    @property
    def view(self) -> View:
        """What the part reads; for a cycle what its verification does."""
        return self.plan.draft_view if self.name == "draft" and self.plan.draft_view else self.plan.verify

    @property
    def draft(self) -> View | None:
        """What the drafts read that the part makes, or for which it weighs the cache."""
        return None if self.name == "verify" and self.plan.weigh is None else self.plan.draft_view

    @property
    def source(self) -> str | None:
        """Where the drafts come from that the part makes, or for which it weighs the cache."""
        if self.name == "cycle" and self.plan.draft_view is None:
            return self.plan.draft_source
        return None if self.draft is None else self.draft.name

    def in_cache(self, capacity: int) -> Part:
        """The part with the plan that does the same with caches of some positions."""
        return dataclasses.replace(self, plan=self.plan.in_cache(capacity))

    @property
    def exists(self) -> bool:
        """Whether its plan has such a part: one without drafts has steps alone."""
        return (self.name == "step") == (self.plan.draft is None)

    def __str__(self) -> str:
        drafts = f"{self.plan.draft_length} {self.source} drafts" if self.source and self.name != "verify" else ""
        tokens = f"{self.plan.draft_length + 1} tokens" if self.name == "verify" else ""
        tokens += f", weighing for {self.draft.name}" if self.name == "verify" and self.draft else ""
        return ", ".join(filter(None, (f"{self.name} {self.view.name}", drafts, tokens)))

    @property
    def steps_per_repetition(self) -> int:
        """Draft steps that a repetition makes, otherwise 1."""
        return self.plan.draft_length if self.name == "draft" else 1

    def advance(self, model: Decoder, state: DecodeState, *, plan: DecodingPlan) -> DecodeState:
        """Runs the part once, and rolls the state back to the context."""
        after = _RUN[self.name](model, state, plan=plan)
        return dataclasses.replace(
            after,
            cache=after.cache.with_lengths(state.cache.lengths),
            num_tokens=state.num_tokens,
            finished=state.finished,
        )

    def num_bytes(self, model: LanguageModel, setting: Setting) -> dict[str, int]:
        """Bytes that a step of the part must move, by what they are; see :func:`pass_bytes`."""
        plan = self.plan
        widths = {"verify": plan.draft_length + 1, "cycle": plan.draft_length + 1}
        parts = [pass_bytes(model, self.view, setting, new_tokens=widths.get(self.name, 1))]
        if self.name == "cycle" and plan.draft_view is not None:
            parts += [pass_bytes(model, plan.draft_view, setting, new_tokens=1)] * plan.draft_length
        return {kind: sum(one[kind] for one in parts) for kind in parts[0]}


def decoding_parts(
    model: LanguageModel,
    modes: Sequence[str],
    *,
    drafts: Sequence[str] = (),
    draft_lengths: Sequence[int] = (),
    draft_contexts: Sequence[str | int] = ("full",),
    verify: str = AUTO,
) -> list[Part]:
    """The parts of some modes of :meth:`LanguageModel.plan`.

    With ``qspec`` or ``lookup`` they are all that a cycle is made of, and what it is compared with.

    Raises:
        UsageError: as :meth:`LanguageModel.plan`.
    """
    plain = [mode for mode in modes if mode not in ("qspec", "lookup")]
    if len(plain) == len(modes):
        return [Part("step", static(model.plan(mode))) for mode in plain]
    target = static(model.plan(draft_length=1, verify=verify)).verify
    plans = dict.fromkeys([DecodingPlan(target), *(static(model.plan(mode)) for mode in plain)])
    steps = [Part("step", plan) for plan in plans]
    combined = itertools.product(drafts, draft_contexts) if "qspec" in modes else ()
    gaining = drafts_that_gain(combined, target.name, draft_head=model.draft_head)
    plans = [
        static(model.plan(draft=draft, draft_length=length, draft_context=context, verify=verify))
        for context, length, draft in itertools.product(draft_contexts, draft_lengths, drafts)
        if (draft, context) in gaining
    ]
    if "lookup" in modes:
        plans += [static(model.plan("lookup", draft_length=length, verify=verify)) for length in draft_lengths]
    plans = list(dict.fromkeys(plans))
    # A verification depends on the drafts by their number, and by whether it weighs blocks for them. It is that of a
    # plan which drafts in any cache, if there is one.
    verifications: dict[tuple[int, int], Part] = {}
    for plan in sorted(plans, key=lambda plan: plan.in_cache(0).draft is None):
        verifications.setdefault((plan.draft_length, plan.num_blocks), Part("verify", plan))
    return [
        *steps,
        *(Part("draft", plan) for plan in plans if plan.draft_view is not None),
        *verifications.values(),
        *(Part("cycle", plan) for plan in plans),
    ]


def pass_bytes(model: LanguageModel, view: View, setting: Setting, *, new_tokens: int) -> dict[str, int]:
    """Bytes that one pass over the model must move, by what they are; on a mesh, those that a device must.

    Weights (codes, scales and all else of the layers) and LM head once, the rows of the embedding, and the keys and
    values of the context (within the window or the budget, if any) and of the new tokens. Activations and logits do
    not count.
    """
    decoder, config = model.decoder, model.config
    of, head = PassBytes.of(decoder), num_bytes(decoder.head_for(view))
    weights = of.weights_of(view) - head
    if view.weight_bits is not None and not _reads_group_sums(model, view):
        weights -= num_bytes([weight.group_sum for weight in quantized_weights(decoder)])
    budget = view.cache_budget if setting.context >= view.cache_full_below else None
    limits = (setting.context, view.window(config.sliding_window), budget)
    seen = min(limit for limit in limits if limit is not None)
    rows = of.own_rows(setting.batch)
    return {
        "weights": weights,
        "lm_head": head,
        "embedding": rows * new_tokens * config.hidden_size * decoder.embedding.get_value().dtype.itemsize,
        "cache": rows * (seen + new_tokens) * of.position,
    }


def context_state(
    decoder: Decoder,
    setting: Setting,
    *,
    num_blocks: int = 0,
    lookup: bool = False,
    shardings: DecodeState | None = None,
) -> DecodeState:
    """Unfinished sequences of ``context`` tokens, with random keys, values and tokens.

    Of ``num_blocks`` of the cache, which a view with a budget reads, the numbers are random as well, and ascending.
    ``lookup`` is whether drafts are looked up in the tokens. What is random in the cache is on devices, as
    ``shardings`` say if there are any, and made by one program for all layers: one for each, or a program of them all,
    takes a GPU's compiler as many times as long.
    """
    rows, sizes = (setting.batch,), {"capacity": setting.capacity, "num_blocks": num_blocks}
    empty = jax.eval_shape(lambda: decoder.create_cache(batch=setting.batch, **sizes))
    places = jax.tree.map(lambda _: None, empty.layers) if shardings is None else shardings.cache.layers
    numbers, key = itertools.count(), jax.random.key(0, impl="rbg")
    keys = (jax.random.fold_in(key, number) for number in numbers)
    layers = jax.tree.map(lambda like, place: _random_entries(next(keys), like, place), empty.layers, places)
    if decoder.kv == KV_INT8:
        layers = _with_scales(layers)
    rng, blocks, lengths = np.random.default_rng(0), None, np.full(rows, setting.context, np.int32)
    if empty.blocks is not None:
        # A budget that pays for more than the context lists blocks behind it, of which nothing is read.
        scores = rng.random((*empty.blocks.shape[:-1], max(num_blocks, setting.context // View.cache_block)))
        blocks = np.sort(np.argsort(scores, axis=-1)[..., :num_blocks].astype(np.int32), axis=-1)
    cache = KVCache(layers, cast(Any, lengths), cast(Any, blocks))
    tokens = functools.partial(rng.integers, decoder.config.vocab_size, dtype=np.int32)
    begun: dict[str, Any] = {
        "last_token": tokens(size=rows),
        "history": tokens(size=(*rows, setting.capacity)) if lookup else None,
        "num_tokens": np.ones(rows, np.int32),
        "max_new_tokens": np.full(rows, setting.capacity, np.int32),
        "finished": np.zeros(rows, bool),
    }
    state = dataclasses.replace(DecodeState.idle(cache), **begun)
    return jax.tree.map(jnp.asarray, state) if shardings is None else state


def _random_entries(key: Array, like: jax.ShapeDtypeStruct, sharding: Sharding | None) -> Array:
    if like.dtype == jnp.int8:
        return random_codes(key, like.shape, sharding)
    return random_normal(key, like.shape, like.dtype, 1.0, sharding)


def _with_scales(layers: Any) -> Any:
    """A cache of int8 whose entries are about as large as those of any other."""
    if isinstance(layers, tuple):
        return tuple(_with_scales(layer) for layer in layers)
    scales = {name: getattr(layers, name) for name in ("key_scales", "value_scales")}
    return dataclasses.replace(layers, **{name: np.full(a.shape, 1 / 73, a.dtype) for name, a in scales.items()})


def _drafts(model: Decoder, state: DecodeState, *, plan: DecodingPlan) -> DecodeState:
    assert plan.draft_view is not None
    tokens, cache = speculative.draft(
        model, state.last_token, state.cache, view=plan.draft_view, draft_length=plan.draft_length
    )
    return dataclasses.replace(state, cache=cache, last_token=tokens[:, -1])


def _verification(model: Decoder, state: DecodeState, *, plan: DecodingPlan) -> DecodeState:
    draft_tokens = jnp.repeat(state.last_token[:, None], plan.draft_length, axis=1)
    found = speculative.verify(model, state.last_token, draft_tokens, state.cache, view=plan.verify, weigh=plan.weigh)
    cache = found.cache
    if found.masses is not None and plan.draft_view is not None:
        cache = model.with_chosen_blocks(cache.with_lengths(state.cache.lengths), found.masses, view=plan.draft_view)
    # Of all of them, or XLA would compute the logits of one.
    return dataclasses.replace(state, cache=cache, last_token=found.tokens.max(axis=1))


_RUN: dict[PartName, Callable[..., DecodeState]] = {
    "step": speculative.cycle,
    "draft": _drafts,
    "verify": _verification,
    "cycle": speculative.cycle,
}


def _reads_group_sums(model: LanguageModel, view: View) -> bool:
    recipe = None if model.quantization is None else activation_quantization(model.quantization, view)
    return recipe is not None and not recipe.symmetric
