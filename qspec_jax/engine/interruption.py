"""Ctrl-C, as libraries report it."""

from __future__ import annotations


def is_interruption(error: BaseException | None, handled: BaseException | None) -> bool:
    """Whether an error came of Ctrl-C: some libraries, and locks of Python, report another one where it comes.

    Args:
        error: that was raised.
        handled: what whoever called was handling before, which has nothing to do with it.
    """
    while error is not None and error is not handled:
        if isinstance(error, KeyboardInterrupt):
            return True
        error = error.__cause__ or error.__context__
    return False
