"""A limit to what the folder of compiled programs holds: those not used for longest go first.

Only files that this library or JAX writes there are counted and removed, by their names: the folder may be one that a
person named, with other things in it. It is looked at as a process begins to use it, and holds what that process
compiles besides.
"""

from __future__ import annotations

import contextlib
import os
import re
from pathlib import Path

from qspec_jax.errors import UsageError

VARIABLE = "QSPEC_JAX_CACHE_GB"
DEFAULT_GB = 10.0
UNLIMITED = "unlimited"
# JAX's own entries, programs of decoders, the costs of plans, and what a process that was killed left half written.
_OURS = re.compile(r"[^/]+-[0-9a-f]{64}-(cache|atime)|decoders/([0-9a-f]{64}|new-\w+)|costs/[0-9a-f]{64}\.json")


def most_bytes() -> int | None:
    """What the environment allows, or the default; None for no limit.

    Raises:
        UsageError: it says something else than a number of gigabytes above 0, or ``unlimited``.
    """
    text = os.environ.get(VARIABLE, "").strip()
    if text.lower() == UNLIMITED:
        return None
    try:
        gigabytes = float(text or DEFAULT_GB)
        if not 0 < gigabytes < float("inf"):
            raise ValueError
    except ValueError:
        raise UsageError(
            f"{VARIABLE}={text!r} is no size; use a number of gigabytes above 0, such as {DEFAULT_GB:g}, or {UNLIMITED}"
        ) from None
    return int(gigabytes * 1e9)


def shrink(folder: Path, num_bytes: int | None) -> int:
    """Removes the files of a folder not used for longest until the others have no more than so many bytes.

    Other processes may use the folder meanwhile: for them an entry is there or not.

    Args:
        folder: of compiled programs.
        num_bytes: that may stay; None for all.

    Returns:
        bytes removed.
    """
    files = [] if num_bytes is None else _entries(folder)
    excess = sum(size for _, size, _ in files) - (num_bytes or 0)
    removed = 0
    for _, size, path in sorted(files, key=lambda file: file[0]):
        if removed >= excess:
            break
        with contextlib.suppress(OSError):  # of somebody else, or gone already
            path.unlink()
            removed += size
    return removed


def _entries(folder: Path) -> list[tuple[float, int, Path]]:
    """When each file of ours was used last, its bytes, and where it is."""
    found = []
    for place in (folder, folder / "decoders", folder / "costs"):
        with contextlib.suppress(OSError), os.scandir(place) as entries:
            for entry in entries:
                path = Path(entry.path)
                if not _OURS.fullmatch(path.relative_to(folder).as_posix()):
                    continue
                with contextlib.suppress(OSError):
                    about = entry.stat(follow_symlinks=False)
                    if entry.is_file(follow_symlinks=False):
                        found.append((max(about.st_atime, about.st_mtime), about.st_size, path))
    return found
