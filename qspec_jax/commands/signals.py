"""Signals that ask a process to end, taken as Ctrl-C is: nothing is left half done, and what is finished is kept."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from typing import Any

_NAMES = ("SIGTERM", "SIGHUP")  # of ``kill`` and ``timeout``, and of a terminal that is closed


@contextlib.contextmanager
def taken_as_interruptions() -> Iterator[list[int]]:
    """Has such a signal raise KeyboardInterrupt; the numbers of those that came.

    A second one ends the process at once. One that is ignored (``nohup``), or minded by somebody else, stays so, and so
    do all outside the main thread.
    """
    came: list[int] = []

    def interrupt(number: int, _: Any) -> None:
        signal.signal(number, signal.SIG_DFL)
        came.append(number)
        raise KeyboardInterrupt

    numbers = [getattr(signal, name) for name in _NAMES if hasattr(signal, name)]
    if threading.current_thread() is not threading.main_thread():
        numbers = []
    taken = [number for number in numbers if signal.getsignal(number) is signal.SIG_DFL]
    for number in taken:
        signal.signal(number, interrupt)
    try:
        yield came
    finally:
        for number in taken:
            signal.signal(number, signal.SIG_DFL)
