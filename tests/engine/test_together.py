"""Blocks that several processes run together: how each ends; a dictionary is between them, and no device."""

from __future__ import annotations

import faulthandler

import pytest

import qspec_jax
from qspec_jax.device import meeting, processes
from qspec_jax.device.processes import End, Group
from qspec_jax.engine import together
from tests.device.test_processes import Client


@pytest.fixture
def pair(monkeypatch):
    """Two processes; one that were lost would end the other by an error of this test."""
    for name, seconds in (("_BEAT_S", 0.01), ("_LEAVE_S", 0.05), ("_LAST_S", 0.0)):
        monkeypatch.setattr(processes, name, seconds)
    monkeypatch.setattr(processes, "current", None)
    monkeypatch.setattr(processes, "end_with", lambda *lost: pytest.fail(str(lost)))
    client = Client()
    return client, Group(client, 0, 2), Group(client, 1, 2)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (qspec_jax.UsageError("no such mode"), "2 process 0: no such mode"),
        (qspec_jax.CheckpointError("no such file"), "1 process 0: no such file"),
        (KeyboardInterrupt(), "130 process 0: interrupted"),
        (KeyError("oh"), "1 process 0: KeyError: 'oh'"),
        (SystemExit(5), "5 process 0: ended by sys.exit(5) before process 0 was done"),
        (SystemExit("no such task"), "1 process 0: ended by sys.exit(no such task) before process 0 was done"),
    ],
)
def test_others_hear_of_an_error_and_end_with_its_code(pair, error, said):
    client, leader, _ = pair
    with pytest.raises(type(error)), together.together(leader, usage_code=2):
        raise error
    assert client.kept["qspec_jax/failed/0"] == said.encode()


def test_others_end_with_the_code_of_process_0(pair):
    _, leader, other = pair
    with together.together(leader) as group:
        group.code = 3
    assert next(other.hear()) == End(3)
    with pytest.raises(qspec_jax.DeviceError, match="these processes have ended what they ran together"):
        leader.tell("more")
    with pytest.raises(qspec_jax.UsageError, match="these processes have ended what they ran together"):
        qspec_jax.load("anything")


def test_sys_exit_without_a_code_is_no_error(pair):
    client, leader, other = pair
    with pytest.raises(SystemExit), together.together(leader):
        raise SystemExit
    assert next(other.hear()) == End(0)
    with pytest.raises(SystemExit), together.together(other):
        raise SystemExit  # of one who follows, before process 0 is done
    assert client.kept["qspec_jax/failed/1"] == b"1 process 1: ended by sys.exit() before process 0 was done"


def test_an_error_at_the_end_of_another_is_one_of_process_0(pair, monkeypatch):
    _, leader, other = pair
    other.fail("too few models")
    other.leave()
    monkeypatch.setattr(leader, "watch", lambda _: None)
    with pytest.raises(qspec_jax.QSpecError, match="process 1: too few models"), together.together(leader):
        pass


def test_a_message_that_is_lost_says_what_is_kept(pair):
    error = RuntimeError("Gloo all-reduce failed: Connection closed by peer")
    with pytest.raises(qspec_jax.QSpecError, match="another process has ended, or"), together.together(pair[1]):
        raise error


def test_a_script_s_block_joins_and_those_that_follow_do_so_at_its_end(pair, monkeypatch):
    _, leader, other = pair
    asked = []
    monkeypatch.setattr("jax.distributed.shutdown", lambda: asked.append("shut down"))
    for group in (leader, other):
        monkeypatch.setattr(processes, "current", None)
        monkeypatch.setattr(meeting, "join", lambda membership, group=group: asked.append(membership) or group)
        with qspec_jax.join("host:1234", num_processes=2, process_id=group.process) as joined:
            assert (joined.leads, joined.process, joined.count) == (group is leader, group.process, 2)
    memberships = [meeting.Membership("host:1234", 2, process) for process in range(2)]
    assert asked == [memberships[0], "shut down", memberships[1], "shut down"]
    assert other.over
    with pytest.raises(qspec_jax.UsageError, match="a process joins once"), qspec_jax.join():
        pass


def test_a_script_ends_in_time_after_an_error(pair, monkeypatch):
    """Its devices may wait for those of others."""
    noted = []
    monkeypatch.setattr(meeting, "join", lambda _: pair[1])
    monkeypatch.setattr("atexit.register", lambda *given, **options: noted.append((*given, options["exit"])))
    with pytest.raises(KeyError), qspec_jax.join("host:1234", num_processes=2, process_id=0):
        raise KeyError
    assert noted == [(faulthandler.dump_traceback_later, 20, True)]


def test_a_script_may_have_told_jax_of_the_processes_or_be_alone(pair, monkeypatch):
    with qspec_jax.join() as alone, qspec_jax.join() as again:
        assert (alone.leads, alone.count, again.leads) == (True, 1, True)
    monkeypatch.setattr("jax.distributed.is_initialized", lambda: True)
    monkeypatch.setattr(meeting, "found", lambda: pair[1])
    with pytest.raises(qspec_jax.UsageError, match="JAX knows the processes already"), qspec_jax.join("auto"):
        pass
    with qspec_jax.join() as joined:
        assert joined is pair[1]


@pytest.mark.parametrize(
    ("given", "error"),
    [
        ({"coordinator": 1234}, "coordinator=1234: use 'HOST:PORT'"),
        ({"coordinator": "a", "num_processes": 2, "process_id": 0}, "coordinator a: use HOST:PORT of process 0"),
        ({"process_id": 1}, "coordinator is missing: use coordinator HOST:PORT, num_processes and process_id together"),
        ({"coordinator": "a:1", "num_processes": "2", "process_id": 0}, "num_processes='2': use a whole number"),
        ({"coordinator": "a:1", "num_processes": 2, "process_id": True}, "process_id=True: use a whole number"),
        ({"coordinator": "a:1", "num_processes": 2, "process_id": 2}, "process_id 2 must be one of 0 to 1"),
    ],
)
def test_arguments_that_make_no_sense_join_nobody(given, error):
    with pytest.raises(qspec_jax.UsageError, match=error), qspec_jax.join(**given):
        pass
