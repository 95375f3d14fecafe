"""What speculation gains, by acceptance: ``E / (gamma * c_d + c_v)`` over plain decoding (see ``bench decode``)."""

from __future__ import annotations

from typing import Any

from qspec_jax.decoding.values import MAX_COUNT, real, whole

_BISECTIONS = 60


def expected_tokens(acceptance: float | Any, draft_length: int | Any) -> float:
    """Tokens that a cycle yields: ``1 + alpha + ... + alpha^gamma``.

    Args:
        acceptance: the chance alpha of a draft whose predecessors were accepted.
        draft_length: gamma; 0 for plain decoding.

    Raises:
        UsageError: an argument makes no sense.
    """
    alpha = real("acceptance", acceptance, "a chance, 0 to 1", least=0.0, most=1.0)
    return sum(alpha**position for position in range(_checked(draft_length) + 1))


def acceptance_for(tokens: float | Any, draft_length: int | Any) -> float | None:
    """The acceptance at which a cycle yields so many tokens; None where no acceptance does.

    Acceptance 0 yields the one token that a cycle always yields. Arguments and errors are those of
    :func:`expected_tokens`.
    """
    tokens = real("tokens", tokens, "0 or more", least=0.0, most=float("inf"))
    if tokens > _checked(draft_length) + 1:
        return None
    low, high = 0.0, 1.0
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        low, high = (middle, high) if expected_tokens(middle, draft_length) < tokens else (low, middle)
    return high


def _checked(draft_length: int | Any) -> int:
    return whole("draft_length", draft_length, "0 or more", least=0, most=MAX_COUNT)
