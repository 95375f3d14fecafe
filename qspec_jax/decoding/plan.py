"""What a cycle does, and the names by which people ask for it. Static under jit."""

from __future__ import annotations

import dataclasses
import functools
import typing
from collections.abc import Collection, Iterable, Sequence
from typing import Any

from qspec_jax.decoding.values import between, listed, shown, whole
from qspec_jax.errors import UsageError
from qspec_jax.model.precision import Precision
from qspec_jax.model.view import View, least_budget

MAX_DRAFT_LENGTH = 16

AUTO = "auto"  # a mode, and a draft length: the engine chooses
AUTO_LENGTHS = (1, 2, 3, 5, 7)
AUTO_LOOKUP_LENGTHS = (3, 7)
MODES = ("qspec", "w4a16", "w8a16", "w4a8", "w4a4", "float")
LOOKUP_MODES = ("lookup", "lookup-qspec")
_TARGETS = {one.value: View.of(one) for one in (Precision.W4A16, Precision.W8A16, Precision.FLOAT)}  # of drafts
VERIFY = (AUTO, *_TARGETS)
DRAFTS = ("auto", "w4a4", "w4a8", "w4a16")  # the last where it is not what verifies: see plan_of
DRAFT_CONTEXTS = ("full", "auto")  # or a number of tokens
DRAFT_BUDGET = 512  # tokens that a draft reads of the cache with `auto`,
FULL_BELOW = 1024  # and of shorter sequences all (docs/lab-notebook/033-drafts-from-the-heaviest-blocks.md)


def default_draft_precision() -> Precision:
    """W4A8 where int4 has no faster arithmetic than int8, W4A4 where it has: NVIDIA Turing to Ada.

    On TPUs v5e and v6e memory bounds W4A8 already. 7x has no integers at all: either draft takes the time of a W4A16
    step, by the compiler's count, and W4A8 is accepted more often.
    """
    import jax  # the names above are for commands, which parse without it

    device = jax.local_devices()[0]
    capability = getattr(device, "compute_capability", None) if device.platform == "gpu" else None
    if capability is not None and "." in str(capability):
        major, minor = (int(part) for part in str(capability).split("."))
        if (7, 5) <= (major, minor) < (9, 0):
            return Precision.W4A4
    return Precision.W4A8


@typing.no_type_check  # it takes values of any type, and checks them itself
@dataclasses.dataclass(frozen=True)
class Lookup:
    """Drafts from the sequence's own text, which cost nothing (``lookup.py``).

    Attributes:
        otherwise: the view, or the precision that names it, that drafts where the text offers nothing; None to verify
            any tokens there.

    Raises:
        UsageError: it is no view.
    """

    otherwise: View | None = None

    def __post_init__(self) -> None:
        if self.otherwise is not None:
            object.__setattr__(self, "otherwise", View.of(self.otherwise))


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
        self, verify: View | Precision | Any, draft: View | Precision | Lookup | Any = None, draft_length: int | Any = 0
    ) -> None:
        """Takes a precision for the view that it names.

        Raises:
            UsageError: there are drafts without a length or the other way round, or too many, or something is no view.
        """
        draft_length = between("draft_length", draft_length, 0, MAX_DRAFT_LENGTH, f"between 0 and {MAX_DRAFT_LENGTH}")
        if (draft is None) != (draft_length == 0):
            raise UsageError("a plan says where drafts come from if, and only if, its draft_length is positive")
        object.__setattr__(self, "verify", View.of(verify))
        object.__setattr__(self, "draft", draft if draft is None or isinstance(draft, Lookup) else View.of(draft))
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
    def label(self) -> str:
        """For people: ``w4a16``, ``lookup x3``, ``w4a8@1024 x5``."""
        return self.mode if self.draft is None else f"{self.draft_source} x{self.draft_length}"

    @property
    def num_blocks(self) -> int:
        """Blocks of the cache that its drafts read; 0 where they read all of it."""
        return 0 if self.draft_view is None else self.draft_view.num_blocks

    @property
    def weigh(self) -> int | None:
        """Positions of the blocks that its verification weighs for the drafts; None where nobody asks."""
        return None if self.draft_view is None or not self.num_blocks else self.draft_view.cache_block

    def in_cache(self, capacity: int) -> DecodingPlan:
        """The plan that does the same with caches of some positions: drafts read the whole of small ones.

        What drafts then as it verifies drafts nothing any more.
        """
        if self.draft_view is None:
            return self
        view = self.draft_view.in_cache(capacity)
        if view == self.draft_view:
            return self
        if view != self.verify:
            return DecodingPlan(self.verify, Lookup(view) if self.lookup else view, self.draft_length)
        return DecodingPlan(self.verify, Lookup(), self.draft_length) if self.lookup else DecodingPlan(self.verify)

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

    @functools.cached_property
    def draft_source(self) -> str | None:
        """Where drafts come from: a view, or the text itself; None for plain decoding."""
        return self.draft_view.name if self.draft_view is not None else "lookup" if self.lookup else None

    @functools.cached_property
    def source_and_target(self) -> str | None:
        """What acceptance depends on, besides the text: ``w4a8 for float``; None for plain decoding."""
        return None if self.draft_source is None else f"{self.draft_source} for {self.verify.name}"


