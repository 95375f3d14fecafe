"""Compiling what may be chosen later, while other programs run."""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Callable, Generator, Iterable
from concurrent import futures
from concurrent.futures import Future, ThreadPoolExecutor

from qspec_jax.decoding.chunks import Shape
from qspec_jax.decoding.plan import DecodingPlan
from qspec_jax.decoding.programs import Programs

# For which a thread keeps Python, once another one asks for it: 5 ms by default. Who dispatches asks for it at every
# call of JAX, and to trace and lower a loop takes seconds of Python.
_SWITCH_S = 0.0005


class _Switching:
    """How often Python changes threads, of which the process has one setting."""

    def __init__(self) -> None:
        self._lock, self._count, self._before_s = threading.Lock(), 0, 0.0

    @contextlib.contextmanager
    def often(self) -> Generator[None]:
        """Often meanwhile, and as before once the last of those who want that has ended."""
        with self._lock:
            if not self._count:
                self._before_s = sys.getswitchinterval()
                sys.setswitchinterval(min(_SWITCH_S, self._before_s))
            self._count += 1
        try:
            yield
        finally:
            with self._lock:
                self._count -= 1
                if not self._count:
                    sys.setswitchinterval(self._before_s + 5e-7)  # of which Python keeps whole microseconds


_switching = _Switching()


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
            self._asked_for[asked] = self._thread.submit(self._compile, plan, shape)
            self._asked_for[asked].add_done_callback(lambda done: self._report_failure(plan, done))

    def _compile(self, plan: DecodingPlan, shape: Shape) -> None:
        with _switching.often():
            self._programs.compile(plan, shape, ())

    def _report_failure(self, plan: DecodingPlan, done: Future[None]) -> None:
        if not done.cancelled() and (error := done.exception()) is not None:
            self._on_event(f"{plan.label} is left out, as it cannot be compiled: {error}")


class NextPrograms:
    """A thread that compiles what a batch needs for requests that wait, while others are served."""

    def __init__(self, programs: Programs, plan: DecodingPlan, on_event: Callable[[str], None]):
        """For the loop of a plan, and the prefills that come before it; ``on_event`` is told when it compiles."""
        self._programs, self._plan, self._on_event = programs, plan, on_event
        self._thread = ThreadPoolExecutor(1, "qspec_jax compile")
        self._asked_for: tuple[Shape, frozenset[int]] | None = None
        self._compiling: Future[None] | None = None

    def are_there(self, shape: Shape, widths: Iterable[int]) -> bool:
        """Whether those of a shape and of chunks of some widths have been compiled since they were first asked for.

        Returns at once. If something else is being compiled, they come after it.

        Raises:
            OutOfMemoryError, UsageError: as :meth:`Programs.compile`. They are compiled again when they are asked for.
        """
        asked_for = shape, frozenset(widths)
        if self._compiling is not None and not self._compiling.done():
            return False
        done, self._compiling = self._compiling, None
        if done is not None and asked_for == self._asked_for:
            done.result()
            return True
        self._asked_for, self._compiling = asked_for, self._thread.submit(self._compile, *asked_for)
        return False

    def wait(self, seconds: float) -> None:
        """Until they are there, but so many seconds at most."""
        if self._compiling is not None:
            futures.wait([self._compiling], seconds)

    def _compile(self, shape: Shape, widths: Iterable[int]) -> None:
        with _switching.often():
            self._programs.compile(self._plan, shape, widths, on_event=self._on_event)
