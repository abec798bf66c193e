"""HTTP/1.1 on a connection, with an end to everything that a client could keep waiting.

Uvicorn times a connection between two requests; the time for a head, for the rest of a body that
nobody reads, and for a client to take its answer is limited here, as is the number of connections.
The body of a request is timed where it is read.
"""

from __future__ import annotations

import asyncio
import ipaddress
import socket
import sys
from collections import Counter
from typing import Any

import h11
import msgspec
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import STATUS_PHRASES, H11Protocol, RequestResponseCycle

from sartor.serving.access import OPEN_PATHS
from sartor.serving.errors import ApiError, invalid, rate_limited, respond, unavailable
from sartor.serving.limits import ServerLimits
from sartor.serving.streaming import BODY_WRITER

_SWEEP_SECONDS = 0.5
SPARE_CONNECTIONS = 8
"""Beyond the limit, for who asks for /health: a balancer must not take a full server for dead."""
_SPARE_SECONDS = 1.0  # for the head of such a request
_HEAD_BYTES = 16 << 10
_SEND_BUFFER_BYTES = 1 << 18
"""What the system may keep of an answer that a client does not take. Left alone it grows to
megabytes a connection, and a client that reads nothing is noticed only once they are full."""


class StrictConnection(h11.Connection):
    """HTTP/1.1 without what two readers may take in two ways (RFC 9112, sections 2.2 and 6.1).

    A proxy before this server may end a head or a body elsewhere than h11 does, and take what
    follows for a request of somebody else's.
    """

    def next_event(self) -> Any:
        if self.their_state is h11.IDLE:
            _check_line_ends(self.trailing_data[0])
        event = super().next_event()
        if isinstance(event, h11.Request):
            names = [name for name, _ in event.headers]
            if b"transfer-encoding" in names:
                if b"content-length" in names:
                    raise h11.RemoteProtocolError("Content-Length beside Transfer-Encoding")
                if event.http_version < b"1.1":
                    raise h11.RemoteProtocolError("Transfer-Encoding in HTTP/1.0")
        return event


def _check_line_ends(received: bytes) -> None:
    """Raises RemoteProtocolError where a line of a head ends with LF alone."""
    end = received.find(b"\r\n\r\n")
    head = received if end < 0 else received[:end]
    if head.count(b"\n") != head.count(b"\r\n"):
        raise h11.RemoteProtocolError("a line of the head ends with LF, and not with CR LF")


class CycleWriter:
    """The body of one response (:class:`~sartor.serving.streaming.BodyWriter`).

    Seven layers of ``send`` and the switch to a task cost more than wording a token.
    """

    def __init__(self, cycle: RequestResponseCycle) -> None:
        self._cycle = cycle

    @property
    def ready(self) -> bool:
        cycle = self._cycle
        return (
            cycle.response_started
            and not cycle.response_complete
            and not cycle.disconnected
            and not cycle.flow.write_paused
        )

    def write(self, data: bytes) -> None:
        self._cycle.transport.write(self._cycle.conn.send(h11.Data(data=data)) or b"")