@typing.no_type_check  # as above
@dataclasses.dataclass(frozen=True)
class AutoPlan:
    """Plans of one target, of which the engine runs the fastest: it chooses anew between bursts of cycles.

    Attributes:
        mode: the name by which it was asked for.
        choices: plain decoding first. Those with a budget have the same one.

    Raises:
        UsageError: the choices are others.
    """

    mode: str
    choices: tuple[DecodingPlan, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "choices", tuple(listed("choices", self.choices, "a list of plans")))
        if not self.choices or not all(isinstance(plan, DecodingPlan) for plan in self.choices):
            raise UsageError("the choices of a plan are plans: one DecodingPlan at least")
        if self.choices[0].draft is not None or len({plan.verify for plan in self.choices}) > 1:
            raise UsageError("the choices of a plan have one target, and plain decoding comes first")
        if len({plan.num_blocks for plan in self.choices} - {0}) > 1:
            raise UsageError("the choices of a plan share one table of blocks, and so one budget")

    @property
    def verify(self) -> View:
        """The target."""
        return self.choices[0].verify

    @property
    def draft_length(self) -> int:
        """Drafts of a cycle at most."""
        return max(plan.draft_length for plan in self.choices)

    @property
    def draft_source(self) -> str | None:
        """Where drafts come from: that is chosen."""
        return "auto"

    @property
    def lookup(self) -> bool:
        """Whether drafts may be looked up in the text."""
        return any(plan.lookup for plan in self.choices)

    @property
    def num_blocks(self) -> int:
        """Blocks of the cache that drafts with a budget read; 0 where none has one."""
        return max(plan.num_blocks for plan in self.choices)

    def in_cache(self, capacity: int) -> AutoPlan | DecodingPlan:
        """The plan that does the same with caches of some positions; the only one that is left."""
        choices = dict.fromkeys(plan.in_cache(capacity) for plan in self.choices)
        return AutoPlan(self.mode, tuple(choices)) if len(choices) > 1 else self.choices[0]


Plan = DecodingPlan | AutoPlan
MISSING_DRAFTS = ("nothing is drafted", "drafts are looked up alone")


def missing_drafts(plan: Plan, capacity: int) -> str | None:
    """What is to be said where the model has no drafts to make in caches of some positions, and a plan has; or None."""
    in_cache = plan.in_cache(capacity)
    if not _asks_the_model(plan) or _asks_the_model(in_cache):
        return None
    name = plan.label if isinstance(plan, DecodingPlan) else plan.mode
    left = MISSING_DRAFTS[in_cache.draft_length > 0]
    return f"{left}: {name} would read all of a cache of {capacity}, as its verification does"


def _asks_the_model(plan: Plan) -> bool:
    """Whether the model makes drafts of a plan."""
    return any(one.draft_view is not None for one in (plan.choices if isinstance(plan, AutoPlan) else (plan,)))


def static(plan: Plan | Any) -> DecodingPlan:
    """A plan in which nothing is chosen.

    Raises:
        UsageError: it is a choice, or no plan.
    """
    if isinstance(plan, AutoPlan):
        raise UsageError(f"{plan.mode} chooses from several plans; name one of them: a mode and a draft length")
    if not isinstance(plan, DecodingPlan):
        raise UsageError(f"plan={shown(plan)}: use what LanguageModel.plan returns, or a DecodingPlan")
    return plan


