"""How a stream of events begins, and how it ends before it has begun."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable

from starlette.types import Message

from sartor.serving.errors import ApiError
from sartor.serving.streaming import DONE, EventStream


async def pieces(first: str) -> AsyncIterator[bytes]:
    yield first.encode()
    yield b"more"


def sent_by(
    first: Callable[[], Awaitable[str]], *, leaves: bool = False
) -> tuple[list[Message], int, Exception | None]:
    """What a stream sends, how often it closes and what it raises."""
    sent: list[Message] = []
    closed: list[bool] = []

    async def receive() -> Message:
        if not leaves:
            await asyncio.Event().wait()
        return {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        sent.append(message)

    async def run() -> None:
        stream = EventStream(first, pieces, lambda: closed.append(True), 5.0, lambda writer: None)
        await stream({"type": "http"}, receive, send)

    try:
        asyncio.run(run())
    except ApiError as error:
        return sent, len(closed), error
    return sent, len(closed), None


def test_the_status_line_comes_with_the_first_news() -> None:
    async def first() -> str:
        return "news"

    sent, closed, error = sent_by(first)
    assert (sent[0]["status"], closed, error) == (200, 1, None)
    assert [message["body"] for message in sent[1:]] == [b"news", b"more", DONE]
    assert [message["more_body"] for message in sent[1:]] == [True, True, False]


def test_an_error_instead_of_news_is_an_answer_of_its_own() -> None:
    async def first() -> str:
        raise ApiError(503, "no worker")

    sent, closed, error = sent_by(first)
    assert (sent, closed) == ([], 1)
    assert isinstance(error, ApiError)
    assert error.status == 503


def test_a_client_that_leaves_before_the_first_news_is_recorded_as_gone() -> None:
    async def first() -> str:
        await asyncio.Event().wait()
        raise AssertionError

    sent, closed, error = sent_by(first, leaves=True)
    assert (sent[0]["status"], closed, error) == (499, 1, None)
