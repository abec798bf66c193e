"""Takes requests in: receives their bytes in bounded time and memory, and has them prepared where
that holds nobody up.

Parsing, validating and tokenising are one call into a library each, during which no other Python
runs. What takes longer than a step of a small model must not happen in the process that passes on
everybody's tokens: small bodies are prepared at once, longer ones on a thread (the tokeniser
lets others run meanwhile), long ones in a process of their own, and the longest in another one,
which lets everybody else have the processor first. In each of these lanes keys take fair turns,
and what the work took is booked for the key, whatever came of it.
"""

from __future__ import annotations

import asyncio
import functools
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

from pydantic import BaseModel
from starlette.requests import ClientDisconnect, Request

from sartor.serving.access import Visit
from sartor.serving.content_coding import codings_of, unfold
from sartor.serving.errors import ApiError, holds_its_part, invalid, unavailable
from sartor.serving.frontend import ServedModel
from sartor.serving.ignored_fields import IgnoredFields
from sartor.serving.intake_process import IntakeProcess
from sartor.serving.limits import ServerLimits
from sartor.serving.openai_types import ChatRequest, CompletionRequest, EmbeddingRequest
from sartor.serving.prepare import Prepared, View, prepare
from sartor.serving.shares import FairTurns, Pace, Room, everything
from sartor.serving.validation import parse

T = TypeVar("T", bound=BaseModel)
B = TypeVar("B", ChatRequest, CompletionRequest, EmbeddingRequest)

INLINE_BYTES = 2**10  # tokenised in 1 ms, or 10 ms where the tokeniser is written in Python
THREADS = 2  # more would only wait for each other: all but the tokeniser runs one at a time
THREAD_BYTES = 64 * 2**10  # parsed in some milliseconds, whatever it holds
PROCESS_BYTES = 512 * 2**10  # what is longer waits in a lane of its own

KEY_BYTES_PER_SECOND = 32 * 2**20
"""Of bodies of one key while others come too: taking bytes is work for the event loop, even of
bodies that are refused. A body of 8 MiB takes 0.25 s at that pace."""

KEY_SECONDS_PER_SECOND = 0.25
"""Of reading the requests of one key while others come too. Hundreds of requests a second, each
small enough for a thread, otherwise take the processor from those who compute."""

_SHORTEST_DELAY = 0.01