def plan_of(
    mode: str | Any,
    *,
    draft: str | Any = "auto",
    draft_length: int | str | Any = 3,
    draft_context: str | int | Any = "auto",
    verify: str | Any = AUTO,
    usual: str = AUTO,
    held: Collection[int | None] = (4,),
    draft_head: int | None = None,
    rounds_in_vain: bool = False,
) -> Plan:
    """The plan of a mode.

    Args:
        mode: one of :data:`MODES`, :data:`LOOKUP_MODES` or ``auto``, which chooses between plain decoding, ``lookup``
            and ``qspec`` with every length of :data:`AUTO_LENGTHS`.
        draft: one of :data:`DRAFTS`. ``w4a16`` reads 16-bit activations, as W4A16 verification does, and gains by
            reading less than that does: a budget of the cache, a head of 4 bits, or weights of fewer bits.
        draft_length: drafts per cycle, where there are any; in the mode ``qspec`` also ``auto``, which chooses between
            :data:`AUTO_LENGTHS` and none.
        draft_context: tokens of the cache that a draft of the model reads: ``full`` is all of them, ``auto`` those that
            matter of a long text where there is a kernel that reads no others, or the draft gains by nothing else.
        verify: one of :data:`VERIFY`, the target of modes that draft; ``auto`` for ``usual``. A plain mode is its own
            target.
        usual: one of :data:`VERIFY`, which a model was loaded for. ``auto`` is ``float`` for one that holds its
            checkpoint's own floats and a 4-bit copy, ``w8a16`` for one with nested weights, and ``w4a16`` for others.
        held: ``weight_bits`` of the views that the model's weights serve (``model.config.held_weights``).
        draft_head: 4 if the model has an LM head of 4 bits for its drafts.
        rounds_in_vain: a step is faster with 16-bit activations than with 8-bit ones. Where the engine chooses, W4A16
            verifies and nobody named a draft, those with a budget then have 16-bit ones.

    Raises:
        UsageError: an unknown mode, draft or target, a draft length below 1, a draft context that is too small,
            weights that the model does not hold, or a draft that reads all that its verification reads.
    """
    draft_context = check_draft_context(draft_context)
    if not isinstance(mode, str) or mode not in (*MODES, *LOOKUP_MODES, AUTO):
        raise UsageError(f"mode={shown(mode)} is unknown; use one of {', '.join((*MODES, *LOOKUP_MODES, AUTO))}")
    if not isinstance(draft, str) or draft not in DRAFTS:
        raise UsageError(f"draft={shown(draft)} is unknown; use one of {', '.join(DRAFTS)}")
    target = _target_of(mode, verify, usual, held)
    if _is_plain(mode):
        return DecodingPlan(target)
    view = View.of(default_draft_precision() if draft == "auto" else Precision(draft))
    view = dataclasses.replace(view, head_bits=draft_head)
    if view == target and mode != "lookup" and (reason := gain_obstacle(draft, draft_context, target.name)):
        raise UsageError(reason)
    part = _part_of_cache(draft_context, always=view == target)
    with_part = dataclasses.replace(view, **part)
    is_chosen = mode == AUTO or (isinstance(draft_length, str) and draft_length == AUTO)
    is_rounded = draft == "auto" and view.activation_bits == 8 and target == View.of(Precision.W4A16)
    if part and is_chosen and is_rounded and rounds_in_vain:
        with_part = dataclasses.replace(with_part, activation_bits=None)
    views = [one for one in dict.fromkeys((view, with_part)) if one != target]
    if mode == AUTO:
        lookups = [DecodingPlan(target, Lookup(), length) for length in AUTO_LOOKUP_LENGTHS]
        return _chosen_of(mode, target, views, *lookups)
    if isinstance(draft_length, str) and draft_length == AUTO:
        if mode != "qspec":
            raise UsageError(
                f"draft_length={AUTO!r} is of mode='qspec'; give mode={mode!r} a number, or use mode='auto'"
            )
        return _chosen_of(mode, target, views)
    draft_length = between("draft_length", draft_length, 1, MAX_DRAFT_LENGTH, f"between 1 and {MAX_DRAFT_LENGTH}")
    if mode == "lookup":
        return DecodingPlan(target, Lookup(), draft_length)
    view = views[-1]
    return DecodingPlan(target, Lookup(view) if mode == "lookup-qspec" else view, draft_length)


