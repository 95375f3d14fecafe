"""The standard streams of a command: what it prints, said in one line where that cannot be written.

A stream may be missing (``>&-``), full (``/dev/full``), read by nobody any more (``| head``), or of an encoding that
lacks characters.
"""

from __future__ import annotations

import contextlib
import functools
import os
import sys
from typing import Any

from qspec_jax.errors import OutputError, QSpecError
from qspec_jax.files import json_lines


def show(text: str = "", *, end: str = "\n") -> None:
    """Prints to the standard output, at once. Characters that its encoding lacks are escaped.

    Raises:
        BrokenPipeError: nobody reads it any more.
        OutputError: it cannot be written.
    """
    stream = sys.stdout
    if stream is None:
        return
    text = _encodable(text + end, getattr(stream, "encoding", None))
    with _told_of_failure():
        stream.write(text)
        stream.flush()


def show_json(value: Any, *, indent: int | None = None) -> None:
    """Prints JSON, on one line unless it is to be indented; see :func:`show`."""
    show(json_lines.dumps(value, getattr(sys.stdout, "encoding", None), indent=indent))


def say(message: str) -> None:
    """A line on the standard error stream, above a progress bar that is there."""
    stream = sys.stderr
    if stream is None:
        return
    # Imported only by who draws a bar, perhaps in another thread at this moment.
    bars = getattr(sys.modules.get("tqdm"), "tqdm", None)
    try:
        if bars is None:
            print(message, file=stream, flush=True)
        else:
            bars.write(message, file=stream)
            stream.flush()
    except (OSError, ValueError):  # nobody can be told
        discard(stream)


def is_terminal(stream: Any) -> bool:
    """Whether a standard stream is there, and somebody looks at it."""
    return stream is not None and stream.isatty()


def is_colored(stream: Any) -> bool:
    """Whether colours are seen on a standard stream: on a terminal that has some, unless ``NO_COLOR`` is set."""
    return is_terminal(stream) and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def require_standard_output(instead: str) -> None:
    """Refuses to work for results that nobody would see.

    Raises:
        QSpecError: there is no standard output; ``instead`` says what to do.
    """
    if sys.stdout is None:
        raise QSpecError(f"there is no standard output to print to; {instead}")


def open_standard_streams() -> None:
    """Puts the null device where a standard stream is closed: the next file opened would take its place otherwise.

    What libraries print would then go into that file.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            with contextlib.suppress(OSError):
                os.open(os.devnull, os.O_RDWR)


def finish() -> None:
    """Writes what is buffered of the standard output; as the process ends nobody could say that it failed.

    Raises:
        BrokenPipeError, OutputError: as :func:`show`.
    """
    if sys.stdout is not None and not sys.stdout.closed:
        with _told_of_failure():
            sys.stdout.flush()


def discard(stream: Any) -> None:
    """Throws away what a stream holds: writing it would fail once more as the process ends."""
    if stream is None:
        return
    with contextlib.suppress(OSError, ValueError):  # a stream of no file
        null = os.open(os.devnull, os.O_WRONLY)
        try:
            os.dup2(null, stream.fileno())
        finally:
            os.close(null)
        stream.flush()


@contextlib.contextmanager
def _told_of_failure():
    try:
        yield
    except BrokenPipeError:
        discard(sys.stdout)
        raise
    except (OSError, ValueError) as error:
        discard(sys.stdout)
        reason = error.strerror or error if isinstance(error, OSError) else error
        raise OutputError(f"cannot write the standard output: {reason}") from error


def _encodable(text: str, encoding: str | None) -> str:
    encoding = encoding or "utf-8"
    try:
        text.encode(encoding)
    except UnicodeEncodeError:
        _tell_of(encoding)
        return text.encode(encoding, "backslashreplace").decode(encoding)
    return text


@functools.cache
def _tell_of(encoding: str) -> None:
    lacks = f"the standard output is {encoding}, which lacks some characters: they are escaped"
    say(f"{lacks}; PYTHONIOENCODING=utf-8 writes them")
