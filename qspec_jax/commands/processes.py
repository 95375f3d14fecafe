"""What commands do that run in several processes: options, the start, and the end of all of them.

The process that leads runs the command. The others load their devices' share of the models that it loads, and make the
calls that it makes (``decoding/following.py``): they read no request, print no result and write no file.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Callable, Generator
from typing import Any

from qspec_jax.commands.options import PROCESSES, Parser, option_of
from qspec_jax.commands.output import is_terminal, say
from qspec_jax.commands.run import keep_compiled_programs
from qspec_jax.device import meeting, processes
from qspec_jax.device.driver import installed_version
from qspec_jax.errors import UsageError

_ALIKE = ("mesh", "mode", "verify", "dtype", "group_size", "kernels", "kv", "head_bits", "draft_head")
_NAMES = "model", "baseline", "draft_model"  # of files, which may lie elsewhere on another host


def add_processes(parser: argparse.ArgumentParser) -> Parser:
    """``--coordinator``, ``--num-processes`` and ``--process-id``; see :func:`run_together`."""
    text = "start the same command once for each; needs --mesh over all their devices"
    group = parser.add_argument_group("several processes", text)
    coordinator, count, process = PROCESSES
    where = "where process 0 listens, or auto: the cluster tells (SLURM, GKE, TPU pods)"
    group.add_argument(coordinator, metavar="HOST:PORT", help=where)
    group.add_argument(count, type=int, metavar="N", help="of all processes")
    group.add_argument(process, type=int, metavar="I", help="of this one, from 0; process 0 writes the results")
    return group


def run_together(
    name: str,
    run: Callable[[argparse.Namespace], int | None],
    arguments: argparse.Namespace,
    *,
    check: Callable[[argparse.Namespace], None] = lambda _: None,
) -> int:
    """Runs a command, in process 0 if there are several, whose others do what it needs; the exit code of all.

    Args:
        name: of the command.
        run: the command.
        arguments: parsed, with those of :func:`add_processes`, and ``mesh``.
        check: refuses arguments, before anything is loaded; in each process, and all hear of it.

    Raises:
        UsageError: the options do not go together.
        DeviceError: the processes do not find each other.
        QSpecError: as the command, or as loading its models.
    """
    with joined(name, arguments) as group:
        check(arguments)
        if group is None:
            return run(arguments) or 0
        if group.leads:
            group.code = run(arguments) or 0
            return group.code
        say(f"process {group.process} of {group.count} follows process 0")
        keep_compiled_programs()
        return group.follower.follow()


@contextlib.contextmanager
def joined(name: str, arguments: argparse.Namespace) -> Generator[processes.Group | None]:
    """The processes that run a command together; None for one alone. Arguments and errors as of :func:`run_together`.

    Processes that a scheduler has started together join by themselves where ``--mesh`` asks for more than one device.
    """
    given = arguments.coordinator, arguments.num_processes, arguments.process_id
    membership = meeting.Membership.of(*given)
    if membership is None and arguments.mesh is not None and meeting.in_cluster(os.environ):
        membership = meeting.Membership(meeting.AUTO)
    if membership is None:
        yield None
        return
    if arguments.mesh is None:
        raise UsageError("several processes share a mesh: give --mesh over all their devices, such as data=2,model=4")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # XLA's warnings of settings that are meant
    _keep_standard_output()
    from qspec_jax.engine.together import together

    with together(meeting.join(membership), usage_code=2) as group:
        _agree(group, name, arguments)
        yield group


def _agree(group: processes.Group, name: str, arguments: argparse.Namespace) -> None:
    """Has those that follow find the leader's models under their own names.

    Raises:
        UsageError: this process would not run what process 0 does.
    """
    options = {option_of(one): getattr(arguments, one) for one in _ALIKE if hasattr(arguments, one)}
    versions = {"qspec_jax": installed_version("qspec-jax"), "jax": installed_version("jax")}
    said = {"the command": name, **options, **versions}
    names = {option_of(one): _listed(getattr(arguments, one)) for one in _NAMES if hasattr(arguments, one)}
    if group.leads:
        group.tell((said, names))
        return
    theirs, their_names = next(group.hear())
    for what, value in theirs.items():
        if said.get(what) != value:
            raise UsageError(f"{what} is {said.get(what)} here and {value} in process 0; give all processes the same")
    renamed: dict[Any, Any] = {}
    for what, values in their_names.items():
        if len(values) != len(names[what]):
            raise UsageError(f"{what} is not given as often here as in process 0; give all processes the same")
        renamed |= dict(zip(values, names[what], strict=True))
    from qspec_jax.decoding.following import Follower

    group.follower = Follower(group, renamed=renamed)


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _keep_standard_output() -> None:
    """Has results alone on the standard output: the library that carries a CPU's messages prints there as well."""
    if sys.stdout is None or is_terminal(sys.stdout):  # it is closed; or somebody edits lines there
        return
    sys.stdout.flush()
    own = os.dup(1)
    os.dup2(2, 1)
    like = {"encoding": sys.stdout.encoding, "errors": sys.stdout.errors}
    sys.stdout = open(own, "w", **like)  # noqa: SIM115 - for as long as the process
