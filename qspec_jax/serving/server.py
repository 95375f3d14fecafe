"""The server's process: how it serves, and how it ends."""

from __future__ import annotations

import math
import socket

import uvicorn

from qspec_jax.serving.api import Api
from qspec_jax.serving.limits import Limits

_AFTER_GRACE_S = 5  # for those that failed then to be told


class Server(uvicorn.Server):
    """Serves until SIGTERM or SIGINT comes, and then what runs."""

    def __init__(self, api: Api, limits: Limits) -> None:
        """For the paths of an ``api``."""
        self._api = api
        config = uvicorn.Config(
            api.app,
            loop="asyncio",
            http="h11",
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

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Takes no more requests, and waits for those that run, for a time."""
        self._api.end()
        await super().shutdown(sockets)
