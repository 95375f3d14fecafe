"""Compiled programs are kept between processes, unless someone says otherwise."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache as jax_cache

from qspec_jax import CheckpointError, enable_compilation_cache, load
from qspec_jax.bench import __main__ as bench
from qspec_jax.commands.run import guarded, keep_compiled_programs
from qspec_jax.device import compilation_cache

ROOT = Path(__file__).parents[2]
SETTINGS = (
    "jax_enable_compilation_cache",
    "jax_compilation_cache_dir",
    "jax_persistent_cache_min_compile_time_secs",
)
# Prints how many programs were asked for, and how many of them were in the cache.
GENERATE = """
import collections
import jax
counts = collections.Counter()
jax.monitoring.register_event_listener(lambda event, **_: counts.update([event.rsplit("/", 1)[-1]]))
import qspec_jax
from tests import tiny
qspec_jax.enable_compilation_cache()
tiny.language_model().generate([[1, 2, 3]], max_new_tokens=4)
print(counts["compile_requests_use_cache"], counts["cache_hits"])
"""


@pytest.fixture
def unconfigured(monkeypatch):
    """JAX and the environment as a user finds them, and as they were afterwards."""
    before = {name: getattr(jax.config, name) for name in SETTINGS}
    monkeypatch.setattr(compilation_cache, "_switched_on", None)
    monkeypatch.delenv(compilation_cache.VARIABLE)
    jax.config.update("jax_enable_compilation_cache", True)
    jax.config.update("jax_compilation_cache_dir", None)
    yield
    for name, value in before.items():
        jax.config.update(name, value)


def programs_and_hits(environment: dict[str, str]) -> tuple[int, int]:
    arguments = [sys.executable, "-c", GENERATE]
    finished = subprocess.run(
        arguments, cwd=ROOT, env=os.environ | environment, check=True, capture_output=True, text=True
    )
    assert "machine feature" not in finished.stderr  # the complaint of a CPU that refuses what it compiled itself
    programs, hits = map(int, finished.stdout.split())
    return programs, hits


def test_a_second_process_compiles_nothing_anew(tmp_path):
    environment = {"QSPEC_JAX_CACHE": str(tmp_path), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    programs, hits = programs_and_hits(environment)
    assert programs > 2
    assert hits == 0
    assert programs_and_hits(environment) == (programs, programs)


@pytest.mark.usefixtures("unconfigured")
def test_loading_a_model_switches_it_on(tmp_path, monkeypatch):
    monkeypatch.setenv("QSPEC_JAX_CACHE", str(tmp_path))
    with pytest.raises(CheckpointError):
        load(tmp_path / "nothing")
    assert jax.config.jax_compilation_cache_dir == str(tmp_path)


@pytest.mark.usefixtures("unconfigured")
def test_the_folder_is_made_and_private(tmp_path):
    folder = enable_compilation_cache(tmp_path / "some" / "folder")
    assert folder == tmp_path / "some" / "folder"
    assert jax.config.jax_compilation_cache_dir == str(folder)
    assert folder.stat().st_mode & 0o077 == 0


@pytest.mark.usefixtures("unconfigured")
def test_the_environment_names_the_folder_or_none(tmp_path, monkeypatch):
    monkeypatch.setenv("QSPEC_JAX_CACHE", "off")
    assert enable_compilation_cache() is None
    assert enable_compilation_cache(tmp_path) is None
    assert jax.config.jax_compilation_cache_dir is None
    monkeypatch.setenv("QSPEC_JAX_CACHE", str(tmp_path / "named"))
    assert enable_compilation_cache() == tmp_path / "named"


@pytest.mark.usefixtures("unconfigured")
def test_a_folder_that_jax_has_already_stays(tmp_path):
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "mine"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 7.0)
    assert enable_compilation_cache(tmp_path / "other") == tmp_path / "mine"
    assert jax.config.jax_persistent_cache_min_compile_time_secs == 7.0
    assert not (tmp_path / "other").exists()


@pytest.mark.usefixtures("unconfigured")
def test_a_cache_that_jax_is_told_not_to_use_stays_off(tmp_path):
    jax.config.update("jax_enable_compilation_cache", False)
    assert enable_compilation_cache(tmp_path) is None
    assert jax.config.jax_compilation_cache_dir is None


@pytest.mark.usefixtures("unconfigured")
def test_a_command_goes_on_without_a_folder_that_cannot_be_made(tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("QSPEC_JAX_CACHE", str(tmp_path / "file" / "below"))
    with pytest.raises(OSError, match="below"):
        enable_compilation_cache()
    keep_compiled_programs()
    (line,) = capsys.readouterr().err.splitlines()
    assert "not kept" in line
    assert "QSPEC_JAX_CACHE=off" in line
    assert jax.config.jax_compilation_cache_dir is None


@pytest.mark.parametrize(
    ("platform", "variables", "expected"),
    [
        ("linux", {"HOME": "/home/me"}, "/home/me/.cache/qspec-jax/compiled"),
        ("linux", {"HOME": "/home/me", "XDG_CACHE_HOME": "/scratch"}, "/scratch/qspec-jax/compiled"),
        ("darwin", {"HOME": "/Users/me"}, "/Users/me/Library/Caches/qspec-jax/compiled"),
        ("win32", {"LOCALAPPDATA": "/me/AppData/Local"}, "/me/AppData/Local/qspec-jax/compiled"),
    ],
)
def test_the_default_folder_is_the_platforms(platform, variables, expected, monkeypatch):
    monkeypatch.setattr(compilation_cache, "sys", SimpleNamespace(platform=platform))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert compilation_cache.default_folder() == Path(expected)


@pytest.mark.usefixtures("unconfigured")
def test_benchmarks_compile_everything_themselves(monkeypatch, tmp_path):
    jax.config.update("jax_compilation_cache_dir", str(tmp_path))
    seen = []

    def add_command(commands):
        commands.add_parser("look").set_defaults(run=lambda _: seen.append(enable_compilation_cache()))

    monkeypatch.setattr(bench, "COMMANDS", (SimpleNamespace(add_command=add_command),))
    assert bench.main(["look"]) == 0
    assert seen == [None]
    assert jax.config.jax_enable_compilation_cache is False


@pytest.mark.usefixtures("unconfigured")
def test_nothing_is_kept_on_a_full_disk(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("QSPEC_JAX_CACHE", str(tmp_path))
    monkeypatch.setattr(compilation_cache.shutil, "disk_usage", lambda _: SimpleNamespace(free=10**6))
    assert keep_compiled_programs() is None
    assert "compiled programs are not kept: [Errno 28] less than 64 MB are free" in capsys.readouterr().err
    assert jax.config.jax_compilation_cache_dir is None


def test_a_cache_is_own_unless_jax_was_told_to_use_another(unconfigured, tmp_path):
    assert compilation_cache.is_own()
    enable_compilation_cache(tmp_path / "own")
    assert compilation_cache.is_own()
    jax.config.update("jax_compilation_cache_dir", str(tmp_path))
    assert not compilation_cache.is_own()
    assert not compilation_cache.forget("jit_loop")


def test_a_folder_that_is_full_is_shrunk_as_it_is_switched_on(unconfigured, tmp_path, monkeypatch):
    old = tmp_path / f"jit_loop-{'0' * 64}-cache"
    old.write_bytes(bytes(2000))
    monkeypatch.setenv("QSPEC_JAX_CACHE_GB", "1e-6")
    assert enable_compilation_cache(tmp_path) == tmp_path
    assert not old.exists()


@pytest.fixture
def asked_anew(unconfigured):
    """JAX asks once whether its cache is used, and where it is."""
    jax_cache.reset_cache()
    yield
    jax_cache.reset_cache()


@pytest.mark.usefixtures("asked_anew")
def test_an_entry_that_is_damaged_is_said_once_and_written_anew(tmp_path, capsys):
    theirs = tmp_path / "jit_doubled-notes"
    theirs.touch()
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)

    def run():
        def doubled(x):  # another function each time, and the same program
            return 2 * x

        enable_compilation_cache(tmp_path)
        assert jax.jit(doubled)(jax.numpy.ones(3, "float32")).tolist() == [2, 2, 2]

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = lambda *warning, **_: sys.stderr.write(warnings.formatwarning(*warning[:4]))
        assert guarded(run) == 0
        (entry,) = tmp_path.glob("jit_doubled-*-cache")
        half = entry.stat().st_size // 2
        entry.write_bytes(entry.read_bytes()[:half])  # as a process leaves it that was killed
        capsys.readouterr()
        assert guarded(run) == 0
        said = capsys.readouterr().err
        assert said.startswith("a compiled program cannot be read, and is compiled again: ")
        assert (said.count("\n"), "delete the folder" in said, entry.stat().st_size > 1.5 * half) == (1, False, True)
        assert guarded(run) == 0
        assert capsys.readouterr().err == ""
    assert theirs.exists()
