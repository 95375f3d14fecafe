"""Where figures come from: device, driver, versions, date and command."""

from __future__ import annotations

import datetime
import os
import platform
import shlex
from collections.abc import Sequence

import jax
import jaxlib.version

from qspec_jax.device.driver import nvidia_driver
from qspec_jax.device.start import start_device


def environment(argv: Sequence[str]) -> dict[str, str | None]:
    """What a figure must be read with; ``argv`` are the arguments of the command."""
    start_device()
    device = jax.local_devices()[0]
    return {
        "device": device.device_kind,
        "platform": device.platform,
        "driver": nvidia_driver() if device.platform == "gpu" else None,
        "runtime": " ".join(device.client.platform_version.split()),
        "jax": jax.__version__,
        "jaxlib": jaxlib.version.__version__,
        "python": platform.python_version(),
        "xla_flags": os.environ.get("XLA_FLAGS"),
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "command": shlex.join(["python", "-m", "qspec_jax.bench", *argv]),
    }


def header(facts: dict[str, str | None]) -> str:
    """Two lines: what it ran on, and the exact command."""
    driver = f", driver {facts['driver']}" if facts["driver"] else ""
    flags = f"XLA_FLAGS={shlex.quote(facts['xla_flags'])} " if facts["xla_flags"] else ""
    first = f"{facts['device']}{driver}, jax {facts['jax']}, Python {facts['python']}, {facts['date']}"
    return f"{first}\n{flags}{facts['command']}"
