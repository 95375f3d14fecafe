"""A start that cannot go on says what to do in one line; one that goes on in another way says so once."""

from __future__ import annotations

import importlib
import logging
import warnings
from types import SimpleNamespace

import jax
import pytest

from qspec_jax.device import driver, start
from qspec_jax.errors import DeviceError, DeviceWarning

UNKNOWN = (
    "Unable to initialize backend 'foo': Backend 'foo' is not in the list of known backends: ['cpu', 'tpu']. (set "
    "JAX_PLATFORMS='' to automatically choose an available backend)"
)
BUSY = (
    "Unable to initialize backend 'cuda': INTERNAL: no supported devices found for platform CUDA (you may need to "
    "uninstall the failing plugin package, or set JAX_PLATFORMS=cpu to skip this backend.)\nmore lines"
)
NEEDS = "triton needs an NVIDIA GPU"
NOT_THERE = "An NVIDIA GPU may be present on this machine, but a CUDA-enabled jaxlib is not installed."


@pytest.fixture
def machine(monkeypatch):
    """Sets what is asked of this machine; nobody asks for a platform."""
    monkeypatch.setattr(start, "_said", set())
    monkeypatch.setattr(jax, "config", SimpleNamespace(jax_platforms=None, jax_default_device=None))

    def is_one_with(*, gpu=False, plugin=None, smi=None, platform="cpu", **environment):
        for name in ("JAX_PLATFORMS", "CUDA_VISIBLE_DEVICES"):
            monkeypatch.delenv(name, raising=False)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(start, "has_nvidia_gpu", lambda: gpu)
        monkeypatch.setattr(driver, "cuda_plugin", lambda: plugin)
        monkeypatch.setattr(driver, "nvidia_driver", lambda: smi)
        backend = platform if callable(platform) else lambda: platform
        monkeypatch.setattr(jax, "default_backend", backend)

    return is_one_with


def record(message: str, error: Exception | None = None) -> logging.LogRecord:
    described = (type(error), error, None) if error is not None else None
    return logging.LogRecord("jax", logging.WARNING, "", 0, message, (), described)


@pytest.mark.parametrize(
    ("told", "settings", "line"),
    [
        (
            UNKNOWN,
            {"JAX_PLATFORMS": "foo"},
            "JAX has no device for JAX_PLATFORMS=foo: Backend 'foo' is not in the list",
        ),
        (
            "",
            {"JAX_PLATFORMS": "cuda"},
            "JAX has no device for JAX_PLATFORMS=cuda: there is no device for it here. Unset",
        ),
        (
            "",
            {"JAX_PLATFORMS": "cuda", "CUDA_VISIBLE_DEVICES": ""},
            "JAX has no device for JAX_PLATFORMS=cuda: there is no device for it here (CUDA_VISIBLE_DEVICES=). Unset",
        ),
        (BUSY, {"gpu": True, "plugin": 13, "smi": "580.65.06"}, "JAX cannot start: INTERNAL: no supported devices"),
        (
            BUSY,
            {"gpu": True, "plugin": 13, "smi": "535.104.05", "JAX_PLATFORMS": "cuda"},
            "JAX has no device for JAX_PLATFORMS=cuda: its driver 535.104.05 is too old for CUDA 13, which needs 580",
        ),
        (
            BUSY,
            {"gpu": True, "plugin": 12, "smi": "470.82"},
            "JAX cannot start: its driver 470.82 is too old for CUDA 12",
        ),
        (
            "AssertionError",
            {"gpu": True, "JAX_PLATFORMS": "cuda"},
            "JAX has no device for JAX_PLATFORMS=cuda: JAX is inst",
        ),
    ],
)
def test_where_no_backend_starts_one_line_says_why_and_what_to_do(machine, told, settings, line):
    def fail():
        raise RuntimeError(told)

    machine(**settings, platform=fail)
    with pytest.raises(DeviceError) as error:
        start.start_device()
    assert str(error.value).startswith(line)
    assert str(error.value).endswith("set JAX_PLATFORMS=cpu to run on the CPU")
    assert "\n" not in str(error.value)


def test_a_default_device_that_is_not_there_is_what_to_unset(machine, monkeypatch):
    machine(JAX_PLATFORMS="cpu")
    monkeypatch.setattr(jax.config, "jax_default_device", "gpu")
    line = start.why_no_backend("Unknown backend: 'gpu' requested, but no platforms that are instances are present.")
    assert line.startswith("JAX has no device for JAX_DEFAULT_DEVICE=gpu: Unknown backend: 'gpu' requested")
    assert line.endswith("are present. Unset JAX_DEFAULT_DEVICE")


