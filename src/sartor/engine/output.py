"""From tokens to chunks: text, stop conditions and log probabilities of one choice."""

from __future__ import annotations

import time

from sartor.engine.request import Chunk, FinishReason, Request, TokenLogprob
from sartor.text.detokenizer import Detokenizer
from sartor.text.tokenizer import Tokenizer


class OutputStream:
    """What a client sees of one choice, and the decision when it ends.

    An end-of-text token ends the answer and is no part of its text; a stop string ends it and
    is cut off. Both count as completion tokens.
    """

    __slots__ = (
        "_detokenizer",
        "_ends",
        "_longest",
        "_request",
        "_started",
        "_tokenizer",
        "cached_tokens",
        "choice",
        "completion_tokens",
        "finish_reason",
    )

    def __init__(self, request: Request, choice: int, tokenizer: Tokenizer, limit: int) -> None:
        """``limit`` is the longest that prompt and output may get together, in tokens."""
        params = request.params
        self.choice = choice
        self.cached_tokens: int | None = None
        """Prompt tokens found in the cache; None before the first step."""
        self.completion_tokens = 0
        self.finish_reason: FinishReason | None = None
        self._request = request
        self._started = 0.0
        self._tokenizer = tokenizer
        self._longest = limit - len(request.prompt)
        self._ends = frozenset(params.stop_token_ids)
        if not params.ignore_eos:
            self._ends |= tokenizer.eos_ids
        self._detokenizer: Detokenizer | None = None
        if request.want_text or params.stop:
            self._detokenizer = Detokenizer(tokenizer, request.prompt, params.stop)
        for token in request.emitted[choice] if request.emitted else ():
            if self.finish_reason is None:  # its text has been sent
                self._advance(token)

    def admit(self, cached_tokens: int) -> None:
        """The choice gets its place in a step. One that comes back from a preemption had it."""
        if self.cached_tokens is None:
            self.cached_tokens = cached_tokens
            self._started = time.perf_counter()

    def push(self, token: int, logprob: TokenLogprob | None) -> Chunk:
        """The chunk of one generated token."""
        text = self._advance(token)
        prefill_seconds = 0.0
        if self._started:
            prefill_seconds = time.perf_counter() - self._started
            self._started = 0.0
        logprobs = () if logprob is None else (logprob,)
        return self._chunk(text, (token,), logprobs, None, prefill_seconds)

    def end(self, reason: FinishReason, error: str | None = None) -> Chunk:
        """The last chunk of a choice that ends for a reason outside of its tokens."""
        text = ""
        if self.finish_reason is None and self._detokenizer is not None:
            text = self._detokenizer.finish()
        self.finish_reason = reason
        return self._chunk(text, (), (), error)

    def logprob(self, token: int, logprob: float, top: tuple[TokenLogprob, ...]) -> TokenLogprob:
        """The public form of one token's log probability."""
        tokenizer = self._tokenizer
        return TokenLogprob(
            token, tokenizer.token_text(token), tokenizer.token_bytes(token), logprob, top
        )

    def _advance(self, token: int) -> str:
        """Takes one token; returns its text and sets ``finish_reason`` where it is the last."""
        self.completion_tokens += 1
        detokenizer = self._detokenizer
        text = ""
        if token in self._ends:
            self.finish_reason = "stop"
        elif detokenizer is not None:
            text = detokenizer.push(token)
            if detokenizer.stopped_by is not None:
                self.finish_reason = "stop"
        if self.finish_reason is None and self.completion_tokens >= self._longest:
            self.finish_reason = "length"
        if self.finish_reason is not None and detokenizer is not None:
            text += detokenizer.finish()
        return text

    def _chunk(
        self,
        text: str,
        tokens: tuple[int, ...],
        logprobs: tuple[TokenLogprob, ...],
        error: str | None,
        prefill_seconds: float = 0.0,
    ) -> Chunk:
        request = self._request
        return Chunk(
            request.id,
            self.choice,
            text if request.want_text else "",
            tokens,
            logprobs,
            self.finish_reason,
            error,
            len(request.prompt),
            self.completion_tokens,
            self.cached_tokens or 0,
            prefill_seconds=prefill_seconds,
        )
