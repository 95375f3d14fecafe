"""Ctrl-C at a conversation: it stops an answer, and is only a hint where a line is read.

The first one asks the answer to end where it is, which leaves the cache as it should be. A second one is raised, for
where the first one waits, such as for a compiler. Between answers and lines there is nothing to stop.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Generator
from typing import Any


class CtrlC(KeyboardInterrupt):
    """Ctrl-C, and no other signal that is taken as one."""


class StopKey:
    """What Ctrl-C does, while :meth:`taken`."""

    def __init__(self) -> None:
        self._stop: Callable[[], None] | None = None
        self._is_raised = False

    @contextlib.contextmanager
    def taken(self) -> Generator[None]:
        """Minds Ctrl-C, unless it is ignored (``nohup``), or this is no main thread."""
        is_main = threading.current_thread() is threading.main_thread()
        earlier = signal.getsignal(signal.SIGINT) if is_main else None
        if earlier in (None, signal.SIG_IGN):
            yield
            return
        signal.signal(signal.SIGINT, self._pressed)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, earlier)

    @contextlib.contextmanager
    def stops(self, stop: Callable[[], None] | None = None) -> Generator[None]:
        """Has it call ``stop`` the first time, and raises :class:`CtrlC` then, or at once without one."""
        self._stop, self._is_raised = stop, stop is None
        try:
            yield
        finally:
            self._stop, self._is_raised = None, False

    def _pressed(self, *_: Any) -> None:
        stop, self._stop = self._stop, None
        if stop is not None:
            self._is_raised = True
            stop()
        elif self._is_raised:
            raise CtrlC
