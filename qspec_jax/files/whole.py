"""Files that are whole, before and after: who is stopped, or finds the disk full, leaves the old one."""

from __future__ import annotations

import contextlib
import io
import os
import tempfile
from pathlib import Path
from typing import Any

from qspec_jax.errors import QSpecError, UsageError


def write_whole(path: Path, content: str | bytes) -> None:
    """Writes a file through one beside it. A device, a pipe, or a file whose directory is closed is written directly.

    Raises:
        QSpecError: it cannot be written; what was there before is there still.
    """
    # Half of a surrogate pair is no text.
    data = content.encode(errors="replace") if isinstance(content, str) else content
    try:
        real = Path(os.path.realpath(path))
        if path.exists() and not (path.is_file() and os.access(real.parent, os.W_OK)):
            path.write_bytes(data)
        else:
            replace(real, data)
    except OSError as error:
        raise QSpecError(f"cannot write {path}: {error.strerror or error}") from error


def write_picture(path: Path, figure: Any, **options: Any) -> None:
    """Writes a figure of matplotlib as :func:`write_whole` does: a PNG, unless its name says otherwise.

    Args:
        path: of the file; without an ending it gets one.
        figure: of matplotlib.
        options: of its ``savefig``.

    Raises:
        QSpecError: it cannot be written; what was there before is there still.
    """
    drawn = io.BytesIO()
    figure.savefig(drawn, format=path.suffix[1:].lower() or "png", **options)
    is_named = path.suffix or (path.exists() and not path.is_file())  # a device has its name
    write_whole(path if is_named else path.with_name(f"{path.name}.png"), drawn.getvalue())


def replace(path: Path, data: bytes) -> None:
    """Writes a file through one beside it.

    Raises:
        OSError: it cannot be written; what was there before is there still.
    """
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        os.chmod(name, path.stat().st_mode & 0o7777 if path.exists() else 0o666 & ~_umask())
        os.replace(name, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name)
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def check_writable(path: Path | None, *, option: str) -> None:
    """Refuses a file that cannot be written, before hours of work.

    Raises:
        UsageError: it is a directory, or its directory is missing or may not be written.
    """
    if path is None:
        return
    if str(path) == "-":
        raise UsageError(f"{option} - is no file; give the name of one")
    if path.is_dir():
        raise UsageError(f"{option} {path} is a directory; give the name of a file")
    if not path.parent.is_dir():
        raise UsageError(f"{option} {path}: there is no directory {path.parent}; create it first")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise UsageError(f"{option} {path} may not be written; give another path")
