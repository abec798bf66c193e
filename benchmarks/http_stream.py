"""HTTP/1.1 and server-sent events for measuring: little work a token, times at arrival.

Bytes are parsed where the event loop hands them over, without a task that wakes up for each piece.
Plain http only. Sources: RFC 9112 (messages, chunked coding), WHATWG HTML section 9.2 (events).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from urllib.parse import urlsplit


class ExchangeError(Exception):
    """An exchange that gave no whole answer; ``kind`` is short and the same for equal causes."""

    def __init__(self, kind: str, detail: str = "") -> None:
        super().__init__(f"{kind}: {detail}" if detail else kind)
        self.kind = kind


class ResponseReader:
    """One response from bytes as they come; ``status`` is 0 until its head is there."""

    def __init__(self) -> None:
        self.status = 0
        self.headers: dict[str, str] = {}
        self.done = False
        self._buffer = b""
        self._chunked = False
        self._left: int | None = None  # bytes of the body, or of the chunk; None: until the end
        self._trailer = False

    @property
    def keeps_alive(self) -> bool:
        """Whether the connection can take another request once this response is done."""
        sized = self._chunked or self._left is not None
        return sized and self.headers.get("connection", "").lower() != "close"

    def feed(self, data: bytes) -> bytes:
        """What these bytes bring of the body. ValueError for what is no HTTP."""
        self._buffer += data
        if not self.status and not self._read_head():
            return b""
        return self._read_chunks() if self._chunked else self._read_plain()

    def end(self) -> None:
        """The other side has closed. Sets ``done`` where the body had no other end."""
        if self.status and not self._chunked and self._left is None:
            self.done = True

    def _read_head(self) -> bool:
        head, found, rest = self._buffer.partition(b"\r\n\r\n")
        if not found:
            return False
        first, *lines = head.decode("latin-1").split("\r\n")
        version, _, status = first.partition(" ")
        if not version.startswith("HTTP/1."):
            raise ValueError(f"no HTTP response: {first[:60]!r}")
        self.status, self._buffer = int(status[:3]), rest
        for line in lines:
            name, _, value = line.partition(":")
            self.headers[name.strip().lower()] = value.strip()
        self._chunked = "chunked" in self.headers.get("transfer-encoding", "").lower()
        if self._chunked:
            self._left = 0
        elif "content-length" in self.headers:
            self._left = int(self.headers["content-length"])
        return True

    def _read_plain(self) -> bytes:
        body, self._buffer = self._buffer, b""
        if self._left is not None:
            body = body[: self._left]
            self._left -= len(body)
            self.done = self._left == 0
        return body

    def _read_chunks(self) -> bytes:
        parts = []
        data, at = self._buffer, 0
        assert self._left is not None
        while not self.done:
            if self._left > 2:  # of the chunk and of the line end after it
                part = data[at : at + self._left - 2]
                parts.append(part)
                at += len(part)
                self._left -= len(part)
                if self._left > 2:
                    break
            if self._left:
                skipped = min(self._left, len(data) - at)
                at += skipped
                self._left -= skipped
                if self._left:
                    break
            end = data.find(b"\r\n", at)
            if end < 0:
                break
            line, at = data[at:end], end + 2
            if self._trailer:
                self.done = not line
            elif size := int(line.split(b";")[0], 16):
                self._left = size + 2
            else:
                self._trailer = True
        self._buffer = data[at:]
        return parts[0] if len(parts) == 1 else b"".join(parts)


class EventReader:
    """The data of server-sent events, from bytes as they come."""

    def __init__(self) -> None:
        self._rest = b""
        self._data: list[bytes] = []

    def feed(self, body: bytes) -> list[bytes]:
        """The data of the events that these bytes complete."""
        *lines, self._rest = (self._rest + body).split(b"\n")
        events = []
        for line in lines:
            line = line.rstrip(b"\r")
            if line.startswith(b"data:"):
                self._data.append(line[6:] if line[5:6] == b" " else line[5:])
            elif not line and self._data:
                events.append(b"\n".join(self._data))
                self._data = []
        return events


@dataclass
class Exchange:
    """One request and its answer. ``on_body`` gets every piece of the body when it comes."""

    request: bytes
    on_body: Callable[[int, bytes], None]
    response: ResponseReader = field(default_factory=ResponseReader)
    left: bool = False

    def leave(self) -> None:
        """To be called from ``on_body``: the client goes away without a word."""
        self.left = True


class _Connection(asyncio.Protocol):
    def __init__(self) -> None:
        self.transport: asyncio.Transport | None = None
        self._exchange: Exchange | None = None
        self._done: asyncio.Future[None] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport

    def connection_lost(self, error: Exception | None) -> None:
        self.transport = None
        if self._exchange is None:
            return
        self._exchange.response.end()
        if self._exchange.response.done:
            self._finish(None)
        else:
            self._finish(ExchangeError("connection closed", str(error or "")))

    def data_received(self, data: bytes) -> None:
        exchange = self._exchange
        if exchange is None:
            return
        try:
            if body := exchange.response.feed(data):
                exchange.on_body(exchange.response.status, body)
        except Exception as error:  # whoever waits must hear of it
            self._finish(ExchangeError("answer not understood", f"{error}"))
            self.abort()
            return
        if exchange.left:
            self._finish(None)
            self.abort()
        elif exchange.response.done:
            self._finish(None)

    async def run(self, exchange: Exchange) -> None:
        assert self.transport is not None
        self._exchange = exchange
        self._done = asyncio.get_running_loop().create_future()
        self.transport.write(exchange.request)
        try:
            await self._done
        finally:
            self._exchange = None

    def abort(self) -> None:
        if self.transport is not None:
            self.transport.abort()

    def _finish(self, error: ExchangeError | None) -> None:
        if self._done is None or self._done.done():
            return
        if error is None:
            self._done.set_result(None)
        else:
            self._done.set_exception(error)


class Client:
    """Requests to one server; connections are used again. Close it in the end."""

    def __init__(self, url: str, headers: dict[str, str] | None = None) -> None:
        parts = urlsplit(url)
        if parts.scheme != "http" or not parts.hostname:
            raise ValueError(f"{url} is not of the form http://HOST:PORT")
        self._host, self._port = parts.hostname, parts.port or 80
        self._prefix = parts.path.rstrip("/")
        fields = {"Host": parts.netloc, **(headers or {})}
        self._head = "".join(f"{name}: {value}\r\n" for name, value in fields.items())
        self._idle: list[_Connection] = []

    def exchange(
        self, method: str, path: str, body: bytes, on_body: Callable[[int, bytes], None]
    ) -> Exchange:
        head = (
            f"{method} {self._prefix}{path} HTTP/1.1\r\n{self._head}"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        return Exchange(head.encode("latin-1") + body, on_body)

    async def run(self, exchange: Exchange, timeout: float) -> None:
        """Returns when the response is whole or the client has left. Raises ExchangeError."""
        try:
            async with asyncio.timeout(timeout):
                await self._run(exchange)
        except TimeoutError:
            raise ExchangeError("timeout", f"no whole answer within {timeout:g} s") from None

    async def call(
        self, method: str, path: str, body: bytes = b"", timeout: float = 60
    ) -> tuple[int, bytes]:
        """Status and whole body of one answer. Raises ExchangeError."""
        parts: list[bytes] = []
        exchange = self.exchange(method, path, body, lambda _, part: parts.append(part))
        await self.run(exchange, timeout)
        return exchange.response.status, b"".join(parts)

    def close(self) -> None:
        for connection in self._idle:
            connection.abort()
        self._idle.clear()

    async def _run(self, exchange: Exchange) -> None:
        connection = self._take()
        used = connection is not None
        while True:
            connection = connection or await self._connect()
            try:
                await connection.run(exchange)
            except ExchangeError:
                # The server may close a connection that was idle just when it is used again.
                if not used or exchange.response.status:
                    raise
                connection, used = None, False
                continue
            except BaseException:
                connection.abort()
                raise
            break
        if exchange.response.done and exchange.response.keeps_alive and not exchange.left:
            self._idle.append(connection)
        else:
            connection.abort()

    def _take(self) -> _Connection | None:
        while self._idle:
            connection = self._idle.pop()
            if connection.transport is not None and not connection.transport.is_closing():
                return connection
        return None

    async def _connect(self) -> _Connection:
        loop = asyncio.get_running_loop()
        try:
            return (await loop.create_connection(_Connection, self._host, self._port))[1]
        except OSError as error:
            raise ExchangeError("no connection", str(error)) from None
