"""What several processes run together: a block of a script, or a command, in which one leads and the others follow."""

from __future__ import annotations

import atexit
import contextlib
import faulthandler
import os
import re
import sys
from collections.abc import Generator
from typing import Any

import jax

from qspec_jax.decoding.following import Follower
from qspec_jax.decoding.values import shown
from qspec_jax.device import meeting, processes
from qspec_jax.device.meeting import Membership
from qspec_jax.errors import QSpecError, UsageError

_END_S = 20
_LOST = (
    "another process has ended, or the network between them failed ({error}). What is finished is kept; with --output, "
    "the same commands go on with it"
)


@contextlib.contextmanager
def join(
    coordinator: str | Any = None, *, num_processes: int | Any = None, process_id: int | Any = None
) -> Generator[processes.Group]:
    """A block of a script that several processes run together; docs/mesh.md has an example.

    All processes load the same models in it, on a mesh of all their devices. Only process 0 uses them: ask for
    ``leads``. The others reach the end of the block, and there do what process 0 does, until that reaches it as well.
    An error in one process ends all, also one that is killed: within a minute, with a line that says which.

    Args:
        coordinator: ``HOST:PORT`` where process 0 listens, or ``auto``: the cluster tells. None where JAX knows already
            (``jax.distributed.initialize``) or a scheduler has started several; otherwise this is the only process.
        num_processes, process_id: of all, and of this one, with a ``HOST:PORT``.

    Yields:
        the processes; ``leads``, ``process`` and ``count`` say which this one is.

    Raises:
        UsageError: the arguments make no sense, or something was run before that the others know nothing of.
        DeviceError: the processes do not find each other.
    """
    if processes.current is not None:
        raise UsageError("these processes have joined before; a process joins once")
    is_known = jax.distributed.is_initialized()
    membership = _membership(coordinator, num_processes, process_id)
    if is_known and membership is not None:
        raise UsageError("JAX knows the processes already; leave the arguments out, or jax.distributed.initialize")
    if not is_known and membership is None and meeting.in_cluster(os.environ):
        membership = Membership(meeting.AUTO)
    if is_known:
        group = meeting.found()
    elif membership is not None:
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # XLA's warnings of settings that are meant
        group = meeting.join(membership)
    else:
        yield processes.Group(None, 0, 1)
        return
    with _ending(), together(group):
        group.follower = None if group.leads else Follower(group)
        yield group
        if group.follower is not None:
            group.follower.follow()
    if not is_known:
        jax.distributed.shutdown()


@contextlib.contextmanager
def _ending() -> Generator[None]:
    """After an error has the process end in time: its devices may wait for those of others, and Python for them."""
    try:
        yield
    except BaseException:
        if sys.__stderr__ is not None:
            atexit.register(faulthandler.dump_traceback_later, _END_S, exit=True, file=sys.__stderr__)
        raise


def _membership(coordinator: Any, num_processes: Any, process_id: Any) -> Membership | None:
    """As of options.

    Raises:
        UsageError: as they do, about arguments.
    """
    if not isinstance(coordinator, str | None):
        raise UsageError(f"coordinator={shown(coordinator)}: use 'HOST:PORT' of process 0, 'auto', or None")
    for name, value in (("num_processes", num_processes), ("process_id", process_id)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
            raise UsageError(f"{name}={shown(value)}: use a whole number")
    try:
        return Membership.of(coordinator, num_processes, process_id)
    except UsageError as error:
        named = re.sub(r"--([a-z-]+)", lambda option: option[1].replace("-", "_"), str(error))
        raise UsageError(named) from None


@contextlib.contextmanager
def together(group: processes.Group, *, usage_code: int = 1) -> Generator[processes.Group]:
    """Around what some processes do together: has the others know how it ends here, and ends it where they end.

    Args:
        group: of them.
        usage_code: with which a process ends that has found a wrong argument.

    Raises:
        QSpecError: another process has ended, or cannot be reached.
    """
    processes.current = group
    group.watch(processes.end_with)
    try:
        yield group
    except BaseException as error:
        if isinstance(error, SystemExit) and not error.code and group.leads:
            group.tell(processes.End())
        else:
            group.fail(*_failure(error, usage_code))
        group.leave()
        if not isinstance(error, QSpecError) and processes.is_lost_message(error):
            raise QSpecError(_LOST.format(error=str(error).strip().splitlines()[0][:200])) from error
        raise
    if group.leads:
        group.tell(processes.End(group.code))
    if failed := group.leave():
        raise QSpecError(failed)


def _failure(error: BaseException, usage_code: int) -> tuple[str, int]:
    """What to say of an error, and the exit code of those that it ends."""
    if isinstance(error, KeyboardInterrupt):
        return "interrupted", 130
    if isinstance(error, SystemExit):
        code = error.code if isinstance(error.code, int) else 1
        return f"ended by sys.exit({error.code or ''}) before process 0 was done", code or 1
    if isinstance(error, QSpecError | OSError):
        return str(error), usage_code if isinstance(error, UsageError) else 1
    return f"{type(error).__name__}: {error}", 1
