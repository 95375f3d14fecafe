"""What one pass reads of the weights, the activations, the head and the cache.

Draft and verification are passes over the same arrays: one packed copy of the weights, one cache. They differ in how
much of them they read, and a view says so. It is data of the call, never of the model: a keyword, static under jit.

``Precision`` names the four usual views. Another one is made by hand, and serves as the draft or the target of a
``DecodingPlan``: ``View(activation_bits=8, cache_budget=1024)`` drafts in W4A8 from the 1,024 tokens of the cache that
the last verification weighed most, ``View(activation_bits=8, cache_window=256)`` from the newest 256.
"""

from __future__ import annotations

import dataclasses
import typing
from typing import Any

from qspec_jax.errors import UsageError
from qspec_jax.model import fields
from qspec_jax.model.precision import Precision

RECENT = 64  # newest tokens that a view with a budget reads whatever they weigh
AHEAD = 17  # positions that a cycle writes, at most


@typing.no_type_check  # it takes values of any type, and checks them itself
@dataclasses.dataclass(frozen=True)
class View:
    """What a pass reads.

    Attributes:
        weight_bits: 4 for the packed codes; 8 for those and the lower nibbles of weights that are nested; None for
            floating point, or for the codes dequantised and multiplied in float32.
        activation_bits: 4 or 8 for integers and an integer matmul; None for floats as they are.
        head_bits: 4 for the LM head in 4 bits; None for the one that verifies.
        cache_window: newest positions that attention reads, the token's own included; None for all of them. A model
            with a sliding window reads no more than that in any case.
        cache_budget: positions that attention reads in each layer and key/value head: the first block, the newest
            tokens, and the blocks that weighed most in the last verification; None for all positions. For drafts.
        cache_block: positions of a block, a multiple of 16.
        cache_full_below: sequences of fewer tokens than this are read whole all the same.

    Raises:
        UsageError: there is no such view.
    """

    weight_bits: int | None = 4
    activation_bits: int | None = None
    head_bits: int | None = None
    cache_window: int | None = None
    cache_budget: int | None = None
    cache_block: int = 16
    cache_full_below: int = 0

    def __post_init__(self) -> None:
        for name in [field.name for field in dataclasses.fields(self)]:
            or_none = name not in ("cache_block", "cache_full_below")
            object.__setattr__(self, name, fields.whole(f"view: {name}", getattr(self, name), or_none=or_none))
        for name, allowed in (
            ("weight_bits", (4, 8, None)),
            ("activation_bits", (4, 8, None)),
            ("head_bits", (4, None)),
        ):
            if (value := getattr(self, name)) not in allowed:
                raise UsageError(f"view: {name}={value} is not supported; use {' or '.join(map(str, allowed))}")
        if self.weight_bits != 4 and self.activation_bits is not None:
            raise UsageError(f"view: activation_bits={self.activation_bits} needs weight_bits=4, for an integer matmul")
        if self.cache_window is not None and self.cache_window < 1:
            raise UsageError(f"view: cache_window={self.cache_window} must be at least 1, or None for all of the cache")
        if self.cache_full_below < 0:
            raise UsageError(f"view: cache_full_below={self.cache_full_below} must be at least 0, which is never")
        self._check_budget()

    def _check_budget(self) -> None:
        if self.cache_block < 16 or self.cache_block % 16:
            raise UsageError(f"view: cache_block={self.cache_block} must be a multiple of 16")
        if self.cache_budget is None:
            return
        if self.cache_window is not None:
            raise UsageError("view: cache_window and cache_budget are two ways to read less of the cache; use one")
        if self.cache_budget < (least := least_budget(self.cache_block)):
            raise UsageError(
                f"view: cache_budget={self.cache_budget} must be at least {least}: the first block of "
                f"{self.cache_block} positions, the newest {RECENT} and those to come"
            )

    @classmethod
    def of(cls, view: View | Precision | Any) -> View:
        """A view as it is, or the one that a precision names.

        Raises:
            UsageError: it is neither.
        """
        if isinstance(view, View):
            return view
        if not isinstance(view, Precision):
            raise UsageError(f"{view!r} is no view; use a View, or one of {', '.join(map(str, Precision))}")
        return _OF_PRECISION[view]

    @property
    def precision(self) -> Precision:
        """The name of what its linears compute."""
        linears = View(self.weight_bits, self.activation_bits)
        return next(precision for precision, view in _OF_PRECISION.items() if view == linears)

    @property
    def name(self) -> str:
        """For people: ``w4a8``; ``w4a8/256`` with a window of 256 positions, ``w4a8@1024`` with a budget of 1,024.

        ``w4a8+head4`` reads an LM head of 4 bits.
        """
        head = "" if self.head_bits is None else f"+head{self.head_bits}"
        part = "" if self.cache_window is None else f"/{self.cache_window}"
        if self.cache_budget is not None:
            part = f"@{self.cache_budget}"
        return f"{self.precision.value}{head}{part}"

    @property
    def num_blocks(self) -> int:
        """Blocks that the budget pays for; 0 where all of the cache is read."""
        return 0 if self.cache_budget is None else self.cache_budget // self.cache_block

    def in_cache(self, capacity: int) -> View:
        """The view that reads the same of a cache of some positions: the whole of a small one needs no budget."""
        if self.cache_budget is None or capacity > max(self.cache_budget, self.cache_full_below):
            return self
        return dataclasses.replace(self, cache_budget=None, cache_block=16, cache_full_below=0)

    def window(self, of_model: int | None) -> int | None:
        """Positions that attention reads in a model with a sliding window ``of_model``, or with none."""
        return min((size for size in (self.cache_window, of_model) if size is not None), default=None)


def least_budget(block: int) -> int:
    """The smallest budget of positions in blocks of this size."""
    return block * (2 + -(-(RECENT + AHEAD - 1) // block))


_OF_PRECISION = {
    Precision.W4A4: View(activation_bits=4),
    Precision.W4A8: View(activation_bits=8),
    Precision.W4A16: View(),
    Precision.W8A16: View(weight_bits=8),
    Precision.FLOAT: View(weight_bits=None),
}
