"""Where a server listens, and how many connections this system lets it have."""

from __future__ import annotations

import errno
import ipaddress
import os
import socket

import psutil

from sartor.errors import SartorError, UsageError

_BACKLOG = 2048
_OTHER_FILES = 64  # of this process, beside connections
_NOT_HERE = (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT)
"""This machine lacks the address, or its whole family: the next one of the name may do."""


def bind(host: str, port: int) -> socket.socket:
    """A socket with that address; port 0 takes a free one. Nobody can connect before ``listen``.

    ``host`` is a name or an address, IPv6 with or without brackets. UsageError for a number that
    is no port, SartorError where the address cannot be had.
    """
    if not 0 <= port <= 65535:
        # The system would take the number modulo 65536.
        raise UsageError(f"port {port} is out of range; choose 1 to 65535, or 0 for a free one")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, ValueError) as error:  # ValueError: it cannot even be a name
        reason = error.strerror if isinstance(error, OSError) else error
        raise SartorError(
            f"cannot listen on host {host!r}: {reason}; give --host a name or an address of this "
            "machine, like 127.0.0.1"
        ) from None
    failure: OSError | None = None
    for family, kind, protocol, _, address in found:
        try:
            return _bound(family, kind, protocol, address)
        except OSError as error:
            failure = failure or error
            if error.errno not in _NOT_HERE:
                break
    assert failure is not None
    raise _refused(host, port, failure) from None


def listen(sock: socket.socket) -> None:
    """Lets clients connect. SartorError where another program has begun to listen there since."""
    try:
        sock.listen(_BACKLOG)
    except OSError as error:
        host, port = sock.getsockname()[:2]
        raise _refused(host, port, error) from None


def _bound(
    family: int, kind: int, protocol: int, address: tuple[str, int] | tuple[object, ...]
) -> socket.socket:
    """With the options of :func:`socket.create_server`, which would listen at once."""
    sock = socket.socket(family, kind, protocol)
    try:
        if os.name == "posix":
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        sock.bind(address)  # whole: the address of a link is nothing without its scope
    except OSError:
        sock.close()
        raise
    return sock


def _refused(host: str, port: int, error: OSError) -> SartorError:
    reason = os.strerror(error.errno) if error.errno else str(error)
    return SartorError(
        f"cannot listen on {host} port {port}: {reason}; choose another with --host or --port"
    )


def url(sock: socket.socket) -> str:
    """The address of a socket as clients write it."""
    host, port = sock.getsockname()[:2]
    return _url(host, port)


def urls(sock: socket.socket) -> list[str]:
    """Addresses by which clients can reach a socket: one, or where it takes whatever comes to
    this machine, that of the machine for itself and then those for others."""
    host, port = sock.getsockname()[:2]
    if not ipaddress.ip_address(host.partition("%")[0]).is_unspecified:
        return [_url(host, port)]
    found = [
        address.address
        for addresses in psutil.net_if_addrs().values()
        for address in addresses
        if address.family == sock.family
    ]
    others = [
        address
        for address in dict.fromkeys(found)
        if not (ip := ipaddress.ip_address(address.partition("%")[0])).is_loopback
        and not ip.is_link_local
    ]
    itself = "::1" if sock.family == socket.AF_INET6 else "127.0.0.1"
    return [_url(address, port) for address in (itself, *others)]


def _url(host: str, port: int) -> str:
    # RFC 6874: the scope of an address is told off by an encoded percent sign.
    return f"http://[{host.replace('%', '%25')}]:{port}" if ":" in host else f"http://{host}:{port}"


def is_public(sock: socket.socket) -> bool:
    """Whether other machines may reach it."""
    return not ipaddress.ip_address(sock.getsockname()[0].partition("%")[0]).is_loopback


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
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        except (ValueError, OSError):  # the kernel has a limit of its own above the hard one
            soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        return max(1, soft - _OTHER_FILES)
    return connections
