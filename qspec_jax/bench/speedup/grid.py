"""What each plan gains over plain decoding in one setting: times of its parts, and tokens that its cycles yield.

A cycle of ``gamma`` drafts takes ``gamma * c_d + c_v`` plain steps and yields ``E`` tokens, so the speed-up is
``E / (gamma * c_d + c_v)`` (see :mod:`qspec_jax.bench.decode.speedup`). Plans of one view share the time of a draft
step, and plans of one length that of a verification: a setting needs far fewer programs than it has plans.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from qspec_jax.bench.decode.measure import Measurement, measure_parts
from qspec_jax.bench.decode.parts import Part, Setting
from qspec_jax.commands.run import say
from qspec_jax.decoding.plan import DecodingPlan, missing_drafts
from qspec_jax.engine.language_model import LanguageModel
from qspec_jax.model.view import View


@dataclasses.dataclass(frozen=True)
class Gain:
    """What a plan gains in a setting.

    Attributes:
        name: of the plan.
        draft_length: gamma.
        draft_ratio: ``c_d``: a draft step over a plain step; 0 where drafts are looked up.
        verify_ratio: ``c_v``: a verification over a plain step.
        tokens_per_cycle: ``E``.
        limit: the speed-up if all passes took what their bytes take.
    """

    name: str
    draft_length: int
    draft_ratio: float
    verify_ratio: float
    tokens_per_cycle: float
    limit: float

    @property
    def speedup(self) -> float:
        """Over plain decoding."""
        return self.tokens_per_cycle / (self.draft_length * self.draft_ratio + self.verify_ratio)


@dataclasses.dataclass(frozen=True)
class Cell:
    """A setting.

    Attributes:
        batch, context: sequences, and tokens in the cache of each.
        plain_ms: of a plain step; None where it could not be measured.
        gains: of every plan whose parts were measured.
        reason: why something is missing, if it is.
    """

    batch: int
    context: int
    plain_ms: float | None
    gains: tuple[Gain, ...] = ()
    reason: str | None = None

    @property
    def tokens_per_s(self) -> float | None:
        """Of plain decoding, over all sequences."""
        return None if self.plain_ms is None else 1e3 * self.batch / self.plain_ms

    @property
    def best(self) -> Gain | None:
        """The plan that gains most; None where plain decoding is the fastest."""
        winner = max(self.gains, key=lambda gain: gain.speedup, default=None)
        return winner if winner is not None and winner.speedup > 1 else None

    @property
    def speedup(self) -> float:
        """Of the best choice: 1 where that is plain decoding."""
        return 1.0 if self.best is None else self.best.speedup

    def to_dict(self) -> dict[str, Any]:
        """All figures, JSON-serialisable."""
        gains = [{**dataclasses.asdict(gain), "speedup": gain.speedup} for gain in self.gains]
        best = None if self.best is None else self.best.name
        setting = {"batch": self.batch, "context": self.context, "reason": self.reason}
        plain = {"plain_ms": self.plain_ms, "plain_tokens_per_s": self.tokens_per_s}
        return {**setting, **plain, "best": best, "speedup": self.speedup, "gains": gains}


def expected_of(chances: Sequence[float], draft_length: int) -> float:
    """``E`` of a cycle: ``1 + a1 + a1 a2 + ...`` of the chance of each draft once those before it are accepted.

    Args:
        chances: by place; the last one is that of all places after it.
        draft_length: gamma.
    """
    tokens = reaches = 1.0
    for place in range(draft_length):
        reaches *= chances[min(place, len(chances) - 1)]
        tokens += reaches
    return tokens


def measure_cell(
    model: LanguageModel,
    plans: Sequence[DecodingPlan],
    setting: Setting,
    tokens_per_cycle: Callable[[DecodingPlan], float | None],
    *,
    repeats: int,
    repetitions: int | None = None,
) -> Cell:
    """Times the parts that plans are made of, and puts them together.

    Args:
        model: synthetic or real.
        plans: with drafts; those that are the same in a cache of this size count once.
        setting: what is in the cache.
        tokens_per_cycle: ``E`` of a plan; None to leave it out.
        repeats, repetitions: as in :func:`measure_parts`.
    """
    for plan in plans:
        if reason := missing_drafts(plan, setting.capacity):
            say(reason)
    in_cache = list(dict.fromkeys(plan.in_cache(setting.capacity) for plan in plans))
    plain = DecodingPlan(in_cache[0].verify if in_cache else View())
    expected = {plan: tokens for plan in in_cache if plan.draft and (tokens := tokens_per_cycle(plan)) is not None}
    parts = _parts_of(list(expected))
    wanted = [Part("step", plain), *dict.fromkeys(part for some in parts.values() for part in some.values())]
    measured = dict(
        zip(wanted, measure_parts(model, wanted, setting, repeats=repeats, repetitions=repetitions), strict=True)
    )
    step = measured[wanted[0]]
    reason = next((one.reason for one in measured.values() if one.reason), None)
    if step.milliseconds is None:
        return Cell(setting.batch, setting.context, None, reason=reason)
    gains = [
        gain
        for plan, some in parts.items()
        if (gain := _gain(plan, step, {name: measured[part] for name, part in some.items()}, expected[plan]))
    ]
    return Cell(setting.batch, setting.context, step.milliseconds, tuple(gains), reason)


def _parts_of(plans: Sequence[DecodingPlan]) -> dict[DecodingPlan, dict[str, Part]]:
    """The draft step and the verification of each plan, those of others where they are the same."""
    longest = {plan.draft_view: plan for plan in sorted(plans, key=lambda plan: plan.draft_length)}
    verifying: dict[tuple[int, int], DecodingPlan] = {}
    parts = {}
    for plan in plans:
        verifies = verifying.setdefault((plan.draft_length, plan.num_blocks), plan)
        parts[plan] = {"verify": Part("verify", verifies)}
        if plan.draft_view is not None:
            parts[plan]["draft"] = Part("draft", longest[plan.draft_view])
    return parts


def _gain(plan: DecodingPlan, step: Measurement, parts: Mapping[str, Measurement], tokens: float) -> Gain | None:
    times = {name: one.milliseconds for name, one in parts.items()}
    if step.milliseconds is None or None in times.values():
        return None
    num_bytes = {name: sum(one.num_bytes.values()) for name, one in parts.items()}
    cycle_bytes = plan.draft_length * num_bytes.get("draft", 0) + num_bytes["verify"]
    return Gain(
        name=plan.label,
        draft_length=plan.draft_length,
        draft_ratio=(times.get("draft") or 0.0) / step.milliseconds,
        verify_ratio=(times["verify"] or 0.0) / step.milliseconds,
        tokens_per_cycle=tokens,
        limit=tokens * sum(step.num_bytes.values()) / cycle_bytes,
    )
