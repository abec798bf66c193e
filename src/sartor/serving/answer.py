"""The answer to one HTTP request, between the gateway that fills it and the one who reads it.

Everything happens on the event loop's thread.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from sartor.engine.request import Chunk, FinishReason, Request, TokenLogprob
from sartor.serving.errors import ApiError

_ENTRY_BYTES = 400  # of a token with its log probability, as an object


@dataclass(slots=True)
class Delta:
    """What is new of one choice of one prompt since the reader last looked."""

    prompt: int
    choice: int
    texts: list[str] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    embedding: bytes = b""

    @property
    def text(self) -> str:
        return "".join(self.texts)


class Answer:
    """One chunk stream over all prompts and choices of a request.

    Chunks that the reader has not fetched are merged, a choice each: a reader who never comes
    holds no more than the text of the answer. Whoever holds an answer must ``close`` it, which
    calls ``abort`` with the id of each prompt that still runs. ``weigh`` is told whenever the
    answer holds more bytes, or fewer, with the difference: those of news that nobody has fetched,
    and those that the reader keeps.

    While the reader waits in ``next``, ``taker`` may take news on the spot: it gets them and says
    whether it did. That saves waking a task for every token. The end and errors are for ``next``.
    """

    def __init__(
        self,
        requests: Sequence[Request],
        abort: Callable[[str], None],
        weigh: Callable[[Answer, int], None] = lambda answer, more: None,
    ) -> None:
        self.tenant = requests[0].tenant if requests else ""
        self.prompt_tokens = sum(len(request.prompt) for request in requests)
        self.completion_tokens = 0
        self.taker: Callable[[list[Delta]], bool] | None = None
        self.held = 0
        self._abort = abort
        self._weigh = weigh
        self._kept = 0
        self._cached = [0] * len(requests)
        self._index = {request.id: i for i, request in enumerate(requests)}
        self._open = {request.id for request in requests}
        self._pending: dict[tuple[int, int], Delta] = {}
        self._error: ApiError | None = None
        self._news = asyncio.Event()
        self._waiting = False

    @property
    def cached_tokens(self) -> int:
        return sum(self._cached)

    async def next(self) -> list[Delta]:
        """What is new; waits for something, and is empty at the end. Raises ApiError."""
        while not self._pending and self._open and self._error is None:
            self._news.clear()
            self._waiting = True
            try:
                await self._news.wait()
            finally:
                self._waiting = False
        if self._error is not None and not self._pending:
            raise self._error
        deltas, self._pending = list(self._pending.values()), {}
        self._hold(self._kept)
        return deltas

    def keep(self, size: int) -> None:
        """The reader keeps so many bytes of what it fetched, until the answer is closed."""
        self._kept = size
        self._hold(size)

    def close(self) -> None:
        for request_id in self._open:
            self._abort(request_id)
        self._open.clear()
        self._kept = 0
        self._hold(0)

    def push(self, chunk: Chunk, done: bool) -> None:
        """One more chunk; ``done``: the last one of its prompt. The reader hears of it by
        ``tell``."""
        prompt = self._index[chunk.request_id]
        place = (prompt, chunk.choice)
        delta = self._pending.get(place)
        if delta is None:
            delta = self._pending[place] = Delta(prompt, chunk.choice)
        if chunk.text:
            delta.texts.append(chunk.text)
        if chunk.logprobs:
            delta.logprobs.extend(chunk.logprobs)
        delta.finish_reason = chunk.finish_reason
        delta.embedding = chunk.embedding
        size = len(chunk.text) + len(chunk.embedding)
        if chunk.logprobs:
            size += _ENTRY_BYTES * sum(1 + len(entry.top) for entry in chunk.logprobs)
        self._hold(self.held + size)
        self.completion_tokens += len(chunk.tokens)
        if chunk.cached_tokens > self._cached[prompt]:
            self._cached[prompt] = chunk.cached_tokens
        if done:
            self._open.discard(chunk.request_id)

    def tell(self) -> None:
        """Lets the reader have what was pushed."""
        if (
            self._waiting
            and not self._news.is_set()  # then the reader is about to look for itself
            and self.taker is not None
            and self._open
            and self._error is None
            and self.taker(list(self._pending.values()))
        ):
            self._pending = {}
            self._hold(self._kept)
        else:
            self._news.set()

    def fail(self, error: ApiError) -> None:
        """One prompt cannot be answered, so the whole request cannot."""
        self._error = self._error or error
        self.close()
        self._news.set()

    def give_up(self, error: ApiError) -> None:
        """As :meth:`fail`, and what nobody has fetched is lost."""
        self._pending = {}
        self.fail(error)

    def _hold(self, size: int) -> None:
        more, self.held = size - self.held, size
        if more:
            self._weigh(self, more)
