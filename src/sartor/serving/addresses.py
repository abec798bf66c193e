"""Where a server listens, and how many connections this system lets it have."""

from __future__ import annotations

import ipaddress
import socket

from sartor.errors import SartorError

_BACKLOG = 2048
_OTHER_FILES = 64  # of this process, beside connections


def listen(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 takes a free one. SartorError where that is not possible."""
    try:
        family, _, _, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        return socket.create_server(address[:2], family=family, backlog=_BACKLOG)
    except (OSError, OverflowError) as error:
        raise SartorError(
            f"cannot listen on {host} port {port}: {error}; choose another with --host or --port"
        ) from None


def url(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def is_public(listener: socket.socket) -> bool:
    """Whether other machines may reach it."""
    return not ipaddress.ip_address(listener.getsockname()[0].partition("%")[0]).is_loopback


def room_for(connections: int) -> int:
    """How many of so many connections the system has open files for, raising its soft limit."""
    try:
        import resource
    except ImportError:  # Windows has no such limit
        return connections
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = connections + _OTHER_FILES
    if soft != resource.RLIM_INFINITY and soft < wanted:
        soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        return max(1, soft - _OTHER_FILES)
    return connections
