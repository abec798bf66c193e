"""Typed messages over ZeroMQ: a bound receiving end, and any number of sending ends.

Sockets live in a private folder where the platform has Unix sockets, else on loopback TCP.
A socket belongs to one thread: who wants to send from two threads opens two ends.
"""

from __future__ import annotations

import hmac
import secrets
import sys
import tempfile
from typing import Any, Generic, TypeVar

import msgspec
import zmq

T = TypeVar("T")
_MAX_SOCKET_PATH = 100  # sun_path holds 104 bytes on macOS, 108 on Linux


def socket_folder() -> str | None:
    """A new private folder for Unix sockets, or None, which stands for loopback TCP: where the
    platform has none, or its temporary folder has too long a name for them."""
    if sys.platform == "win32" or not zmq.has("ipc"):
        return None
    if len(tempfile.gettempdir()) + 40 > _MAX_SOCKET_PATH:
        return None
    return tempfile.mkdtemp(prefix="sartor-")


class Receiver(Generic[T]):
    """The receiving end. ``address`` is where senders connect; messages have type ``kind``."""

    def __init__(self, folder: str | None, key: str, kind: object) -> None:
        self._key = key.encode()
        self._decoder: msgspec.msgpack.Decoder[T] = msgspec.msgpack.Decoder(kind)
        self._socket: Any = zmq.Context.instance().socket(zmq.PULL)
        self._socket.setsockopt(zmq.RCVHWM, 0)
        if folder is None:
            port: int = self._socket.bind_to_random_port("tcp://127.0.0.1")
            self.address = f"tcp://127.0.0.1:{port}"
        else:
            self.address = f"ipc://{folder}/{secrets.token_hex(6)}"
            self._socket.bind(self.address)

    def receive(self, wait_seconds: float) -> list[T]:
        """All messages that are there; waits for a first one at most ``wait_seconds``."""
        messages: list[T] = []
        if not self._socket.poll(int(wait_seconds * 1000)):
            return messages
        while True:
            try:
                frames = self._socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return messages
            if len(frames) == 2 and hmac.compare_digest(frames[0], self._key):
                messages.append(self._decoder.decode(frames[1]))

    def close(self) -> None:
        self._socket.close(linger=0)


class Sender(Generic[T]):
    """A sending end; never blocks and keeps what the other side has not taken yet."""

    def __init__(self, address: str, key: str) -> None:
        self._key = key.encode()
        self._encoder = msgspec.msgpack.Encoder()
        # A context of its own: only its end waits for what is unsent, and another sender's
        # open socket must not hold that up.
        self._context = zmq.Context()
        self._socket: Any = self._context.socket(zmq.PUSH)
        self._socket.setsockopt(zmq.SNDHWM, 0)
        self._socket.connect(address)

    def send(self, message: T) -> None:
        self._socket.send_multipart((self._key, self._encoder.encode(message)))

    def close(self, linger_seconds: float = 0.0) -> None:
        """Closes; what is still unsent gets ``linger_seconds`` to leave."""
        self._socket.close(linger=int(linger_seconds * 1000))
        self._context.term()
