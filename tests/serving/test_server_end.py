"""Connections of a server, without a model: how many there may be, how long they wait, and who is there at the end."""

from __future__ import annotations

import asyncio
import contextlib
import json
import resource
import signal
import socket

import pytest
from starlette.applications import Starlette
from starlette.responses import Response

from qspec_jax.errors import QSpecError
from qspec_jax.serving.api import Api
from qspec_jax.serving.limits import Limits
from qspec_jax.serving.listening import bind, listen, most_connections
from qspec_jax.serving.server import Server

REQUEST = b"GET / HTTP/1.1\r\nhost: a\r\n\r\n"
HEAD_S = 1000.0


class OneAnswer(Api):
    """Answers once it may."""

    def __init__(self):
        self.app, self.asked, self.may_answer = Starlette(), asyncio.Event(), asyncio.Event()
        self.app.add_route("/", self._answer)

    num_open = 0

    def end(self):
        pass

    def end_at_once(self):
        self.may_answer.set()

    async def _answer(self, request):
        self.asked.set()
        await self.may_answer.wait()
        return Response("yes")


class Ending:
    """A server that ends in the step of the loop in which it is told."""

    def __init__(self, listening, **limits):
        self.api, self.told, self.address = OneAnswer(), asyncio.Event(), listening.getsockname()
        self.server = Server(self.api, Limits(**{"grace_s": 0.0, **limits}))
        self.server.main_loop = self.told.wait
        self.ended = asyncio.create_task(self.server.serve(sockets=[listening]))

    async def connected(self, *, sends=b""):
        reader, writer = await asyncio.open_connection(*self.address)
        writer.write(sends)
        return reader, writer

    def ends_between(self):
        """The next connection is accepted before the end, and its protocol hears of it after the end has begun."""
        protocol = self.server.config.http_protocol_class

        def made(**options):
            self.told.set()  # which wakes the server before asyncio tells the protocol of its connection
            return protocol(**options)

        self.server.config.http_protocol_class = made


async def what_is_left(reader):
    """What a client still gets; nothing where it is cut off, whether what it sent was read or not."""
    with contextlib.suppress(ConnectionResetError):
        return await reader.read()
    return b""


def ending(check, **limits):
    """Runs a check of a server."""

    async def run():
        async with contextlib.AsyncExitStack() as stack:
            await stack.enter_async_context(asyncio.timeout(60))
            listening = stack.enter_context(contextlib.closing(bind("127.0.0.1", 0)))
            made = Ending(listening, **limits)
            while not made.server.started:
                await asyncio.sleep(0)
            await check(made)
            made.told.set()
            await made.ended

    asyncio.run(run())


@pytest.mark.parametrize("sends", [b"", REQUEST], ids=["idle", "asks"])
def test_a_connection_that_comes_in_between_is_closed_and_not_waited_for(sends, caplog):
    async def check(made):
        made.ends_between()
        reader, writer = await made.connected(sends=sends)
        assert await what_is_left(reader) == b""
        writer.close()

    ending(check)
    assert "exceeded" not in caplog.text


def test_who_asked_is_answered_and_who_waits_idle_is_closed(caplog):
    async def check(made):
        idle, half, asks = [await made.connected(sends=sends) for sends in (b"", REQUEST[:9], REQUEST)]
        await made.api.asked.wait()
        made.told.set()
        for reader, _ in (idle, half):
            assert await what_is_left(reader) == b""
        made.api.may_answer.set()
        answer = await asks[0].read()
        assert (answer[:12], answer[-3:]) == (b"HTTP/1.1 200", b"yes")
        for _, writer in (idle, half, asks):
            writer.close()

    ending(check)
    assert "exceeded" not in caplog.text


@pytest.mark.parametrize("signals", [2, 3])
def test_a_second_signal_ends_what_runs_and_a_third_one_waits_for_nobody(signals, caplog):
    async def check(made):
        if signals == 3:
            made.api.end_at_once = lambda: None
        reader, writer = await made.connected(sends=REQUEST)
        await made.api.asked.wait()
        made.told.set()
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGTERM)[:signals]:
            made.server.handle_exit(number, None)
        made.server._captured_signals.clear()  # which it would raise again in this process
        assert (await what_is_left(reader))[-3:] == (b"yes" if signals == 2 else b"")
        await made.ended
        writer.close()

    ending(check, grace_s=1000.0)
    assert "exceeded" not in caplog.text


