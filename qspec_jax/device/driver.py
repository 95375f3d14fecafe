"""The NVIDIA driver of this machine, and whether JAX's CUDA plugin can use it; asks without JAX."""

from __future__ import annotations

import ctypes
import itertools
import subprocess
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

_PLUGINS = {13: "jax-cuda13-plugin", 12: "jax-cuda12-plugin"}
OLDEST_DRIVER = {13: 580, 12: 525}  # by the major version of CUDA


def nvidia_driver() -> str | None:
    """The version of the NVIDIA driver; None where nvidia-smi does not say."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        output = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    return next((line.strip() for line in output.splitlines() if line.strip()), None)


def has_nvidia_gpu() -> bool:
    """Whether the system has a device of one, usable or not."""
    return any(Path("/dev").glob("nvidia[0-9]*")) or Path("/dev/dxg").exists()


def reach_each_other(ordinals: Sequence[int]) -> bool:
    """Whether each of some GPUs, by their CUDA ordinals, may read and write the memory of the others."""
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    if cuda.cuInit(0):
        return False
    can = ctypes.c_int()
    for pair in itertools.permutations(ordinals, 2):
        if cuda.cuDeviceCanAccessPeer(ctypes.byref(can), *pair) or not can.value:
            return False
    return True


def installed_version(package: str) -> str | None:
    """Of a package; None where it is not installed, as that of a clone which runs where it lies."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def cuda_plugin() -> int | None:
    """The major version of CUDA that JAX's installed plugin is for; None if there is none."""
    return next((major for major, name in _PLUGINS.items() if installed_version(name) is not None), None)


def driver_problem() -> str | None:
    """Why JAX cannot use an NVIDIA GPU that is here, with what to do, as far as versions tell; None if they do not."""
    cuda, driver = cuda_plugin(), nvidia_driver()
    if cuda is None:
        return "JAX is installed without CUDA; run pip install -U 'jax[cuda13]'"
    oldest = OLDEST_DRIVER[cuda]
    major = (driver or "").partition(".")[0]
    if major.isdigit() and int(major) < oldest:
        older = "" if cuda == 12 else ", or install jax[cuda12] in place of jax[cuda13]"
        return f"its driver {driver} is too old for CUDA {cuda}, which needs {oldest} or newer; update it{older}"
    return None
