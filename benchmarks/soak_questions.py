"""What a soak asks: questions with one right answer each, and requests that must be refused."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from http_stream import Client, EventReader, Exchange
from traffic import Prompts

PATHS = ("/v1/chat/completions", "/v1/completions")


@dataclass(frozen=True)
class Question:
    """A request whose answer is always the same: greedy, or with a seed."""

    path: str
    body: Mapping[str, Any]

    def bytes(self, stream: bool) -> bytes:
        extra = {"stream": True, "stream_options": {"include_usage": True}} if stream else {}
        return json.dumps({**self.body, **extra}).encode()


@dataclass
class Answer:
    """Of every choice its text and why it ended; tokens over all, -1 where it has no usage."""

    texts: dict[int, str] = field(default_factory=dict)
    ends: dict[int, str] = field(default_factory=dict)
    tokens: int = -1
    error: str = ""

    def take(self, body: Mapping[str, Any]) -> None:
        """Adds one event, or a whole answer."""
        if body.get("error"):
            self.error = str(body["error"])[:300]
        if body.get("usage"):
            self.tokens = body["usage"]["completion_tokens"]
        for choice in body.get("choices", ()):
            index = choice["index"]
            holder = choice.get("delta") or choice.get("message") or {}
            text = choice.get("text") or holder.get("content") or ""
            self.texts[index] = self.texts.get(index, "") + text
            if choice.get("finish_reason"):
                self.ends[index] = choice["finish_reason"]

    def begins(self, other: Answer) -> bool:
        """Whether this is a part of the other answer, from its beginning."""
        return not self.error and all(
            other.texts.get(index, "").startswith(text) for index, text in self.texts.items()
        )


def make_questions(
    model: str, prompts: Prompts, count: int, longest: int, seed: int
) -> list[Question]:
    """Chats and completions in turn, of up to ``longest`` words; half of them begin alike in
    threes, some want several choices, stop strings or penalties."""
    rng = np.random.default_rng(seed)
    prefixes = [prompts.words(prompts.draw(longest // 3, rng)) for _ in range(3)]
    questions = []
    for number in range(count):
        words = prompts.words(prompts.draw(int(rng.integers(4, longest // 2)), rng))
        text = f"{prefixes[int(rng.integers(3))]} {words}" if rng.random() < 0.5 else words
        body: dict[str, Any] = {"model": model, "max_tokens": int(rng.integers(2, 64))}
        if rng.random() < 0.5:
            body["temperature"] = 0
        else:
            body |= {"seed": number, "temperature": 0.8, "top_p": 0.9, "n": int(rng.integers(1, 4))}
        if rng.random() < 0.5:
            body["ignore_eos"] = True
        if rng.random() < 0.25:
            body["stop"] = [" the", "\n\n"]
        if rng.random() < 0.25:
            body["presence_penalty"] = 1.0
        if number % 2:
            questions.append(Question(PATHS[1], {**body, "prompt": text}))
        else:
            messages = [{"role": "user", "content": text}]
            questions.append(Question(PATHS[0], {**body, "messages": messages}))
    return questions


@dataclass(frozen=True)
class BadRequest:
    """A request with the status that it must get."""

    method: str
    path: str
    body: bytes
    status: int


def bad_requests(model: str) -> list[BadRequest]:
    chat, plain = PATHS
    good = {"model": model, "prompt": "x", "max_tokens": 2}
    bodies: list[tuple[str, dict[str, Any], int]] = [
        (plain, {**good, "model": "no such model"}, 404),
        (plain, {**good, "max_tokens": -1}, 400),
        (plain, {**good, "temperature": 9}, 400),
        (plain, {**good, "no_such_parameter": 1}, 400),
        (plain, {**good, "prompt": [2**30]}, 400),
        (plain, {**good, "prompt": [1] * 200_000}, 400),
        (plain, {**good, "prompt": []}, 400),
        (chat, {"model": model, "messages": []}, 400),
        (chat, {"model": model, "messages": "hello"}, 400),
    ]
    return [
        *(BadRequest("POST", path, json.dumps(body).encode(), code) for path, body, code in bodies),
        BadRequest("POST", chat, b'{"model": ', 400),
        BadRequest("GET", "/v1/nothing", b"", 404),
        BadRequest("GET", chat, b"", 405),
    ]


async def ask(
    client: Client,
    question: Question,
    stream: bool,
    timeout: float,
    leave_after: int | None = None,
) -> Answer:
    """The answer, or what came of it until the client left after so many pieces of a stream.

    Raises ExchangeError. A status other than 200 is the answer's error.
    """
    answer, raw, events = Answer(), b"", EventReader()
    pieces = 0
    ended = False

    def on_body(status: int, body: bytes) -> None:
        nonlocal raw, pieces, ended
        if not stream or status != 200:
            raw += body
            return
        for data in events.feed(body):
            ended = data == b"[DONE]"
            if not ended:
                answer.take(json.loads(data))
                pieces += 1
                if pieces == leave_after:
                    exchange.leave()

    exchange: Exchange = client.exchange("POST", question.path, question.bytes(stream), on_body)
    await client.run(exchange, timeout)
    status = exchange.response.status
    if status != 200:
        answer.error = f"status {status}: {raw[:300].decode(errors='replace')}"
    elif not stream:
        answer.take(json.loads(raw))
    elif not ended and not exchange.left:
        answer.error = "the stream has no end"
    return answer
