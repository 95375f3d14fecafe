"""What a cycle of each plan takes: measured here, in another setting, on another day, or guessed by the bytes it reads.

A decode step is limited by the memory that it reads: the weights, and the keys and values of all rows. So the time of a
cycle in one setting tells its time in another one, and that of one plan the time of a similar one, in the ratio of
their bytes. That is good enough to say what is worth a trial; what is chosen was measured.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from qspec_jax.decoding.plan import DecodingPlan
from qspec_jax.decoding.program_store import source_digest
from qspec_jax.files.whole import replace
from qspec_jax.model.decoder import Decoder
from qspec_jax.model.decoder import num_bytes as bytes_of_decoder

_SOUND_S = 0.2  # of a measurement with which others are compared
_MEMORY_S = 2.0  # of what was measured before, where a setting is measured again
_STEPS_PER_DOUBLING = 2  # settings of contexts
_REACH = 4  # of these: how far a measurement tells


@dataclasses.dataclass(frozen=True)
class PassBytes:
    """What passes over a model read.

    Attributes:
        weights: bytes of all weights that a pass reads whatever it does.
        position: bytes of the keys and values of a position in all layers.
        window: positions that the model itself attends to; None for all.
    """

    weights: int
    position: int
    window: int | None = None

    @classmethod
    def of(cls, decoder: Decoder) -> PassBytes:
        """Of a decoder, whose arrays may be shapes."""
        config = decoder.config
        position = 2 * config.num_layers * config.num_kv_heads * config.head_dim * decoder.dtype.itemsize
        embedding = config.vocab_size * config.hidden_size * decoder.dtype.itemsize
        untied = 0 if decoder.lm_head is None else embedding
        return cls(bytes_of_decoder(decoder) - untied, position, config.sliding_window)

    def of_cycle(self, plan: DecodingPlan, *, rows: int, context: int) -> int:
        """Bytes of a cycle: of its drafts, and of the verification."""
        seen = min(context, self.window or context)
        total = self.weights + rows * seen * self.position
        if (view := plan.draft_view) is not None:
            budget = view.cache_budget if view.cache_budget and context >= view.cache_full_below else seen
            limits = (seen, budget, view.cache_window or seen)
            total += plan.draft_length * (self.weights + rows * min(limits) * self.position)
        return total

    def can_win(self, plan: DecodingPlan, *, rows: int, context: int) -> bool:
        """Whether a cycle of which all drafts are accepted reads fewer bytes for each token than a plain step."""
        if plan.draft is None:
            return True
        plain = self.of_cycle(DecodingPlan(plan.verify), rows=rows, context=context)
        return self.of_cycle(plan, rows=rows, context=context) < plain * (plan.draft_length + 1)


class CostTable:
    """Seconds per cycle by plan, rows and context, kept in a file if there is one.

    A file that is damaged or cannot be read or written is as good as none.

    Attributes:
        acceptance: by source of drafts, the chance of each draft of the last texts, once those before were accepted.
    """

    def __init__(self, num_bytes: PassBytes, path: Path | None = None):
        """Reads what is known of a model; ``path`` is a file of :func:`table_path`."""
        self.num_bytes, self.path = num_bytes, path
        self.acceptance: dict[str, list[float]] = {}
        self._seconds: dict[str, dict[str, float]] = {}
        self._weights: dict[tuple[str, str], float] = {}  # seconds that they were measured for, in this process
        self._changed = False
        if path is not None:
            with contextlib.suppress(OSError, ValueError, TypeError, AttributeError, KeyError):
                read = json.loads(path.read_text(encoding="utf-8"))
                seconds = {
                    str(plan): {str(setting): float(one) for setting, one in known.items() if one > 0}
                    for plan, known in read["seconds"].items()
                }
                acceptance = {str(source): [float(one) for one in some] for source, some in read["acceptance"].items()}
                self._seconds, self.acceptance = seconds, acceptance

    def note(self, plan: DecodingPlan, seconds: float, *, rows: int, context: int, weight: float = 1.0) -> None:
        """Takes a measurement of a cycle into account, which took ``weight`` seconds."""
        known = self._seconds.setdefault(_name(plan), {})
        bucket = _bucket(context)
        # As if the context were in the middle of its bucket.
        seconds *= self._ratio(plan, rows, _middle(bucket), context)
        key = f"{rows}x{bucket}"
        before, trusted = known.get(key, seconds), self._weights.get((_name(plan), key), 0.0)
        if key in known and not trusted:
            trusted = weight  # of another run: as good as this measurement
        known[key] = (before * trusted + seconds * weight) / (trusted + weight)
        self._weights[_name(plan), key] = min(trusted + weight, _MEMORY_S)
        self._changed = True

    def is_exact(self, plan: DecodingPlan, *, rows: int, context: int) -> bool:
        """Whether a cycle was measured at this context."""
        return f"{rows}x{_bucket(context)}" in self._seconds.get(_name(plan), {})

    def is_sound(self, plan: DecodingPlan, *, rows: int, context: int) -> bool:
        """Whether a cycle is known that was measured for long enough, or in another process, to be compared with."""
        name, bucket = _name(plan), self._nearest(plan, rows=rows, context=context)
        if bucket is None:
            return False
        return self._weights.get((name, f"{rows}x{bucket}"), _SOUND_S) >= _SOUND_S

    def known(self, plan: DecodingPlan, *, rows: int, context: int) -> float | None:
        """Seconds of a cycle as measured at a context as near as can be; None where it was not."""
        nearest = self._nearest(plan, rows=rows, context=context)
        if nearest is None:
            return None
        seconds = self._seconds[_name(plan)][f"{rows}x{nearest}"]
        return seconds * self._ratio(plan, rows, context, _middle(nearest))

    def _nearest(self, plan: DecodingPlan, *, rows: int, context: int) -> int | None:
        """The setting of contexts nearest to one in which a plan was measured, if any within reach was."""
        known, here = self._seconds.get(_name(plan), {}), _bucket(context)
        buckets = [int(key.partition("x")[2]) for key in known if key.partition("x")[0] == str(rows)]
        nearest = min(buckets, key=lambda bucket: abs(bucket - here), default=None)
        return None if nearest is None or abs(nearest - here) > _REACH else nearest

    def guess(self, plan: DecodingPlan, plans: Mapping[DecodingPlan, float], *, rows: int, context: int) -> float:
        """Seconds of a cycle from what is known of other plans.

        Args:
            plan: of which to guess.
            plans: seconds of plans that are known here; plain decoding at least.
            rows, context: the setting.
        """

        plain = next(one for one in plans if one.draft is None)
        alike = [one for one in plans if one.draft_source == plan.draft_source]
        if alike:  # a cycle takes a plain step, and as much again for each draft
            nearest = min(alike, key=lambda one: abs(one.draft_length - plan.draft_length))
            return plans[plain] + (plans[nearest] - plans[plain]) * plan.draft_length / nearest.draft_length
        size = self.num_bytes.of_cycle
        return plans[plain] * size(plan, rows=rows, context=context) / size(plain, rows=rows, context=context)

    def save(self) -> None:
        """Writes what was measured since it was read, all of it or nothing."""
        if self.path is None or not self._changed:
            return
        with contextlib.suppress(OSError):
            self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            seconds = {plan: dict(known) for plan, known in list(self._seconds.items())}  # others may add to it
            text = json.dumps({"seconds": seconds, "acceptance": dict(self.acceptance)}, indent=1)
            replace(self.path, text.encode())
            self._changed = False

    def _ratio(self, plan: DecodingPlan, rows: int, context: int, other: int) -> float:
        """Bytes of a cycle at a context over those at another one."""
        size = self.num_bytes.of_cycle
        return size(plan, rows=rows, context=context) / size(plan, rows=rows, context=other)


def table_path(folder: Path, decoder: Decoder) -> Path:
    """Where costs of a decoder are kept: its shape, device, and the versions of all that decides how long it takes."""
    weights = [(leaf.shape, str(leaf.dtype)) for leaf in jax.tree.leaves(_state(decoder))]
    device = jax.devices()[0]
    kernels = decoder.layers[0].attention.kernels
    facts: Any = (decoder.config, weights, kernels, device.device_kind, jax.__version__, source_digest())
    return folder / f"{hashlib.sha256(repr(facts).encode()).hexdigest()}.json"


def _state(decoder: Decoder) -> Any:
    from flax import nnx

    return nnx.state(decoder)


def _name(plan: DecodingPlan) -> str:
    return f"{plan.verify.name} {plan.draft_source} {plan.draft_length}"


def _bucket(context: int) -> int:
    return round(_STEPS_PER_DOUBLING * math.log2(max(context, 1)))


def _middle(bucket: int) -> int:
    return round(2 ** (bucket / _STEPS_PER_DOUBLING))
