"""How kernels for TPUs are interpreted and lowered where there is no TPU."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import jax
import pytest
from jax.experimental.pallas import tpu as pltpu

DEVICE_KINDS = {"v5e": "TPU v5 lite", "v6e": "TPU v6 lite", "7x": "TPU7x"}
# XLA's operations; and a simulation of memories, copies and semaphores, where what nobody wrote is NaN.
MODES = {"quick": True, "simulated": pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")}

modes = pytest.mark.parametrize("interpret", MODES.values(), ids=MODES)


@contextlib.contextmanager
def races_raise() -> Iterator[None]:
    """Fails where a copy was not waited for: JAX 0.12 raises by itself, earlier ones only note it."""
    from jax._src.pallas.mosaic.interpret import interpret_pallas_call

    try:
        yield
        races = getattr(interpret_pallas_call, "races", None)
        assert races is None or not races.races_found
    finally:
        pltpu.reset_tpu_interpret_mode_state()


def described_tpu(generation: str = "v5e") -> contextlib.AbstractContextManager[Any]:
    """What is traced within is for a TPU that is only described; libtpu is not needed."""
    device = jax.sharding.AbstractDevice(device_kind=DEVICE_KINDS[generation], num_cores=1, platform="tpu")
    auto = (jax.sharding.AxisType.Auto,)
    mesh = jax.sharding.AbstractMesh((1,), ("x",), axis_types=auto, abstract_device=device)
    return jax.sharding.use_abstract_mesh(mesh)


def tpu_program(function: Any, *args: Any, generation: str = "v5e") -> str:
    """What a function is lowered to for such a TPU."""
    with described_tpu(generation):
        return jax.jit(function).trace(*args).lower(lowering_platforms=("tpu",)).as_text()
