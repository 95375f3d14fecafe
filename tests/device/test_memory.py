"""Free memory is what the system, a container and the limits of the process leave, the least of them."""

from __future__ import annotations

import sys
import warnings
from types import SimpleNamespace

import jax
import pytest

from qspec_jax.device import memory
from qspec_jax.errors import OutOfMemoryError

VERSION_2 = {"memory.max": "1000\n", "memory.current": "700\n", "memory.stat": "anon 100\ninactive_file 200\n"}
VERSION_1 = {"memory.limit_in_bytes": "900", "memory.usage_in_bytes": "800", "memory.stat": "total_inactive_file 50\n"}


@pytest.mark.parametrize(
    ("groups", "own", "free"),
    [
        ({"": VERSION_2}, "0::/\n", 500),
        ({"job/step": VERSION_2}, "0::/job/step\n", 500),
        ({"job": VERSION_2, "job/step": {**VERSION_2, "memory.max": "max"}}, "0::/job/step\n", 500),
        ({"memory": VERSION_1}, "4:memory:/docker/1f\n0::/\n", 150),
        ({"memory/a": VERSION_1, "": VERSION_2}, "4:cpu,memory:/a\n0::/\n", 150),
        ({"": {**VERSION_2, "memory.max": "100"}}, "0::/\n", 0),
        ({"": {**VERSION_2, "memory.max": "max"}}, "0::/\n", None),
        ({}, "0::/gone\n", None),
        ({"": VERSION_2}, "damaged\n", None),
    ],
)
def test_limits_of_a_container_count(tmp_path, groups, own, free):
    root = tmp_path / "cgroup"
    for folder, files in groups.items():
        (root / folder).mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            (root / folder / name).write_text(text)
    (tmp_path / "own").write_text(own)
    assert memory._of_container(root, tmp_path / "own") == free


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_least_of_all_limits_counts_on_a_cpu(monkeypatch):
    import resource

    device = SimpleNamespace(platform="cpu", memory_stats=lambda: None)
    monkeypatch.setattr(jax, "local_devices", lambda: [device])
    monkeypatch.setattr(memory, "_of_container", lambda: 10**15)
    monkeypatch.setattr(resource, "getrlimit", lambda _: (10**16, 10**16))
    assert memory.available_bytes() == pytest.approx(memory._of_system(), rel=0.2)
    monkeypatch.setattr(memory, "_of_container", lambda: 5)
    assert memory.available_bytes() == 5
    monkeypatch.setattr(resource, "getrlimit", lambda _: (1, 1))
    assert memory.available_bytes() == 0


@pytest.mark.parametrize(("free", "warned"), [(10**9, False), (2 * 10**8, True)])
def test_little_that_is_left_to_compile_is_warned_of(monkeypatch, free, warned):
    """Where a container kills the process, nobody can say anything any more."""
    monkeypatch.setattr(jax, "default_backend", lambda: "cpu")
    monkeypatch.setattr(memory, "available_bytes", lambda: free)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        memory.check_memory(10**8, what="the weights of a model")
    said = "the weights of a model leave 100 MB, and compiling takes some 300 MB: the system may kill this process"
    assert [str(one.message) for one in caught] == [said] * warned
    with pytest.raises(OutOfMemoryError, match=r"need 2\.00 GB and .* has"):
        memory.check_memory(2 * 10**9, what="the weights of a model")
