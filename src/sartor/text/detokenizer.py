"""Token by token, back to text."""

from __future__ import annotations

import codecs
from collections.abc import Sequence

from sartor.errors import UsageError
from sartor.text.tokenizer import Tokenizer


class Detokenizer:
    """The text of one output stream, as far as it is certain.

    ``push`` returns text that later tokens cannot change: no part of a character, nothing that may
    still become a stop string. All pushes and ``finish`` together give ``tokenizer.decode`` of the
    tokens, or what precedes the first stop string to be completed; how the tokens cut the text
    makes no difference.

    ``prompt_ids``: the tokens before the stream. With them a SentencePiece stream keeps its leading
    space (the text goes on), and a character that the prompt left open is completed; without them
    the stream is decoded as a text of its own. Costs a constant number of steps per token.

    UsageError if a stop string is empty.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt_ids: Sequence[int] = (),
        stop: Sequence[str] = (),
        skip_special: bool = True,
    ) -> None:
        if not all(stop):
            raise UsageError("a stop string is empty; give at least one character or none at all")
        self.stopped_by: str | None = None
        self._tokenizer = tokenizer
        self._skip_special = skip_special
        self._stop = tuple(stop)
        self._longest = max(map(len, self._stop), default=0)
        self._held = ""
        self._parts: list[str] = []
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        tail = self._prompt_tail(prompt_ids)
        self._at_start = tokenizer.strips_leading_space and not tail
        self._utf8.decode(tail)

    @property
    def text(self) -> str:
        """Everything returned so far."""
        if len(self._parts) > 1:
            self._parts = ["".join(self._parts)]
        return self._parts[0] if self._parts else ""

    def push(self, token_id: int) -> str:
        """Take one token; the text that has become certain (often empty)."""
        if self.stopped_by is not None:
            return ""
        data = self._tokenizer.piece(token_id, self._skip_special)
        if self._at_start and data:
            self._at_start = False
            if data.startswith(b" "):
                data = data[1:]
        return self._release(self._utf8.decode(data), last=False)

    def finish(self) -> str:
        """No more tokens: the rest of the text; an unfinished character becomes U+FFFD."""
        if self.stopped_by is not None:
            return ""
        return self._release(self._utf8.decode(b"", final=True), last=True)

    def _release(self, new: str, *, last: bool) -> str:
        if self._stop:
            new = self._apply_stop(self._held + new, last)
        if new:
            self._parts.append(new)
        return new

    def _apply_stop(self, window: str, last: bool) -> str:
        end, start = len(window) + 1, 0
        for stop in self._stop:
            # Completed first wins, not begun first: otherwise the answer would depend on how
            # much text one token brings.
            at = window.find(stop)
            if at >= 0 and (at + len(stop), at) < (end, start):
                end, start = at + len(stop), at
                self.stopped_by = stop
        if self.stopped_by is not None:
            self._held = ""
            return window[:start]
        keep = 0 if last else self._possible_stop(window)
        certain = len(window) - keep
        self._held = window[certain:]
        return window[:certain]

    def _possible_stop(self, window: str) -> int:
        """Length of the longest end of ``window`` that is the beginning of a stop string."""
        earliest = max(0, len(window) - self._longest + 1)
        best = len(window)
        for stop in self._stop:
            at = window.find(stop[0], max(earliest, len(window) - len(stop) + 1))
            while 0 <= at < best:
                if stop.startswith(window[at:]):
                    best = at
                    break
                at = window.find(stop[0], at + 1)
        return len(window) - best

    def _prompt_tail(self, prompt_ids: Sequence[int]) -> bytes:
        """The last bytes of the prompt's text, from the start of a character on."""
        tail = b""
        for token in reversed(prompt_ids):
            tail = self._tokenizer.piece(int(token), self._skip_special) + tail
            if len(tail) >= 4:
                break
        tail = tail[-4:]
        while tail and tail[0] & 0xC0 == 0x80:
            tail = tail[1:] if len(tail) > 1 else b"?"
        return tail
