"""One writer of one output. A lock belongs to an open file, and ends with the process that opened it, however it ends.

The package ``filelock`` leaves a file beside each output, which it must empty; an output can be locked itself. Where
the system has no such locks (Windows, some network disks) nobody is refused.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Generator
from pathlib import Path
from typing import IO

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

from qspec_jax.errors import QSpecError

_TRIES = 100  # to open a file that another run removes at the same moment, each time


def lock(file: IO[bytes] | int, what: str) -> None:
    """Locks an open file for as long as it is open.

    Args:
        file: or its descriptor.
        what: it is, for messages.

    Raises:
        QSpecError: another one has it.
    """
    if fcntl is None:
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise QSpecError(f"{what} is being written by another run; wait for it, or give another path") from error
    except OSError:
        return  # a disk without locks


@contextlib.contextmanager
def locked(path: Path) -> Generator[None]:
    """Keeps others from writing a file or a directory, by the lock of a hidden file beside it that is gone afterwards.

    A directory that is there already is locked itself, too: nobody needs to be able to write beside it.

    Raises:
        QSpecError: another one has it, or the file cannot be made.
    """
    real = Path(os.path.realpath(path))
    file = real.parent / f".{real.name}.lock"
    with contextlib.ExitStack() as held:
        is_locked = False
        try:
            if real.is_dir() and fcntl is not None:
                is_locked = _lock_directory(real, str(path), held)
            file.parent.mkdir(parents=True, exist_ok=True)
            held.callback(os.close, _open(file, str(path)))
            held.callback(_remove, file)
        except OSError as error:
            if not is_locked:
                raise QSpecError(f"cannot write {path}: {error.strerror or error}") from error
        yield


def _lock_directory(directory: Path, what: str, held: contextlib.ExitStack) -> bool:
    """Locks a directory for as long as it is ``held``; whether it could be opened."""
    try:
        descriptor = os.open(directory, os.O_RDONLY)
    except OSError:  # one that may be written, and not be read
        return False
    held.callback(os.close, descriptor)
    lock(descriptor, what)
    return True


def _remove(file: Path) -> None:
    with contextlib.suppress(OSError):
        file.unlink()


def _open(file: Path, what: str) -> int:
    for _ in range(_TRIES):
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            lock(descriptor, what)
            # Whoever had it may have removed it since it was opened here.
            if file.exists() and os.path.samestat(file.stat(), os.fstat(descriptor)):
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)
    raise QSpecError(
        f"cannot lock {file}: it is another file each time that it is opened; write to a folder of another file system"
    )
