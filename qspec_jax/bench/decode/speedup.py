"""What speculation gains over plain decoding, by acceptance (Leviathan et al., 2023, section 3).

With acceptance ``alpha``, the chance that a draft is accepted once those before it are, a cycle of ``gamma`` drafts
yields ``E = (1 - alpha^(gamma + 1)) / (1 - alpha)`` tokens (equation 1). It costs ``gamma * c_d + c_v`` plain steps:
a draft step takes ``c_d`` of one and the verification ``c_v``, so the speed-up is ``E / (gamma * c_d + c_v)``.

``alpha`` is not the acceptance rate of the other commands, accepted over drafted tokens, which counts the drafts after
a rejected one too and so is lower.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from qspec_jax.decoding.speedup import acceptance_for, expected_tokens

if TYPE_CHECKING:
    from qspec_jax.evaluation.scores import DraftScore

ACCEPTANCES = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 1.0)


@dataclasses.dataclass(frozen=True)
class Speculation:
    """Times of QSpec beside those of plain decoding at the verify precision.

    Attributes:
        draft: precision of the drafts.
        draft_length: gamma.
        batch, context: sequences, and tokens in the cache of each.
        plain_ms, draft_ms, verify_ms, cycle_ms: of a plain step, a draft step, a verification, and of a whole cycle
            in the loop that generates.
        accepted: what drafts of a real model were worth; None where that was not measured.
        verify: the target, by the name of its view, at which plain steps decode as well.
    """

    draft: str
    draft_length: int
    batch: int
    context: int
    plain_ms: float
    draft_ms: float
    verify_ms: float
    cycle_ms: float
    accepted: DraftScore | None = None
    verify: str = "w4a16"

    @property
    def draft_ratio(self) -> float:
        """``c_d``."""
        return self.draft_ms / self.plain_ms

    @property
    def verify_ratio(self) -> float:
        """``c_v``."""
        return self.verify_ms / self.plain_ms

    @property
    def costs(self) -> dict[str, float]:
        """Plain steps that a cycle costs: by its ``parts``, and as the ``loop`` runs it."""
        parts = self.draft_length * self.draft_ratio + self.verify_ratio
        return {"parts": parts, "loop": self.cycle_ms / self.plain_ms}

    @property
    def gap_ms(self) -> float:
        """What a cycle in the loop takes beyond its drafts and verification."""
        return self.cycle_ms - self.draft_length * self.draft_ms - self.verify_ms

    @property
    def accepted_alpha(self) -> float | None:
        """The acceptance at which a cycle yields the tokens that it was measured to."""
        return None if self.accepted is None else acceptance_for(self.accepted.tokens_per_cycle, self.draft_length)

    def speedups(self, tokens_per_cycle: float) -> dict[str, float]:
        """Of cycles that yield so many tokens, by each of :attr:`costs`."""
        return {kind: tokens_per_cycle / cost for kind, cost in self.costs.items()}

    def to_dict(self, acceptances: Sequence[float] = ACCEPTANCES) -> dict[str, Any]:
        """All figures, JSON-serialisable."""
        tokens = [expected_tokens(acceptance, self.draft_length) for acceptance in acceptances]
        curve = [
            {"acceptance": acceptance, "tokens_per_cycle": one, "speedup": self.speedups(one)}
            for acceptance, one in zip(acceptances, tokens, strict=True)
        ]
        measured = None
        if self.accepted is not None:
            speedups = self.speedups(self.accepted.tokens_per_cycle)
            measured = {"alpha": self.accepted_alpha, "speedup": speedups, **dataclasses.asdict(self.accepted)}
        times = {key: value for key, value in dataclasses.asdict(self).items() if key != "accepted"}
        return {
            **times,
            "draft_ratio": self.draft_ratio,
            "verify_ratio": self.verify_ratio,
            "gap_ms": self.gap_ms,
            "costs": self.costs,
            "break_even": {kind: acceptance_for(cost, self.draft_length) for kind, cost in self.costs.items()},
            "curve": curve,
            "accepted": measured,
        }


def targets_of(speculations: Sequence[Speculation]) -> str:
    """What they are compared with, for people: ``W8A16``."""
    return " or ".join(dict.fromkeys(one.verify.upper() for one in speculations))
