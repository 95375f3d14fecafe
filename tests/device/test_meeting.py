"""Processes that find each other, or end with a line that says who is missing or wrong; no JAX is asked."""

from __future__ import annotations

import contextlib
import socket
import struct
from concurrent.futures import ThreadPoolExecutor

import pytest

from qspec_jax.device import meeting
from qspec_jax.device.meeting import AUTO, Membership, in_cluster
from qspec_jax.errors import DeviceError, UsageError

MOST_S = 60.0


@pytest.fixture
def coordinator():
    with socket.create_server(("localhost", 0)) as free:
        port = free.getsockname()[1]
    return f"localhost:{port}"


def meet(members, connect_s=MOST_S, failing=()):
    """What each of them ends with; those of ``failing`` end by themselves: address, count, which, error and code."""

    def one(member):
        try:
            meeting._meet(member, connect_s)
        except DeviceError as error:
            return str(error)
        except UsageError as error:
            return f"usage: {error}"
        return None

    with ThreadPoolExecutor(len(members) + len(failing)) as pool:
        telling = [pool.submit(meeting.tell_of_failure, *given, tell_s=MOST_S) for given in failing]
        ended = list(pool.map(one, members))
        for told in telling:
            told.result()
        return ended


def test_all_go_on_once_all_have_come(coordinator):
    assert meet([Membership(coordinator, 3, one) for one in (2, 0, 1)]) == [None] * 3
    assert meet([Membership(coordinator, 1, 0)]) == [None]


@pytest.fixture
def time_is_up(monkeypatch):
    """Says after how many of those who come process 0 waits no longer: none is too late for that."""

    def after(count):
        came, welcome = [], meeting._Reception.welcome

        def count_them(here, other):
            welcome(here, other)
            came.append(other)
            if len(came) == count:
                here.end = 0.0

        monkeypatch.setattr(meeting._Reception, "welcome", count_them)

    return after


def test_who_does_not_come_is_named_by_all_who_came(coordinator, time_is_up):
    time_is_up(1)
    first, second = meet([Membership(coordinator, 4, one) for one in (0, 2)])
    assert first == second
    assert first.startswith("process 1, 3 of 4 did not come within 60 s: start each with its own --process-id")


@pytest.mark.parametrize(
    ("process", "code", "said"),
    [
        (0, 2, "usage: process 0: no option --x"),
        (1, 2, "usage: process 1: no option --x"),
        (1, 1, "process 1: no option --x"),
        (None, 2, "usage: a process: no option --x"),
    ],
)
def test_one_that_fails_before_it_comes_ends_all_with_its_error(coordinator, process, code, said):
    others = [Membership(coordinator, 3, one) for one in range(3) if one != (1 if process is None else process)]
    assert meet(others, failing=[(coordinator, 3, process, "no option\n --x", code)]) == [said, said]


def test_several_that_fail_end_one_another(coordinator):
    failing = [(coordinator, 3, process, f"wrong {process}", 2) for process in range(2)]
    assert meet([Membership(coordinator, 3, 2)], failing=failing)[0] == "usage: process 0: wrong 0"


@pytest.mark.parametrize("process", [0, 1])
def test_one_that_fails_says_that_it_waits_for_others_and_goes_without_them(coordinator, process, monkeypatch):
    monkeypatch.setattr(meeting, "_NOTICE_S", 0.0)
    said = []
    meeting.tell_of_failure(coordinator, 2, process, "no", 2, waits=lambda: said.append("waits"), tell_s=0.5)
    assert said == ["waits"]


def test_who_is_none_of_them_is_passed_over(coordinator):
    port = int(coordinator.rpartition(":")[2])

    def come(line):
        with socket.create_connection(("localhost", port), timeout=MOST_S) as stranger:
            stranger.sendall(line)
            stranger.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # it is reset

    with ThreadPoolExecutor(1) as pool:
        leader = pool.submit(meeting._meet, Membership(coordinator, 2, 0), MOST_S)
        while not leader.done():
            with contextlib.suppress(ConnectionRefusedError):
                come(b"")
                break
        for line in (b"GET / HTTP/1.1\r\n\r\n", b"qspec_jax x 2\n", b"\xff\n"):
            come(line)
        meeting._meet(Membership(coordinator, 2, 1), MOST_S)
        leader.result()


