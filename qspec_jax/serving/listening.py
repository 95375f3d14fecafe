"""Where a server listens."""

from __future__ import annotations

import contextlib
import ipaddress
import socket

from qspec_jax.errors import QSpecError


def bind(host: str, port: int) -> socket.socket:
    """A socket that does not listen yet: whoever comes is refused until the model is there.

    Raises:
        QSpecError: the address is none of this machine's, or somebody has it.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        made = socket.socket(family, kind, protocol)
        try:
            made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            made.bind(address)
        except OSError:
            made.close()
            raise
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise QSpecError(f"cannot listen on {host} port {port}: {reason}; give another --host or --port") from error
    return made


def address_of(listening: socket.socket) -> str:
    """Where clients find a socket: ``http://127.0.0.1:8000``."""
    host, port = listening.getsockname()[:2]
    return f"http://[{host}]:{port}" if listening.family == socket.AF_INET6 else f"http://{host}:{port}"


def is_loopback(listening: socket.socket) -> bool:
    """Whether only this machine can reach it."""
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(listening.getsockname()[0]).is_loopback
    return False
