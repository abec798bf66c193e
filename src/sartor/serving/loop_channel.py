"""The end of a channel that an event loop reads and writes."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from typing import Generic, TypeVar

from sartor.serving.channel import End, Framer, Splitter

In = TypeVar("In")
Out = TypeVar("Out")


class _Reading(asyncio.Protocol, Generic[In]):
    def __init__(
        self,
        kind: object,
        receive: Callable[[In], None],
        ended: Callable[[Exception | None], None],
    ) -> None:
        self._splitter: Splitter[In] = Splitter(kind)
        self._receive = receive
        self._ended = ended
        self._error: Exception | None = None
        self._transport: asyncio.BaseTransport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        try:
            messages = self._splitter.split(data)
        except Exception as error:
            self._error = error
            assert self._transport is not None
            self._transport.close()
            return
        for message in messages:
            self._receive(message)

    def connection_lost(self, error: Exception | None) -> None:
        self._ended(self._error or _unless_it_left(error))


class _Writing(asyncio.Protocol):
    def __init__(self, ended: Callable[[Exception | None], None]) -> None:
        self._ended = ended

    def connection_lost(self, error: Exception | None) -> None:
        # Where the other side has left, there may still be something to read.
        if (error := _unless_it_left(error)) is not None:
            self._ended(error)


def _unless_it_left(error: Exception | None) -> Exception | None:
    return None if isinstance(error, ConnectionError) else error


class LoopChannel(Generic[In, Out]):
    """Opened with ``open``; everything happens on the event loop."""

    def __init__(self, reading: asyncio.Transport, writing: asyncio.Transport) -> None:
        self._framer: Framer[Out] = Framer()
        self._reading = reading
        self._writing = writing

    @classmethod
    async def open(
        cls,
        end: End,
        kind: object,
        receive: Callable[[In], None],
        ended: Callable[[Exception | None], None],
    ) -> LoopChannel[In, Out]:
        """Calls ``receive`` with each message of type ``kind``, and ``ended`` once no more can
        come, or go, with the error if that is why. Closes the end where it fails itself."""
        reading: asyncio.Transport | None = None
        try:
            reading = await _transport(end.incoming, lambda: _Reading(kind, receive, ended))
            return cls(reading, await _transport(end.outgoing, lambda: _Writing(ended)))
        except BaseException:
            if reading is not None:
                reading.close()
            end.close()
            raise

    def send(self, message: Out) -> None:
        """Never blocks, and keeps what the other side has not taken yet."""
        if not self._writing.is_closing():  # then there is no other side
            self._writing.write(self._framer.frame(message))

    def close(self) -> None:
        self._reading.close()
        self._writing.abort()


async def _transport(
    sock: socket.socket, protocol: Callable[[], asyncio.Protocol]
) -> asyncio.Transport:
    loop = asyncio.get_running_loop()
    # Windows makes its pairs of loopback TCP.
    local = sock.family != socket.AF_INET
    connect = loop.create_unix_connection if local else loop.create_connection
    transport, _ = await connect(protocol, sock=sock)
    return transport
