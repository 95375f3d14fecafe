"""Environment variables of JAX that are meant for other programs: a command runs without them.

JAX reads its variables once, as it is imported. What a program sets instead is left out by
:mod:`qspec_jax.device.settings`.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Generator

from qspec_jax.commands.output import say

_DIRECTIONS = ("", "_HOST_TO_DEVICE", "_DEVICE_TO_HOST", "_DEVICE_TO_DEVICE")
_OF_OTHER_PROGRAMS = {  # and what they say that JAX does anyway, besides nothing
    "JAX_DISABLE_JIT": ("0", "f", "false", "n", "no", "off"),
    "JAX_NUMPY_RANK_PROMOTION": ("allow",),
    "JAX_THREEFRY_PARTITIONABLE": ("1", "on", "t", "true", "y", "yes"),
    **{f"JAX_TRANSFER_GUARD{way}": ("allow",) for way in _DIRECTIONS},
}


@contextlib.contextmanager
def without_settings_of_others() -> Generator[None]:
    """Says what has no effect, and takes it out of the environment meanwhile."""
    found = {name: os.environ.pop(name) for name in _OF_OTHER_PROGRAMS if name in os.environ}
    for name, value in found.items():
        if value.lower() not in ("", *_OF_OTHER_PROGRAMS[name]):
            say(f"{name}={value}: no effect on this command, which runs compiled programs and draws by seeds")
    try:
        yield
    finally:
        os.environ.update(found)
