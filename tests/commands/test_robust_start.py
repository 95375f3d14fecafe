"""A command on a machine that lacks something ends in one line, or goes on and says so once."""

from __future__ import annotations

import _imp
import os
import signal
import subprocess
import sys
import time
import warnings
from importlib.machinery import ExtensionFileLoader
from types import ModuleType

import pytest

from qspec_jax.commands.run import _unkept_program, guarded
from qspec_jax.commands.signals import taken_as_interruptions
from qspec_jax.device import compilation_cache
from qspec_jax.errors import DeviceError, DeviceWarning
from tests.device.test_failures import JaxRuntimeError

WRITING = "Error writing persistent compilation cache entry for 'jit_loop': OSError: [Errno 28] No space left: '/c/{}'"


def ending(capsys, work, **options) -> tuple[int, str]:
    return guarded(work, **options), capsys.readouterr().err


def fail_with(error):
    def work():
        raise error

    return work


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (DeviceError("JAX cannot start"), "error: JAX cannot start\n"),
        (JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory"), "error: out of memory: RESOURCE_EXHAUSTED: Out of mem"),
        (MemoryError(), "error: out of memory: MemoryError; use a smaller model"),
        (PermissionError(13, "Permission denied", "/x"), "error: [Errno 13] Permission denied: '/x'\n"),
    ],
)
def test_what_the_machine_lacks_is_one_line(capsys, error, line):
    code, said = ending(capsys, fail_with(error))
    assert code == 1
    assert said.startswith(line)
    assert said.count("\n") == 1


@pytest.mark.parametrize(
    ("error", "debug"), [(RuntimeError("a mistake of ours"), False), (JaxRuntimeError("RESOURCE_EXHAUSTED"), True)]
)
def test_other_errors_and_debug_keep_their_traceback(error, debug):
    with pytest.raises(type(error)):
        guarded(fail_with(error), debug=lambda: debug)


def test_programs_that_cannot_be_kept_are_one_line_for_all(capsys, monkeypatch):
    monkeypatch.setattr(compilation_cache, "is_own", lambda: True)

    def work():
        for place in ("aa", "aa", "aa"):
            warnings.warn(WRITING.format(place), UserWarning, stacklevel=1)
        warnings.warn("Error reading persistent compilation cache entry for 'x': EOFError: cut\nmore", stacklevel=1)
        warnings.warn("no kernel runs here", DeviceWarning, stacklevel=1)

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = lambda *warning, **_: sys.stderr.write(warnings.formatwarning(*warning[:4]))
        code, said = ending(capsys, work)
    assert code == 0
    assert said.splitlines() == [
        "compiled programs are not kept: OSError: [Errno 28] No space left: '/c/aa'; QSPEC_JAX_CACHE=FOLDER names "
        "another folder, QSPEC_JAX_CACHE=off none",
        "a compiled program cannot be read, and is compiled again: EOFError: cut; delete the folder of QSPEC_JAX_CACHE",
        "warning: no kernel runs here",
    ]


def test_a_cache_that_jax_is_told_to_use_is_what_to_change(monkeypatch):
    monkeypatch.setattr(compilation_cache, "is_own", lambda: False)
    remedy = "; name another folder by JAX_COMPILATION_CACHE_DIR, which JAX is told to use, or unset it"
    assert _unkept_program(WRITING.format("aa")).endswith(f"No space left: '/c/aa'{remedy}")
    assert _unkept_program("Error reading persistent compilation cache entry for 'x': EOFError: cut").endswith(remedy)


def test_a_command_leaves_out_what_the_environment_says_to_other_programs(capsys, monkeypatch):
    told = {
        "JAX_DISABLE_JIT": "True",
        "JAX_NUMPY_RANK_PROMOTION": "raise",
        "JAX_THREEFRY_PARTITIONABLE": "0",
        "JAX_TRANSFER_GUARD": "disallow",
        "JAX_TRANSFER_GUARD_DEVICE_TO_HOST": "allow",  # as ever
    }
    for name, value in told.items():
        monkeypatch.setenv(name, value)
    seen = []
    code, said = ending(capsys, lambda: seen.extend(told.keys() & os.environ.keys()))
    assert (code, seen) == (0, [])
    assert [line.partition(": no effect on this command")[0] for line in said.splitlines()] == [
        f"{name}={told[name]}" for name in list(told)[:4]
    ]
    assert {name: os.environ[name] for name in told} == told


LEAVES = """
import atexit, os, signal, threading, time
from qspec_jax.commands.run import leave

def thread():  # it goes on; nobody can stop a compiler
    while signal.getsignal(number) == before:
        time.sleep(0.001)
    {send}
    time.sleep(1000)

number = signal.{name}
before = signal.getsignal(number)
{during}
print("done")
leave({code})
"""
DURING = {
    "a thread goes on": "threading.Thread(target=thread).start()",
    "a thread takes it": "threading.Thread(target=thread).start()",  # and the main one is not interrupted
    "libraries clean up": "atexit.register(os.kill, os.getpid(), number)",
}


@pytest.mark.parametrize("during", DURING)
@pytest.mark.parametrize(("name", "code"), [("SIGINT", 0), ("SIGTERM", 1)])
def test_a_signal_after_the_work_is_done_changes_nothing(during, name, code):
    itself = "signal.pthread_kill(threading.get_ident(), number)"
    send = itself if during == "a thread takes it" else "os.kill(os.getpid(), number)"
    source = LEAVES.format(name=name, code=code, during=DURING[during], send=send)
    ended = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, timeout=60, check=False)
    assert (ended.returncode, ended.stdout, ended.stderr) == (code, "done\n", "")


def test_another_signal_does_not_cut_off_what_is_waited_for():
    source = """
import os, signal, threading, time
from qspec_jax.commands.run import leave

def thread():
    while signal.getsignal(signal.SIGTERM) == before:
        time.sleep(0.001)
    os.kill(os.getpid(), signal.SIGWINCH)
    time.sleep(0.3)  # in which the process would end
    print("waited for")

before = signal.getsignal(signal.SIGTERM)
signal.signal(signal.SIGWINCH, lambda *_: None)
threading.Thread(target=thread).start()
leave(0)
"""
    ended = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, timeout=60, check=False)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "waited for\n", "")


def test_an_interruption_waits_until_a_module_in_c_has_been_imported(monkeypatch):
    """Code of Python that such a module runs meanwhile would raise it, and the library in C would abort."""
    done = []

    def import_in_c(module):
        os.kill(os.getpid(), signal.SIGINT)
        done.append("imported")

    monkeypatch.setattr(_imp, "exec_dynamic", import_in_c)

    def work():
        ExtensionFileLoader("module", "module.so").exec_module(ModuleType("module"))
        done.append("goes on")
        time.sleep(60)  # until it comes again
        done.append("has slept")

    with taken_as_interruptions(), pytest.raises(KeyboardInterrupt):
        work()
    assert done == ["imported", "goes on"]
