"""The start of JAX's backend: what cannot go on says what to do, and what goes on in another way says so once.

What JAX logs meanwhile (a traceback, where a plugin fails) is held back where one of these lines says the same.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import warnings
from collections.abc import Generator
from typing import Any

import jax

from pallas_kernels.dispatch import BACKENDS, REFERENCE, available_implementations, backend_obstacle
from qspec_jax.device.driver import driver_problem, has_nvidia_gpu
from qspec_jax.errors import DeviceError, DeviceWarning

_ON_CPU = "set JAX_PLATFORMS=cpu to run on the CPU"
_MEANT = "This runs on the CPU; JAX_PLATFORMS=cpu says that it is meant to"
_LOGGER = "jax._src.xla_bridge"
_BESIDES = re.compile(
    r"Unable to initialize backend '[^']*': |\s*\((?:set JAX_PLATFORMS|you may need to uninstall)[^)]*\)"
)
_said: set[str] = set()


def start_device() -> None:
    """Has JAX start its backend, if it has not yet.

    Raises:
        DeviceError: it cannot.

    Warns:
        DeviceWarning: the device is not the one that is there, or it runs without kernels. Once in a process.
    """
    with _held_back() as records:
        try:
            platform = jax.default_backend()
        except Exception as error:  # JAX has RuntimeError, and AssertionError where no backend is left
            raise DeviceError(why_no_backend(str(error))) from error
        note = unused_gpu(records) if platform == "cpu" else without_kernels()
        if note is not None:
            records.clear()
    if note is not None and note not in _said:
        _said.add(note)
        warnings.warn(note, DeviceWarning, stacklevel=3)


def why_no_backend(told: str) -> str:
    """One line of what JAX says when no backend starts, with what to do."""
    asked = _asked_for()
    reason = _first_line(_BESIDES.sub("", told)) or f"there is no device for it here{_visible()}"
    if "cuda" in (asked or "cuda") and has_nvidia_gpu() and (problem := driver_problem()) is not None:
        reason = problem
    if default := _default_device():
        return f"JAX has no device for JAX_DEFAULT_DEVICE={default}: {reason}. Unset JAX_DEFAULT_DEVICE"
    if asked:
        return f"JAX has no device for JAX_PLATFORMS={asked}: {reason}. Unset JAX_PLATFORMS, or {_ON_CPU}"
    return f"JAX cannot start: {reason}. To go on, {_ON_CPU}"


def unused_gpu(records: list[logging.LogRecord]) -> str | None:
    """What to say where JAX runs on the CPU and nobody asked for that; None if there is nothing else.

    Args:
        records: what JAX logged as it started.
    """
    if _asked_for():
        return None
    logged = [_logged(record) for record in records]
    if has_nvidia_gpu():
        if os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
            return None
        told = next((line for line in logged if "NVIDIA GPU may" not in line), None)
        reason = driver_problem() or f"{told or 'it does not say why'}; install it anew: pip install -U 'jax[cuda13]'"
        return f"an NVIDIA GPU is here and JAX cannot use it: {reason}. {_MEANT}"
    if any("TPU may be present" in line for line in logged):
        return f"a TPU is here and JAX cannot use it: run pip install -U 'jax[tpu]'. {_MEANT}"
    if logged:  # a plugin without hardware, such as CUDA's libraries on a machine without a GPU
        return f"no GPU is used: {logged[0]}. {_MEANT}"
    return None


def without_kernels() -> str | None:
    """What to say of an accelerator for which there are no kernels; None where there are some."""
    if available_implementations() != (REFERENCE,):
        return None
    kind = jax.local_devices()[0].device_kind
    name = next(iter(BACKENDS))
    why = f"{name} {backend_obstacle(name)}"
    return f"no kernel of this library runs on {kind}, and XLA's own operations do the work, more slowly: {why}"


def _asked_for() -> str | None:
    """The platforms that somebody has named."""
    config: Any = jax.config
    return os.environ.get("JAX_PLATFORMS") or config.jax_platforms


def _default_device() -> str | None:
    """The platform that somebody has named for arrays, and that is no device yet."""
    config: Any = jax.config
    return config.jax_default_device if isinstance(config.jax_default_device, str) else None


@contextlib.contextmanager
def _held_back() -> Generator[list[logging.LogRecord]]:
    """Takes what JAX logs as it starts; what is still in the list afterwards is logged then."""
    records: list[logging.LogRecord] = []
    logger = logging.getLogger(_LOGGER)

    def hold(record: logging.LogRecord) -> bool:
        if record.levelno < logging.WARNING:
            return True
        records.append(record)
        return False

    logger.addFilter(hold)
    try:
        yield records
    except DeviceError:
        records.clear()
        raise
    finally:
        logger.removeFilter(hold)
        for record in records:
            logger.handle(record)


def _logged(record: logging.LogRecord) -> str:
    """One line of a record: the error that it holds, or its message."""
    error = record.exc_info[1] if record.exc_info else None
    return _first_line(str(error) if error is not None else record.getMessage())


def _first_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[0].removesuffix(" Is it installed?").rstrip(".") if lines else ""


def _visible() -> str:
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return "" if visible is None else f" (CUDA_VISIBLE_DEVICES={visible})"