class Peers:
    """How many connections each address has. Of IPv6, which gives a machine as many addresses as
    it likes, the network of 64 bits counts."""

    def __init__(self, limits: ServerLimits) -> None:
        # Of few connections one address may have all: it is likely to be the only one.
        self.most = min(limits.peer_connections, max(limits.connections // 2, 64))
        self._count: Counter[str] = Counter()

    def enter(self, address: str) -> bool:
        """One more connection; False where that is one too many."""
        name = _network(address)
        self._count[name] += 1
        return self._count[name] <= self.most

    def leave(self, address: str) -> None:
        name = _network(address)
        self._count[name] -= 1
        if not self._count[name]:
            del self._count[name]


def _network(address: str) -> str:
    try:
        found = ipaddress.ip_address(address)
    except ValueError:  # a socket without addresses
        return address
    if isinstance(found, ipaddress.IPv6Address):
        if found.ipv4_mapped is not None:
            return str(found.ipv4_mapped)
        return str(ipaddress.ip_network((found, 64), strict=False))
    return str(found)


class BoundedProtocol(H11Protocol):
    """One connection. ``sweep`` it about twice a second."""

    def __init__(self, limits: ServerLimits, peers: Peers, **uvicorn: Any) -> None:
        super().__init__(**uvicorn)
        self._peers = peers
        self._peer = ""
        self._spare: asyncio.TimerHandle | None = None
        self.conn = StrictConnection(h11.SERVER, _HEAD_BYTES)
        self._limits = limits
        self._since: float | None = None
        self._answered: object = None
        self._application: ASGIApp = self.app
        self.app = self._run

    async def _run(self, scope: Scope, receive: Receive, send: Send) -> None:
        assert self.cycle is not None
        if self._spare is not None:
            self._spare.cancel()
            if scope["path"] not in OPEN_PATHS:
                await respond(self._full(closes=True))(scope, receive, send)
                return
        scope.setdefault("extensions", {})[BODY_WRITER] = CycleWriter(self.cycle)
        await self._application(scope, receive, send)

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        sock = transport.get_extra_info("socket")
        if sock is not None:
            # asyncio does so by itself only where the listening socket names its protocol. Without
            # it, each answer of two writes waits 40 ms for the acknowledgement of the first.
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER_BYTES)
        self._peer = (transport.get_extra_info("peername") or ("",))[0]
        over = len(self.connections) - self._limits.connections
        if not self._peers.enter(self._peer):
            self._refuse(
                rate_limited(
                    f"this address has {self._peers.most} connections to the server, the limit "
                    "(--max-peer-connections); close some of them",
                    "too_many_connections",
                    retry_after=1,
                )
            )
        elif over > SPARE_CONNECTIONS:
            self._refuse(self._full())
        elif over > 0:
            self._spare = self.loop.call_later(_SPARE_SECONDS, self._refuse, self._full())

    def connection_lost(self, exc: Exception | None) -> None:
        self._peers.leave(self._peer)
        if self._spare is not None:
            self._spare.cancel()
        super().connection_lost(exc)

    def _full(self, *, closes: bool = False) -> ApiError:
        error = unavailable(
            f"the server has its fill of {self._limits.connections} connections; try again in a "
            "moment",
            retry_after=1,
        )
        error.closes = closes
        return error

    def send_400_response(self, msg: str) -> None:
        error = sys.exc_info()[1]  # uvicorn calls this where it has caught it
        status = error.error_status_hint if isinstance(error, h11.RemoteProtocolError) else 400
        self._refuse(invalid(f"this is no HTTP request that can be served: {error or msg}"), status)

    def sweep(self, now: float) -> None:
        """Ends what has lasted too long."""
        answering = self.cycle is not None and not self.cycle.response_complete
        closing = self.transport.is_closing()
        idle = self.timeout_keep_alive_task is not None  # then uvicorn counts
        if (answering or idle) and not closing:
            self._since = None
            return
        if self._since is None or self._answered is not self.cycle:
            self._since, self._answered = now, self.cycle
        if now - self._since < self._limits.head_seconds:
            return
        if closing:  # with bytes that the client does not take
            self.transport.abort()
        elif self.conn.their_state is h11.IDLE and self.conn.trailing_data[0]:
            self._refuse(
                ApiError(
                    408,
                    f"the head of the request was not complete after {self._limits.head_seconds:g}"
                    " s, the server's limit",
                    code="head_timeout",
                )
            )
        else:
            self.transport.close()

    def _refuse(self, error: ApiError, status: int | None = None) -> None:
        """Answers on the connection itself, outside of any request, and closes it."""
        if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):  # in an answer already
            self.transport.close()
            return
        status = status or error.status
        body = msgspec.json.encode(error.body())
        headers = [
            ("Content-Type", "application/json"),
            ("Content-Length", str(len(body))),
            ("Connection", "close"),
            *error.headers().items(),
        ]
        for event in (
            h11.Response(status_code=status, headers=headers, reason=STATUS_PHRASES[status]),
            h11.Data(data=body),
            h11.EndOfMessage(),
        ):
            self.transport.write(self.conn.send(event) or b"")
        self.transport.close()


async def keep_sweeping(connections: set[Any]) -> None:
    """Sweeps all connections, over and over."""
    loop = asyncio.get_running_loop()
    while True:
        await asyncio.sleep(_SWEEP_SECONDS)
        for connection in list(connections):
            connection.sweep(loop.time())
