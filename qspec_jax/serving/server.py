"""The server's process: how it serves, and how it ends."""

from __future__ import annotations

import asyncio
import math
import socket

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.server import ServerState

from qspec_jax.serving.api import Api
from qspec_jax.serving.limits import Limits
from qspec_jax.serving.listening import listen

_AFTER_GRACE_S = 5  # for those that failed then to be told


class _State(ServerState):
    """What all connections of a server know."""

    is_ending = False


class _Connection(H11Protocol):
    """A client's connection, which is closed where it comes as the server ends.

    asyncio tells a protocol of its connection a step of the loop after it was accepted. uvicorn closes those that it
    knows when it ends, and then waits for all: one in between would be waited for until the time of grace is over.
    """

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        if isinstance(self.server_state, _State) and self.server_state.is_ending:
            self.shutdown()


class Server(uvicorn.Server):
    """Serves until SIGTERM or SIGINT comes, and then what runs."""

    def __init__(self, api: Api, limits: Limits) -> None:
        """For the paths of an ``api``."""
        self._api = api
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
            timeout_graceful_shutdown=math.ceil(limits.grace_s) + _AFTER_GRACE_S,
        )
        super().__init__(config)
        self._state = _State()
        self.server_state: ServerState = self._state

    def listen(self, bound: socket.socket) -> None:
        """Lets clients come to a socket, whom :meth:`run` answers.

        Raises:
            QSpecError: somebody has its address after all.
        """
        listen(bound, backlog=self.config.backlog)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Takes no more requests, and waits for those that run, for a time."""
        self._api.end()
        self._state.is_ending = True
        await super().shutdown(sockets)
