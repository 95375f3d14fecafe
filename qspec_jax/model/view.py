"""What one pass reads of the weights, the activations, the head and the cache.

Draft and verification are passes over the same arrays: one packed copy of the weights, one cache. They differ in how
much of them they read, and a view says so. It is data of the call, never of the model: a keyword, static under jit.

``Precision`` names the four usual views. Another one is made by hand, and serves as the draft or the target of a
``DecodingPlan``: ``View(activation_bits=8, cache_window=256)`` drafts in W4A8 from the newest 256 tokens.
"""

from __future__ import annotations

import dataclasses

from qspec_jax.errors import UsageError
from qspec_jax.model.precision import Precision


@dataclasses.dataclass(frozen=True)
class View:
    """What a pass reads.

    Attributes:
        weight_bits: 4 for the packed codes; None for floating point, or for the codes dequantised and multiplied in
            float32.
        activation_bits: 4 or 8 for integers and an integer matmul; None for floats as they are.
        head_bits: None for the LM head as it is stored. There is no other one yet.
        cache_window: newest positions that attention reads, the token's own included; None for all of them. A model
            with a sliding window reads no more than that in any case.

    Raises:
        UsageError: there is no such view.
    """

    weight_bits: int | None = 4
    activation_bits: int | None = None
    head_bits: int | None = None
    cache_window: int | None = None

    def __post_init__(self) -> None:
        for name, allowed in (("weight_bits", (4, None)), ("activation_bits", (4, 8, None)), ("head_bits", (None,))):
            if (value := getattr(self, name)) not in allowed:
                raise UsageError(f"view: {name}={value} is not supported; use {' or '.join(map(str, allowed))}")
        if self.weight_bits is None and self.activation_bits is not None:
            raise UsageError(f"view: activation_bits={self.activation_bits} needs weight_bits=4, for an integer matmul")
        if self.cache_window is not None and self.cache_window < 1:
            raise UsageError(f"view: cache_window={self.cache_window} must be at least 1, or None for all of the cache")

    @classmethod
    def of(cls, view: View | Precision) -> View:
        """A view as it is, or the one that a precision names."""
        return view if isinstance(view, View) else _OF_PRECISION[view]

    @property
    def precision(self) -> Precision:
        """The name of what its linears compute."""
        linears = View(self.weight_bits, self.activation_bits)
        return next(precision for precision, view in _OF_PRECISION.items() if view == linears)

    @property
    def name(self) -> str:
        """For people: ``w4a8``, or ``w4a8/256`` with a window of 256 positions."""
        window = "" if self.cache_window is None else f"/{self.cache_window}"
        return f"{self.precision.value}{window}"

    def window(self, of_model: int | None) -> int | None:
        """Positions that attention reads in a model with a sliding window ``of_model``, or with none."""
        return min((size for size in (self.cache_window, of_model) if size is not None), default=None)


_OF_PRECISION = {
    Precision.W4A4: View(activation_bits=4),
    Precision.W4A8: View(activation_bits=8),
    Precision.W4A16: View(),
    Precision.FLOAT: View(weight_bits=None),
}
