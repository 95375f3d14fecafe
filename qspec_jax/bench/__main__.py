"""``python -m qspec_jax.bench COMMAND``: benchmarks at the command line.

Tables go to the standard output, progress to the standard error stream. Exit codes: 0 success, 1 failure (a result
that differs from the reference included), 2 a usage error, 130 interrupted.

A command is a module with ``add_command(commands)``, which adds its parser and sets ``run`` on it: a function from
the parsed arguments to the exit code. It checks what it can of them before it imports JAX.

No compiled program is kept or taken from before, whatever JAX is configured to do: compile times are cold ones.
"""

from __future__ import annotations

if __name__ == "__main__":  # before the rest is imported
    from qspec_jax.commands.beginning import interrupted_in_one_line

    interrupted_in_one_line()

import argparse
import contextlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from qspec_jax.bench.decode import command as decode
from qspec_jax.bench.kernels import command as kernels
from qspec_jax.bench.scaling import command as scaling
from qspec_jax.bench.speedup import command as speedup
from qspec_jax.bench.throughput import command as throughput
from qspec_jax.bench.tpu import command as tpu
from qspec_jax.bench.tune import command as tune
from qspec_jax.commands.output import require_standard_output
from qspec_jax.commands.processes import run_together
from qspec_jax.commands.run import exit_code, leave
from qspec_jax.files.lock import locked

COMMANDS = (kernels, decode, speedup, throughput, tune, tpu, scaling)


def build_parser() -> argparse.ArgumentParser:
    """The options of all commands."""
    parser = argparse.ArgumentParser(prog="python -m qspec_jax.bench", description="Benchmarks of qspec-jax.")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for module in COMMANDS:
        module.add_command(commands)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit code."""
    argv = sys.argv[1:] if argv is None else list(argv)

    def run(arguments: argparse.Namespace) -> int | None:
        require_standard_output("send it to a file")
        _keep_no_programs()
        arguments.argv = argv
        if hasattr(arguments, "coordinator"):
            return run_together(f"bench {arguments.run.__module__.split('.')[-2]}", _run, arguments)
        return _run(arguments)

    return exit_code(run, build_parser(), argv)


def _run(arguments: argparse.Namespace) -> int | None:
    """Runs a command, with the files that it writes locked."""
    with contextlib.ExitStack() as locks:
        for name in ("json", "output"):
            path = getattr(arguments, name, None)
            if path is not None and _is_made(path):
                locks.enter_context(locked(path))
        return arguments.run(arguments)


def _is_made(path: Path) -> bool:
    """Whether a report would become a file there; the command itself says what else is in the way."""
    return path.parent.is_dir() and os.access(path.parent, os.W_OK) and (path.is_file() or not path.exists())


def _keep_no_programs() -> None:
    """Switches JAX's compilation cache off, and imports no JAX for it: options may still be found wrong."""
    if "jax" in sys.modules:
        sys.modules["jax"].config.update("jax_enable_compilation_cache", False)
    else:
        os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"


if __name__ == "__main__":
    leave(main())
