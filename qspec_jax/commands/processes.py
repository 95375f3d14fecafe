"""What commands do that run in several processes: options, the start, and the end of all of them.

The process that leads runs the command. The others load their devices' share of the model, and make the calls that the
first one makes (``decoding/led_programs.py``): they read no request, print no result and write no file.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import version
from typing import TYPE_CHECKING

from qspec_jax.commands.options import Parser, option_of
from qspec_jax.commands.output import say
from qspec_jax.commands.run import load_and_compile
from qspec_jax.device import meeting, processes
from qspec_jax.errors import QSpecError, UsageError

if TYPE_CHECKING:
    from qspec_jax.engine.language_model import LanguageModel

_ALIKE = ("mesh", "mode", "verify", "dtype", "group_size", "kernels")  # a model may lie elsewhere on another host
_LOST = (
    "another process has ended, or the network between them failed ({error}). What is finished is kept; with --output, "
    "the same commands go on with it"
)


def add_processes(parser: argparse.ArgumentParser) -> Parser:
    """``--coordinator``, ``--num-processes`` and ``--process-id``; see :func:`joined`."""
    text = "start the same command once for each; needs --mesh over all their devices"
    group = parser.add_argument_group("several processes", text)
    coordinator = "where process 0 listens, or auto: the cluster tells (SLURM, GKE, TPU pods)"
    group.add_argument("--coordinator", metavar="HOST:PORT", help=coordinator)
    group.add_argument("--num-processes", type=int, metavar="N", help="of all processes")
    group.add_argument("--process-id", type=int, metavar="I", help="of this one, from 0; process 0 writes the results")
    return group


@contextlib.contextmanager
def joined(arguments: argparse.Namespace) -> Iterator[processes.Group | None]:
    """The processes that run a command together; None for one alone.

    Processes that a scheduler has started together join by themselves where ``--mesh`` asks for more than one device.

    Raises:
        UsageError: the options do not go together.
        DeviceError: the processes do not find each other.
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
    group = meeting.join(membership)
    group.watch(processes.end_with)
    processes.current = group
    try:
        _agree(group, arguments)
        yield group
    except BaseException as error:
        group.fail("interrupted" if isinstance(error, KeyboardInterrupt) else str(error) or type(error).__name__)
        group.leave()
        if not isinstance(error, QSpecError) and processes.is_lost_message(error):
            raise QSpecError(_LOST.format(error=str(error).splitlines()[0][:200])) from error
        raise
    if group.leads:
        group.tell(processes.End())
    group.leave()


def _agree(group: processes.Group, arguments: argparse.Namespace) -> None:
    """Raises UsageError where this process would not run what process 0 does."""
    options = {option_of(name): getattr(arguments, name) for name in _ALIKE}
    said = {**options, "qspec_jax": version("qspec-jax"), "jax": version("jax")}
    if group.leads:
        group.tell(said)
        return
    for name, value in next(group.hear()).items():
        if said[name] != value:
            raise UsageError(f"{name} is {said[name]} here and {value} in process 0; give all processes the same")


def _keep_standard_output() -> None:
    """Has results alone on the standard output: the library that carries a CPU's messages prints there as well."""
    if sys.stdout is None:  # it is closed
        return
    sys.stdout.flush()
    own = os.dup(1)
    os.dup2(2, 1)
    like = {"encoding": sys.stdout.encoding, "errors": sys.stdout.errors}
    sys.stdout = open(own, "w", **like)  # noqa: SIM115 - for as long as the process


def follow(group: processes.Group, load: Callable[..., LanguageModel], arguments: argparse.Namespace) -> int:
    """Loads the model of a command, and does what the process that leads says; the exit code.

    Args:
        group: in which this process does not lead.
        load: :func:`qspec_jax.load`.
        arguments: as of :func:`load_and_compile`.

    Raises:
        QSpecError: the model cannot be loaded, or a call fails.
    """
    from qspec_jax.decoding.led_programs import Call
    from qspec_jax.decoding.led_programs import follow as make_calls

    say(f"process {group.process} of {group.count} follows process 0")
    model = load_and_compile(load, arguments, lambda _: None)

    def calls() -> Iterator[Call]:
        for message in group.hear():
            if isinstance(message, processes.End):
                return
            yield message

    make_calls(model.programs, calls())
    return 0
