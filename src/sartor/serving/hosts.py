"""The names under which clients may ask a server that has no keys.

A web page can make its own name point to this machine (DNS rebinding), and then counts as one of
this server's for the browser. The ``Host`` header tells: it has the page's name. An address that is
written out cannot be made to point elsewhere.
"""

from __future__ import annotations

import ipaddress
import re
import socket
from collections.abc import Sequence
from dataclasses import dataclass

from sartor.errors import UsageError
from sartor.serving.errors import ApiError
from sartor.serving.targets import printable

_AUTHORITY = re.compile(
    r"(?:\[(?P<address>[0-9A-Fa-f:.%\w]+)\]|(?P<name>[^\[\]:@/\s]+))(?::\d{0,5})?"
)
_Address = ipaddress.IPv4Address | ipaddress.IPv6Address


@dataclass(frozen=True)
class Hosts:
    """``names`` in small letters; ``bound`` is the address that the server listens on, None where
    every address of the machine is. ``anything`` takes every name."""

    names: frozenset[str]
    bound: _Address | None = None
    anything: bool = False

    @classmethod
    def of(cls, sock: socket.socket, host: str, allowed: Sequence[str] = ()) -> Hosts:
        """Those of a socket that was bound to ``host``, of this machine, and ``allowed`` ones."""
        bound = _address(sock.getsockname()[0])
        machine = socket.gethostname()
        short = machine.partition(".")[0]
        names = {_tidy(name) for name in (host, machine, short, *allowed)}
        unspecified = bound is None or bound.is_unspecified
        return cls(frozenset(names - {""}), None if unspecified else bound, "*" in allowed)

    def know(self, host: str | None) -> bool:
        """Whether a ``Host`` header, with or without a port, has one of the names.

        None, as HTTP/1.0 allows, and an empty one come from no browser, so they do.
        """
        if self.anything or not host:
            return True
        found = _AUTHORITY.fullmatch(host)
        if found is None:
            return False
        name = _tidy(found["address"] or found["name"])
        if name in self.names or name == "localhost" or name.endswith(".localhost"):
            return True
        address = _address(name)
        if address is None:
            return False
        return address.is_loopback or self.bound is None or address == self.bound


def check_hosts(names: Sequence[str]) -> None:
    """Raises UsageError for what is no name of a host."""
    for name in names:
        found = _AUTHORITY.fullmatch(name)
        has_port = found is not None and found.end("name") != len(name) and name[-1:] != "]"
        if _address(name) is None and (found is None or has_port):
            raise UsageError(
                f"serve: {name!r} is no name of a host; write it without scheme, port and path, "
                "like box.example.org, or * for any name"
            )


def misdirected(host: str) -> ApiError:
    """RFC 9110, section 15.5.20."""
    shown = printable(host)
    return ApiError(
        421,
        f"this server is not known as {shown}, and without API keys it answers only under its own "
        "names and addresses; ask 127.0.0.1, or start it with --allowed-host and that name, or "
        "with --keys",
        code="misdirected_request",
    )


def _tidy(name: str) -> str:
    """As names are compared: a dot at the end and brackets change nothing."""
    return name.lower().strip("[]").removesuffix(".")


def _address(text: str) -> _Address | None:
    """An address, without the link that it may name; None for a name."""
    try:
        address = ipaddress.ip_address(text.partition("%")[0])
    except ValueError:
        return None
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return mapped or address