class Intake:
    """The way in, for all routes of one server. ``close`` it to end its process and threads."""

    def __init__(
        self,
        models: Mapping[str, ServedModel],
        limits: ServerLimits,
        part: Callable[[], float] = everything,
    ) -> None:
        """``part``: how much of the room, and of the places for work, one key may have."""
        self.limits = limits
        self.bodies = Room(limits.bodies_bytes, part)
        """Bytes of bodies that are being read."""
        self.seconds: dict[str, float] = {}
        """What reading requests took, by key."""
        self._part = part
        self._byte_pace = Pace(KEY_BYTES_PER_SECOND)
        self._work_pace = Pace(KEY_SECONDS_PER_SECOND)
        self._models = models
        self._threads = ThreadPoolExecutor(THREADS, "intake")
        self._thread_turns = FairTurns(THREADS, part)
        self._processes = [
            (IntakeProcess(models), FairTurns(1)),
            (IntakeProcess(models, behind_others=True), FairTurns(1)),
        ]
        self._ignored = IgnoredFields()

    async def prepared(
        self, request: Request, kind: type[B], view: View, visit: Visit
    ) -> Prepared[B]:
        """A request for tokens, ready for the engine. Raises ApiError 4xx, or 503 where all the
        room for incoming bodies is taken."""
        with self._room(visit) as room:
            body = await self._receive(request, room)
            try:
                prepared = await self._prepare(kind, body, view, visit)
            except ApiError as error:
                visit.spend(error.tokens)
                raise
        self._ignored.note(prepared.ignored)
        return prepared

    async def _prepare(self, kind: type[B], body: bytes, view: View, visit: Visit) -> Prepared[B]:
        await self._wait(self._work_pace, visit.key.name, 0.0)
        # A chat waits for the process of its template, which must not hold up the event loop.
        if len(body) <= INLINE_BYTES and kind is not ChatRequest:
            with self._booked(visit):
                return prepare(kind, body, self._models, view)
        if len(body) <= THREAD_BYTES:
            loop = asyncio.get_running_loop()
            call = functools.partial(prepare, kind, body, self._models, view)
            async with self._thread_turns.turn(visit.key.name, visit.key.share):
                with self._booked(visit):
                    return await loop.run_in_executor(self._threads, call)
        process, turns = self._processes[len(body) > PROCESS_BYTES]
        async with turns.turn(visit.key.name, visit.key.share):
            with self._booked(visit):
                return await process.prepare(kind, body, view)

    @contextmanager
    def _booked(self, visit: Visit) -> Iterator[None]:
        begun = time.monotonic()
        try:
            yield
        finally:
            seconds = time.monotonic() - begun
            self.seconds[visit.key.name] = self.seconds.get(visit.key.name, 0.0) + seconds
            visit.spend_intake(seconds)
            self._work_pace.delay(visit.key.name, seconds, begun)

    async def parsed(self, request: Request, kind: type[T], visit: Visit) -> T:
        """A request about the server itself, which is never long."""
        with self._room(visit) as room:
            body = await self._receive(request, room)
            if len(body) > THREAD_BYTES:
                raise _too_large(THREAD_BYTES)
            return parse(kind, body, self.limits)

    async def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)
        for process, _ in self._processes:
            await process.close()

    async def _receive(self, request: Request, room: _Body) -> bytes:
        """The body of a request with JSON in it, unpacked.

        ApiError 415 for another type or an unknown encoding, 413 when too long, 408 when it takes
        too long to come, 400 when it cannot be unpacked.
        """
        limits = self.limits
        _check_type(request)
        codings = codings_of(request.headers.getlist("content-encoding"))
        declared = request.headers.get("content-length", "")
        if declared.isdecimal() and (len(declared) > 18 or int(declared) > limits.body_bytes):
            raise _too_large(limits.body_bytes)
        if declared.isdecimal():
            room.check(int(declared))  # before any of it is read
        body = bytearray()
        try:
            async with asyncio.timeout(limits.body_seconds):
                async for piece in request.stream():
                    room.take(len(piece))
                    body += piece
                    if len(body) > limits.body_bytes:
                        raise _too_large(limits.body_bytes)
                    await self._wait(self._byte_pace, room.key, len(piece))
        except ClientDisconnect:
            raise invalid("the client closed the connection in the middle of the body") from None
        except TimeoutError:
            raise ApiError(
                408,
                f"the body was not complete after {limits.body_seconds:g} s, the server's limit; "
                "send it faster, or less",
                code="body_timeout",
                closes=True,
            ) from None
        found = bytes(body)
        for coding in reversed(codings):
            found = await self._unfold(found, coding, room)
        return found

    async def _wait(self, pace: Pace, key: str, amount: float) -> None:
        """Where keys share, one that is ahead of its pace waits."""
        if self._part() < 1:
            delay = pace.delay(key, amount, time.monotonic())
            if delay > _SHORTEST_DELAY:
                await asyncio.sleep(delay)

    async def _unfold(self, body: bytes, coding: str, room: _Body) -> bytes:
        """A body without one of its encodings: slice by slice, so that others get their turns on
        the threads, and none of it on the event loop."""
        loop = asyncio.get_running_loop()
        slices = unfold(body, coding, self.limits.body_bytes)
        pieces: list[bytes] = []
        try:
            while (
                piece := await loop.run_in_executor(self._threads, next, slices, None)
            ) is not None:
                room.take(len(piece))
                pieces.append(piece)
            return b"".join(pieces)
        finally:
            pieces.clear()  # an error's traceback would keep them until the garbage is collected

    @contextmanager
    def _room(self, visit: Visit) -> Iterator[_Body]:
        body = _Body(self.bodies, visit.key.name)
        try:
            yield body
        finally:
            body.leave()


class _Body:
    """What one body takes of the memory for all of them."""

    def __init__(self, room: Room, key: str) -> None:
        self.key = key
        self._room = room
        self._held = 0

    def take(self, size: int) -> None:
        """Raises ApiError 503 where all the memory is taken, and 429 where the key's part is."""
        self.check(size)
        self._room.take(self.key, size)
        self._held += size

    def check(self, size: int) -> None:
        """As :meth:`take`, and takes nothing: a client that says much and sends nothing keeps
        nobody else's room."""
        match self._room.full(self.key, size):
            case "all":
                raise unavailable(
                    f"the server is receiving as much as it can hold ({self._room.limit} bytes); "
                    "try again in a moment",
                    retry_after=1,
                )
            case "key":
                raise holds_its_part(
                    self.key, f"{self._room.most} of the {self._room.limit} bytes of bodies"
                )

    def leave(self) -> None:
        if self._held:
            self._room.give(self.key, self._held)
            self._held = 0


def _check_type(request: Request) -> None:
    content_type = request.headers.get("content-type", "application/json")
    kind = content_type.partition(";")[0].strip().lower()
    if kind != "application/json" and not (kind.startswith("application/") and "+json" in kind):
        raise ApiError(
            415,
            f"the content type is {kind[:80]!r}; send JSON with Content-Type: application/json",
        )


def _too_large(limit: int) -> ApiError:
    return ApiError(
        413, f"the body is larger than {limit} bytes, the limit; send less", code="body_too_large"
    )
