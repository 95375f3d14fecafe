"""What of the machine makes a program fail, told from what libraries raise; knows their words and imports none of them.

It is asked after the fact. What can be told before it is tried is said there: memory in ``memory.py``, the start of
JAX in ``start.py``.
"""

from __future__ import annotations

import re
import sys
import traceback

from qspec_jax.errors import DeviceError, OutOfMemoryError, QSpecError

MEMORY_REMEDY = (
    "use a smaller model, a 4-bit mode instead of float, bfloat16, a shorter --max-seq-len or fewer prompts "
    "at once, or free the device"
)
# The libraries of a GPU take memory of their own as they start, and call what they lack by other names.
_MEMORY = re.compile(
    r"RESOURCE_EXHAUSTED|out of memory|CUDA_ERROR_OUT_OF_MEMORY|ALLOC_FAILED|failed to allocate"
    r"|(?:Failed|Unable) to create (?:cu\w+|BLAS|solver) handle|DNN library initialization failed",
    re.IGNORECASE,
)
_DRIVER = re.compile(
    r"CUDA_ERROR_(?:UNSUPPORTED_PTX_VERSION|NO_BINARY_FOR_GPU|INVALID_PTX|SYSTEM_DRIVER_MISMATCH|NO_DEVICE"
    r"|COMPAT_NOT_SUPPORTED_ON_DEVICE)|insufficient for CUDA runtime|no kernel image is available|ptxas",
    re.IGNORECASE,
)
_LOST = re.compile(r"CUDA_ERROR_(?:ECC_UNCORRECTABLE|DEVICE_UNAVAILABLE|NOT_PERMITTED)|fallen off the bus|busy or unav")
_JAXLIB = re.compile(r"jaxlib (?:is )?version|version of jaxlib|AVX instructions", re.IGNORECASE)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed: of Python, or of a device."""
    return isinstance(error, MemoryError) or (_is_of_jax(error) and _MEMORY.search(str(error)) is not None)


def explained(error: BaseException) -> QSpecError | None:
    """One line for a failure that the machine is the cause of, with what to do; None for any other."""
    line = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)[:300]
    if _is_of_the_start(error):
        from qspec_jax.device.start import why_no_backend  # JAX is there already: it has failed

        return DeviceError(why_no_backend(str(error)))
    if _is_of_a_setting(error):
        return DeviceError(f"JAX refuses a setting: {line.rstrip('.')}; correct that variable, or unset it")
    if is_out_of_memory(error):
        return OutOfMemoryError(f"out of memory: {line}; {MEMORY_REMEDY}")
    if _is_of_jax(error) and _DRIVER.search(str(error)):
        return DeviceError(
            f"the GPU, its driver and JAX do not fit together: {line}; update the driver, or set JAX_PLATFORMS=cpu. "
            "python -m qspec_jax.info shows their versions"
        )
    if _is_of_jax(error) and _LOST.search(str(error)):
        return DeviceError(f"the GPU cannot be used: {line}; free or reset it, or set JAX_PLATFORMS=cpu")
    if isinstance(error, RuntimeError) and "can't start new thread" in str(error):
        return OutOfMemoryError("the system starts no more threads; raise the limits of this user (ulimit -u, -v)")
    if isinstance(error, RuntimeError) and _JAXLIB.search(str(error)):
        return DeviceError(f"JAX cannot be used here: {line}; install JAX anew: pip install -U jax jaxlib")
    if isinstance(error, ModuleNotFoundError) and error.name and not error.name.startswith("qspec_jax"):
        package = error.name.partition(".")[0]
        return QSpecError(f"the package {package} is missing; install this library anew, with what it needs")
    return None


def _is_of_the_start(error: BaseException) -> bool:
    """Whether JAX has found no backend; where none is left it says so by an AssertionError without a word."""
    return isinstance(error, (RuntimeError, AssertionError)) and _raised_in(error) == "jax._src.xla_bridge"


def _is_of_a_setting(error: BaseException) -> bool:
    """Whether an environment variable has a value that JAX does not know: it is not imported then."""
    return isinstance(error, ValueError) and _raised_in(error) == "jax._src.config" and "jax" not in sys.modules


def _raised_in(error: BaseException) -> str | None:
    """The module that an error comes from."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    return frames[-1].f_globals.get("__name__") if frames else None


def _is_of_jax(error: BaseException) -> bool:
    return type(error).__name__ in ("JaxRuntimeError", "XlaRuntimeError")
