"""Compiled programs kept on disk between processes: JAX's persistent compilation cache, in the user's cache folder.

JAX looks a program up by everything that decides what it compiles to: the program, kernels included, the versions of
JAX and of the driver, the compiler's flags, and the kind of device; for a CPU also its features, so that a home
directory may be shared by different machines.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import jax

from qspec_jax.device.cache_size import most_bytes, shrink

VARIABLE = "QSPEC_JAX_CACHE"
OFF = "off"
# JAX's own default of a second would leave out prefill programs of small models.
_MIN_COMPILE_S = 0.1
_LEAST_FREE = 64 << 20
_switched_on: Path | None = None  # the folder of this library, once JAX uses it


def enable_compilation_cache(folder: str | os.PathLike[str] | None = None) -> Path | None:
    """Has JAX keep the programs that it compiles from now on, so that another process need not compile them again.

    This is a setting of the whole process: programs that are not this library's are kept too. It changes nothing
    where ``jax_compilation_cache_dir`` is set already, where ``jax_enable_compilation_cache`` is off, and where the
    environment says ``QSPEC_JAX_CACHE=off``. The folder may be deleted at any time. What was not used for longest is
    removed from it first, until it has no more than ``QSPEC_JAX_CACHE_GB`` gigabytes (10). Whoever can write to it
    decides what the programs do.

    Args:
        folder: to keep them in, made if it is not there; None for what ``QSPEC_JAX_CACHE`` names, or else
            :func:`default_folder`.

    Returns:
        the folder in use, None if programs are not kept.

    Raises:
        OSError: the folder cannot be made or written, or its disk is full.
        UsageError: ``QSPEC_JAX_CACHE_GB`` is no size.
    """
    global _switched_on
    config: Any = jax.config
    if not config.jax_enable_compilation_cache or os.environ.get(VARIABLE) == OFF:
        return None
    if configured := config.jax_compilation_cache_dir:
        return Path(configured)
    folder = Path(folder or os.environ.get(VARIABLE) or default_folder()).absolute()
    limit = most_bytes()
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    shrink(folder, limit)
    if not os.access(folder, os.W_OK | os.X_OK):
        raise PermissionError(errno.EACCES, "cannot be written", str(folder))
    if shutil.disk_usage(folder).free < _LEAST_FREE:  # an entry that is half written would be read for ever
        raise OSError(errno.ENOSPC, f"less than {_LEAST_FREE >> 20} MB are free", str(folder))
    config.update("jax_compilation_cache_dir", str(folder))
    _switched_on = folder
    shortest = min(_MIN_COMPILE_S, config.jax_persistent_cache_min_compile_time_secs)
    config.update("jax_persistent_cache_min_compile_time_secs", shortest)
    return folder


def is_own() -> bool:
    """Whether the cache that JAX uses is the one that this library switched on; so is none."""
    config: Any = jax.config
    return config.jax_compilation_cache_dir in (None, "", _switched_on and str(_switched_on))


def forget(program: str) -> bool:
    """Removes what JAX's cache has under the name of a program, if this library switched the cache on.

    JAX neither uses an entry that is damaged nor writes over it: it would be read, and complained of, for ever.

    Args:
        program: as JAX's warning calls it; those of other models may have the same name.

    Returns:
        whether there was something, and none of it is left.
    """
    if _switched_on is None or not is_own():
        return False
    own = re.compile(re.escape(program) + "-[0-9a-f]{64}-(cache|atime)")
    try:
        entries = [file for file in _switched_on.iterdir() if own.fullmatch(file.name)]
        for entry in entries:
            entry.unlink(missing_ok=True)
    except OSError:
        return False
    return bool(entries)


def default_folder() -> Path:
    """``qspec-jax/compiled`` in the platform's folder for what can be made again.

    Raises:
        OSError: the user has no home directory.
    """
    variable, below_home = {
        "win32": ("LOCALAPPDATA", "AppData/Local"),
        "darwin": (None, "Library/Caches"),
    }.get(sys.platform, ("XDG_CACHE_HOME", ".cache"))
    named = os.environ.get(variable) if variable else None
    try:
        base = Path(named) if named else Path.home() / below_home
    except RuntimeError as error:
        raise FileNotFoundError(errno.ENOENT, "the user has no home directory") from error
    return base / "qspec-jax" / "compiled"
