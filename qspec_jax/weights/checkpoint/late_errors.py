"""Errors of TensorStore that come late: of threads that end after a save has failed, or was interrupted."""

from __future__ import annotations

import contextlib
import logging
import re
import sys
import threading
from collections.abc import Callable, Generator
from typing import Any

OS_ERROR = re.compile(r"os_error_code='(\d+)'")  # of TensorStore
WRITING = ".writing-"  # in the name of a directory that is not complete
_LOGS = ("asyncio", "absl")  # the second is Orbax's
_LATE_S = 60.0  # that threads of TensorStore may take to end


class LateErrors:
    """Prints no tracebacks of TensorStore's threads that end after the first of them has failed: one error is enough.

    They report to the event loop that Orbax has closed by then; Python prints what is raised there, asyncio logs what
    nobody has taken, and threads of Orbax log what they were interrupted in. Nobody knows when the last of them ends,
    so after a failure, or Ctrl-C, all stay silent for a while. However many saves have failed by then, they are
    silenced once.
    """

    def __init__(self) -> None:
        self._lock, self._count = threading.Lock(), 0

    @contextlib.contextmanager
    def silenced(self) -> Generator[None]:
        """Has them silent during a save, and after one that fails."""
        self._begin()
        try:
            yield
        except BaseException:
            timer = threading.Timer(_LATE_S, self._end)
            timer.daemon = True  # no process waits for it
            timer.start()
            raise
        self._end()

    def _begin(self) -> None:
        with self._lock:
            self._count += 1
            if not isinstance(sys.unraisablehook, _QuietHook):
                sys.unraisablehook = _QuietHook(self, sys.unraisablehook)
            for name in _LOGS:
                logging.getLogger(name).addFilter(_is_of_others)  # which is there once

    def _end(self) -> None:
        with self._lock:
            self._count -= 1
            if self._count:
                return
            if isinstance(sys.unraisablehook, _QuietHook):
                sys.unraisablehook = sys.unraisablehook.usual
            for name in _LOGS:
                logging.getLogger(name).removeFilter(_is_of_others)

    @property
    def are_silenced(self) -> bool:
        """Whether a save runs, or has failed a while ago."""
        return self._count > 0


class _QuietHook:
    """Prints what is raised where nobody can take it, as usual, unless it is an error that came late."""

    def __init__(self, late: LateErrors, usual: Callable[[Any], Any]) -> None:
        self._late, self.usual = late, usual

    def __call__(self, unraisable: Any) -> None:
        is_late = unraisable.exc_type is RuntimeError and str(unraisable.exc_value) == "Event loop is closed"
        if not (is_late and self._late.are_silenced):
            self.usual(unraisable)


def _is_of_others(record: logging.LogRecord) -> bool:
    """Whether what is logged is no error that TensorStore had of the system, or with a file that is being written."""
    error = str(record.exc_info[1]) if record.exc_info else ""
    return not (OS_ERROR.search(error) or WRITING in error)
