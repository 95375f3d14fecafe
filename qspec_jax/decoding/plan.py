"""What a cycle does, and the names by which people ask for it. Static under jit."""

from __future__ import annotations

import dataclasses

import jax

from qspec_jax.errors import UsageError
from qspec_jax.model.precision import Precision

MAX_DRAFT_LENGTH = 16

MODES = ("qspec", "w4a16", "w4a8", "w4a4", "float")
LOOKUP_MODES = ("lookup", "lookup-qspec")
DRAFTS = ("auto", "w4a4", "w4a8")


def default_draft_precision() -> Precision:
    """W4A8 where int4 has no faster arithmetic than int8, W4A4 where it has: NVIDIA Turing to Ada."""
    device = jax.devices()[0]
    capability = getattr(device, "compute_capability", None) if device.platform == "gpu" else None
    if capability is not None and "." in str(capability):
        major, minor = (int(part) for part in str(capability).split("."))
        if (7, 5) <= (major, minor) < (9, 0):
            return Precision.W4A4
    return Precision.W4A8


@dataclasses.dataclass(frozen=True)
class DecodingPlan:
    """What one cycle does; static under jit.

    Attributes:
        verify: the precision whose output is produced.
        draft: the precision of the drafts; None where the model makes none.
        draft_length: gamma, drafts per cycle; 0 for plain decoding.
        lookup: drafts are taken from the sequence's own text where it has them; those of ``draft``, if any, are made
            where it has not.
    """

    verify: Precision
    draft: Precision | None = None
    draft_length: int = 0
    lookup: bool = False

    def __post_init__(self) -> None:
        if (self.draft is None and not self.lookup) != (self.draft_length == 0):
            raise ValueError("a plan has a draft precision or lookup if, and only if, its draft_length is positive")
        if self.draft_length > MAX_DRAFT_LENGTH:
            raise ValueError(f"draft_length={self.draft_length} is more than {MAX_DRAFT_LENGTH}")

    @property
    def mode(self) -> str:
        """The name of its kind."""
        if self.draft is not None:
            return "lookup-qspec" if self.lookup else "qspec"
        return "lookup" if self.lookup else self.verify.value

    @property
    def draft_source(self) -> str | None:
        """Where drafts come from: a precision, or the text itself; None for plain decoding."""
        return self.draft.value if self.draft is not None else "lookup" if self.lookup else None


def plan_of(mode: str, *, draft: str = "auto", draft_length: int = 3, quantized: bool = True) -> DecodingPlan:
    """The plan of a mode.

    Args:
        mode: one of :data:`MODES` or :data:`LOOKUP_MODES`.
        draft: one of :data:`DRAFTS`.
        draft_length: drafts per cycle, where there are any.
        quantized: whether the model has 4-bit weights.

    Raises:
        UsageError: an unknown mode or draft, a draft length below 1, or a 4-bit mode of a float model.
    """
    if mode not in (*MODES, *LOOKUP_MODES):
        raise UsageError(f"mode={mode!r} is unknown; use one of {', '.join((*MODES, *LOOKUP_MODES))}")
    if draft not in DRAFTS:
        raise UsageError(f"draft={draft!r} is unknown; use one of {', '.join(DRAFTS)}")
    if mode != "float" and not quantized:
        raise UsageError(f"mode={mode!r} needs 4-bit weights; load the model with a QuantConfig, or use mode='float'")
    if mode not in ("qspec", *LOOKUP_MODES):
        return DecodingPlan(verify=Precision(mode))
    if not 1 <= draft_length <= MAX_DRAFT_LENGTH:
        raise UsageError(f"draft_length={draft_length} must be between 1 and {MAX_DRAFT_LENGTH}")
    if mode == "lookup":
        return DecodingPlan(Precision.W4A16, None, draft_length, lookup=True)
    draft_precision = default_draft_precision() if draft == "auto" else Precision(draft)
    return DecodingPlan(Precision.W4A16, draft_precision, draft_length, lookup=mode == "lookup-qspec")
