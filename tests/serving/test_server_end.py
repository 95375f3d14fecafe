"""The end of a server, without a model: who is connected as it comes."""

from __future__ import annotations

import asyncio
import contextlib
import socket

import pytest
from starlette.applications import Starlette
from starlette.responses import Response

from qspec_jax.errors import QSpecError
from qspec_jax.serving.api import Api
from qspec_jax.serving.limits import Limits
from qspec_jax.serving.listening import bind, listen
from qspec_jax.serving.server import Server

REQUEST = b"GET / HTTP/1.1\r\nhost: a\r\n\r\n"


class OneAnswer(Api):
    """Answers once it may."""

    def __init__(self):
        self.app, self.asked, self.may_answer = Starlette(), asyncio.Event(), asyncio.Event()
        self.app.add_route("/", self._answer)

    def end(self):
        pass

    async def _answer(self, request):
        self.asked.set()
        await self.may_answer.wait()
        return Response("yes")


class Ending:
    """A server that ends in the step of the loop in which it is told."""

    def __init__(self, listening):
        self.api, self.told, self.address = OneAnswer(), asyncio.Event(), listening.getsockname()
        self.server = Server(self.api, Limits(grace_s=0.0))
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


def ending(check):
    """Runs a check of a server."""

    async def run():
        async with contextlib.AsyncExitStack() as stack:
            await stack.enter_async_context(asyncio.timeout(60))
            listening = stack.enter_context(contextlib.closing(bind("127.0.0.1", 0)))
            made = Ending(listening)
            while not made.server.started:
                await asyncio.sleep(0)
            await check(made)
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
