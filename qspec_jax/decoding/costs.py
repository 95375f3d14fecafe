"""What a cycle of each plan takes: measured here, in another setting, on another day, or guessed by the bytes it reads.

A decode step is limited by the memory that it reads: the weights, and the keys and values of rows that are not idle. So
the time of a cycle in one setting tells its time in another one, and that of one plan the time of a similar one, in the
ratio of their bytes. What a step takes besides is learnt from plain decoding at two loads, or at one where it is known
how fast the device copies. That is good enough to say what is worth a trial; what is chosen was measured.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import hashlib
import json
import math
from collections.abc import Hashable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax

from qspec_jax.decoding.mesh_costs import position_bytes
from qspec_jax.decoding.plan import DecodingPlan
from qspec_jax.decoding.program_store import source_digest
from qspec_jax.device.mesh import DATA
from qspec_jax.files.whole import replace
from qspec_jax.model.decoder import Decoder
from qspec_jax.model.layouts import num_bytes, outside_bytes, unread_bytes
from qspec_jax.model.view import View

_SOUND_S = 0.03  # of a measurement with which others are compared
_MEMORY_S = 2.0  # of what was measured before, where a setting is measured again
_STEPS_PER_DOUBLING = 2  # buckets of loads
_REACH = 4.0  # of these: how far a measurement tells by its bytes alone
_KINDS = 32  # sequences of which is kept how much texts differ
_MOST_FIXED = 0.95  # of a step that takes the same at any load
# Of the bandwidth of copies, that passes reach: 0.65 with large weights, less with small ones and a cache of few rows.
_OF_BANDWIDTH = 0.5


class Setting(NamedTuple):
    """What a cycle runs on.

    Attributes:
        rows: of the batch.
        active: rows that are not idle; attention reads nothing of the others.
        context: tokens in each of these, about.
    """

    rows: int
    active: int
    context: int

    @property
    def load(self) -> int:
        """Tokens in the cache for each row of the batch: the bytes of a plain step depend on nothing else."""
        return max(1, round(self.active * self.context / self.rows))

    @classmethod
    def of_load(cls, rows: int, load: int) -> Setting:
        """All rows with so many tokens each."""
        return cls(rows, rows, load)


@dataclasses.dataclass(frozen=True)
class PassBytes:
    """What passes over a model read; on a mesh, what one of its devices does.

    Attributes:
        weights: bytes of all weights but those of a table.
        position: bytes of the keys and values of a position in all layers.
        window: positions that the model itself attends to; None for all.
        unread: of the weights, those that views of so many ``weight_bits`` leave alone.
        heads: how many bytes fewer an LM head of so many ``head_bits`` has than the one that verifies.
        places: devices that share the rows.
    """

    weights: int
    position: int
    window: int | None = None
    unread: Mapping[int | None, int] = dataclasses.field(default_factory=dict)
    heads: Mapping[int | None, int] = dataclasses.field(default_factory=dict)
    places: int = 1

    @classmethod
    def of(cls, decoder: Decoder) -> PassBytes:
        """Of a decoder, whose arrays may be shapes."""
        config = decoder.config
        position = position_bytes(config, decoder.split, dtype_bytes=decoder.dtype.itemsize, kv=decoder.kv)
        unread = {view.weight_bits: unread_bytes(decoder, view) for view in map(View, (4, 8, None))}
        head = num_bytes(decoder.head_for(View()))
        weights = num_bytes(_state(decoder)) - outside_bytes(decoder) + head
        heads: dict[int | None, int] = {}
        if decoder.quantized_head is not None:
            heads[4] = head - num_bytes(decoder.head_for(View(head_bits=4)))
        mesh = getattr(getattr(decoder.embedding.get_value(), "sharding", None), "mesh", None)
        places = 1 if mesh is None else mesh.shape.get(DATA, 1)
        return cls(weights, position, config.sliding_window, unread, heads, places)

    def own_rows(self, rows: int) -> int:
        """Those of a batch that a device has, or has at most."""
        return -(-rows // self.places)

    def weights_of(self, view: View) -> int:
        """Bytes of the weights that a pass over a view reads, whatever it does."""
        return self.weights - self.unread.get(view.weight_bits, 0) - self.heads.get(view.head_bits, 0)

    def of_cycle(self, plan: DecodingPlan, *, rows: int, context: int) -> int:
        """Bytes of a cycle: of its drafts, and of the verification."""
        rows, seen = self.own_rows(rows), min(context, self.window or context)
        total = self.weights_of(plan.verify) + rows * seen * self.position
        if (view := plan.draft_view) is not None:
            budget = view.cache_budget if view.cache_budget and context >= view.cache_full_below else seen
            limits = (seen, budget, view.cache_window or seen)
            total += plan.draft_length * (self.weights_of(view) + rows * min(limits) * self.position)
        return total

    def can_win(self, plan: DecodingPlan, *, rows: int, context: int) -> bool:
        """Whether a cycle of which all drafts are accepted reads fewer bytes for each token than a plain step."""
        if plan.draft is None:
            return True
        plain = self.of_cycle(DecodingPlan(plan.verify), rows=rows, context=context)
        return self.of_cycle(plan, rows=rows, context=context) < plain * (plan.draft_length + 1)


@dataclasses.dataclass
class Trials:
    """What plans that were tried have lost against the best one, of all that ran in this process.

    Attributes:
        elapsed_s: of all bursts.
        lost_s: by trials, programs that were loaded for them included.
        gained_s: by plans that were chosen, against plain decoding.
        load_s: what the first run of a program takes besides its cycles, as far as it is known.
        loaded: names of the programs that have run.
        num_loads: of which was measured what they take.
    """

    elapsed_s: float = 0.0
    lost_s: float = 0.0
    gained_s: float = 0.0
    load_s: float = 0.01
    loaded: set[Hashable] = dataclasses.field(default_factory=set)
    num_loads: int = 0

    def note_load(self, seconds: float) -> None:
        """Takes the first run of a program into account, which took so much besides its cycles."""
        self.num_loads += 1
        self.load_s += (seconds - self.load_s) / min(self.num_loads, 4)


class CostTable:
    """Seconds per cycle by plan, rows and load (:class:`Setting`), kept in a file if there is one.

    A file that is damaged or cannot be read or written is as good as none.

    Attributes:
        acceptance: by source of drafts and target, the chances of the drafts of the last texts.
        kinds: by source and target, drafts of the last sequences, each by place: how many were tried and accepted.
        trials: which all batches of a model share.
    """

    def __init__(self, num_bytes: PassBytes, path: Path | None = None, *, bandwidth: float | None = None):
        """Reads what is known of a model.

        Args:
            num_bytes: of its passes.
            path: a file of :func:`table_path`.
            bandwidth: bytes per second that the device copies; None if nobody knows.
        """
        self.num_bytes, self.path, self._bandwidth = num_bytes, path, bandwidth
        self.acceptance: dict[str, list[float]] = {}
        self.kinds: dict[str, collections.deque[Sequence[tuple[float, float]]]] = {}
        self.trials = Trials()
        self._seconds: dict[str, dict[str, float]] = {}
        self._weights: dict[tuple[str, str], float] = {}  # seconds that they were measured for, in this process
        self._changed = False
        # What follows from the table, until it changes: a choice asks for the same of many plans.
        self._buckets_of: dict[tuple[str, int], list[int]] = {}
        self._fixed: dict[tuple[str, int], float] = {}
        if path is not None:
            with contextlib.suppress(OSError, ValueError, TypeError, AttributeError, KeyError):
                read = json.loads(path.read_text(encoding="utf-8"))
                seconds = {
                    str(plan): {str(setting): float(one) for setting, one in known.items() if one > 0}
                    for plan, known in read["seconds"].items()
                }
                acceptance = {str(source): [float(one) for one in some] for source, some in read["acceptance"].items()}
                self._seconds, self.acceptance = seconds, acceptance
                for name, some in read.get("kinds", {}).items():
                    drafts = [[(float(tried), float(accepted)) for tried, accepted in one] for one in some]
                    self.note_kinds(str(name), drafts)

    def note(self, plan: DecodingPlan, seconds: float, setting: Setting, *, weight: float = 1.0) -> None:
        """Takes a measurement of a cycle into account, which took ``weight`` seconds."""
        known = self._seconds.setdefault(_name(plan), {})
        bucket = _bucket(setting.load)
        # As if the load were in the middle of its bucket.
        seconds *= self.ratio(plan, Setting.of_load(setting.rows, _middle(bucket)), setting)
        key = f"{setting.rows}x{bucket}"
        before, trusted = known.get(key, seconds), self._weights.get((_name(plan), key), 0.0)
        if key in known and not trusted:
            trusted = weight  # of another run: as good as this measurement
        known[key] = (before * trusted + seconds * weight) / (trusted + weight)
        self._weights[_name(plan), key] = min(trusted + weight, _MEMORY_S)
        self._changed = True
        self._fixed.clear()
        self._buckets_of.clear()

    def note_kinds(self, source_and_target: str, drafts: Iterable[Sequence[tuple[float, float]]]) -> None:
        """Remembers how drafts of some sequences were accepted."""
        self.kinds.setdefault(source_and_target, collections.deque(maxlen=_KINDS)).extend(drafts)

    def is_exact(self, plan: DecodingPlan, setting: Setting) -> bool:
        """Whether a cycle was measured at this load."""
        return f"{setting.rows}x{_bucket(setting.load)}" in self._seconds.get(_name(plan), {})

    def is_sound(self, plan: DecodingPlan, setting: Setting) -> bool:
        """Whether a cycle is known that was measured for long enough, or in another process, to be compared with."""
        name, here, reach = _name(plan), _bucket(setting.load), self._reach(plan, setting.rows)
        near = [bucket for bucket in self._buckets(name, setting.rows) if abs(bucket - here) <= reach]
        weights = [self._weights.get((name, f"{setting.rows}x{bucket}"), _SOUND_S) for bucket in near]
        return bool(near) and sum(weights) >= _SOUND_S

    def known(self, plan: DecodingPlan, setting: Setting) -> float | None:
        """Seconds of a cycle as measured at a load as near as can be; None where it was not."""
        nearest = self._nearest(plan, setting)
        if nearest is None:
            return None
        seconds = self._seconds[_name(plan)][f"{setting.rows}x{nearest}"]
        return seconds * self.ratio(plan, setting, Setting.of_load(setting.rows, _middle(nearest)))

    def _nearest(self, plan: DecodingPlan, setting: Setting) -> int | None:
        """The bucket of loads nearest to one in which a plan was measured, if any within reach was."""
        here = _bucket(setting.load)
        nearest = min(self._buckets(_name(plan), setting.rows), key=lambda bucket: abs(bucket - here), default=None)
        reach = self._reach(plan, setting.rows)
        return None if nearest is None or abs(nearest - here) > reach else nearest

    def _reach(self, plan: DecodingPlan, rows: int) -> float:
        """How many buckets away a measurement tells: any number once plain decoding is known at two loads."""
        return _REACH if len(self._buckets(_name(_plain(plan)), rows)) < 2 else math.inf

    def _buckets(self, name: str, rows: int) -> list[int]:
        """The buckets of loads in which a plan was measured."""
        if (name, rows) not in self._buckets_of:
            keys = [key.partition("x") for key in self._seconds.get(name, {})]
            self._buckets_of[name, rows] = [int(bucket) for batch, _, bucket in keys if batch == str(rows)]
        return self._buckets_of[name, rows]

    def guess(self, plan: DecodingPlan, plans: Mapping[DecodingPlan, float], setting: Setting) -> float:
        """Seconds of a cycle from what is known of other plans.

        Args:
            plan: of which to guess.
            plans: seconds of plans that are known here; plain decoding at least.
            setting: what it would run on.
        """

        plain = next(one for one in plans if one.draft is None)
        alike = [one for one in plans if one.draft_source == plan.draft_source]
        if alike:  # a cycle takes a plain step, and as much again for each draft
            nearest = min(alike, key=lambda one: abs(one.draft_length - plan.draft_length))
            return plans[plain] + (plans[nearest] - plans[plain]) * plan.draft_length / nearest.draft_length
        return plans[plain] * self._size(plan, setting) / self._size(plain, setting)

    def ratio(self, plan: DecodingPlan, setting: Setting, other: Setting) -> float:
        """Bytes of a cycle in a setting over those in another one."""
        return self._size(plan, setting) / self._size(plan, other)

    def save(self) -> None:
        """Writes what was measured since it was read, all of it or nothing."""
        if self.path is None or not self._changed:
            return
        with contextlib.suppress(OSError):
            self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            seconds = {plan: dict(known) for plan, known in list(self._seconds.items())}  # others may add to it
            kinds = {name: list(some) for name, some in list(self.kinds.items())}
            text = json.dumps({"seconds": seconds, "acceptance": dict(self.acceptance), "kinds": kinds})
            replace(self.path, text.encode())
            self._changed = False

    def _size(self, plan: DecodingPlan, setting: Setting) -> float:
        """Bytes of a cycle, and as many more as could be read in the time that its passes take whatever they read."""
        passes = 1 + (plan.draft_length if plan.draft_view is not None else 0)
        read = self.num_bytes.of_cycle(plan, rows=setting.active, context=setting.context)
        plain, rows = _plain(plan), setting.rows
        key = _name(plain), rows
        if key not in self._fixed:
            self._fixed[key] = self._fixed_bytes(plain, rows)
        return read + passes * self._fixed[key]

    def _fixed_bytes(self, plain: DecodingPlan, rows: int) -> float:
        """What could be read in that part of a pass that takes the same at any load, as far as it is known.

        Two loads tell, or one and the time that its bytes take at least.
        """
        buckets = self._buckets(_name(plain), rows)
        if not buckets or (len(buckets) < 2 and self._bandwidth is None):
            return 0.0
        few, many = min(buckets), max(buckets)
        sizes = [self.num_bytes.of_cycle(plain, rows=rows, context=_middle(bucket)) for bucket in (few, many)]
        seconds = [self._seconds[_name(plain)][f"{rows}x{bucket}"] for bucket in (few, many)]
        if few < many:
            per_byte = max(0.0, (seconds[1] - seconds[0]) / (sizes[1] - sizes[0]))
        else:
            assert self._bandwidth is not None
            per_byte = 1 / (_OF_BANDWIDTH * self._bandwidth)
        fixed_s = min(max(0.0, seconds[0] - per_byte * sizes[0]), _MOST_FIXED * seconds[0])
        return sizes[0] * fixed_s / (seconds[0] - fixed_s)


def table_path(folder: Path, decoder: Decoder) -> Path:
    """Where costs of a decoder are kept: its shape, device, and the versions of all that decides how long it takes."""
    weights = [(leaf.shape, str(leaf.dtype)) for leaf in jax.tree.leaves(_state(decoder))]
    device = jax.local_devices()[0]
    kernels = decoder.layers[0].attention.kernels
    facts: Any = (decoder.config, weights, kernels, decoder.kv, device.device_kind, jax.__version__, source_digest())
    return folder / f"{hashlib.sha256(repr(facts).encode()).hexdigest()}.json"


def _state(decoder: Decoder) -> Any:
    from flax import nnx

    return nnx.state(decoder)


@functools.cache
def _plain(plan: DecodingPlan) -> DecodingPlan:
    return DecodingPlan(plan.verify)


@functools.cache
def _name(plan: DecodingPlan) -> str:
    return f"{plan.verify.name} {plan.draft_source} {plan.draft_length}"


def _bucket(load: int) -> int:
    return round(_STEPS_PER_DOUBLING * math.log2(load))


def _middle(bucket: int) -> int:
    return round(2 ** (bucket / _STEPS_PER_DOUBLING))
