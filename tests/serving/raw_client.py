"""A client that can do everything wrong: bytes on a socket."""

from __future__ import annotations

import contextlib
import json
import socket
import time
from types import TracebackType
from typing import Any

from server_process import ServerProcess


class RawClient:
    """One connection. What the server sends is collected until it closes or stays silent."""

    def __init__(self, server: ServerProcess, seconds: float = 20.0) -> None:
        host, port = server.url.removeprefix("http://").split(":")
        self.socket = socket.create_connection((host, int(port)), seconds)
        self.received = b""

    def __enter__(self) -> RawClient:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self.socket.close()

    def send(self, data: bytes) -> RawClient:
        self.socket.sendall(data)
        return self

    def post(self, body: bytes, path: str = "/v1/completions", *headers: str) -> RawClient:
        head = [
            f"POST {path} HTTP/1.1",
            "Host: localhost",
            f"Content-Length: {len(body)}",
            *headers,
        ]
        return self.send("\r\n".join([*head, "", ""]).encode("latin-1") + body)

    def drip(self, piece: bytes, every: float, seconds: float) -> float:
        """Sends a piece again and again; after how many seconds the server had closed."""
        begin = time.monotonic()
        self.socket.settimeout(every)
        while time.monotonic() - begin < seconds:
            try:
                self.socket.sendall(piece)
                data = self.socket.recv(65536)
                self.received += data
                if not data:
                    return time.monotonic() - begin
            except TimeoutError:
                continue
            except OSError:
                return time.monotonic() - begin
        raise AssertionError(f"the connection was still open after {seconds} s")

    def read_to_end(self) -> bytes:
        """All there is until the server closes."""
        with contextlib.suppress(ConnectionResetError):
            while data := self.socket.recv(65536):
                self.received += data
        return self.received

    def answer(self) -> tuple[int, Any]:
        """Status and JSON of the next whole answer; leaves later ones for the next call."""
        while b"\r\n\r\n" not in self.received:
            self._more()
        head, _, rest = self.received.partition(b"\r\n\r\n")
        lines = head.decode("latin-1").split("\r\n")
        fields = {
            name.lower(): value.strip()
            for name, _, value in (line.partition(":") for line in lines[1:])
        }
        length = int(fields["content-length"])
        while len(rest) < length:
            self._more()
            rest = self.received.partition(b"\r\n\r\n")[2]
        self.received = rest[length:]
        return int(lines[0].split()[1]), json.loads(rest[:length])

    def _more(self) -> None:
        data = self.socket.recv(65536)
        assert data, f"closed after {self.received!r}"
        self.received += data
