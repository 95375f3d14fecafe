"""What a command does before it works: ``--help`` and wrong options import neither JAX nor what is as slow.

One process starts all commands, one after the other, and then imports the rest: about 1.5 seconds.
"""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
HEAVY = ("jax", "numpy", "flax", "transformers", "huggingface_hub", "matplotlib", "requests", "jinja2", "yaml")
HELP = [["--help"]]
BENCH = {
    "kernels": [["--ops", "w4a2"], ["--implementations", "cutlass"], ["--shape", "4096"], ["--model", "no/such.gguf"]],
    "decode": [["--mode", "w4a2"], ["--draft-length", "99"], ["--preset", "llama-9"], ["--model", "no/such.gguf"]],
    "throughput": [["--slots", "0"], ["--rate", "0"], ["--draft-length", "99"], ["--preset", "llama-9"]],
    "tune": [["--ops", "w4a2"], ["--group-size", "48"], ["--repeats", "0"], ["--output", "no/such/table.json"]],
}
COMMANDS = {
    "qspec_jax.generate": [
        *HELP,
        [],
        ["--prompt", "a", "--mode", "w4a2"],
        ["--prompt", "a", "--draft-length", "0"],
        ["--prompt", "a", "--temperature", "-1"],
        ["--prompt", "a", "--model", "no/such.gguf"],
        ["--prompt-file", "no/such.txt"],
    ],
    "qspec_jax.chat": [
        *HELP,
        ["--mode", "w4a2"],
        ["--max-new-tokens", "0"],
        ["--temperature", "-1"],
        ["--model", "no/such.gguf"],
    ],
    "qspec_jax.serve": [
        *HELP,
        ["--mode", "w4a2"],
        ["--port", "65536"],
        ["--timeout", "0"],
        ["--max-waiting", "-1"],
        ["--draft-length", "99"],
        ["--api-key-file", "no/such.key"],
        ["no/such.gguf"],
    ],
    "qspec_jax.quantize": [
        *HELP,
        ["default"],
        ["default", "out", "--recipe", "gptx"],
        ["default", "out", "--recipe", "no/such.toml"],
        ["no/such.gguf", "out", "--recipe", "rtn"],
    ],
    "qspec_jax.evaluate": [
        *HELP,
        [],
        ["--drafts", "w4a2"],
        ["--draft-lengths", "99"],
        ["--draft-contexts", "window-0"],
        ["--text", "no/such.txt"],
        ["--text", str(Path(__file__)), "--baseline", "no/such.gguf"],
    ],
    "qspec_jax.texts": [
        *HELP,
        [],
        ["no/such/folder", "--documents", "1"],
        ["no/such/folder", "--long-contexts", "2048"],
        ["no/such/folder", "--model", "no/such.gguf"],
    ],
    "qspec_jax.info": [
        *HELP,
        ["no/such.gguf"],
        ["--op", "swiglu"],
        ["default", "--self-test"],
        ["--max-seconds", "0"],
        ["--output", "no/such/folder/file"],
    ],
    "qspec_jax.bench.__main__": [
        *HELP,
        [],
        *([command, *arguments] for command, wrong in BENCH.items() for arguments in [*HELP, *wrong]),
    ],
    # lm-eval's own parser.
    "qspec_jax.harness": [*HELP, ["run", "--no-such-option"]] if find_spec("lm_eval") else [],
}
STARTS = [(module, arguments) for module, starts in COMMANDS.items() for arguments in starts]
START_ALL = """
import contextlib, importlib, io, json, sys

starts, heavy = json.loads(sys.argv[1])
import qspec_jax
found = [[0, "", [name for name in heavy if name in sys.modules]]]
for module, arguments in starts:
    before, said = set(sys.modules), io.StringIO()
    sys.argv[1:] = arguments
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        try:
            code = importlib.import_module(module).main()
        except SystemExit as end:
            code = end.code
    found.append([code, said.getvalue(), [name for name in heavy if name in sys.modules.keys() - before]])
from qspec_jax import *
import pallas_kernels
from jax._src import xla_bridge
slow = [name for name in ("transformers", "torch", "orbax", "tensorstore", "jax.experimental.pallas")
        if name in sys.modules]
print(json.dumps([found, slow, sorted(xla_bridge._backends)]))
"""


@pytest.fixture(scope="module")
def started():
    """Of the package alone and of each start: exit code, what it said, and what it imported that it should not."""
    command = [sys.executable, "-c", START_ALL, json.dumps([STARTS, HEAVY])]
    ended = subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT)
    return json.loads(ended.stdout)


def test_importing_the_package_imports_nothing(started):
    assert started[0][0] == [0, "", []]


@pytest.mark.parametrize("index", range(len(STARTS)), ids=[" ".join([module, *rest]) for module, rest in STARTS])
def test_help_and_wrong_options_come_before_jax(started, index):
    _, arguments = STARTS[index]
    code, said, imported = started[0][index + 1]
    assert imported == []
    if "--help" in arguments:
        assert code == 0
        assert said.startswith("usage: ")
    else:
        assert code == (1 if "no/such.gguf" in arguments else 2)
        assert "error: " in said


INTERRUPTED = """
import builtins, runpy, sys

def interrupted(name, scope=None, *rest, **options):
    if name == "argparse" and scope and scope["__name__"] == "__main__":
        {raises}
    return usual(name, scope, *rest, **options)

usual, builtins.__import__ = builtins.__import__, interrupted
runpy.run_module(sys.argv[1], run_name="__main__", alter_sys=True)
"""


@pytest.mark.parametrize("command", COMMANDS)
def test_ctrl_c_while_a_command_is_imported_is_one_line(command):
    line = [sys.executable, "-c", INTERRUPTED.format(raises="raise KeyboardInterrupt"), command]
    ended = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert (ended.returncode, ended.stdout, ended.stderr) == (130, "", "interrupted\n")


def test_what_else_fails_while_a_command_is_imported_keeps_its_traceback():
    line = [sys.executable, "-c", INTERRUPTED.format(raises="raise ZeroDivisionError"), "qspec_jax.info"]
    ended = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert (ended.returncode, ended.stderr.splitlines()[-1]) == (1, "ZeroDivisionError")


def test_importing_all_of_the_package_does_no_work(started):
    """No backend is initialised, no tokenizer library loaded, no kernel of a GPU or TPU read."""
    assert started[1:] == [[], []]
