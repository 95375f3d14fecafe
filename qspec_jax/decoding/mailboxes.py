"""Which programs of a mesh send sums into mailboxes in each other's memory, and not as messages of a library."""

from __future__ import annotations

import functools
import importlib
import os
from types import ModuleType
from typing import Any

import jax
from jax.sharding import Mesh
from jax.typing import DTypeLike

from pallas_kernels.dispatch import MOSAIC, REFERENCE, backend_obstacle
from qspec_jax.decoding.plan import DecodingPlan
from qspec_jax.device.driver import reach_each_other
from qspec_jax.device.mesh import MODEL

_ALLOCATOR = "XLA_PYTHON_CLIENT_ALLOCATOR"
_NO_PEERS = "NCCL_P2P_DISABLE"  # where the driver offers a way between devices that does not work
_NVSHMEM = "xla_gpu_experimental_enable_nvshmem"
_OLDEST_JAX = (0, 11)  # from which on a kernel finds the memory of other devices without NVSHMEM


def obstacle(mesh: Mesh, plan: DecodingPlan, *, kernels: str | None = None) -> str | None:
    """Why the loops of a plan send messages, as the end of a sentence; None if they use mailboxes.

    Args:
        mesh: of the programs.
        plan: of the loop.
        kernels: implementation that somebody asks for by name.
    """
    devices = list(mesh.devices.flat)
    if mesh.shape[MODEL] < 2:
        return "devices do not share a model"
    if kernels == REFERENCE:
        return "XLA's own operations are asked for"
    if (reason := backend_obstacle(MOSAIC)) is not None:
        return reason
    if jax.__version_info__ < _OLDEST_JAX or _module() is None:
        return "JAX is too old"
    # Kernels find the memory of other devices in another way as soon as there are several processes.
    if jax.process_count() > 1:
        return "there are several processes"
    if [device.id for device in devices] != list(range(len(devices))):
        return "the devices are not in their order"
    if os.environ.get(_ALLOCATOR, "default").lower() not in ("default", "bfc", "platform"):
        return f"{_ALLOCATOR} keeps memory that other devices may not reach"
    if os.environ.get(_NO_PEERS, "0") != "0":
        return f"{_NO_PEERS} is set"
    if _NVSHMEM in os.environ.get("XLA_FLAGS", ""):
        return f"XLA_FLAGS has {_NVSHMEM}"
    if plan.lookup and plan.draft_view is not None:
        return "a branch would move the mailbox"
    if not _reach_each_other(tuple(devices)):
        return "the devices do not reach each other's memory"
    return None


def empty_mailbox(num_values: int, dtype: DTypeLike) -> Any:
    """For sums of at most so many values; made in the program of a mesh for which there is no :func:`obstacle`."""
    module = _module()
    assert module is not None
    return module.Mailbox.empty(MODEL, num_values, dtype)


@functools.cache
def _reach_each_other(devices: tuple[jax.Device, ...]) -> bool:
    return reach_each_other([device.local_hardware_id for device in devices])


@functools.cache
def _module() -> ModuleType | None:
    try:
        return importlib.import_module("pallas_kernels.backends.mosaic.mailbox")
    except ImportError:
        return None
