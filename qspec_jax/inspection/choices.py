"""Which kernels a model would run on this device: its own calls, traced with shapes alone."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

import pallas_kernels
from pallas_kernels import QuantizedWeight
from pallas_kernels.dispatch import REFERENCE, Selection, recorded
from qspec_jax.decoding.plan import AUTO, plan_of, static
from qspec_jax.model.cache import KV_OF_MODEL
from qspec_jax.model.config import ModelConfig, QuantConfig, held_weights
from qspec_jax.model.decoder import Decoder, abstract_decoder
from qspec_jax.model.layouts import add_group_sums, lay_out
from qspec_jax.model.linear import Linear, WeightFormat, activation_quantization
from qspec_jax.model.parameters import layer_anatomy
from qspec_jax.model.view import View

_MATMULS = ("w4a16_matmul", "w4a16_swiglu", "w4a4_matmul", "w4a4_swiglu_quantize", "float_matmul")
_CAPACITY = 1024


@dataclasses.dataclass(frozen=True)
class Choice:
    """What one call of a pass runs.

    Attributes:
        part: of the model: ``mlp.down``, or the operation's name.
        op: the operation.
        runs: the implementation.
        others: each other implementation that is not the reference, and why it does not run.
    """

    part: str
    op: str
    runs: str
    others: Mapping[str, str]


def kernel_choices(
    config: ModelConfig,
    *,
    quantization: QuantConfig,
    formats: Mapping[str, WeightFormat] | None,
    kernels: str | None,
    dtype: Any,
    kv: str = KV_OF_MODEL,
    verify: str = AUTO,
) -> dict[str, list[Choice]]:
    """For each pass of a cycle what each call of a layer and of the head runs, in their order.

    All layers are alike, so that one is traced. Weights are laid out as QSpec with its usual draft has them; ``verify``
    is its target, as of ``LanguageModel.plan``.
    """
    one_layer = dataclasses.replace(config, num_layers=1)
    decoder = abstract_decoder(
        one_layer, quantization=quantization, formats=formats, kernels=kernels, dtype=dtype, scan_layers=True
    )
    decoder.kv = kv
    held, draft_head = held_weights(quantization), quantization.draft_head
    plan = static(plan_of("qspec", draft_context="full", verify=verify, held=held, draft_head=draft_head))
    target, draft = plan.views
    passes = {
        f"verify {target.name}": (target, 4),
        f"draft {draft.name}": (draft, 1),
        f"prefill {target.name}": (target, 128),
    }
    return {name: _choices(decoder, view, tokens, plan.views) for name, (view, tokens) in passes.items()}


def _choices(decoder: Decoder, view: View, num_tokens: int, views: Sequence[View]) -> list[Choice]:
    graph, state = nnx.split(decoder)
    selections: list[Selection] = []
    obstacles: list[Mapping[str, str | None]] = []

    def trace(state: nnx.State, tokens: jax.Array) -> Any:
        traced = nnx.merge(graph, state)
        lay_out(traced, views)
        quantization = traced.layers[0].mlp.down.quantization
        assert quantization is not None
        recipes = [activation_quantization(quantization, one) for one in views]
        if any(recipe is not None and not recipe.symmetric for recipe in recipes):
            add_group_sums(traced)
        obstacles.extend(_of_any_layout(traced, path, view) for path in layer_anatomy(traced.config).linears)
        cache = traced.create_cache(batch=1, capacity=_CAPACITY)
        with recorded() as log:
            logits, _ = traced(tokens, cache, precision=view, logits_at=jnp.zeros(1, jnp.int32))
        selections.extend(log)
        return logits

    jax.eval_shape(trace, state, jax.ShapeDtypeStruct((1, num_tokens), jnp.int32))
    return _named(selections, obstacles, list(layer_anatomy(decoder.config).linears))


def _of_any_layout(decoder: Decoder, path: str, view: View) -> Mapping[str, str | None]:
    """What keeps the matmul of a linear from each implementation, if its codes had the order that this one reads.

    Of a linear that the view reads as floats, which have no order, the call itself tells.
    """
    linear: Linear = operator.attrgetter(path)(decoder.layers[0])
    weight = linear.read_by(view)
    if not isinstance(weight, QuantizedWeight):
        return {}
    settings = linear.input_quantization(view)
    with recorded() as log:
        if settings is None:
            pallas_kernels.best_layout(weight, linear.dtype, implementation=REFERENCE)
        else:
            groups = weight.num_inputs // (settings["group_size"] or weight.num_inputs)
            pallas_kernels.best_layout_for_codes(
                weight, symmetric=settings["symmetric"], num_groups=groups, implementation=REFERENCE
            )
    return log[0].obstacles


def _named(selections: list[Selection], obstacles: list[Mapping[str, str | None]], linears: list[str]) -> list[Choice]:
    """Calls by the part of the model that makes them: matmuls come in the order of the linears."""
    parts = list(zip(linears, obstacles, strict=True))
    choices: dict[Choice, None] = {}
    for one in selections:
        part, found = (one.op, one.obstacles)
        if one.op in _MATMULS and parts:
            part, of_linear = parts.pop(0)
            found = of_linear or found
        elif one.op in ("float_matmul", *_MATMULS):
            part = "lm_head"
        usual = (
            f"comes after {one.chosen}, which serves the call" if one.chosen != REFERENCE else "is not asked: XLA is"
        )
        others = {name: found.get(name) or usual for name in one.obstacles if name not in (one.chosen, REFERENCE)}
        choices.setdefault(Choice(part, one.op, str(one.chosen), _Frozen(others)))
    return list(choices)


class _Frozen(dict[str, str]):
    """A dictionary that is not changed, and can be compared by its contents in a set."""

    def __hash__(self) -> int:
        return hash(tuple(self.items()))
