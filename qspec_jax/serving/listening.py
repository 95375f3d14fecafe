"""Where a server listens."""

from __future__ import annotations

import contextlib
import ipaddress
import socket

try:
    import resource
except ImportError:  # Windows
    resource = None

from qspec_jax.errors import QSpecError

_MOST_CONNECTIONS = 10_000


def bind(host: str, port: int) -> socket.socket:
    """A socket that has its address, and does not listen yet: whoever comes is refused until the model is there.

    Raises:
        QSpecError: the address is none of this machine's, or somebody has it.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        made = socket.socket(family, kind, protocol)
        try:
            made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            made.bind(address)
            # Two that share their address could both be bound until one of them listens.
            made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 0)
        except OSError:
            made.close()
            raise
    except (OSError, UnicodeError) as error:
        raise _refusal(host, port, error) from error
    return made


def listen(bound: socket.socket, *, backlog: int) -> None:
    """Lets clients come to a socket of :func:`bind`.

    Args:
        bound: the socket.
        backlog: connections that wait to be taken.

    Raises:
        QSpecError: somebody has the address after all.
    """
    try:
        # Connections have this of the socket, and a server that follows needs it of those that are about to end.
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.listen(backlog)
    except OSError as error:
        host, port = bound.getsockname()[:2]
        raise _refusal(host, port, error) from error


def most_connections() -> int:
    """How many a server has at a time: half of the files that its process may open.

    Others are for what came meanwhile, and for what the process opens besides. Where none is left to accept a
    connection with, asyncio tries again without an end, and logs a traceback each time.
    """
    may_open = -1 if resource is None else resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return max(1, may_open // 2) if 0 < may_open < 2 * _MOST_CONNECTIONS else _MOST_CONNECTIONS


def _refusal(host: str, port: int, error: OSError | UnicodeError) -> QSpecError:
    reason = getattr(error, "strerror", None) or error
    return QSpecError(f"cannot listen on {host} port {port}: {reason}; give another --host or --port")


def address_of(listening: socket.socket) -> str:
    """Where clients find a socket: ``http://127.0.0.1:8000``."""
    host, port = listening.getsockname()[:2]
    return f"http://[{host}]:{port}" if listening.family == socket.AF_INET6 else f"http://{host}:{port}"


def is_loopback(listening: socket.socket) -> bool:
    """Whether only this machine can reach it."""
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(listening.getsockname()[0]).is_loopback
    return False
