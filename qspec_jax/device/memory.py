"""Whether something fits into the memory of the default device, said before it is tried."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import jax

from qspec_jax.errors import OutOfMemoryError


def available_bytes() -> int | None:
    """Free memory of the default device, or None where neither the device nor the system tells."""
    device = jax.devices()[0]
    statistics = device.memory_stats()
    if statistics and "bytes_limit" in statistics:
        return statistics["bytes_limit"] - statistics.get("bytes_in_use", 0)
    meminfo = Path("/proc/meminfo")
    if device.platform != "cpu" or not meminfo.exists():
        return None
    for line in meminfo.read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return None


def check_memory(needed_bytes: int, *, what: str) -> None:
    """Raises OutOfMemoryError if ``needed_bytes`` cannot fit."""
    available = available_bytes()
    if available is not None and needed_bytes > available:
        raise OutOfMemoryError(
            f"{what} need {needed_bytes / 1e9:.2f} GB and {jax.devices()[0].device_kind} has "
            f"{available / 1e9:.2f} GB free; {_REMEDY}"
        )


@contextlib.contextmanager
def explain_out_of_memory(when: str) -> Iterator[None]:
    """Turns an allocation failure of the device into an OutOfMemoryError."""
    try:
        yield
    except MemoryError as error:
        raise OutOfMemoryError(f"out of memory {when}; {_REMEDY}") from error
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise OutOfMemoryError(f"out of device memory {when}; {_REMEDY}") from error


_REMEDY = (
    "use a smaller model, a 4-bit mode instead of float, bfloat16, a shorter --max-seq-len or fewer prompts "
    "at once, or free the device"
)
