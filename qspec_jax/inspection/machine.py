"""This machine as a program of JAX sees it: versions, devices, drivers, and which kernels run."""

from __future__ import annotations

import importlib
import os
import platform
import warnings
from typing import Any

import jax

import qspec_jax
from pallas_kernels.backends import early_launch
from pallas_kernels.dispatch import BACKENDS, backend_obstacle, operations
from qspec_jax.device.compilation_cache import enable_compilation_cache
from qspec_jax.device.driver import has_nvidia_gpu, installed_version, nvidia_driver
from qspec_jax.device.memory import available_bytes
from qspec_jax.device.start import start_device
from qspec_jax.errors import DeviceError, DeviceWarning, UsageError
from qspec_jax.weights.resolve import demo_gguf_path

_PACKAGES = ("jax", "jaxlib", "flax", "orbax-checkpoint", "transformers", "tokenizers", "gguf", "numpy")
_PLUGINS = ("jax-cuda13-plugin", "jax-cuda12-plugin", "jax-rocm7-plugin", "libtpu")
_VARIABLES = (
    *("JAX_PLATFORMS", "XLA_FLAGS", "CUDA_VISIBLE_DEVICES"),
    *("QSPEC_JAX_CACHE", "QSPEC_JAX_CACHE_GB", "HF_HOME", "HF_HUB_OFFLINE"),
)


def describe_machine() -> dict[str, Any]:
    """Facts by name, for JSON. What cannot be found out is None; ``problem`` is why there is no device."""
    names = (*_PACKAGES, *_PLUGINS)
    versions = {name: installed_version(name) for name in names}
    facts: dict[str, Any] = {
        "qspec_jax": qspec_jax.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}, {os.cpu_count()} CPUs",
        "versions": {name: version for name, version in versions.items() if version or name in _PACKAGES},
        "environment": {name: os.environ[name] for name in _VARIABLES if name in os.environ},
        "driver": nvidia_driver() if has_nvidia_gpu() else None,
        "compiled_programs": _cache(),
        "demo_model": None if (path := demo_gguf_path()) is None else str(path),
    }
    return {**facts, **_device_facts()}


def _device_facts() -> dict[str, Any]:
    nothing = {"platform": None, "runtime": None, "devices": [], "free_bytes": None, "kernels": {}, "note": None}
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            start_device()
    except DeviceError as error:
        return {**nothing, "problem": str(error)}
    notes = [str(one.message) for one in caught if issubclass(one.category, DeviceWarning)]
    devices = jax.local_devices()
    return {
        "platform": jax.default_backend(),
        "runtime": " ".join(devices[0].client.platform_version.split()) or None,
        "devices": [_device(device) for device in devices],
        "free_bytes": available_bytes(),
        "kernels": {name: _state_of(name) for name in BACKENDS},
        "early_launch": early_launch.is_supported(),
        "note": notes[0] if notes else None,
        "problem": None,
    }


def _device(device: Any) -> dict[str, Any]:
    statistics = device.memory_stats() or {}
    return {
        "kind": device.device_kind,
        "compute_capability": getattr(device, "compute_capability", None),
        "memory_bytes": statistics.get("bytes_limit"),
    }


def _state_of(name: str) -> str | None:
    """Why the kernels of a backend do not run here, or None."""
    if (obstacle := backend_obstacle(name)) is not None:
        return obstacle
    for op, implementations in operations().items():
        if (module := implementations.modules.get(name)) is not None:
            try:
                importlib.import_module(module)
            except ImportError as error:
                return f"cannot be imported, for {op}: {error}"
    return None


def _cache() -> str:
    """Where compiled programs are kept, or why they are not."""
    try:
        folder = enable_compilation_cache()
    except (OSError, UsageError) as error:
        return f"not kept: {error}"
    return "not kept" if folder is None else str(folder)
