"""Compiling what may be chosen later, while other programs run."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

from qspec_jax.decoding.chunks import Shape
from qspec_jax.decoding.plan import DecodingPlan
from qspec_jax.decoding.programs import Programs


class CompileBeside:
    """A thread that compiles the loops of plans, one at a time."""

    def __init__(self, programs: Programs, on_event: Callable[[str], None]):
        """``on_event`` is told of a plan that does not compile."""
        self._programs, self._on_event = programs, on_event
        self._thread = ThreadPoolExecutor(1, "qspec_jax compile")
        self._asked_for: dict[tuple[DecodingPlan, Shape], Future[None]] = {}

    def prepare(self, plan: DecodingPlan, shape: Shape) -> None:
        """Has a plan's loop compiled, unless another one is being compiled. One that does not compile is never ready.

        Returns at once.
        """
        asked = plan, shape
        if asked not in self._asked_for and all(other.done() for other in self._asked_for.values()):
            self._asked_for[asked] = self._thread.submit(self._programs.compile, *asked, ())
            self._asked_for[asked].add_done_callback(lambda done: self._report_failure(plan, done))

    def _report_failure(self, plan: DecodingPlan, done: Future[None]) -> None:
        if not done.cancelled() and (error := done.exception()) is not None:
            self._on_event(f"{plan.label} is left out, as it cannot be compiled: {error}")
