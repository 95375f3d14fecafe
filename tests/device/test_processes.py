"""What processes tell each other, and how one that is gone is missed; the coordinator is a dictionary."""

from __future__ import annotations

import sys
import threading

import pytest

from qspec_jax.device import processes
from qspec_jax.device.processes import Group
from qspec_jax.errors import DeviceError

MOST_S = 60.0


class Client:
    """What JAX's client of its coordinator does, as far as it is used."""

    def __init__(self):
        self.kept, self.is_gone = {}, False

    def key_value_set_bytes(self, key, value, allow_overwrite=False):
        self.check()
        assert allow_overwrite or key not in self.kept
        self.kept[key] = value

    def key_value_delete(self, key):
        del self.kept[key]

    def key_value_dir_get_bytes(self, folder):
        self.check()
        return [(key, value) for key, value in self.kept.items() if key.startswith(folder)]

    def blocking_key_value_get_bytes(self, key, timeout_ms):
        self.check()
        if key not in self.kept:
            self.is_gone = True  # next time
            raise RuntimeError("DEADLINE_EXCEEDED: nothing came")
        return self.kept[key]

    def check(self):
        if self.is_gone:
            raise RuntimeError("UNAVAILABLE: connection refused\nand more")


@pytest.fixture(autouse=True)
def soon(monkeypatch):
    for name, seconds in (("_BEAT_S", 0.01), ("_LEAVE_S", 0.3), ("_LAST_S", 0.0)):
        monkeypatch.setattr(processes, name, seconds)


def groups(count):
    client = Client()
    return client, [Group(client, process, count) for process in range(count)]


def test_messages_come_in_order_to_each_and_the_oldest_are_let_go(monkeypatch):
    monkeypatch.setattr(processes, "_KEPT", 3)
    client, (leader, one, other) = groups(3)
    heard, also = one.hear(), other.hear()
    for number in range(8):
        leader.tell({"number": number})
        assert next(heard) == next(also) == {"number": number}
    assert len(client.kept) == 3


def test_a_leader_that_has_nothing_to_do_is_waited_for_and_one_that_is_gone_is_not():
    _, (leader, one) = groups(2)
    leader.tell("all")
    heard = one.hear()
    assert next(heard) == "all"
    with pytest.raises(DeviceError, match=r"process 0 has ended, .* \(UNAVAILABLE: connection refused\)"):
        next(heard)  # after one wait in vain


def lost(watching, *, beside=(), then=lambda: None):
    """What a process loses, while others leave signs of life until something happens."""
    came, told = threading.Event(), []

    def note(line, code):
        told.append((line, code))
        came.set()

    for other in beside:
        other.watch(lambda *_: None)
    watching.watch(note)
    then()
    assert came.wait(MOST_S)
    for one in (*beside, watching):
        one.leave()
    return told


def test_a_process_that_is_never_there_is_named(monkeypatch):
    monkeypatch.setattr(processes, "SILENT_S", 0.05)
    _, (leader, _) = groups(2)
    ((line, code),) = lost(leader)
    assert line.startswith("process 1 has given no sign of life for 0 s")
    assert code == 1


def test_of_several_the_one_that_is_silent_is_named(monkeypatch):
    """By a clock that goes on as the test says: a thread that starts late is silent, too."""
    now = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    signs = processes._Signs([1, 2])
    for second in range(40):
        now[0] = float(second)
        said = signs.lost({1: str(second), 2: str(min(second, 5))})
        assert (said is None) == (second <= 5 + processes.SILENT_S)
        assert said is None or said.startswith("process 2 has given no sign of life for 30 s")


def test_an_error_is_passed_on_to_all():
    client, (leader, one) = groups(2)
    ((line, code),) = lost(leader, beside=[one], then=lambda: one.fail("no such file", 2))
    assert (line, code) == ("process 1: no such file", 2)
    assert "qspec_jax/left/0" in client.kept


def test_the_leader_waits_where_all_meet_and_nobody_else_does(monkeypatch):
    monkeypatch.setattr(processes, "_MEET_S", 0.01)
    _, (leader, one, other) = groups(3)
    one.meet(0)
    meeting = threading.Thread(target=leader.meet, args=(0,))
    meeting.start()
    meeting.join(0.05)
    assert meeting.is_alive()
    other.meet(0)
    meeting.join(MOST_S)
    assert not meeting.is_alive()


def test_a_leader_whose_own_part_fails_ends_with_all_others(monkeypatch):
    """A server, say, which would answer nobody any more."""
    monkeypatch.setattr(processes, "_OVER_S", 0.05)
    client, (leader, _) = groups(2)

    def fail():
        with pytest.raises(ValueError, match="no room"), leader.telling("a call"):
            raise ValueError("no room")
        with pytest.raises(DeviceError):
            leader.tell("another")

    ((line, code),) = lost(leader, then=fail)
    expected = "the processes cannot go on together after an error of this one (no room); start anew"
    assert (line, code) == (expected, 1)
    assert client.kept["qspec_jax/failed/0"] == f"1 process 0: {expected}".encode()


def test_a_coordinator_that_is_gone_ends_those_that_follow():
    client, (_, one) = groups(2)
    ((line, code),) = lost(one, then=lambda: setattr(client, "is_gone", True))
    assert line == "process 0 has ended, or cannot be reached any more (UNAVAILABLE: connection refused)"
    assert code == 1
    one.fail("nobody can be told")


def test_the_leader_leaves_last(monkeypatch):
    monkeypatch.setattr(processes, "_LEAVE_S", MOST_S)
    _, (leader, one) = groups(2)
    leaving = threading.Thread(target=leader.leave)
    leaving.start()
    leaving.join(0.1)
    assert leaving.is_alive()
    one.leave()
    leaving.join(MOST_S)
    assert not leaving.is_alive()
    one.fail("at the last moment")
    assert leader.leave() == "process 1: at the last moment"


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        ("UNKNOWN: Gloo all-reduce failed: Connection closed by peer", True),
        ("INTERNAL: NCCL operation ncclAllGather failed: unhandled system error", True),
        ("RESOURCE_EXHAUSTED: out of memory", False),
        ("list index out of range", False),
    ],
)
def test_a_lost_message_is_known_by_who_carries_it(error, expected):
    assert processes.is_lost_message(RuntimeError(error)) is expected


def test_an_end_at_once_undoes_what_it_must_and_says_one_line(monkeypatch, capsys):
    undone = []
    monkeypatch.setattr(processes, "before_the_end", [lambda: undone.append(1 / 0), lambda: undone.append("echo")])
    monkeypatch.setattr("os._exit", sys.exit)
    with pytest.raises(SystemExit, match="2"):
        processes.end_with("process 1: no such file", 2)
    assert (undone, capsys.readouterr().err) == (["echo"], "error: process 1: no such file\n")