async def time_for_a_head_is_over(made):
    (connection,) = made.server.server_state.connections
    while not (connection._no_request and not connection._no_request.cancelled()):
        await asyncio.sleep(0)
    assert connection._no_request.when() - connection.loop.time() <= HEAD_S
    connection._no_request.cancel()
    connection._close_without_request()


@pytest.mark.parametrize("sends", [b"", REQUEST[:9], REQUEST + REQUEST[:9]], ids=["nothing", "half", "half after one"])
def test_who_asks_for_nothing_is_closed(sends):
    async def check(made):
        made.api.may_answer.set()
        reader, writer = await made.connected(sends=sends)
        if sends.count(REQUEST):
            await reader.readuntil(b"yes")
        while not made.server.server_state.connections:
            await asyncio.sleep(0)
        await time_for_a_head_is_over(made)
        assert await what_is_left(reader) == b""
        writer.close()

    ending(check, body_s=HEAD_S)


def test_who_waits_for_an_answer_is_not_closed_however_long_it_takes():
    async def check(made):
        reader, writer = await made.connected(sends=REQUEST)
        await made.api.asked.wait()
        await time_for_a_head_is_over(made)
        made.api.may_answer.set()
        assert (await reader.readuntil(b"yes"))[:12] == b"HTTP/1.1 200"
        writer.close()

    ending(check, body_s=HEAD_S)


def test_connections_leave_half_of_the_files_of_the_process_to_others(monkeypatch):
    for may_open, expected in ((100, 50), (1024, 512), (resource.RLIM_INFINITY, 10_000), (10**6, 10_000)):
        monkeypatch.setattr(resource, "getrlimit", lambda _, soft=may_open: (soft, soft))
        assert most_connections() == expected
        assert Server(OneAnswer(), Limits()).config.backlog * 4 <= max(expected, 512)


def test_one_connection_too_many_is_told_so_and_another_takes_its_place(monkeypatch):
    monkeypatch.setattr("qspec_jax.serving.server.most_connections", lambda: 2)

    async def check(made):
        made.api.may_answer.set()
        (_, to_first), (second, to_second) = [await made.connected(sends=REQUEST[:9]) for _ in range(2)]
        reader, writer = await made.connected()
        head, _, body = (await reader.read()).partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 503")
        assert json.loads(body)["error"]["code"] == "too_many_connections"
        to_first.close()
        await to_first.wait_closed()
        while len(made.server.server_state.connections) > 1:
            await asyncio.sleep(0)
        third, to_third = await made.connected(sends=REQUEST)
        to_second.write(REQUEST[9:])
        for one in (second, third):
            assert (await one.readuntil(b"yes"))[:12] == b"HTTP/1.1 200"
        for one in (writer, to_second, to_third):
            one.close()

    ending(check)


@pytest.mark.parametrize("sends", [b"hello\r\n\r\n", b"\x16\x03\x01\x02\x00\x01\r\n\r\n", REQUEST[:16] + b"\r\n"])
def test_what_is_no_http_is_refused_as_all_else_is(sends):
    async def check(made):
        reader, writer = await made.connected(sends=sends)
        head, _, body = (await reader.read()).partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 400")
        assert b"content-type: application/json" in head
        assert set(json.loads(body)["error"]) == {"message", "type", "param", "code"}
        writer.close()

    ending(check)


def test_an_address_belongs_to_the_first_of_two_servers_that_start():
    with contextlib.closing(bind("127.0.0.1", 0)) as first:
        host, port = first.getsockname()
        with pytest.raises(QSpecError, match=f"cannot listen on 127.0.0.1 port {port}: "):
            bind(host, port)
        listen(first, backlog=1)
        with pytest.raises(QSpecError, match=f"port {port}"):
            bind(host, port)
        # Its connections that are about to end are in the way of no other server.
        with socket.create_connection((host, port)) as client:
            first.accept()[0].close()
            assert client.recv(1) == b""
    with contextlib.closing(bind(host, port)) as second:
        listen(second, backlog=1)
