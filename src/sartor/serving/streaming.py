"""Server-sent events, and noticing that nobody listens any more.

Source of the format: WHATWG HTML, section 9.2.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from typing import Any, Generic, Protocol, TypeVar

import msgspec
from starlette.background import BackgroundTask
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

T = TypeVar("T")
DONE = b"data: [DONE]\n\n"
KEEP_ALIVE = b": keep-alive\n\n"


def event(data: object) -> bytes:
    return b"data: " + msgspec.json.encode(data) + b"\n\n"


class BodyWriter(Protocol):
    """Writes to the body of a response on the spot, past the ASGI server's ``send``."""

    @property
    def ready(self) -> bool:
        """Whether the client takes what is sent: False when it is slow, or has gone."""

    def write(self, data: bytes) -> None: ...


BODY_WRITER = "sartor.body_writer"
"""The extension of an ASGI scope where a server that can do so has a :class:`BodyWriter`."""


class Disconnected(Exception):
    """The client has gone; there is nobody to answer."""


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        continue


async def while_connected(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """The result of ``work``, which is cancelled when the client goes: then Disconnected."""
    working, watching = asyncio.create_task(work), asyncio.create_task(_gone(receive))
    try:
        await asyncio.wait({working, watching}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise Disconnected
        return working.result()
    finally:
        for task in (working, watching):
            task.cancel()
        await asyncio.gather(working, watching, return_exceptions=True)


class EventStream(Response, Generic[T]):
    """A response whose body is ``pieces`` and then ``DONE``; calls ``close`` when it ends, however.

    The status line waits for the ``first`` news, which ``pieces`` gets: what it raises can still
    be an answer of its own. The stream ends early when the client goes; one that leaves a piece
    unread for ``stall_seconds`` counts as gone. ``write_at_once`` gets a writer, where the server
    has one: what it writes while ``pieces`` are waited for comes between them.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        first: Callable[[], Awaitable[T]],
        pieces: Callable[[T], AsyncIterator[bytes]],
        close: Callable[[], None],
        stall_seconds: float,
        write_at_once: Callable[[BodyWriter], None],
    ) -> None:
        self.status_code = 200
        self.background: BackgroundTask | None = None
        self._first = first
        self._pieces = pieces
        self._close = close
        self._stall_seconds = stall_seconds
        self._write_at_once = write_at_once
        self._started = False
        # Proxies must not collect events; X-Accel-Buffering is what nginx listens to.
        self.init_headers({"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await while_connected(receive, self._send(scope, send))
        except Disconnected:
            if not self._started:
                await Response(status_code=499)(scope, receive, send)  # nobody reads it
        except (TimeoutError, OSError):
            return  # as if it had gone
        finally:
            self._close()

    async def _send(self, scope: Scope, send: Send) -> None:
        first = await self._first()
        self._started = True
        start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
        await send(start)
        if writer := scope.get("extensions", {}).get(BODY_WRITER):
            self._write_at_once(writer)
        async for piece in self._pieces(first):
            await self._write(send, piece, more=True)
        # DONE is the end for many clients, so nothing of the answer may be left to do after it.
        await self._write(send, DONE, more=False)

    async def _write(self, send: Send, piece: bytes, *, more: bool) -> None:
        # Not wait_for: before Python 3.12 it loses a cancellation that comes as it ends, and a
        # stream would go on for a client that has gone.
        async with asyncio.timeout(self._stall_seconds):
            await send({"type": "http.response.body", "body": piece, "more_body": more})
