"""What the machine is the cause of is told from what libraries say, and nothing else is."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from qspec_jax.device.failures import explained
from qspec_jax.errors import DeviceError, OutOfMemoryError, QSpecError


class JaxRuntimeError(RuntimeError):
    """Has the name by which JAX's is known; that one cannot be made everywhere."""


def no_module(name: str) -> ModuleNotFoundError:
    return ModuleNotFoundError(f"No module named '{name}'", name=name)


def of_the_start(error: Exception) -> Exception:
    """The error as JAX's file of backends raises it."""
    try:
        exec("raise error", {"__name__": "jax._src.xla_bridge", "error": error})
    except (RuntimeError, AssertionError) as raised:
        return raised
    raise AssertionError("nothing was raised")


MEMORY = [
    "RESOURCE_EXHAUSTED: Out of memory allocating 8589934592 bytes.",
    "INTERNAL: Failed to create cuBLAS handle",
    "FAILED_PRECONDITION: DNN library initialization failed. Look at the errors above for more details.",
    "INTERNAL: CUDNN_STATUS_ALLOC_FAILED",
    "INTERNAL: failed to allocate 12.0GiB (12884901888 bytes) from device: CUDA_ERROR_OUT_OF_MEMORY: out of memory",
]
DRIVER = [
    "INTERNAL: CUDA_ERROR_UNSUPPORTED_PTX_VERSION: the provided PTX was compiled with an unsupported toolchain.",
    "INTERNAL: the CUDA driver version is insufficient for CUDA runtime version",
    "INTERNAL: no kernel image is available for execution on the device",
    "INTERNAL: ptxas exited with non-zero error code 65280",
    "INTERNAL: CUDA_ERROR_DEVICE_UNAVAILABLE: CUDA-capable device(s) is/are busy or unavailable",
]


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        *((JaxRuntimeError(text), OutOfMemoryError) for text in MEMORY),
        *((JaxRuntimeError(f"\n{text}\nmore"), DeviceError) for text in DRIVER),
        (MemoryError(), OutOfMemoryError),
        (RuntimeError("can't start new thread"), OutOfMemoryError),
        (RuntimeError("jaxlib version 0.9.0 is newer than and incompatible with jax version 0.8"), DeviceError),
        (RuntimeError("This version of jaxlib was built using AVX instructions, which your CPU"), DeviceError),
        (no_module("flax.nnx"), QSpecError),
        (of_the_start(RuntimeError("Unable to initialize backend 'foo': it is not in the list.\nmore")), DeviceError),
        (of_the_start(AssertionError()), DeviceError),
        (AssertionError(), None),
        (no_module("qspec_jax.nothing"), None),
        (JaxRuntimeError("INTERNAL: something else"), None),
        (RuntimeError("RESOURCE_EXHAUSTED"), None),
        (ValueError("out of memory"), None),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_failure_of_the_machine_is_one_line(error, kind):
    found = explained(error)
    assert type(found) is (type(None) if kind is None else kind)
    assert "\n" not in str(found)


@pytest.mark.parametrize("setting", ["JAX_ENABLE_X64=maybe", "JAX_DEFAULT_DEVICE=cpu:1"])
def test_a_variable_that_jax_does_not_understand_is_one_line(setting):
    """It is found out as JAX is imported."""
    work = "from qspec_jax.commands.run import guarded; raise SystemExit(guarded(lambda: __import__('jax') and None))"
    environment = os.environ | dict([setting.split("=")])
    ended = subprocess.run([sys.executable, "-c", work], env=environment, capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stdout, ended.stderr.count("\n")) == (1, "", 1)
    assert ended.stderr.startswith("error: JAX refuses a setting: ")
    assert setting.partition("=")[2] in ended.stderr
    assert ended.stderr.endswith("; correct that variable, or unset it\n")


def test_a_value_that_is_wrong_later_is_none_of_a_variable():
    with pytest.raises(ValueError, match="no such mode") as raised:
        exec("raise ValueError('no such mode')", {"__name__": "jax._src.config"})
    assert explained(raised.value) is None
