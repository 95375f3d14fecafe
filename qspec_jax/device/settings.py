"""JAX's settings that are meant for other programs, and would break those of the engine or change what they draw.

Some are the calling thread's, and some are the process's: environment variables, and ``jax.config.update``. So threads
of the engine need this as well.
"""

from __future__ import annotations

import contextlib
from collections.abc import Generator
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh


@contextlib.contextmanager
def usual_settings() -> Generator[None]:
    """JAX as it is without them; also a decorator, ``@usual_settings()``.

    The engine compiles its programs ahead, for devices that it names, and hands them arrays of the host. These do not
    hold here, then: ``jax.disable_jit``, which compiles nothing; ``jax.set_mesh``, which puts arrays where no program
    wants them; ``jax.transfer_guard``, which refuses the host's arrays; and ``jax.numpy_rank_promotion``. Nor does the
    older way of JAX to draw numbers (``jax.threefry_partitionable``): a seed means the same text everywhere.
    """
    config: Any = jax.config
    with contextlib.ExitStack() as stack:
        if config.jax_disable_jit:
            stack.enter_context(jax.disable_jit(False))
        if config.jax_numpy_rank_promotion != "allow":
            stack.enter_context(jax.numpy_rank_promotion("allow"))
        if _guards_transfers(config):
            stack.enter_context(jax.transfer_guard("allow"))
        if not config.jax_threefry_partitionable:
            stack.enter_context(jax.threefry_partitionable(True))
        if _is_on_a_mesh():
            stack.enter_context(jax.set_mesh(Mesh(np.empty((), object), ())))
        yield


def _is_on_a_mesh() -> bool:
    try:
        return not jax.sharding.get_mesh().empty
    except ValueError:  # a program is traced, where nobody may ask
        return False


def _guards_transfers(config: Any) -> bool:
    ways = ("", "_host_to_device", "_device_to_host", "_device_to_device")
    return any(getattr(config, f"jax_transfer_guard{way}") not in (None, "allow") for way in ways)
