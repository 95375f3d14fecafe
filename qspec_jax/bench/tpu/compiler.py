"""The TPU's own compiler, on a machine without a TPU: libtpu compiles for a topology that is only described."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies

from qspec_jax.errors import UsageError

# libtpu looks for a TPU's host, takes a lock and writes logs, unless it is told all this.
_VARIABLES = {
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_LOG_DIR": "disabled",
    "TPU_STDERR_LOG_LEVEL": "3",
    "TPU_MIN_LOG_LEVEL": "3",
}


@dataclasses.dataclass(frozen=True)
class Generation:
    """A generation of TPUs, of which all figures are those of a TensorCore.

    Attributes:
        topology: as libtpu names the smallest one that it describes.
        tb_per_s: of its memory, as JAX's table of TPUs has it.
        ghz: assumed, from the peak of bfloat16 and the size of the matrix units.
    """

    topology: str
    tb_per_s: float
    ghz: float

    def cycles(self, num_bytes: int) -> float:
        """That memory takes for some bytes."""
        return num_bytes / (1e12 * self.tb_per_s) * self.ghz * 1e9


GENERATIONS = {
    "v5e": Generation("v5e:2x2", tb_per_s=0.82, ghz=1.5),
    "v6e": Generation("v6e:2x2", tb_per_s=1.64, ghz=1.75),
    "7x": Generation("tpu7x:2x2x1", tb_per_s=3.7, ghz=2.2),
}


def described_devices(generation: str) -> list[Any]:
    """Devices of a topology of a generation.

    Raises:
        UsageError: libtpu is not installed.
    """
    for name, value in _VARIABLES.items():
        os.environ.setdefault(name, value)
    try:
        return list(topologies.get_topology_desc(GENERATIONS[generation].topology, "tpu").devices)
    except (ImportError, RuntimeError) as error:
        raise UsageError(
            f"libtpu does not describe a TPU ({error}); install it: pip install 'qspec-jax[tpu]'"
        ) from None


@contextmanager
def described(device: Any) -> Generator[None]:
    """What is traced within is for this device: kernels, and the choice between them, ask which one there is."""
    one = jax.sharding.AbstractDevice(device_kind=device.device_kind, num_cores=device.num_cores, platform="tpu")
    auto = (jax.sharding.AxisType.Auto,)
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((1,), ("x",), axis_types=auto, abstract_device=one)):
        yield


def compile_for(generation: str, function: Callable[..., Any], *args: Any, **options: Any) -> jax.stages.Compiled:
    """The program of a function on one TPU.

    Args:
        generation: a name of :data:`GENERATIONS`.
        function: of arrays; ``options`` are those of ``jax.jit``.
        args: trees of arrays, or of their shapes.
    """
    device = described_devices(generation)[0]
    sharding = jax.sharding.SingleDeviceSharding(device)

    def placed(array: Any) -> jax.ShapeDtypeStruct:
        array = array if hasattr(array, "dtype") else np.asarray(array)
        return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding)

    with described(device):
        traced = jax.jit(function, **options).trace(*jax.tree.map(placed, args))
    return traced.lower().compile()
