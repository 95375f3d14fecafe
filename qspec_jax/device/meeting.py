"""How several processes find each other: who each of them is, and that all have come.

Each is told by options, or by the cluster. JAX's own client would wait for the others as well, but where one does not
come, or two are the same, it ends the process with a signal and a page of addresses. So they meet before: process 0
listens where JAX's coordinator will, the others tell it who they are, and all begin at once or end with the same line.
One that ends before, for a wrong option say, tells that as well (:func:`tell_of_failure`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import re
import socket
import time
from collections.abc import Callable, Collection, Iterable
from typing import Any, NamedTuple

from qspec_jax.device import processes
from qspec_jax.device.processes import Group
from qspec_jax.device.relay import Relay
from qspec_jax.errors import DeviceError, QSpecError, UsageError

AUTO = "auto"
CONNECT_S = 60  # that processes wait for each other
TELL_S = 20  # that one which has failed waits for those that would wait for it
_USE = "use --coordinator HOST:PORT, --num-processes and --process-id together, or --coordinator auto on a cluster"
_NAME, _GO, _FAILED = "qspec_jax", "go", "failed"
_MOST_BYTES = 1000  # of a line
_AGAIN_S = 0.2
_ANSWER_S = 5.0
_NOTICE_S = 1.0  # of waiting, which is no news before


@dataclasses.dataclass(frozen=True)
class Membership:
    """Which of how many processes this is, and where process 0 listens; None where the cluster knows.

    Attributes:
        coordinator: ``HOST:PORT`` of process 0, or ``auto``.
        num_processes, process_id: of all, and of this one.
    """

    coordinator: str
    num_processes: int | None = None
    process_id: int | None = None

    @classmethod
    def of(cls, coordinator: str | None, num_processes: int | None, process_id: int | None) -> Membership | None:
        """What options say; None for a process of its own.

        Raises:
            UsageError: they do not go together, or say nothing that can be.
        """
        numbers = num_processes, process_id
        if coordinator is None:
            if numbers != (None, None):
                raise UsageError(f"--coordinator is missing: {_USE}")
            return None
        if coordinator == AUTO:
            if numbers != (None, None):
                raise UsageError(f"--coordinator auto asks the cluster for the other two: {_USE}")
            return cls(AUTO)
        if num_processes is None or process_id is None:
            raise UsageError(f"--num-processes or --process-id is missing: {_USE}")
        _address(coordinator)
        if num_processes < 1:
            raise UsageError(f"--num-processes {num_processes} must be at least 1")
        if not 0 <= process_id < num_processes:
            raise UsageError(f"--process-id {process_id} must be one of 0 to {num_processes - 1} (--num-processes - 1)")
        return cls(coordinator, num_processes, process_id)


def in_cluster(environment: Any = os.environ) -> bool:
    """Whether a scheduler has plainly started several processes to run together: a step of SLURM, hosts of TPUs."""
    tasks = environment.get("SLURM_STEP_NUM_TASKS", "1")
    hosts = environment.get("TPU_WORKER_HOSTNAMES", "").split(",")
    return (tasks.isdigit() and int(tasks) > 1) or len(hosts) > 1 or environment.get("MEGASCALE_NUM_SLICES", "1") != "1"


def _address(coordinator: str) -> tuple[str, int]:
    matched = re.fullmatch(r"\[?([^\[\]/\s]+?)\]?:([0-9]{1,5})", coordinator)
    if matched is None or not 0 < int(matched[2]) < 2**16:
        raise UsageError(f"--coordinator {coordinator}: use HOST:PORT of process 0, such as 10.0.0.1:1234")
    return matched[1], int(matched[2])


def join(membership: Membership, *, connect_s: int = CONNECT_S) -> Group:
    """Waits for all processes; before anything asks JAX for a device.

    Raises:
        UsageError: no cluster is found that tells who the processes are, or JAX has been asked for a device.
        DeviceError: process 0 cannot be reached in time, or others do not come.
    """
    import jax
    from jax._src import xla_bridge  # JAX has no public way to ask

    if xla_bridge.backends_are_initialized():
        raise UsageError("JAX has been asked for its devices already, of this process alone; join the others before")
    processes.has_met = True
    _meet(membership, float(connect_s))
    relay = _relay_of(membership)
    config: Any = jax.config
    config.update("jax_enable_preemption_service", False)  # which would take SIGTERM for its own
    config.update("jax_enable_recoverability", True)  # JAX would end others with a signal before they can say why
    wanted: dict[str, Any] = {}
    if membership.coordinator != AUTO:
        wanted |= {"coordinator_address": membership.coordinator if relay is None else relay.address}
        wanted |= {"num_processes": membership.num_processes, "process_id": membership.process_id}
    waits: dict[str, Any] = {"initialization_timeout": connect_s, "heartbeat_timeout_seconds": 100}
    try:
        jax.distributed.initialize(**wanted, **waits)
    except (ValueError, TypeError) as error:
        raise UsageError(f"no cluster says who the processes are ({_first_line(error)}): {_USE}") from error
    except RuntimeError as error:  # what XLA raises is one as well
        of = "" if membership.num_processes is None else f" of {membership.num_processes}"
        raise DeviceError(
            f"not all{of} processes came within {connect_s} s, or they do not agree on who they are: start each with "
            f"its own --process-id and the same --coordinator and --num-processes ({_first_line(error)})"
        ) from error
    return found(relay)


def _relay_of(membership: Membership) -> Relay | None:
    """Between JAX and process 0, for those that are told where that is."""
    if membership.coordinator == AUTO or membership.process_id == 0:
        return None
    return Relay(_address(membership.coordinator), lambda: processes.end_with(processes.LOST))


def found(relay: Relay | None = None) -> Group:
    """The processes that JAX knows, and what this one reaches process 0 through."""
    import jax

    return Group(_client(), jax.process_index(), jax.process_count(), relay)


def _client() -> Any:
    from jax._src import distributed  # JAX has no public way to what it keeps for all processes

    return distributed.global_state.client


def _meet(membership: Membership, connect_s: float) -> None:
    """Waits until all processes have said who they are, where the coordinator will be.

    JAX would wait as well, but end the process with a signal where one does not come.
    """
    if membership.num_processes is None or membership.process_id is None:
        return  # the cluster has started all of them
    end = time.monotonic() + connect_s
    if membership.process_id == 0:
        _receive(membership, connect_s, end)
    else:
        _report(membership, connect_s, end)


class _Failure(NamedTuple):
    """Why processes cannot begin, and the exit code of all."""

    code: int
    said: str

    @property
    def kind(self) -> type[QSpecError]:
        return UsageError if self.code == 2 else DeviceError

    def line(self) -> str:
        return f"{_FAILED} {self.code} {self.said}"

    @classmethod
    def of(cls, line: str) -> _Failure | None:
        matched = re.fullmatch(rf"{_FAILED} ([0-9]+) (.*)", line)
        return None if matched is None else cls(int(matched[1]), matched[2])


def tell_of_failure(
    coordinator: str,
    num_processes: int | None,
    process_id: int | None,
    error: str,
    code: int,
    *,
    waits: Callable[[], Any] = lambda: None,
    tell_s: float = TELL_S,
) -> None:
    """Has those that wait for this process, or will in a moment, end with its error instead; nobody, if none is there.

    Args:
        coordinator, num_processes, process_id: of this one, before it joins; None where it does not know.
        error: with which it ends.
        code: its exit code, and theirs.
        waits: called once where nobody could be told within a second.
        tell_s: how long to wait for them.

    Raises:
        UsageError: ``coordinator`` is no address.
    """
    who = "a process" if process_id is None else f"process {process_id}"
    failure = _Failure(code, f"{who}: {' '.join(error.split())}")
    address, end = _address(coordinator), time.monotonic() + tell_s
    if process_id == 0:
        with contextlib.suppress(DeviceError, failure.kind):
            _receive(Membership(coordinator, num_processes, 0), tell_s, end, failure=failure, waits=waits)
        return
    notice = time.monotonic() + _NOTICE_S
    while time.monotonic() < end:
        with contextlib.suppress(OSError), socket.create_connection(address, timeout=_ANSWER_S) as connection:
            _say(connection, f"{_NAME} {process_id} {num_processes} {failure.line()}")
            connection.settimeout(max(1.0, end - time.monotonic()))
            if _line(connection):  # it has heard
                return
        if time.monotonic() > notice:
            notice = math.inf
            waits()
        time.sleep(_AGAIN_S)


def _receive(
    membership: Membership,
    connect_s: float,
    end: float,
    *,
    failure: _Failure | None = None,
    waits: Callable[[], Any] = lambda: None,
) -> None:
    """What process 0 does: hears of the others, and tells all of them at once whether they may go on.

    Where one has failed, itself say, those who come are told at once, and the others waited for a little longer.
    """
    host, port = _address(membership.coordinator)
    here = _Reception(membership.num_processes or 1, end, failure)
    notice = math.inf if failure is None else time.monotonic() + _NOTICE_S
    try:
        with contextlib.ExitStack() as open_sockets:
            listening = open_sockets.enter_context(_listen(port))
            while not here.is_complete and (now := time.monotonic()) < here.end:
                if now >= notice:
                    notice = math.inf
                    waits()
                listening.settimeout(max(0.1, min(here.end, notice) - now))
                with contextlib.suppress(TimeoutError):
                    here.welcome(open_sockets.enter_context(listening.accept()[0]))
            if here.failure is None:
                here.failure = here.missing(connect_s)
                _tell(here.came.values(), _GO if here.failure is None else here.failure.line())
    except OSError as error:
        raise DeviceError(
            f"process 0 cannot listen at --coordinator {host}:{port} ({error.strerror or error}); use a free port"
        ) from error
    if here.failure is not None:
        raise here.failure.kind(here.failure.said)


class _Reception:
    """What process 0 knows of the others while they come: who is there, and who has failed."""

    def __init__(self, count: int, end: float, failure: _Failure | None):
        self.end, self.failure = end, failure
        self.came: dict[int, socket.socket] = {}
        self._count = count
        self._unknown = 0  # that have failed, and do not know which they are

    @property
    def is_complete(self) -> bool:
        return len(self.came) + self._unknown >= self._count - 1

    def welcome(self, other: socket.socket) -> None:
        """Hears who has come, and tells it what is wrong already; passes over what is none of these processes."""
        other.settimeout(_ANSWER_S)
        try:
            _, process, of, *rest = _line(other).split(maxsplit=3)
            failed = _Failure.of(rest[0]) if rest else None
            if failed is not None and not process.isdigit():
                self._unknown += 1
            elif failed is None and (wrong := _disagreement(int(process), int(of), self._count, self.came)):
                _tell([other], _Failure(1, wrong).line())
                return
            else:
                self.came[int(process)] = other
        except (OSError, ValueError):
            return
        if failed is not None and self.failure is None:
            self.failure, self.end = failed, min(self.end, time.monotonic() + TELL_S)
            _tell({other, *self.came.values()}, failed.line())
        elif self.failure is not None:
            _tell([other], self.failure.line())

    def missing(self, connect_s: float) -> _Failure | None:
        """What is wrong where some have not come in time."""
        absent = [str(one) for one in range(1, self._count) if one not in self.came]
        if not absent:
            return None
        return _Failure(
            1,
            f"process {', '.join(absent)} of {self._count} did not come within {connect_s:.0f} s: "
            "start each with its own --process-id and the same --coordinator and --num-processes",
        )


def _listen(port: int) -> socket.socket:
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True)
    return socket.create_server(("", port))


def _disagreement(process: int, of: int, count: int, came: Collection[int]) -> str:
    """What is wrong with a process that has come; nothing, where all is well."""
    if of != count:
        return f"--num-processes is {of} here and {count} in process 0; give all processes the same"
    return f"--process-id {process} is given to two processes; give each its own" if process in came else ""


def _report(membership: Membership, connect_s: float, end: float) -> None:
    """What the others do: tell process 0 who they are, and wait until all have come."""
    where = f"process 0 cannot be reached at --coordinator {membership.coordinator} within {connect_s:.0f} s"
    while True:
        try:
            with socket.create_connection(_address(membership.coordinator), timeout=_ANSWER_S) as connection:
                _say(connection, f"{_NAME} {membership.process_id} {membership.num_processes}")
                connection.settimeout(max(1.0, end - time.monotonic()) + 5)
                said = _line(connection)
                break
        except OSError as error:
            if time.monotonic() > end:
                raise DeviceError(
                    f"{where} ({error.strerror or error}); start it there with the same options and --process-id 0. "
                    "If it runs, see whether a firewall is between"
                ) from error
        time.sleep(_AGAIN_S)
    if (failure := _Failure.of(said)) is not None:
        raise failure.kind(failure.said)
    if said != _GO:
        raise DeviceError(f"{where}: something else listens there, or process 0 has ended; use a free port")


def _tell(connections: Iterable[socket.socket], line: str) -> None:
    for one in connections:
        with contextlib.suppress(OSError):  # it may have gone
            _say(one, line)


def _say(connection: socket.socket, line: str) -> None:
    connection.sendall(f"{line.encode()[: _MOST_BYTES - 1].decode(errors='ignore')}\n".encode())


def _line(connection: socket.socket) -> str:
    """A line that the other side sends; what there is of it, where that side ends."""
    received = b""
    while not received.endswith(b"\n") and len(received) < _MOST_BYTES and (more := connection.recv(_MOST_BYTES)):
        received += more
    return received.decode(errors="replace").strip()


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
