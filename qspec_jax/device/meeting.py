"""How several processes find each other: who each of them is, and that all have come.

Each is told by options, or by the cluster. JAX's own client would wait for the others as well, but where one does not
come, or two are the same, it ends the process with a signal and a page of addresses. So they meet before: process 0
listens where JAX's coordinator will, the others tell it who they are, and all begin at once or end with the same line.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import socket
import time
from collections.abc import Collection
from typing import Any

from qspec_jax.device.processes import Group
from qspec_jax.errors import DeviceError, UsageError

AUTO = "auto"
CONNECT_S = 60  # that processes wait for each other
_USE = "use --coordinator HOST:PORT, --num-processes and --process-id together, or --coordinator auto on a cluster"
_NAME, _GO, _NO = "qspec_jax", "go", "no: "


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
    _meet(membership, float(connect_s))
    config: Any = jax.config
    config.update("jax_enable_preemption_service", False)  # which would take SIGTERM for its own
    config.update("jax_enable_recoverability", True)  # JAX would end others with a signal before they can say why
    wanted: dict[str, Any] = {}
    if membership.coordinator != AUTO:
        wanted |= {"coordinator_address": membership.coordinator}
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
    return found()


def found() -> Group:
    """The processes that JAX knows."""
    import jax

    return Group(_client(), jax.process_index(), jax.process_count())


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


def _receive(membership: Membership, connect_s: float, end: float) -> None:
    """What process 0 does: hears of the others, and tells all of them at once whether they may go on."""
    host, port = _address(membership.coordinator)
    count = membership.num_processes or 1
    came: dict[int, socket.socket] = {}
    try:
        with contextlib.ExitStack() as open_sockets:
            listening = open_sockets.enter_context(_listen(port))
            while (missing := [one for one in range(1, count) if one not in came]) and time.monotonic() < end:
                listening.settimeout(max(0.1, end - time.monotonic()))
                with contextlib.suppress(TimeoutError, ValueError, IndexError):
                    other = open_sockets.enter_context(listening.accept()[0])
                    other.settimeout(5)
                    _, process, of = _line(other).split()
                    wrong = _disagreement(int(process), int(of), count, came)
                    other.sendall(f"{_NO}{wrong}\n".encode() if wrong else b"")
                    if not wrong:
                        came[int(process)] = other
            error = (
                None
                if not missing
                else (
                    f"process {', '.join(map(str, missing))} of {count} did not come within {connect_s:.0f} s: "
                    "start each with its own --process-id and the same --coordinator and --num-processes"
                )
            )
            for other in came.values():
                with contextlib.suppress(OSError):  # it may have gone
                    other.sendall(f"{_GO if error is None else _NO + error}\n".encode())
    except OSError as error:
        raise DeviceError(
            f"process 0 cannot listen at --coordinator {host}:{port} ({error.strerror or error}); use a free port"
        ) from error
    if error is not None:
        raise DeviceError(error)


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
            with socket.create_connection(_address(membership.coordinator), timeout=5) as connection:
                connection.sendall(f"{_NAME} {membership.process_id} {membership.num_processes}\n".encode())
                connection.settimeout(max(1.0, end - time.monotonic()) + 5)
                said = _line(connection)
                break
        except OSError as error:
            if time.monotonic() > end:
                raise DeviceError(
                    f"{where} ({error.strerror or error}); start it there with the same options and --process-id 0. "
                    "If it runs, see whether a firewall is between"
                ) from error
        time.sleep(0.2)
    if said.startswith(_NO):
        raise DeviceError(said.removeprefix(_NO))
    if said != _GO:
        raise DeviceError(f"{where}: something else listens there, or process 0 has ended; use a free port")


def _line(connection: socket.socket) -> str:
    """A line that the other side sends; what there is of it, where that side ends."""
    received = b""
    while not received.endswith(b"\n") and len(received) < 1000 and (more := connection.recv(1000)):
        received += more
    return received.decode(errors="replace").strip()


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
