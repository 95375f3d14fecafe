"""The first thing that a command does: from then on Ctrl-C is one line, also while the rest of it is imported."""

from __future__ import annotations

import contextlib
import os
import sys
from types import TracebackType

_INTERRUPTED = 130


def interrupted_in_one_line() -> None:
    """Has an interruption that nobody catches end the process, as :func:`qspec_jax.commands.run.guarded` does later.

    What Python does before it runs the command's own file is not covered.
    """
    usual = sys.excepthook

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if not issubclass(kind, KeyboardInterrupt):
            usual(kind, error, trace)
            return
        with contextlib.suppress(OSError, ValueError, AttributeError):  # there may be nobody to tell
            sys.stderr.write("interrupted\n")
            sys.stderr.flush()
        os._exit(_INTERRUPTED)

    sys.excepthook = hook