@pytest.mark.parametrize(
    ("settings", "records", "line"),
    [
        ({}, [], None),
        ({"gpu": True, "JAX_PLATFORMS": "cpu"}, [], None),
        ({"gpu": True, "CUDA_VISIBLE_DEVICES": ""}, [record(NOT_THERE)], None),
        (
            {"gpu": True},
            [record(NOT_THERE)],
            "JAX is installed without CUDA; run pip install -U 'jax[cuda13]'. This",
        ),
        (
            {"gpu": True, "plugin": 13, "smi": "535.1"},
            [record(NOT_THERE)],
            "its driver 535.1 is too old for CUDA 13, which",
        ),
        (
            {"gpu": True, "plugin": 13},
            [record("Jax plugin configuration error", RuntimeError("Unable to load cuDNN. Is it installed?\nTrace"))],
            "Unable to load cuDNN; install it anew: pip install -U 'jax[cuda13]'. This runs",
        ),
        (
            {},
            [record("A Google TPU may be present on this machine, but")],
            "a TPU is here and JAX cannot use it: run pip",
        ),
        (
            {"plugin": 13},
            [record("", RuntimeError("Unable to load CUDA"))],
            "no GPU is used: Unable to load CUDA. This runs",
        ),
    ],
)
def test_a_run_on_the_cpu_beside_an_accelerator_is_explained(machine, settings, records, line):
    machine(**settings)
    said = start.unused_gpu(records)
    assert said is None if line is None else line in said


@pytest.mark.parametrize(
    ("kind", "capability", "version", "line"),
    [
        (
            "Tesla T4",
            "7.5",
            "cuda 13000",
            f"{NEEDS} of compute capability 8.0 or newer; this one has 7.5",
        ),
        ("MI300X", "9.4", "rocm 60300", f"{NEEDS}; this is an AMD GPU"),
        ("A100", "8.0", "cuda 13000", None),
    ],
)
def test_a_gpu_without_kernels_is_named_once(machine, monkeypatch, kind, capability, version, line):
    machine(platform="gpu", gpu=True)
    client = SimpleNamespace(platform_version=version)
    device = SimpleNamespace(device_kind=kind, compute_capability=capability, client=client)
    monkeypatch.setattr(jax, "local_devices", lambda: [device])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            start.start_device()
    beginning = f"no kernel of this library runs on {kind}, and XLA's own operations do the work, more slowly: "
    assert [str(one.message) for one in caught] == ([] if line is None else [beginning + line])


@pytest.mark.parametrize("gpu", [True, False])
def test_what_jax_logs_is_held_back_where_a_line_says_the_same(machine, monkeypatch, caplog, gpu):
    def starting():
        logging.getLogger("jax._src.xla_bridge").warning("something" if not gpu else NOT_THERE)
        return "cpu" if gpu else "gpu"

    machine(gpu=gpu, platform=starting)
    monkeypatch.setattr(start, "without_kernels", lambda: None)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        start.start_device()
    assert [issubclass(one.category, DeviceWarning) for one in caught] == [True] * gpu
    assert caplog.messages == ([] if gpu else ["something"])


@pytest.mark.parametrize("command", ["bench decode", "bench kernels", "bench speedup", "bench tune", "chat"])
def test_commands_start_the_device_before_they_ask_which_one_it_is(machine, command, capsys, monkeypatch):
    """Otherwise JAX's own traceback is there first, and its own words on a GPU that it cannot use."""
    rest = command.split()[1:]
    main = importlib.import_module("qspec_jax.bench.__main__" if rest else "qspec_jax.chat").main
    asked = []

    def fail():
        asked.append(list(logging.getLogger("jax._src.xla_bridge").filters))
        raise AssertionError

    machine(JAX_PLATFORMS="cuda", platform=fail)
    monkeypatch.setenv("QSPEC_JAX_CACHE", "off")
    names = "jax_platforms jax_default_device jax_compilation_cache_dir jax_enable_compilation_cache"
    settings = dict.fromkeys(names.split())
    monkeypatch.setattr(jax, "config", SimpleNamespace(**settings, update=lambda *setting: None))
    assert main(rest) == 1
    assert "error: JAX has no device for JAX_PLATFORMS=cuda: there is no device" in capsys.readouterr().err
    assert asked[0]
