"""What a ``config.json`` says of rotary position embedding: the base of its angles, and how they are scaled.

Two spellings are in use, ``rope_theta`` with ``rope_scaling``, and ``rope_parameters``. They are ranked as transformers
ranks them (``RotaryEmbeddingConfigMixin``): one dictionary counts, as a whole, and what is in it counts more than what
stands beside it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Literal

from qspec_jax.errors import UnsupportedModelError

DEFAULT_THETA = 10000.0
_LARGEST = 3.4e38  # what is computed with is float32
_NEEDED = {"linear": ("factor",), "llama3": ("factor", "low_freq_factor", "high_freq_factor"), "yarn": ()}


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """Scaling of the rotary frequencies, as ``rope_scaling`` of a Hugging Face config.

    Attributes:
        kind: ``linear`` divides every frequency by ``factor``; ``llama3`` only the low ones, with a
            smooth transition between the two wavelength bounds; ``yarn`` (Peng et al., 2023) only the low ones, with a
            linear transition over the pairs.
        factor: the divisor.
        low_freq_factor, high_freq_factor: used by ``llama3``.
        original_max_position_embeddings: used by ``llama3`` and ``yarn``.
        beta_fast, beta_slow: turns over the original length of the first and the last pair in ``yarn``'s transition.
        truncate: ``yarn``'s transition begins and ends at whole pairs.
        attention_factor: of ``yarn``; multiplies cosine and sine.
    """

    kind: Literal["linear", "llama3", "yarn"]
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float = 1.0

    def __post_init__(self) -> None:
        names = ("factor", "low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow", "attention_factor")
        for name in (*names, "original_max_position_embeddings"):
            if not 0 < getattr(self, name) < math.inf:
                raise UnsupportedModelError(
                    f"rope scaling {self.kind!r}: {name}={getattr(self, name)} must be positive"
                )
        if self.low_freq_factor == self.high_freq_factor:
            raise UnsupportedModelError(f"rope scaling {self.kind!r}: low_freq_factor and high_freq_factor are equal")

    @property
    def scaled_length(self) -> int:
        """Positions that a model was stretched to; 0 where its config counts them already."""
        return int(self.factor * self.original_max_position_embeddings) if self.kind == "yarn" else 0


def rope_parameters(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The one dictionary that counts: ``rope_scaling`` if it says anything, else ``rope_parameters``.

    Raises:
        UnsupportedModelError: it is no dictionary, or another one for every kind of layer.
    """
    name = "rope_scaling" if config.get("rope_scaling") else "rope_parameters"
    parameters = config.get(name) or {}
    if not isinstance(parameters, Mapping):
        raise UnsupportedModelError(f"config.json: {name}={shown(parameters)} is neither an object nor null")
    if nested := [key for key, value in parameters.items() if isinstance(value, Mapping)]:
        raise UnsupportedModelError(
            f"config.json: {name} has settings of their own for {', '.join(nested)}; supported: the same in all layers"
        )
    return parameters


def read_rope(config: Mapping[str, Any]) -> tuple[float, RopeScaling | None]:
    """The base of the rotary angles, and how they are scaled.

    Raises:
        UnsupportedModelError: the scaling is not supported, or a number that it needs is missing or none.
    """
    parameters = rope_parameters(config)
    theta = number(parameters, "rope_theta", number(config, "rope_theta", DEFAULT_THETA))
    if theta <= 1:
        raise UnsupportedModelError(f"config.json: rope_theta={theta} must be greater than 1")
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if kind == "default":
        return theta, None
    if not isinstance(kind, str) or kind not in _NEEDED:
        raise UnsupportedModelError(
            f"config.json: rope scaling {kind!r} is not supported; supported: {', '.join(_NEEDED)}"
        )
    if missing := [key for key in _NEEDED[kind] if parameters.get(key) is None]:
        raise UnsupportedModelError(f"config.json: rope scaling {kind!r} lacks {', '.join(missing)}")
    if kind == "linear":
        return theta, RopeScaling("linear", number(parameters, "factor"))
    # As in transformers: beside the dictionary, in it, or the length of the model.
    places = (config, "original_max_position_embeddings"), (parameters, "original_max_position_embeddings")
    places = (*places, (config, "max_position_embeddings"))
    original = int(next((number(place, key) for place, key in places if place.get(key) is not None), 2048))
    if kind == "yarn":
        return theta, _yarn(config, parameters, original)
    numbers: dict[str, Any] = {key: number(parameters, key) for key in _NEEDED["llama3"]}
    return theta, RopeScaling("llama3", original_max_position_embeddings=original, **numbers)


def _yarn(config: Mapping[str, Any], parameters: Mapping[str, Any], original: int) -> RopeScaling:
    """As ``_compute_yarn_parameters`` of transformers reads it."""
    factor = number(parameters, "factor", number(config, "max_position_embeddings", 2048.0) / max(original, 1))
    attention = number(parameters, "attention_factor", 0.0)
    if parameters.get("attention_factor") is None:
        mscale, all_dim = (number(parameters, key, 0.0) for key in ("mscale", "mscale_all_dim"))
        by_both = mscale and all_dim
        attention = _magnitude(factor, mscale) / _magnitude(factor, all_dim) if by_both else _magnitude(factor, 1.0)
    return RopeScaling(
        "yarn",
        factor,
        original_max_position_embeddings=original,
        beta_fast=number(parameters, "beta_fast", 0.0) or 32.0,
        beta_slow=number(parameters, "beta_slow", 0.0) or 1.0,
        truncate=truth(parameters, "truncate", default=True),
        attention_factor=attention,
    )


def _magnitude(factor: float, mscale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def number(values: Mapping[str, Any], key: str, default: float | None = None) -> float:
    """The number of an entry, ``default`` if it is missing or null.

    Raises:
        UnsupportedModelError: it is no finite number, or there is neither it nor a default.
    """
    value = default if values.get(key) is None else values[key]
    if isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= _LARGEST:
        return float(value)
    raise UnsupportedModelError(f"config.json: {key}={shown(value)} is not a finite number")


def truth(values: Mapping[str, Any], key: str, *, default: bool = False) -> bool:
    """The truth value of an entry, ``default`` if it is missing or null.

    Raises:
        UnsupportedModelError: it is something else, such as the text "false", which would count as true.
    """
    value = default if values.get(key) is None else values[key]
    if isinstance(value, (bool, int, float)) and value in (0, 1):
        return bool(value)
    raise UnsupportedModelError(f"config.json: {key}={shown(value)} is neither true nor false")


def shown(value: Any) -> str:
    """A value of a config for a message: not all of it if it is long."""
    if isinstance(value, int) and abs(value) > 1 << 64:
        return f"a number of {value.bit_length()} bits"  # Python refuses to write the longest in digits
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
