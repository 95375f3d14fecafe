"""Times of compiled programs of many calls.

On an NVIDIA GPU the clock is CUPTI, the profiler of the driver: the time of every kernel that the program runs,
without dispatch and without the gaps between kernels. Elsewhere it is the wall clock. With several GPUs XLA asks CUPTI,
which tells the kernels of each: what Mosaic offers is made for one.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, TypeVar

import jax
import jax.numpy as jnp

from qspec_jax.errors import QSpecError

Clock = Literal["kernel", "wall"]
WALL_NOTICE = "wall: wall-clock times of a device without a kernel clock; they say nothing about a GPU"
_NO_KERNELS = ("Memcpy", "Memset")  # of the events on a stream
_Result = TypeVar("_Result")


@dataclasses.dataclass(frozen=True)
class Timing:
    """Microseconds of one call, and what they were taken with."""

    microseconds: float
    clock: Clock


def compile_calls(function: Callable[[Any, Any], Any], shared: Any, copies: Sequence[Any]) -> jax.stages.Compiled:
    """One program that calls ``function(shared, copy)`` for each copy; its result is the list of theirs."""
    program = jax.jit(lambda shared, copies: [function(shared, copy) for copy in copies])
    return program.lower(shared, list(copies)).compile()


def time_calls(program: jax.stages.Compiled, shared: Any, copies: Sequence[Any], *, repeats: int) -> Timing:
    """The median time of a call over some runs of the program, after a first run that does not count.

    Raises:
        QSpecError: the kernel clock worked before and records nothing now.
    """
    copies = list(copies)
    if kernel_clock_works():
        runs_us = [_kernel_us(program, shared, copies) for _ in range(repeats)]
        return Timing(statistics.median(runs_us) / len(copies), "kernel")
    jax.block_until_ready(program(shared, copies))
    runs_us = [_wall_us(program, shared, copies) for _ in range(repeats)]
    return Timing(statistics.median(runs_us) / len(copies), "wall")


@functools.cache
def kernel_clock_works() -> bool:
    """CUPTI is there, and sees a kernel that is run."""
    if jax.default_backend() != "gpu":
        return False
    try:
        return bool(_kernels(jax.jit(lambda a: a + 1), jnp.zeros(1024)))
    except (ImportError, RuntimeError):
        return False


def run_in_threads(
    tasks: Iterable[Callable[[], _Result]], *, errors: tuple[type[Exception], ...]
) -> list[_Result | Exception]:
    """Results of the tasks in order, run in one thread per core; an error of the given types is its result.

    For compiling, before anything is timed: compiling may use the device, and the profiler must not be attached
    to or detached from a process whose other threads load kernels.
    """

    def attempt(task: Callable[[], _Result]) -> _Result | Exception:
        try:
            return task()
        except errors as error:
            return error

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(attempt, tasks))


def _kernel_us(program: jax.stages.Compiled, shared: Any, copies: list[Any]) -> float:
    kernels = _kernels(program, shared, copies)
    if not kernels:
        raise QSpecError(
            "the profiler recorded no kernel; end other tools that use CUPTI (Nsight, torch.profiler) and try again"
        )
    return 1e3 * sum(milliseconds for _, milliseconds in kernels)


def _kernels(program: Any, *arguments: Any) -> list[tuple[str, float]]:
    """Name and milliseconds of every kernel of a run, after a first one."""
    jax.block_until_ready(program(*arguments))
    return recorded_kernels(lambda: program(*arguments))


def recorded_kernels(run: Callable[[], Any]) -> list[tuple[str, float]]:
    """Name and milliseconds of every kernel of one run, of a program that has run before; of all GPUs that run it.

    Raises:
        ImportError, RuntimeError: there is no CUPTI.
    """
    if jax.local_device_count() > 1:
        return _traced_kernels(run)
    # profiler.measure would call a program twice with the same arguments, which donated ones do not survive.
    profiler: Any = importlib.import_module("jax.experimental.mosaic.gpu.profiler")  # not on every platform
    if profiler.mosaic_gpu_lib is None:
        raise RuntimeError("jaxlib was built without CUPTI")
    cupti = profiler.mosaic_gpu_lib._mosaic_gpu_ext
    cupti._cupti_init()
    try:
        jax.block_until_ready(run())
    finally:
        kernels = cupti._cupti_get_timings(True)  # detaches CUPTI
    return list(kernels or ())


def _traced_kernels(run: Callable[[], Any]) -> list[tuple[str, float]]:
    options = jax.profiler.ProfileOptions()
    options.host_tracer_level = options.python_tracer_level = 0
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder, profiler_options=options):
            jax.block_until_ready(run())
        files = list(Path(folder).rglob("*.xplane.pb"))
        return [kernel for file in files for kernel in kernels_of(jax.profiler.ProfileData.from_file(os.fspath(file)))]


def kernels_of(trace: Any) -> list[tuple[str, float]]:
    """Name and milliseconds of every kernel in a ``jax.profiler.ProfileData``, device by device."""
    streams = (
        line
        for plane in trace.planes
        if plane.name.startswith("/device:GPU:")
        for line in plane.lines
        if line.name.startswith("Stream #")  # others tell the same by operations and modules
    )
    events = (event for stream in streams for event in stream.events)
    return [(event.name, event.duration_ns / 1e6) for event in events if not event.name.startswith(_NO_KERNELS)]


def _wall_us(program: jax.stages.Compiled, shared: Any, copies: list[Any]) -> float:
    start = time.perf_counter()
    jax.block_until_ready(program(shared, copies))
    return 1e6 * (time.perf_counter() - start)
