"""One answer: shown while it is made, and how fast that went."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

if TYPE_CHECKING:
    from collections.abc import Generator

    from sartor.engine.load import LoadedModel
    from sartor.engine.request import Chunk, FinishReason


@dataclass(frozen=True)
class Answer:
    """A whole answer.

    prompt_seconds   from the call to the first token
    decode_seconds   from the first token to the last
    cached_tokens    prompt tokens that needed no computing
    """

    text: str
    finish_reason: FinishReason | None
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    prompt_seconds: float
    decode_seconds: float

    @property
    def prompt_rate(self) -> float | None:
        """Computed prompt tokens a second, with the first token of the answer."""
        computed = self.prompt_tokens - self.cached_tokens
        return computed / self.prompt_seconds if self.prompt_seconds else None

    @property
    def decode_rate(self) -> float | None:
        """Tokens a second after the first one; None for a single token."""
        later = self.completion_tokens - 1
        return later / self.decode_seconds if later > 0 and self.decode_seconds else None

    def speed(self) -> str:
        """One line for the screen."""
        cached = f" ({self.cached_tokens} cached)" if self.cached_tokens else ""
        parts = [f"prompt {self.prompt_tokens} tokens{cached}{_rate(self.prompt_rate)}"]
        parts.append(f"answer {self.completion_tokens} tokens{_rate(self.decode_rate)}")
        return ", ".join(parts)


def follow(
    chunks: Iterator[Chunk],
    show: Callable[[str], None],
    stopped: Callable[[], bool] = lambda: False,
) -> Answer:
    """Hands each piece of text to ``show`` as it comes; the request ends with this call.

    Where ``stopped`` says so after a piece, nothing more is made: ``finish_reason`` is None then.
    """
    started = first = last = time.perf_counter()
    texts: list[str] = []
    chunk: Chunk | None = None
    # Closing aborts: whatever ends the loop, nothing goes on in the engine.
    with closing(cast("Generator[Chunk, None, None]", chunks)) as stream:
        for chunk in stream:
            last = time.perf_counter()
            if first == started and chunk.tokens:
                first = last
            if chunk.text:
                texts.append(chunk.text)
                show(chunk.text)
            if stopped():
                break
    assert chunk is not None  # every request ends with a chunk
    return Answer(
        text="".join(texts),
        finish_reason=chunk.finish_reason,
        prompt_tokens=chunk.prompt_tokens,
        cached_tokens=chunk.cached_tokens,
        completion_tokens=chunk.completion_tokens,
        prompt_seconds=first - started,
        decode_seconds=last - first,
    )


def more_context(loaded: LoadedModel, context: int) -> str:
    """How to get a longer context than this one, as the end of a sentence; empty for not at all."""
    limit = loaded.model.context_length
    if context < loaded.context_length:
        return f", or free some memory: it holds no more than {context} tokens of context now"
    if context < limit:
        return f", or start with a --context of up to {limit}"
    return f" ({limit} is this model's own limit)"


def _rate(rate: float | None) -> str:
    return "" if rate is None else f" at {rate:.1f} tokens/s"
