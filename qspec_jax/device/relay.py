"""The way of a process to JAX's coordinator in process 0, which ends with a line of ours where process 0 does.

JAX's client polls the coordinator, and ends its process with a signal and a page of addresses the moment that this
connection closes. It has no option against it, and its callback cannot be one of Python (its argument cannot be
converted, which ends the process as well). So the client is connected to this process itself, from where its bytes are
passed on: when process 0 closes the other end, the client sees nothing, and this process says what it has to.
"""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable
from typing import Any

_LOOPBACK = "127.0.0.1"
_CONNECT_S = 5.0
_BYTES = 1 << 16


class Relay:
    """Passes bytes on between a port of this process and an address, for as long as the process."""

    def __init__(self, to: tuple[str, int], on_loss: Callable[[], Any]):
        """Begins to listen.

        Args:
            to: host and port.
            on_loss: called in a thread of its own where the other side ends a connection that it has answered on.
                The connection of this side stays as it is until that returns, and is closed then.

        Raises:
            OSError: there is no free port.
        """
        self.on_loss = on_loss
        self._to = to
        self._listening = socket.create_server((_LOOPBACK, 0))
        self.address = f"{_LOOPBACK}:{self._listening.getsockname()[1]}"
        self._start(self._listen)

    def _start(self, work: Callable[..., None], *arguments: Any) -> None:
        threading.Thread(target=work, args=arguments, name="qspec_jax relay", daemon=True).start()

    def _listen(self) -> None:
        while True:
            near, _ = self._listening.accept()
            self._start(self._connect, near)

    def _connect(self, near: socket.socket) -> None:
        try:
            far = socket.create_connection(self._to, timeout=_CONNECT_S)
        except OSError:  # the coordinator does not listen yet; JAX tries again
            near.close()
            return
        far.settimeout(None)
        for one in (near, far):
            one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        is_closed = threading.Event()  # by JAX
        self._start(self._send, near, far, is_closed)
        self._answer(near, far, is_closed)

    def _send(self, near: socket.socket, far: socket.socket, is_closed: threading.Event) -> None:
        _pass_on(near, far)
        is_closed.set()
        with contextlib.suppress(OSError):
            far.shutdown(socket.SHUT_RDWR)

    def _answer(self, near: socket.socket, far: socket.socket, is_closed: threading.Event) -> None:
        """Passes answers on. Who has given none was no coordinator: where processes meet, another listens before it."""
        with near, far:
            if _pass_on(far, near) and not is_closed.is_set():
                self.on_loss()
            with contextlib.suppress(OSError):
                near.shutdown(socket.SHUT_RDWR)


def _pass_on(source: socket.socket, to: socket.socket) -> bool:
    """Passes bytes on until one of the two ends; whether there were any."""
    were_any = False
    with contextlib.suppress(OSError):  # a connection that is reset has ended
        while data := source.recv(_BYTES):
            were_any = True
            to.sendall(data)
    return were_any
