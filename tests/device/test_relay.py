"""What lies between a process and JAX's coordinator: bytes pass, and an end of the other side is told beforehand."""

from __future__ import annotations

import contextlib
import socket
import threading

import pytest

from qspec_jax.device.relay import Relay

MOST_S = 60


@pytest.fixture
def ends():
    """A relay, what it has told of, and a function that connects through it: this end, and the far one."""
    told, may_close = threading.Event(), threading.Event()

    def lose():
        told.set()
        may_close.wait(MOST_S)

    with contextlib.ExitStack() as stack:
        server = stack.enter_context(socket.create_server(("localhost", 0)))
        relay = Relay(("localhost", server.getsockname()[1]), lose)
        host, port = relay.address.split(":")

        def connect():
            near = stack.enter_context(socket.create_connection((host, int(port)), timeout=MOST_S))
            far = stack.enter_context(server.accept()[0])
            far.settimeout(MOST_S)
            return near, far

        yield connect, told, may_close, server
        may_close.set()


def answered(connect):
    near, far = connect()
    near.sendall(b"asked")
    assert far.recv(100) == b"asked"
    far.sendall(b"answered")
    assert near.recv(100) == b"answered"
    return near, far


@pytest.mark.parametrize("is_reset", [False, True])
def test_an_end_is_told_before_this_side_sees_it(ends, is_reset):
    connect, told, may_close, _ = ends
    near, far = answered(connect)
    if is_reset:  # as where bytes lie there that a killed process has not read
        near.sendall(b"unread")
        far.recv(1, socket.MSG_PEEK)
    far.close()
    assert told.wait(MOST_S)
    near.setblocking(False)
    with pytest.raises(BlockingIOError):
        near.recv(1)
    near.settimeout(MOST_S)
    may_close.set()
    assert near.recv(1) == b""


def test_what_this_side_ends_is_no_loss(ends):
    connect, told, _, _ = ends
    near, far = answered(connect)
    near.close()
    assert far.recv(1) == b""
    answered(connect)  # others pass still
    assert not told.is_set()


def test_who_has_answered_nothing_was_no_coordinator_and_is_tried_again(ends):
    connect, told, _, server = ends
    near, far = connect()
    far.close()
    assert near.recv(1) == b""
    answered(connect)
    port = server.getsockname()[1]
    server.close()
    assert not told.is_set()
    relay = Relay(("localhost", port), told.set)
    with socket.create_connection(("127.0.0.1", int(relay.address.split(":")[1])), timeout=MOST_S) as refused:
        assert refused.recv(1) == b""
    assert not told.is_set()
