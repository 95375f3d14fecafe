"""What speculation gains, by acceptance: ``E / (gamma * c_d + c_v)`` over plain decoding (see ``bench decode``)."""

from __future__ import annotations

_BISECTIONS = 60


def expected_tokens(acceptance: float, draft_length: int) -> float:
    """Tokens that a cycle yields: ``1 + alpha + ... + alpha^gamma``."""
    return sum(acceptance**position for position in range(draft_length + 1))


def acceptance_for(tokens: float, draft_length: int) -> float | None:
    """The acceptance at which a cycle yields so many tokens; None where no acceptance does.

    Acceptance 0 yields the one token that a cycle always yields.
    """
    if tokens > draft_length + 1:
        return None
    low, high = 0.0, 1.0
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        low, high = (middle, high) if expected_tokens(middle, draft_length) < tokens else (low, middle)
    return high
