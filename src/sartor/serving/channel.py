"""Typed messages between two processes, over connected sockets.

A message is its length (uint32, little-endian) and msgpack. Each direction has a pair of sockets
of its own: writing to a process that has died must not lose what it said before. The sockets have
no address, so nobody else can connect and nothing is left in the file system. They are read where
the messages are needed, without a thread between.
"""

from __future__ import annotations

import selectors
import socket
import struct
import sys
import threading
import time
from typing import Generic, NamedTuple, TypeVar

import msgspec

In = TypeVar("In")
Out = TypeVar("Out")
Ticket = int | bytes
"""What a process finds a socket by that another process made for it."""

_LENGTH = struct.Struct("<I")
_PIECE = 1 << 16
_BUFFER_BYTES = 1 << 20
"""Asked of the system for each socket: what does not fit waits for the next turn of a loop."""
_RETRY_SECONDS = 0.001


class End(NamedTuple):
    """One side's sockets: it reads ``incoming`` and writes ``outgoing``."""

    incoming: socket.socket
    outgoing: socket.socket

    def close(self) -> None:
        self.incoming.close()
        self.outgoing.close()

    def descriptors(self) -> tuple[int, ...]:
        """What a process that is started must inherit for the tickets to be good there."""
        if sys.platform == "win32":
            return ()
        return (self.incoming.fileno(), self.outgoing.fileno())

    def tickets(self, pid: int) -> tuple[Ticket, Ticket]:
        """For the process ``pid``, which runs already: ``open_end`` takes them there."""
        if sys.platform == "win32":
            return self.incoming.share(pid), self.outgoing.share(pid)
        return self.incoming.fileno(), self.outgoing.fileno()


def connected_ends() -> tuple[End, End]:
    """Two ends; what the one writes the other reads."""
    there, here = socket.socketpair()
    try:
        back, forth = socket.socketpair()
    except OSError:
        there.close()
        here.close()
        raise
    for sock in (there, here, back, forth):
        for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
            sock.setsockopt(socket.SOL_SOCKET, option, _BUFFER_BYTES)
        if sock.family == socket.AF_INET:  # as on Windows
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return End(here, forth), End(back, there)


def open_end(tickets: tuple[Ticket, Ticket]) -> End:
    return End(*map(_open, tickets))


def _open(ticket: Ticket) -> socket.socket:
    if sys.platform == "win32":
        assert isinstance(ticket, bytes)
        return socket.fromshare(ticket)
    assert isinstance(ticket, int)
    sock = socket.socket(fileno=ticket)
    sock.set_inheritable(False)  # a process that this one starts would keep it open
    return sock


class Framer(Generic[Out]):
    """Messages to bytes. Not for several threads at once."""

    def __init__(self) -> None:
        self._encoder = msgspec.msgpack.Encoder()

    def frame(self, message: Out) -> bytearray:
        data = bytearray(_LENGTH.size)
        self._encoder.encode_into(message, data, _LENGTH.size)
        _LENGTH.pack_into(data, 0, len(data) - _LENGTH.size)
        return data


class Splitter(Generic[In]):
    """Bytes as they come, back to messages of type ``kind``."""

    def __init__(self, kind: object) -> None:
        self._decoder: msgspec.msgpack.Decoder[In] = msgspec.msgpack.Decoder(kind)
        self._data = bytearray()

    def split(self, data: bytes) -> list[In]:
        """The messages that are complete now. Raises msgspec.MsgspecError for what is none."""
        self._data += data
        messages: list[In] = []
        begin = 0
        while len(self._data) - begin >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(self._data, begin)
            end = begin + _LENGTH.size + length
            if end > len(self._data):
                break
            messages.append(self._decoder.decode(self._data[begin + _LENGTH.size : end]))
            begin = end
        del self._data[:begin]
        return messages


class Channel(Generic[In, Out]):
    """An end for threads: one receives messages of type ``kind``, any of them sends."""

    def __init__(self, end: End, kind: object) -> None:
        self._end = end
        self._framer: Framer[Out] = Framer()
        self._splitter: Splitter[In] = Splitter(kind)
        self._unsent = bytearray()
        self._lock = threading.Lock()
        self._open = True
        for sock in end:
            sock.setblocking(False)
        self._selector = selectors.DefaultSelector()
        self._selector.register(end.incoming, selectors.EVENT_READ)

    def send(self, message: Out) -> None:
        """Never blocks; what the other side has no room for leaves with a later call of anything
        here. Nothing is sent to a side that has closed."""
        with self._lock:
            if self._end.outgoing.fileno() >= 0:
                self._unsent += self._framer.frame(message)
                self._flush()

    def receive(self, wait_seconds: float) -> list[In]:
        """All messages that are there; waits for something at most ``wait_seconds``."""
        if self._unsent:
            with self._lock:
                self._flush()
            if self._unsent:
                wait_seconds = min(wait_seconds, _RETRY_SECONDS)
        if not self._open:
            time.sleep(wait_seconds)
            return []
        if wait_seconds > 0 and not self._selector.select(wait_seconds):
            return []
        messages: list[In] = []
        while True:
            try:
                data = self._end.incoming.recv(_PIECE)
            except BlockingIOError:
                return messages
            except ConnectionError:
                data = b""
            if not data:
                self._open = False
                return messages
            messages += self._splitter.split(data)

    def close(self, linger_seconds: float = 0.0) -> None:
        """Closes; what is still unsent gets ``linger_seconds`` to leave."""
        end = time.monotonic() + linger_seconds
        while self._unsent and time.monotonic() < end:
            time.sleep(_RETRY_SECONDS)
            with self._lock:
                self._flush()
        with self._lock:
            self._selector.close()
            self._end.close()

    def _flush(self) -> None:
        while self._unsent:
            try:
                sent = self._end.outgoing.send(self._unsent)
            except ConnectionError:  # nobody reads it any more
                sent = len(self._unsent)
            except OSError:  # no room, or no memory: later
                return
            del self._unsent[:sent]
