"""Whether something fits into the memory of a device, said before it is tried."""

from __future__ import annotations

import contextlib
import re
import sys
import warnings
from collections.abc import Generator, Iterator
from pathlib import Path

import jax
from jax.sharding import Mesh

from qspec_jax.device.failures import MEMORY_REMEDY, is_out_of_memory
from qspec_jax.device.sizes import size_text
from qspec_jax.errors import DeviceWarning, OutOfMemoryError

_TO_COMPILE = 300_000_000


def available_bytes() -> int | None:
    """Free memory of the default device, or None where neither the device nor the system tells."""
    device = jax.local_devices()[0]
    statistics = device.memory_stats()
    if statistics and "bytes_limit" in statistics:
        return statistics["bytes_limit"] - statistics.get("bytes_in_use", 0)
    if device.platform != "cpu":
        return None
    known = [size for size in (_of_system(), _of_container(), _of_process()) if size is not None]
    return min(known, default=None)


def _of_system(meminfo: Path = Path("/proc/meminfo")) -> int | None:
    lines = meminfo.read_text().splitlines() if meminfo.exists() else []
    sizes = (int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    return next(sizes, None)


def _of_container(groups: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> int | None:
    """What the limits of a container or a batch system leave; beyond them the system kills a process unasked."""
    left = []
    for folder, limit, usage in _memory_groups(groups, own):
        with contextlib.suppress(OSError, ValueError):  # "max" is no limit
            used = int((folder / usage).read_text())
            cached = re.search(r"^(?:total_)?inactive_file (\d+)", (folder / "memory.stat").read_text(), re.MULTILINE)
            left.append(int((folder / limit).read_text()) - used + (int(cached[1]) if cached else 0))
    return max(0, min(left)) if left else None


def _memory_groups(groups: Path, own: Path) -> Iterator[tuple[Path, str, str]]:
    """Folders of this process's groups and of those above them, with the names of limit and usage: versions 2 and 1."""
    lines = own.read_text().splitlines() if own.exists() else []
    for _, controllers, path in (line.split(":", 2) for line in lines if line.count(":") >= 2):
        if controllers and "memory" not in controllers.split(","):
            continue
        root = groups / "memory" if controllers else groups
        limit, usage = ("limit_in_bytes", "usage_in_bytes") if controllers else ("max", "current")
        folder = root / path.lstrip("/")
        for one in dict.fromkeys((root, folder, *folder.parents)):
            if one.is_relative_to(root):
                yield one, f"memory.{limit}", f"memory.{usage}"


def _of_process() -> int | None:
    """What ``ulimit -v`` leaves."""
    if sys.platform != "linux":
        return None
    import resource

    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit == resource.RLIM_INFINITY:
        return None
    return max(0, limit - int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize())


def check_memory(needed_bytes: int, *, what: str) -> None:
    """Raises OutOfMemoryError if ``needed_bytes`` cannot fit, and warns where a CPU has too little left to compile."""
    available = available_bytes()
    if available is not None and needed_bytes > available:
        raise OutOfMemoryError(
            f"{what} need {size_text(needed_bytes)} and {jax.local_devices()[0].device_kind} has "
            f"{size_text(available)} free; {MEMORY_REMEDY}"
        )
    if available is not None and available - needed_bytes < _TO_COMPILE and jax.default_backend() == "cpu":
        left = f"leave {size_text(available - needed_bytes)}, and compiling takes some {size_text(_TO_COMPILE)}"
        warnings.warn(f"{what} {left}: the system may kill this process", DeviceWarning, stacklevel=3)


def sharing_memory(mesh: Mesh) -> int:
    """How many of a mesh's devices have the memory that :func:`available_bytes` tells: a CPU's are all one machine."""
    own = mesh.local_devices
    return max(1, len(own)) if jax.default_backend() == "cpu" else 1


@contextlib.contextmanager
def explain_out_of_memory(when: str) -> Generator[None]:
    """Turns an allocation failure of the device into an OutOfMemoryError."""
    try:
        yield
    except (MemoryError, jax.errors.JaxRuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        whose = "memory" if isinstance(error, MemoryError) else "device memory"
        raise OutOfMemoryError(f"out of {whose} {when}; {MEMORY_REMEDY}") from error
