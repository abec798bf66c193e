"""An answer as a stream of server-sent events."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator

from sartor.serving.answer import Answer, Delta
from sartor.serving.errors import ApiError, internal
from sartor.serving.openai_format import Json, Shape, usage
from sartor.serving.openai_types import StreamOptions
from sartor.serving.request_record import RequestRecord
from sartor.serving.streaming import KEEP_ALIVE, BodyWriter, event

logger = logging.getLogger(__name__)
_KEEP_ALIVE_SECONDS = 15.0


class AnswerEvents:
    """Words an answer, and tells its record what went wrong."""

    def __init__(
        self, shape: Shape, answer: Answer, options: StreamOptions, record: RequestRecord
    ) -> None:
        self._shape = shape
        self._answer = answer
        self._record = record
        self._with_usage = bool(options.include_usage)
        self._running_usage = self._with_usage and bool(options.continuous_usage_stats)
        self._head = shape.head()
        self._spoke = False

    async def pieces(self, first: list[Delta]) -> AsyncIterator[bytes]:
        """All events but the closing one, from the ``first`` news on."""
        deltas: list[Delta] | None = first
        try:
            while deltas is None or deltas:
                if deltas is None:
                    yield KEEP_ALIVE
                elif words := self._word(deltas):
                    yield words
                deltas = await self._news()
            if self._with_usage:
                yield event({**self._head, "choices": [], "usage": usage(self._answer)})
        except ApiError as error:
            self._record.error = error
            yield event(error.body())
        except Exception as error:  # the headers have gone out: this is the only way left to say so
            logger.exception("an answer broke off")
            self._record.error = internal(f"the answer broke off: {type(error).__name__}")
            yield event(self._record.error.body())

    def write_at_once(self, writer: BodyWriter) -> None:
        """From now on, news go to ``writer`` while the stream waits for them and it is ready."""

        def take(deltas: list[Delta]) -> bool:
            if not writer.ready:
                return False
            try:
                words = self._word(deltas)
            except Exception:  # not the caller's trouble: the stream will meet it, and say so
                return False
            if words:
                writer.write(words)
                self._spoke = True
            return True

        self._answer.taker = take

    def _word(self, deltas: list[Delta]) -> bytes:
        extra: Json = {"usage": None} if self._with_usage else {}
        if self._running_usage:
            extra = {"usage": usage(self._answer)}
        return b"".join(
            event({**self._head, "choices": [choice], **extra})
            for delta in deltas
            for choice in self._shape.events(delta)
        )

    async def _news(self) -> list[Delta] | None:
        """What is new; None when nothing was said for a while."""
        while True:
            self._spoke = False
            try:
                async with asyncio.timeout(_KEEP_ALIVE_SECONDS):
                    return await self._answer.next()
            except TimeoutError:
                if not self._spoke:
                    return None
