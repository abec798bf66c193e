"""Events written on the spot are those that the stream itself would have sent."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import msgspec

from sartor.engine.request import Chunk, FinishReason, Request
from sartor.graph import SamplingParams
from sartor.serving.answer import Answer, Delta
from sartor.serving.answer_events import AnswerEvents
from sartor.serving.errors import internal
from sartor.serving.openai_format import CompletionShape, Json
from sartor.serving.openai_types import StreamOptions
from sartor.serving.request_record import RequestRecord


class Writer:
    """A client that takes what it gets, unless it is told not to."""

    def __init__(self) -> None:
        self.ready = True
        self.written: list[bytes] = []

    def write(self, data: bytes) -> None:
        self.written.append(data)


class Broken(CompletionShape):
    """Cannot word a certain text."""

    def events(self, delta: Delta) -> list[Json]:
        if delta.text == "c":
            raise ValueError("no words")
        return super().events(delta)


def chunk(text: str, choice: int = 0, end: FinishReason | None = None) -> Chunk:
    return Chunk("a", choice, text, (1,), (), end, "", 3, 2, 1)


async def stream(
    chunks: Sequence[Chunk], writer: Writer | None, kind: type[CompletionShape] = CompletionShape
) -> tuple[bytes, RequestRecord]:
    """What a client gets of an answer of two choices; the chunks come one by one."""
    request = Request("a", (1, 2, 3), SamplingParams(n=2), seed=1)
    answer = Answer([request], lambda _: None)
    shape = kind("m", "f", n=2, logprobs=False, echoes=())
    shape.head().update(id="cmpl", created=0)
    record = RequestRecord("r", "POST", 0.0, 0)
    events = AnswerEvents(
        shape, answer, StreamOptions(include_usage=True, continuous_usage_stats=True), record
    )
    if writer is not None:
        events.write_at_once(writer)
    sent: list[bytes] = [] if writer is None else writer.written
    ended: set[int] = set()

    async def read() -> None:
        answer.push(chunks[0], False)
        async for piece in events.pieces(await answer.next()):
            sent.append(piece)

    reader = asyncio.create_task(read())
    for one in chunks[1:]:
        await turn()
        if one.finish_reason is not None:
            ended.add(one.choice)
        answer.push(one, len(ended) == 2)
        answer.tell()
    await reader
    return b"".join(sent), record


async def turn() -> None:
    """Lets all tasks come to rest."""
    for _ in range(5):
        await asyncio.sleep(0)


CHUNKS = [chunk("a"), chunk("b", 1), chunk("c"), chunk(""), chunk("d", 1, "stop"), chunk("e")]
END = chunk("f", 0, "length")


def texts(body: bytes) -> list[str]:
    decoded: list[Any] = [msgspec.json.decode(line[6:]) for line in body.split(b"\n\n") if line]
    return [c["text"] for one in decoded for c in one.get("choices", ())]


def test_they_are_the_same() -> None:
    plain, _ = asyncio.run(stream([*CHUNKS, END], None))
    writer = Writer()
    direct, _ = asyncio.run(stream([*CHUNKS, END], writer))
    assert direct == plain
    assert texts(direct) == ["a", "b", "c", "d", "e", "f"]


def test_who_waits_gets_them_on_the_spot() -> None:
    async def run() -> None:
        answer = Answer([Request("a", (1,), SamplingParams(), seed=1)], lambda _: None)
        taken: list[str] = []

        def take(deltas: list[Delta]) -> bool:
            taken.extend(delta.text for delta in deltas)
            return True

        answer.taker = take
        answer.push(chunk("a"), False)
        answer.tell()  # nobody waits yet
        assert [delta.text for delta in await answer.next()] == ["a"]
        reader = asyncio.create_task(answer.next())
        await turn()
        answer.push(chunk("b"), False)
        answer.push(chunk("c", 1), False)
        answer.tell()
        await turn()
        assert taken == ["b", "c"]
        assert not reader.done()
        answer.push(chunk("d", 0, "stop"), True)
        answer.tell()  # the end is for the reader
        assert [delta.text for delta in await reader] == ["d"]
        assert taken == ["b", "c"]

    asyncio.run(run())


def test_a_slow_client_gets_them_later() -> None:
    writer = Writer()
    writer.ready = False
    body, _ = asyncio.run(stream([*CHUNKS, END], writer))
    assert texts(body) == ["a", "b", "c", "d", "e", "f"]


def test_what_cannot_be_worded_ends_this_answer_alone() -> None:
    writer = Writer()
    body, record = asyncio.run(stream([*CHUNKS[:3]], writer, Broken))
    events = [line[6:] for line in body.split(b"\n\n") if line]
    assert b"broke off: ValueError" in events[-1]
    assert record.error is not None
    assert record.error.status == internal("x").status
