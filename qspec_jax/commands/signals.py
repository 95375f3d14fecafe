"""Signals that ask a process to end, taken as Ctrl-C is: nothing is left half done, and what is finished is kept.

Python throws an interruption away that comes where no error can be raised: in a callback of the garbage collector, of
which JAX has one, or in ``__del__``. It then comes once more. Libraries in C turn one into another error, or
abort, while they are imported. It waits until they have been.
"""

from __future__ import annotations

import _thread
import atexit
import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Generator, Sequence
from importlib.machinery import ExtensionFileLoader
from types import FrameType
from typing import Any

_NAMES = ("SIGTERM", "SIGHUP")  # of ``kill`` and ``timeout``, and of a terminal that is closed
_AGAIN_S = 0.02
_IN_C = ("jaxlib", "numpy", "ml_dtypes")
_LOADS = ("create_module", "exec_module")


@contextlib.contextmanager
def taken_as_interruptions() -> Generator[list[int]]:
    """Has such a signal raise KeyboardInterrupt; the numbers of those that came.

    A second one ends the process at once. One that is ignored (``nohup``), or minded by somebody else, stays so, and so
    do all outside the main thread.
    """
    came: list[int] = []

    def interrupt(number: int, frame: FrameType | None) -> None:
        if _is_importing(frame):
            _come_again(number)
            return
        if number != signal.SIGINT:
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
        _come_again(number)

    usual: dict[int, Any] = {getattr(signal, name): signal.SIG_DFL for name in _NAMES if hasattr(signal, name)}
    usual[signal.SIGINT] = signal.default_int_handler
    if threading.current_thread() is not threading.main_thread():
        usual = {}
    taken = [number for number, handler in usual.items() if signal.getsignal(number) is handler]
    for number in taken:
        signal.signal(number, interrupt)
    earlier, sys.unraisablehook = sys.unraisablehook, note_lost
    try:
        yield came
    finally:
        sys.unraisablehook = earlier
        for number in taken:
            signal.signal(number, usual[number])


def minded_no_more(at_once: Callable[[], Any]) -> None:
    """Has signals change nothing of what a command that is done says of itself, by its exit code.

    Its work is done. While threads are waited for, a signal says not to; from then on the process ends anyway, and
    libraries would print where in their own cleaning up they were interrupted.

    Args:
        at_once: ends the process, and waits for no thread.
    """
    if threading.current_thread() is not threading.main_thread():
        return
    numbers = [getattr(signal, name) for name in ("SIGINT", *_NAMES) if hasattr(signal, name)]
    numbers = [number for number in numbers if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler)]
    if not numbers:
        return
    for number in numbers:
        signal.signal(number, lambda *_: at_once())
    _told_at_once(at_once, numbers)

    def ignore() -> None:
        for number in numbers:
            signal.signal(number, signal.SIG_IGN)

    atexit.register(ignore)  # the last to be registered is the first to be called


def _told_at_once(action: Callable[[], Any], numbers: Sequence[int]) -> None:
    """Has a thread do it as soon as one of some signals comes.

    Python runs handlers in the main thread, once that is back from C. While it waits for threads it may never be: if
    another thread took the signal, or if it came just before the wait began.
    """
    reader, writer = os.pipe()
    os.set_blocking(writer, False)

    def wait() -> None:
        while os.read(reader, 1)[0] not in numbers:  # others may have handlers, too
            pass
        action()

    threading.Thread(target=wait, daemon=True).start()
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)


def _is_importing(frame: FrameType | None) -> bool:
    """Whether a library in C is being imported in the frames of a signal: its Python, or the module in C itself."""
    while frame is not None:
        name, function = frame.f_globals.get("__name__") or "", frame.f_code.co_name
        if function == "<module>" and name.partition(".")[0] in _IN_C:
            return True
        # A module in C has no frame. The loader's is the next one, in whatever package it was asked for.
        if function in _LOADS and isinstance(frame.f_locals.get("self"), ExtensionFileLoader):
            return True
        frame = frame.f_back
    return False


def _come_again(number: int) -> None:
    threading.Timer(_AGAIN_S, _interrupt_main, [number]).start()


def _interrupt_main(number: int) -> None:
    """Interrupts the main thread, also in what it waits for, which Python's own way leaves to end by itself."""
    main = threading.main_thread().ident
    if hasattr(signal, "pthread_kill") and main is not None and callable(signal.getsignal(number)):
        signal.pthread_kill(main, number)
    else:
        _thread.interrupt_main(signal.Signals(number))
