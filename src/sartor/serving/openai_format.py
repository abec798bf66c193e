"""Answers in the shapes of the OpenAI API, streamed and whole, from the same deltas.

Source: the OpenAI API reference (objects chat.completion, chat.completion.chunk,
text_completion).
"""

from __future__ import annotations

import codecs
import time
from collections.abc import Sequence
from typing import Any, Protocol
from uuid import uuid4

from sartor.engine.request import TokenLogprob
from sartor.serving.answer import Answer, Delta

Json = dict[str, Any]


class Shape(Protocol):
    """How one endpoint words its answers; holds the state of one answer."""

    def head(self) -> Json:
        """Fields that every object of the answer has."""

    def events(self, delta: Delta) -> list[Json]:
        """The stream's choices for what is new."""

    def chances(self, index: int, logprobs: Sequence[TokenLogprob]) -> dict[str, list[Any]] | None:
        """The lists that log probabilities of a choice are added to, with what is new; None where
        the answer has none."""

    def choice(self, index: int, text: str, logprobs: Json | None, end: str | None) -> Json:
        """One choice of a whole answer, with the lists of :meth:`chances`."""

    def index(self, delta: Delta) -> int: ...


class ChatShape:
    """chat.completion and chat.completion.chunk."""

    def __init__(self, model: str, fingerprint: str, *, logprobs: bool, stream: bool) -> None:
        self._head = _head("chatcmpl-", "chat.completion", model, fingerprint, stream)
        self._logprobs = logprobs
        self._greeted: set[int] = set()

    def head(self) -> Json:
        return self._head

    def index(self, delta: Delta) -> int:
        return delta.choice

    def events(self, delta: Delta) -> list[Json]:
        new = []
        if delta.choice not in self._greeted:
            self._greeted.add(delta.choice)
            new.append(self._event(delta.choice, {"role": "assistant", "content": ""}, None, None))
        if delta.text or delta.logprobs:
            content = {"content": delta.text}
            lists = self.chances(delta.choice, delta.logprobs)
            new.append(self._event(delta.choice, content, self._with_refusal(lists), None))
        if delta.finish_reason is not None:
            new.append(self._event(delta.choice, {}, None, delta.finish_reason))
        return new

    def choice(self, index: int, text: str, logprobs: Json | None, end: str | None) -> Json:
        return {
            "index": index,
            "message": {"role": "assistant", "content": text, "refusal": None},
            "logprobs": self._with_refusal(logprobs),
            "finish_reason": end,
        }

    def chances(self, index: int, logprobs: Sequence[TokenLogprob]) -> dict[str, list[Any]] | None:
        if not self._logprobs:
            return None
        return {
            "content": [
                {**_chance(entry), "top_logprobs": [_chance(other) for other in entry.top]}
                for entry in logprobs
            ]
        }

    def _event(self, index: int, delta: Json, logprobs: Json | None, end: str | None) -> Json:
        return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": end}

    def _with_refusal(self, lists: Json | None) -> Json | None:
        return None if lists is None else {**lists, "refusal": None}


class CompletionShape:
    """text_completion. Choices of several prompts are numbered through, prompt by prompt.

    ``echoes``: texts to put in front of the choices of each prompt, or nothing.
    """

    def __init__(
        self,
        model: str,
        fingerprint: str,
        *,
        n: int,
        logprobs: bool,
        echoes: Sequence[str],
    ) -> None:
        self._head = _head("cmpl-", "text_completion", model, fingerprint, stream=False)
        self._n = n
        self._logprobs = logprobs
        self._echoes = echoes
        self._offsets: dict[int, _Offsets] = {}
        self._begun: set[int] = set()

    def head(self) -> Json:
        return self._head

    def index(self, delta: Delta) -> int:
        return delta.prompt * self._n + delta.choice

    def events(self, delta: Delta) -> list[Json]:
        index, text = self.index(delta), delta.text
        if index not in self._begun:
            self._begun.add(index)
            text = self._echo(index) + text
        if not (text or delta.logprobs or delta.finish_reason):
            return []
        return [self._choice(index, text, self.chances(index, delta.logprobs), delta.finish_reason)]

    def choice(self, index: int, text: str, logprobs: Json | None, end: str | None) -> Json:
        return self._choice(index, self._echo(index) + text, logprobs, end)

    def chances(self, index: int, logprobs: Sequence[TokenLogprob]) -> dict[str, list[Any]] | None:
        if not self._logprobs:
            return None
        offsets = self._offsets.setdefault(index, _Offsets())
        return {
            "tokens": [entry.text for entry in logprobs],
            "token_logprobs": [_finite(entry) for entry in logprobs],
            # The chosen token is always among them, so there may be one more than asked for.
            "top_logprobs": [_by_text((*entry.top, entry)) for entry in logprobs],
            "text_offset": [offsets.next(entry.bytes) for entry in logprobs],
        }

    def _echo(self, index: int) -> str:
        return self._echoes[index // self._n] if self._echoes else ""

    def _choice(self, index: int, text: str, logprobs: Json | None, end: str | None) -> Json:
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": end}


class _Offsets:
    """Where each token's text begins, in characters; one inside a character begins with it."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._length = 0

    def next(self, data: bytes) -> int:
        begin = self._length
        self._length += len(self._decoder.decode(data))
        return begin


def usage(answer: Answer) -> Json:
    return {
        "prompt_tokens": answer.prompt_tokens,
        "completion_tokens": answer.completion_tokens,
        "total_tokens": answer.prompt_tokens + answer.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": answer.cached_tokens},
    }


def _head(prefix: str, kind: str, model: str, fingerprint: str, stream: bool) -> Json:
    return {
        "id": prefix + uuid4().hex,
        "object": kind + (".chunk" if stream else ""),
        "created": int(time.time()),
        "model": model,
        "system_fingerprint": fingerprint,
    }


def _chance(entry: TokenLogprob) -> Json:
    return {"token": entry.text, "logprob": _finite(entry), "bytes": list(entry.bytes)}


def _by_text(entries: Sequence[TokenLogprob]) -> dict[str, float]:
    """By text, as this format wants it; of tokens that look alike, the likeliest counts."""
    return {entry.text: _finite(entry) for entry in sorted(entries, key=lambda e: e.logprob)}


def _finite(entry: TokenLogprob) -> float:
    """JSON has no infinity; the API's stand-in for an impossible token is -9999."""
    return max(entry.logprob, -9999.0)
