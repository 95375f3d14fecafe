"""Signals that ask a process to end, taken as Ctrl-C is: nothing is left half done, and what is finished is kept.

Python throws an interruption away that comes where no error can be raised: in a callback of the garbage collector, of
which JAX has one, or in ``__del__``. It then comes once more.
"""

from __future__ import annotations

import _thread
import contextlib
import signal
import sys
import threading
from collections.abc import Generator
from typing import Any

_NAMES = ("SIGTERM", "SIGHUP")  # of ``kill`` and ``timeout``, and of a terminal that is closed
_AGAIN_S = 0.02


@contextlib.contextmanager
def taken_as_interruptions() -> Generator[list[int]]:
    """Has such a signal raise KeyboardInterrupt; the numbers of those that came.

    A second one ends the process at once. One that is ignored (``nohup``), or minded by somebody else, stays so, and so
    do all outside the main thread.
    """
    came: list[int] = []

    def interrupt(number: int, _: Any) -> None:
        signal.signal(number, signal.SIG_DFL)
        came.append(number)
        raise KeyboardInterrupt

    def note_lost(lost: Any) -> None:
        if lost.exc_type is not KeyboardInterrupt or threading.current_thread() is not threading.main_thread():
            earlier(lost)
            return
        number = came[-1] if came else signal.SIGINT
        if came:
            signal.signal(number, interrupt)
        threading.Timer(_AGAIN_S, _thread.interrupt_main, [number]).start()

    numbers = [getattr(signal, name) for name in _NAMES if hasattr(signal, name)]
    if threading.current_thread() is not threading.main_thread():
        numbers = []
    taken = [number for number in numbers if signal.getsignal(number) is signal.SIG_DFL]
    for number in taken:
        signal.signal(number, interrupt)
    earlier, sys.unraisablehook = sys.unraisablehook, note_lost
    try:
        yield came
    finally:
        sys.unraisablehook = earlier
        for number in taken:
            signal.signal(number, signal.SIG_DFL)