def _target_of(mode: str, verify: str | Any, usual: str, held: Collection[int | None]) -> View:
    """The view whose output a mode produces.

    Raises:
        UsageError: there is no such target, it contradicts the mode, or the model has not the weights of both.
    """
    verify = check_verify(verify, mode)
    if verify == AUTO and not _is_plain(mode):
        verify = usual
    if mode != "float" and 4 not in held:
        raise UsageError(f"mode={mode!r} needs 4-bit weights; load the model with a QuantConfig, or use mode='float'")
    if mode == "w8a16" and 8 not in held:
        raise UsageError("mode='w8a16' needs 8-bit weights; load the model with verify='w8a16', or use mode='w4a16'")
    if verify != AUTO and (target := _TARGETS[verify]).weight_bits not in held:
        others = [name for name, view in _TARGETS.items() if view.weight_bits in held]
        raise UsageError(
            f"verify={verify!r} needs weights that this model does not hold; load it with verify={verify!r}, or use "
            f"verify={' or '.join(map(repr, others))}"
        )
    if _is_plain(mode):
        return View.of(Precision(mode))
    if verify == AUTO:
        return _TARGETS["float" if None in held else "w8a16" if 8 in held else "w4a16"]
    return target


def _is_plain(mode: str) -> bool:
    return mode in MODES and mode != "qspec"


def check_verify(verify: str | Any, mode: str) -> str:
    """One of :data:`VERIFY`, for a mode of this file.

    Raises:
        UsageError: it is none, or a plain mode produces another output.
    """
    if not isinstance(verify, str) or verify not in VERIFY:
        raise UsageError(f"verify={shown(verify)} is unknown; use one of {', '.join(VERIFY)}")
    if verify not in (AUTO, mode) and _is_plain(mode):
        raise UsageError(
            f"mode={mode!r} decodes plainly and has no drafts for verify={verify!r} to verify; use verify={AUTO!r}, "
            f"or mode={verify!r} or 'qspec'"
        )
    return verify


def _chosen_of(mode: str, target: View, views: Sequence[View], *others: DecodingPlan) -> AutoPlan:
    """A choice between plain decoding, drafts of some views in every length, and other plans."""
    drafting = [DecodingPlan(target, view, length) for view in views for length in AUTO_LENGTHS]
    return AutoPlan(mode, (DecodingPlan(target), *others, *drafting))


def gain_obstacle(draft: str, draft_context: str | int, verify: str, *, draft_head: int | None = None) -> str | None:
    """Why drafts read all that their verification reads, and so cost a plain step; None where they do not.

    Args:
        draft, draft_context, draft_head: as in :func:`plan_of`.
        verify: the same; of ``auto`` nothing is known before there is a model.
    """
    if (draft, draft_context, verify) != ("w4a16", "full", "w4a16") or draft_head is not None:
        return None
    return (
        f"draft={draft!r} with draft_context='full' reads what verify='w4a16' reads, and costs a plain step; use "
        "draft_context='auto' or a number, draft='w4a8', verify='w8a16' or 'float', or load it with draft_head=4"
    )


def drafts_that_gain(
    combined: Iterable[tuple[str, str | int]], verify: str, *, draft_head: int | None
) -> list[tuple[str, str | int]]:
    """Of drafts and what they read of the cache those without a :func:`gain_obstacle`.

    Raises:
        UsageError: there are some, and each has one.
    """
    reasons = {one: gain_obstacle(*one, verify, draft_head=draft_head) for one in combined}
    if reasons and all(reasons.values()):
        raise UsageError(next(filter(None, reasons.values())))
    return [one for one, reason in reasons.items() if reason is None]


def _part_of_cache(draft_context: str | int, *, always: bool) -> dict[str, int]:
    """The fields of a view that say how much of the cache a draft reads.

    Args:
        draft_context: one that was checked.
        always: ``auto`` is a part of it on all devices.
    """
    if draft_context == "full" or (draft_context == "auto" and not always and not _reads_blocks_alone()):
        return {}
    if draft_context == "auto":
        return {"cache_budget": DRAFT_BUDGET, "cache_full_below": FULL_BELOW}
    assert isinstance(draft_context, int)
    return {"cache_budget": draft_context}


def _reads_blocks_alone() -> bool:
    """Whether the kernels of this device read the blocks of a budget and no others: the reference reads everything."""
    import jax

    return jax.default_backend() == "gpu"


def check_draft_context(draft_context: Any) -> str | int:
    """A name of :data:`DRAFT_CONTEXTS`, or a number of tokens that will do.

    Raises:
        UsageError: it is neither.
    """
    if isinstance(draft_context, str) and draft_context in DRAFT_CONTEXTS:
        return draft_context
    least = least_budget(View.cache_block)
    try:
        return whole("draft_context", draft_context, "", least=least)
    except UsageError as error:
        names = ", ".join(DRAFT_CONTEXTS)
        given = f"draft_context={shown(draft_context)}"
        raise UsageError(f"{given}: use {names} or a number of tokens from {least} on") from error
