"""The server's process: how it serves, and how it ends."""

from __future__ import annotations

import asyncio
import contextlib
import math
import socket
from collections.abc import Callable
from types import FrameType

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.server import ServerState

from qspec_jax.serving.api import Api
from qspec_jax.serving.limits import Limits
from qspec_jax.serving.listening import listen, most_connections
from qspec_jax.serving.refusals import ApiError

_AFTER_GRACE_S = 5  # for those that failed then to be told
_MOST_BACKLOG = 128


class _State(ServerState):
    """What all connections of a server know.

    Attributes:
        is_ending: it takes no more requests.
        most_connections: that there may be at a time.
        head_s: seconds for the head of a request to come.
    """

    def __init__(self, most_connections: int, head_s: float) -> None:
        super().__init__()
        self.is_ending, self.most_connections, self.head_s = False, most_connections, head_s


class _Connection(H11Protocol):
    """A client's connection. It is closed where it comes as the server ends, is one too many, or asks for nothing.

    asyncio tells a protocol of its connection a step of the loop after it was accepted. uvicorn closes those that it
    knows when it ends, and then waits for all: one in between would be waited for until the time of grace is over.
    uvicorn has no time for the head of a request either: who sends half of one would be waited for without an end.
    """

    _no_request: asyncio.TimerHandle | None = None  # says so, unless one comes

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        state = self._state()
        if state.is_ending:
            self.shutdown()
        elif len(state.connections) > state.most_connections:
            message = f"this server has {state.most_connections} connections, and takes no more; try again later"
            self._refuse(ApiError(503, message, code="too_many_connections", headers={"retry-after": "1"}))
        else:
            self._wait_for_request()

    def connection_lost(self, exc: Exception | None) -> None:
        if self._no_request is not None:
            self._no_request.cancel()
        super().connection_lost(exc)

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if not self.transport.is_closing():
            self._wait_for_request()

    def send_400_response(self, msg: str) -> None:
        """Refuses what is no HTTP, as all else is refused."""
        self._refuse(ApiError(400, "this is no valid request of HTTP/1.1", code="invalid_http"))

    def _state(self) -> _State:
        assert isinstance(self.server_state, _State)
        return self.server_state

    def _wait_for_request(self) -> None:
        if self._no_request is not None:
            self._no_request.cancel()
        self._no_request = self.loop.call_later(self._state().head_s, self._close_without_request)

    def _close_without_request(self) -> None:
        if self.cycle is None or self.cycle.response_complete:
            self.transport.close()

    def _refuse(self, error: ApiError) -> None:
        answer = error.response()
        events = (
            h11.Response(status_code=error.status, headers=[*answer.raw_headers, (b"connection", b"close")]),
            h11.Data(data=bytes(answer.body)),
            h11.EndOfMessage(),
        )
        with contextlib.suppress(h11.LocalProtocolError):  # in the middle of an answer
            for event in events:
                self.transport.write(self.conn.send(event) or b"")
        self.transport.close()


class Server(uvicorn.Server):
    """Serves until SIGTERM or SIGINT comes, and then what runs, unless another one comes."""

    def __init__(self, api: Api, limits: Limits, *, say: Callable[[str], None] = lambda _: None) -> None:
        """For the paths of an ``api``; ``say`` is told of what still runs as it ends."""
        self._api, self._say, self._grace_s = api, say, limits.grace_s
        self._loop: asyncio.AbstractEventLoop | None = None
        self._num_signals = 0
        self._state = _State(most_connections(), limits.body_s)
        config = uvicorn.Config(
            api.app,
            loop="asyncio",
            http=_Connection,
            ws="none",
            lifespan="off",
            log_config=None,  # which would close handlers of others
            log_level="error",  # nothing of each request that is no HTTP
            access_log=False,
            proxy_headers=False,
            server_header=False,
            # So many may be accepted at a step of the loop, before any of them is closed as one too many.
            backlog=max(1, min(_MOST_BACKLOG, self._state.most_connections // 4)),
            timeout_graceful_shutdown=math.ceil(limits.grace_s) + _AFTER_GRACE_S,
        )
        super().__init__(config)
        self.server_state: ServerState = self._state

    def listen(self, bound: socket.socket) -> None:
        """Lets clients come to a socket, whom :meth:`run` answers.

        Raises:
            QSpecError: somebody has its address after all.
        """
        listen(bound, backlog=self.config.backlog)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begins to serve."""
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The first signal ends the server, the second one what it still runs; the third one waits for no client."""
        self._num_signals += 1
        if self._num_signals == 1 or self._loop is None:
            super().handle_exit(sig, frame)
        elif self._num_signals == 2:
            self._loop.call_soon_threadsafe(self._end_at_once)
        else:
            self._loop.call_soon_threadsafe(self._leave_clients)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Takes no more requests, and waits for those that run, for a time."""
        self._api.end()
        self._state.is_ending = True
        if (count := self._api.num_open) and self._grace_s:
            left = f"answers that are not done ({count}) have {self._grace_s:g} s"
            self._say(f"ending: {left}; Ctrl-C or SIGTERM once more ends them at once")
        await super().shutdown(sockets)

    def _end_at_once(self) -> None:
        """Fails what runs, and gives clients a moment to be told."""
        self._api.end_at_once()
        asyncio.get_running_loop().call_later(_AFTER_GRACE_S, self._leave_clients)

    def _leave_clients(self) -> None:
        """Cuts all connections off, and waits for no work of theirs."""
        self.force_exit = True
        for connection in list(self._state.connections):
            assert isinstance(connection, _Connection)
            connection.transport.abort()
