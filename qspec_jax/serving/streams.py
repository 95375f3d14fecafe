"""Answers on their way to a client: waited for as long as it is there, whole or as server-sent events."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from typing import Any

from starlette.types import Receive, Scope, Send

from qspec_jax.engine.answer import Answer
from qspec_jax.errors import QSpecError
from qspec_jax.files import json_lines
from qspec_jax.serving.refusals import NOT_AGAIN, ApiError, failure_of
from qspec_jax.serving.shapes import Shapes

_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-store"),
    (b"x-accel-buffering", b"no"),
]
GONE = 499  # for who counts: nobody is there to be told
_LAST_WORD_S = 1.0


class ClientGoneError(Exception):
    """The client has left."""


class Changes:
    """Tells a coroutine that an answer has changed, whoever says so."""

    def __init__(self) -> None:
        self._loop, self._event = asyncio.get_running_loop(), asyncio.Event()

    def __call__(self) -> None:
        """Says so; any thread may."""
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._event.set)

    async def wait(self) -> None:
        """Waits for the next time."""
        await self._event.wait()
        self._event.clear()


async def while_there(receive: Receive, work: Coroutine[Any, Any, Any], *, until_s: float) -> Any:
    """What some work for a client yields.

    Args:
        receive: of the request, whose body has been read.
        work: is cancelled if it takes too long, or nobody waits for it.
        until_s: when it takes too long, by the loop's clock.

    Raises:
        ClientGoneError: the client has left.
        ApiError: it takes too long.
    """
    worker, watcher = asyncio.ensure_future(work), asyncio.ensure_future(_disconnection(receive))
    try:
        left_s = max(0.0, until_s - asyncio.get_running_loop().time())
        await asyncio.wait({worker, watcher}, timeout=left_s, return_when=asyncio.FIRST_COMPLETED)
        if worker.done():
            return worker.result()
        if watcher.done():
            raise ClientGoneError
        raise ApiError(504, "the answer takes longer than this server waits", code="timeout", headers=NOT_AGAIN)
    finally:
        worker.cancel()
        watcher.cancel()
        await asyncio.gather(worker, watcher, return_exceptions=True)


async def _disconnection(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def all_done(answers: Sequence[Answer], changes: Changes) -> None:
    """Waits until all answers are done."""
    while not all(answer.done for answer in answers):
        await changes.wait()


async def events(answers: Sequence[Answer], shapes: Shapes, changes: Changes) -> AsyncIterator[dict[str, Any]]:
    """The objects of a stream, as the answers come.

    Raises:
        QSpecError: one of them has failed.
    """
    for event in shapes.first():
        yield event
    running = dict(enumerate(answers))
    while running:
        await changes.wait()
        for index, answer in list(running.items()):
            while index in running and (piece := answer.take()) is not None:
                if piece.finished:
                    del running[index]
                for event in shapes.piece(index, piece, answer):
                    yield event
    for event in shapes.last(answers):
        yield event


class EventStream:
    """An answer that is sent piece by piece: a response of ASGI."""

    def __init__(
        self, objects: AsyncIterator[dict[str, Any]], *, until_s: float, at_end: Callable[[int], None]
    ) -> None:
        """Of some objects, until some time; ``at_end`` is called however it ends, with a status of HTTP."""
        self._objects, self._until_s, self._at_end = objects, until_s, at_end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends it."""
        status = 500
        try:
            status = await while_there(receive, self._send(send), until_s=self._until_s)
        except ClientGoneError:
            status = GONE
        except ApiError as error:  # it takes too long; a client that does not read will not read this either
            status = error.status
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(_end(send, error), _LAST_WORD_S)
        finally:
            self._at_end(status)

    async def _send(self, send: Send) -> int:
        await send({"type": "http.response.start", "status": 200, "headers": _HEADERS})
        try:
            async for one in self._objects:
                await send(_event(one))
        except QSpecError as error:
            failure = failure_of(error)
            await _end(send, failure)
            return failure.status
        await _end(send)
        return 200


async def _end(send: Send, error: ApiError | None = None) -> None:
    last = b"data: [DONE]\n\n" if error is None else _event(error.to_dict())["body"]
    await send({"type": "http.response.body", "body": last, "more_body": False})


def _event(value: dict[str, Any]) -> dict[str, Any]:
    # Without what some clients take for the end of a line.
    body = f"data: {json_lines.dumps(value)}\n\n".encode()
    return {"type": "http.response.body", "body": body, "more_body": True}
