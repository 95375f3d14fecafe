"""Times of decode steps and of the parts of a QSpec cycle, each in a loop on the device as generation runs them.

The loop is ``decoding.speculative.generate`` itself, compiled as for generation and with its cache donated, with
a part in place of the cycle. Times are of the wall clock, around one dispatch of many repetitions.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import jax

from qspec_jax.bench.decode.parts import Part, PartName, Setting, context_state
from qspec_jax.bench.decode.speedup import Speculation
from qspec_jax.bench.timing import kernel_clock_works, recorded_kernels
from qspec_jax.commands.run import say
from qspec_jax.decoding.loop_settings import cycles_per_check
from qspec_jax.decoding.plan import missing_drafts
from qspec_jax.decoding.state import DecodeState
from qspec_jax.device.memory import explain_out_of_memory
from qspec_jax.device.processes import is_lost_message
from qspec_jax.engine.language_model import LanguageModel
from qspec_jax.errors import OutOfMemoryError
from qspec_jax.evaluation.scores import DraftScore

Status = Literal["ok", "unsupported", "failed"]
_DISPATCH_S = 0.25  # that a timed dispatch should last, so that what it costs itself does not count
_MIN_REPETITIONS, _MAX_REPETITIONS = 4, 2000
_PROFILED_REPETITIONS = 8
_CARRIES_MESSAGES = re.compile("nccl|all_?reduce|all_?gather|all_?to_?all", re.IGNORECASE)  # of NCCL, and XLA's own


@dataclasses.dataclass(frozen=True)
class Measurement:
    """One part in one setting.

    Attributes:
        part: name, see :class:`Part`.
        precision, draft, draft_length: of its plan; ``draft`` is None where nothing is drafted.
        batch, context, capacity: the setting.
        status, reason: ``unsupported`` is what kernels asked for by name refuse, ``failed`` what does not compile or
            run.
        milliseconds: of a step: the median of ``runs_ms``.
        runs_ms: of every timed dispatch, by the wall clock.
        repetitions: of the part in a dispatch.
        compile_s: seconds to trace and compile the loop.
        num_bytes: that a step must move, by what they are.
        kernels: name, launches per step and microseconds per step, the longest first; None without a kernel clock,
            or where it recorded nothing.
    """

    part: PartName
    precision: str
    draft: str | None
    draft_length: int
    batch: int
    context: int
    capacity: int
    status: Status = "ok"
    reason: str | None = None
    milliseconds: float | None = None
    runs_ms: tuple[float, ...] = ()
    repetitions: int | None = None
    compile_s: float | None = None
    num_bytes: Mapping[str, int] = dataclasses.field(default_factory=dict)
    kernels: tuple[tuple[str, float, float], ...] | None = None

    @property
    def tokens_per_s(self) -> float | None:
        """Of plain decoding, over all sequences."""
        return None if self.part != "step" or self.milliseconds is None else 1e3 * self.batch / self.milliseconds

    @property
    def kernel_ms(self) -> float | None:
        """The times of all kernels, added up, of which several may run at once."""
        return None if self.kernels is None else sum(microseconds for _, _, microseconds in self.kernels) / 1e3

    @property
    def collective_ms(self) -> float | None:
        """The time of kernels that carry messages between devices, in which they also wait for each other."""
        if self.kernels is None:
            return None
        return sum(us for name, _, us in self.kernels if _CARRIES_MESSAGES.search(name)) / 1e3

    @property
    def idle_share(self) -> float | None:
        """Share of the time in which no kernel runs; None also where kernels overlap by more than that."""
        if self.kernel_ms is None or self.milliseconds is None or self.kernel_ms > self.milliseconds:
            return None
        return 1 - self.kernel_ms / self.milliseconds

    def bound_ms(self, copy_tb_per_s: float) -> float:
        """What moving the bytes takes at a copy bandwidth."""
        return sum(self.num_bytes.values()) / copy_tb_per_s * 1e-9

    def to_dict(self, copy_tb_per_s: float) -> dict[str, Any]:
        """All figures, JSON-serialisable."""
        bound_ms = self.bound_ms(copy_tb_per_s) if self.num_bytes else None
        share = None if bound_ms is None or self.milliseconds is None else bound_ms / self.milliseconds
        return {
            **dataclasses.asdict(self),
            "tokens_per_s": self.tokens_per_s,
            "bound_ms": bound_ms,
            "share_of_bound": share,
            "kernel_ms": self.kernel_ms,
            "collective_ms": self.collective_ms,
            "idle_share": self.idle_share,
        }


def measure_parts(
    model: LanguageModel, parts: Sequence[Part], setting: Setting, *, repeats: int, repetitions: int | None = None
) -> Iterator[Measurement]:
    """Compiles the loops of all parts, cycles first and thus as cold as they come, and times them in order.

    Args:
        model: synthetic or real.
        parts: what to repeat.
        setting: what is in the cache.
        repeats: timed dispatches, of which the median counts.
        repetitions: of the part in a dispatch, rounded up to a multiple of ``cycles_per_check``;
            None for as many as make it last a quarter of a second.
    """
    for plan in dict.fromkeys(part.plan for part in parts):
        if reason := missing_drafts(plan, setting.capacity):
            say(reason)
    parts = list(dict.fromkeys(part for one in parts if (part := one.in_cache(setting.capacity)).exists))
    for part in parts:
        model.programs.lay_out_weights(part.plan)
    loops: dict[Part, _Loop | Measurement] = {}
    for part in sorted(parts, key=lambda part: part.name != "cycle"):
        say(f"compiling {part}, {setting} ...")
        loops[part] = _attempt(lambda part=part: _Loop.compile(model, part, setting), part, setting)
    for part in parts:
        loop = loops.pop(part)
        if isinstance(loop, Measurement):
            yield loop
            continue
        say(f"timing {part}, {setting} ...")
        yield _attempt(lambda loop=loop: loop.measure(repeats, repetitions), part, setting)


class _Loop:
    """The compiled loop of a part, and the state that its runs hand on."""

    def __init__(self, model: LanguageModel, part: Part, setting: Setting, program: Any, compile_s: float):
        self.model, self.part, self.setting = model, part, setting
        self.program, self.compile_s = program, compile_s
        self._state: Any = None

    @classmethod
    def compile(cls, model: LanguageModel, part: Part, setting: Setting) -> _Loop:
        model.programs.check_cache(rows=setting.batch, capacity=setting.capacity)
        make = functools.partial(context_state, setting=setting, **_state_options(part))
        began = time.perf_counter()
        program = model.programs.repetition(part.plan, make, advance=part.advance)
        return cls(model, part, setting, program, time.perf_counter() - began)

    def measure(self, repeats: int, repetitions: int | None) -> Measurement:
        make = functools.partial(context_state, setting=self.setting, **_state_options(self.part))
        self._state = self.model.programs.made(make)
        per_step_ms = 1e3 / self.part.steps_per_repetition
        together = cycles_per_check(self.part.plan)
        self._run(together)
        repetitions = repetitions or _fitting_repetitions(self._run(2 * together) / (2 * together))
        repetitions = -(-repetitions // together) * together
        runs_ms = [self._run(repetitions) / repetitions * per_step_ms for _ in range(repeats)]
        kernels = self._kernels() if kernel_clock_works() else None
        self._state = None
        return dataclasses.replace(
            _subject(self.part, self.setting),
            milliseconds=statistics.median(runs_ms),
            runs_ms=tuple(runs_ms),
            repetitions=repetitions,
            compile_s=self.compile_s,
            num_bytes=self.part.num_bytes(self.model, self.setting),
            kernels=kernels,
        )

    def _run(self, repetitions: int) -> float:
        """Seconds of one dispatch."""
        began = time.perf_counter()
        self._dispatch(repetitions)
        return time.perf_counter() - began

    def _dispatch(self, repetitions: int) -> DecodeState:
        self._state = self.program(self._state, repetitions)
        return jax.block_until_ready(self._state)

    def _kernels(self) -> tuple[tuple[str, float, float], ...] | None:
        recorded = recorded_kernels(lambda: self._dispatch(_PROFILED_REPETITIONS))
        mesh = self.model.mesh
        devices = 1 if mesh is None else len(mesh.local_devices)
        steps = _PROFILED_REPETITIONS * self.part.steps_per_repetition * devices  # of all of which kernels are recorded
        return by_kernel(recorded, steps) if recorded else None


def speculations(
    measurements: Sequence[Measurement], accepted: Mapping[tuple[str, int], DraftScore]
) -> list[Speculation]:
    """QSpec beside plain decoding, for every cycle that was measured with its parts and a plain step.

    Args:
        measurements: of any parts and settings.
        accepted: what drafts of a real model were worth, by their precision and length.
    """
    times = {
        (one.part, one.precision, one.draft, one.draft_length, one.batch, one.context): one.milliseconds
        for one in measurements
    }
    found = []
    for one in measurements:
        if one.part != "cycle" or one.draft is None:
            continue
        setting, length = (one.batch, one.context), one.draft_length
        plain = times.get(("step", one.precision, None, 0, *setting))
        draft = 0.0 if one.draft == "lookup" else times.get(("draft", one.draft, one.draft, length, *setting))
        verifies = [times.get(("verify", one.precision, draft, length, *setting)) for draft in (one.draft, None)]
        verify = next((milliseconds for milliseconds in verifies if milliseconds), None)
        if plain and draft is not None and verify and one.milliseconds:
            score = accepted.get((one.draft, length))
            times_of = (plain, draft, verify, one.milliseconds)
            found.append(Speculation(one.draft, length, *setting, *times_of, score, verify=one.precision))
    return found


def by_kernel(recorded: Sequence[tuple[str, float]], steps: int) -> tuple[tuple[str, float, float], ...]:
    """Name, launches per step and microseconds per step of each kernel, the longest in sum first.

    Args:
        recorded: name and milliseconds of every launch.
        steps: that they were recorded over.
    """
    totals: dict[str, tuple[int, float]] = {}
    for name, milliseconds in recorded:
        count, total = totals.get(name, (0, 0.0))
        totals[name] = count + 1, total + milliseconds
    rows = [(name, count / steps, 1e3 * total / steps) for name, (count, total) in totals.items()]
    return tuple(sorted(rows, key=lambda row: -row[2]))


def _fitting_repetitions(seconds: float) -> int:
    return max(_MIN_REPETITIONS, min(_MAX_REPETITIONS, math.ceil(_DISPATCH_S / seconds)))


def _attempt(task: Callable[[], Any], part: Part, setting: Setting) -> Any:
    """The result of the task, or a measurement that says why there is none."""
    try:
        with explain_out_of_memory("in this setting"):
            return task()
    except (NotImplementedError, ValueError, OutOfMemoryError, jax.errors.JaxRuntimeError) as error:
        if is_lost_message(error):  # nothing can run any more
            raise
        status: Status = "unsupported" if isinstance(error, NotImplementedError) else "failed"
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        return dataclasses.replace(_subject(part, setting), status=status, reason=reason)


def _subject(part: Part, setting: Setting) -> Measurement:
    return Measurement(part.name, part.view.name, part.source, part.plan.draft_length, **dataclasses.asdict(setting))


def _state_options(part: Part) -> dict[str, Any]:
    return {"num_blocks": part.plan.num_blocks, "lookup": part.name == "cycle" and part.plan.lookup}