def test_processes_that_disagree_are_told_what_about(coordinator, time_is_up):
    time_is_up(1)
    found = meet([Membership(coordinator, 2, 0), Membership(coordinator, 3, 1)])
    assert found[1] == "--num-processes is 3 here and 2 in process 0; give all processes the same"
    assert "process 1 of 2 did not come" in found[0]


def test_two_that_say_they_are_one_are_told(coordinator, time_is_up):
    time_is_up(2)
    found = meet([Membership(coordinator, 3, 0), Membership(coordinator, 3, 1), Membership(coordinator, 3, 1)])
    assert sum("--process-id 1 is given to two processes" in one for one in found) == 1


def test_nobody_there_and_somebody_else_there_are_told_apart(coordinator):
    assert "cannot be reached at --coordinator" in meet([Membership(coordinator, 2, 1)], 0.3)[0]
    with socket.create_server(("", int(coordinator.rpartition(":")[2]))) as other, ThreadPoolExecutor(1) as pool:
        assert "cannot listen at --coordinator" in meet([Membership(coordinator, 2, 0)], 0.3)[0]

        def answer():
            connection, _ = other.accept()
            with connection:
                connection.recv(100)
                connection.sendall(b"HTTP/1.1 400 Bad Request\n")

        answered = pool.submit(answer)
        assert "something else listens there" in meet([Membership(coordinator, 2, 1)], 0.3)[0]
        answered.result()


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ((None, 2, None), "--coordinator is missing"),
        ((None, None, 0), "--coordinator is missing"),
        (("a:1", 2, None), "--num-processes or --process-id is missing"),
        (("a:1", None, 1), "--num-processes or --process-id is missing"),
        (("auto", 2, None), "auto asks the cluster for the other two"),
        (("a:1", 2, 2), "--process-id 2 must be one of 0 to 1"),
        (("a:1", 2, -1), "--process-id -1 must be one of 0 to 1"),
        (("a:1", 0, 0), "--num-processes 0 must be at least 1"),
        (("a", 2, 1), "--coordinator a: use HOST:PORT"),
        (("a:0", 2, 1), "--coordinator a:0: use HOST:PORT"),
        (("a:70000", 2, 1), "use HOST:PORT"),
        (("http://a:1", 2, 1), "use HOST:PORT"),
        ((":1", 2, 1), "use HOST:PORT"),
    ],
)
def test_options_that_do_not_go_together_are_refused(options, error):
    with pytest.raises(UsageError, match=error):
        Membership.of(*options)


def test_options_that_do():
    assert Membership.of(None, None, None) is None
    assert Membership.of("auto", None, None) == Membership(AUTO)
    assert Membership.of("[::1]:1234", 2, 1) == Membership("[::1]:1234", 2, 1)
    assert meeting._address("[::1]:1234") == ("::1", 1234)


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, False),
        ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "8"}, False),  # in a batch script, which is one process
        ({"SLURM_STEP_NUM_TASKS": "1"}, False),
        ({"SLURM_STEP_NUM_TASKS": "8"}, True),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, False),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, True),
        ({"MEGASCALE_NUM_SLICES": "2"}, True),
    ],
)
def test_a_cluster_is_what_plainly_starts_several(environment, expected):
    assert in_cluster(environment) is expected


def test_no_cluster_and_auto_is_refused(monkeypatch):
    def initialize(**_):
        raise ValueError("coordinator_address should be defined.")

    monkeypatch.setattr("jax.distributed.initialize", initialize)
    monkeypatch.setattr("jax.config.update", lambda *_: None)
    monkeypatch.setattr("jax._src.xla_bridge.backends_are_initialized", lambda: False)
    with pytest.raises(UsageError, match=r"no cluster says who the processes are \(coordinator_address should"):
        meeting.join(Membership(AUTO))


def test_nothing_may_have_asked_for_a_device_before(monkeypatch):
    monkeypatch.setattr("jax._src.xla_bridge.backends_are_initialized", lambda: True)
    with pytest.raises(UsageError, match="JAX has been asked for its devices already"):
        meeting.join(Membership(AUTO))
