"""What a cycle does, and the names by which people ask for it. Static under jit."""

from __future__ import annotations

import dataclasses

from qspec_jax.errors import UsageError
from qspec_jax.model.precision import Precision
from qspec_jax.model.view import View, least_budget

MAX_DRAFT_LENGTH = 16

MODES = ("qspec", "w4a16", "w4a8", "w4a4", "float")
LOOKUP_MODES = ("lookup", "lookup-qspec")
DRAFTS = ("auto", "w4a4", "w4a8")
DRAFT_CONTEXTS = ("full", "auto")  # or a number of tokens
DRAFT_BUDGET = 1024  # tokens that a draft reads of the cache with `auto`,
FULL_BELOW = 2048  # and of shorter sequences all


def default_draft_precision() -> Precision:
    """W4A8 where int4 has no faster arithmetic than int8, W4A4 where it has: NVIDIA Turing to Ada."""
    import jax  # the names above are for commands, which parse without it

    device = jax.devices()[0]
    capability = getattr(device, "compute_capability", None) if device.platform == "gpu" else None
    if capability is not None and "." in str(capability):
        major, minor = (int(part) for part in str(capability).split("."))
        if (7, 5) <= (major, minor) < (9, 0):
            return Precision.W4A4
    return Precision.W4A8


@dataclasses.dataclass(frozen=True)
class Lookup:
    """Drafts from the sequence's own text, which cost nothing (``lookup.py``).

    Attributes:
        otherwise: the view that drafts where the text offers nothing; None to verify any tokens there.
    """

    otherwise: View | None = None


@dataclasses.dataclass(frozen=True, init=False)
class DecodingPlan:
    """What one cycle does; static under jit.

    Tokens equal those of plain decoding at targets that read activations as floats: those of all modes with drafts. A
    target with integer activations (W4A8, W4A4) may choose other tokens than plain decoding at it: seen on a CPU.

    Attributes:
        verify: the target: the view whose output is produced.
        draft: where drafts come from: a view of the same model, or the text; None for plain decoding.
        draft_length: gamma, drafts per cycle; 0 for plain decoding.
    """

    verify: View
    draft: View | Lookup | None
    draft_length: int

    def __init__(
        self, verify: View | Precision, draft: View | Precision | Lookup | None = None, draft_length: int = 0
    ) -> None:
        """Takes a precision for the view that it names.

        Raises:
            ValueError: there are drafts without a length or the other way round, or too many.
        """
        if (draft is None) != (draft_length == 0):
            raise ValueError("a plan says where drafts come from if, and only if, its draft_length is positive")
        if draft_length > MAX_DRAFT_LENGTH:
            raise ValueError(f"draft_length={draft_length} is more than {MAX_DRAFT_LENGTH}")
        object.__setattr__(self, "verify", View.of(verify))
        object.__setattr__(self, "draft", View.of(draft) if isinstance(draft, View | Precision) else draft)
        object.__setattr__(self, "draft_length", draft_length)

    @property
    def lookup(self) -> bool:
        """Whether drafts are looked up in the text."""
        return isinstance(self.draft, Lookup)

    @property
    def draft_view(self) -> View | None:
        """The view of the drafts that the model makes; None where it makes none."""
        return self.draft.otherwise if isinstance(self.draft, Lookup) else self.draft

    @property
    def num_blocks(self) -> int:
        """Blocks of the cache that its drafts read; 0 where they read all of it."""
        return 0 if self.draft_view is None else self.draft_view.num_blocks

    @property
    def weigh(self) -> int | None:
        """Positions of the blocks that its verification weighs for the drafts; None where nobody asks."""
        return None if self.draft_view is None or not self.num_blocks else self.draft_view.cache_block

    def in_cache(self, capacity: int) -> DecodingPlan:
        """The plan that does the same with caches of some positions: drafts read the whole of small ones."""
        if self.draft_view is None:
            return self
        view = self.draft_view.in_cache(capacity)
        return DecodingPlan(self.verify, Lookup(view) if self.lookup else view, self.draft_length)

    @property
    def views(self) -> tuple[View, ...]:
        """All views that its passes read."""
        return (self.verify,) if self.draft_view is None else (self.verify, self.draft_view)

    @property
    def mode(self) -> str:
        """The name of its kind."""
        if self.draft_view is not None:
            return "lookup-qspec" if self.lookup else "qspec"
        return "lookup" if self.lookup else self.verify.name

    @property
    def draft_source(self) -> str | None:
        """Where drafts come from: a view, or the text itself; None for plain decoding."""
        return self.draft_view.name if self.draft_view is not None else "lookup" if self.lookup else None


def plan_of(
    mode: str,
    *,
    draft: str = "auto",
    draft_length: int = 3,
    draft_context: str | int = "full",
    quantized: bool = True,
) -> DecodingPlan:
    """The plan of a mode.

    Args:
        mode: one of :data:`MODES` or :data:`LOOKUP_MODES`.
        draft: one of :data:`DRAFTS`.
        draft_length: drafts per cycle, where there are any.
        draft_context: tokens of the cache that a draft of the model reads: ``full`` is all of them, ``auto`` those that
            matter of a long text.
        quantized: whether the model has 4-bit weights.

    Raises:
        UsageError: an unknown mode or draft, a draft length below 1, a draft context that is too small, or a 4-bit mode
            of a float model.
    """
    part = _part_of_cache(draft_context)
    if mode not in (*MODES, *LOOKUP_MODES):
        raise UsageError(f"mode={mode!r} is unknown; use one of {', '.join((*MODES, *LOOKUP_MODES))}")
    if draft not in DRAFTS:
        raise UsageError(f"draft={draft!r} is unknown; use one of {', '.join(DRAFTS)}")
    if mode != "float" and not quantized:
        raise UsageError(f"mode={mode!r} needs 4-bit weights; load the model with a QuantConfig, or use mode='float'")
    if mode not in ("qspec", *LOOKUP_MODES):
        return DecodingPlan(Precision(mode))
    if not 1 <= draft_length <= MAX_DRAFT_LENGTH:
        raise UsageError(f"draft_length={draft_length} must be between 1 and {MAX_DRAFT_LENGTH}")
    if mode == "lookup":
        return DecodingPlan(Precision.W4A16, Lookup(), draft_length)
    view = View.of(default_draft_precision() if draft == "auto" else Precision(draft))
    view = dataclasses.replace(view, **part)
    return DecodingPlan(Precision.W4A16, Lookup(view) if mode == "lookup-qspec" else view, draft_length)


def _part_of_cache(draft_context: str | int) -> dict[str, int]:
    """The fields of a view that say how much of the cache a draft reads."""
    check_draft_context(draft_context)
    if draft_context == "full":
        return {}
    if draft_context == "auto":
        return {"cache_budget": DRAFT_BUDGET, "cache_full_below": FULL_BELOW}
    assert isinstance(draft_context, int)
    return {"cache_budget": draft_context}


def check_draft_context(draft_context: str | int) -> None:
    """Raises UsageError for what is neither a name of :data:`DRAFT_CONTEXTS` nor a number of tokens that will do."""
    least = least_budget(View.cache_block)
    is_number = isinstance(draft_context, int) and not isinstance(draft_context, bool)
    if draft_context not in DRAFT_CONTEXTS and not (is_number and int(draft_context) >= least):
        raise UsageError(
            f"draft_context={draft_context!r}: use {', '.join(DRAFT_CONTEXTS)} or a number of tokens from {least} on"
        )
