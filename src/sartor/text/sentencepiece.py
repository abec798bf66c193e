"""SentencePiece BPE straight from pieces and scores.

The algorithm of SentencePiece (``bpe_model.cc``): of all neighbouring pairs whose concatenation is
a piece, join the one with the best score, leftmost first, until none is left. It needs no merge
table. Deriving one from 262,144 Gemma pieces takes seconds, and its ranks only approximate the
tie rule; the dictionary built here takes a tenth of a second.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from enum import IntEnum
from heapq import heapify, heappop, heappush

import numpy as np
from numpy.typing import NDArray

SPACE = "\u2581"  # how SentencePiece spells a space inside a piece

TokenTypes = NDArray[np.integer]  # one TokenType for each token, by id

_CACHE_LIMIT = 1 << 16
_CACHED_LENGTH = 64


class TokenType(IntEnum):
    """``SentencePiece.Type`` in sentencepiece_model.proto; GGUF uses the same numbers."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


class Splitter:
    """Cuts text at the given strings: the leftmost match, and there the longest."""

    def __init__(self, tokens: Mapping[str, int]) -> None:
        self._tokens = dict(tokens)
        lengths: dict[str, set[int]] = {}
        for token in self._tokens:
            lengths.setdefault(token[:2], set()).add(len(token))
        self._lengths = {start: sorted(sizes, reverse=True) for start, sizes in lengths.items()}
        starts = sorted(lengths, key=len, reverse=True)
        self._start = re.compile("|".join(map(re.escape, starts))) if starts else None

    def split(self, text: str) -> Iterator[tuple[str, int | None]]:
        """Pieces of ``text`` in order: ``(text, None)`` between matches, ``(match, id)``."""
        start = at = 0
        while self._start is not None and (found := self._start.search(text, at)):
            at = found.start()
            match = self._longest(text, at)
            if match is None:
                at += 1
                continue
            if start < at:
                yield text[start:at], None
            yield match, self._tokens[match]
            start = at = at + len(match)
        if start < len(text):
            yield text[start:], None

    def _longest(self, text: str, at: int) -> str | None:
        for key in (text[at : at + 2], text[at]):
            for size in self._lengths.get(key, ()):
                candidate = text[at : at + size]
                if candidate in self._tokens:
                    return candidate
        return None


class SentencePieceBPE:
    """Encodes text; ids equal those of the ``sentencepiece`` library.

    Two things the library cannot do are added: control tokens are recognised in the text when
    asked for, and the text after one starts afresh (with the space prefix, if the model has one),
    as every chat format of these models expects.
    """

    def __init__(
        self,
        tokens: Sequence[str],
        scores: Sequence[float],
        types: TokenTypes,
        *,
        unknown_id: int | None,
        space_prefix: bool,
        remove_extra_spaces: bool = False,
        normalize: Callable[[str], str] | None = None,
    ) -> None:
        control = ids_of_type(types, TokenType.CONTROL)
        user = ids_of_type(types, TokenType.USER_DEFINED)
        user_ids = {tokens[i].replace(" ", SPACE): i for i in user}
        self._control = Splitter({tokens[i]: i for i in control})
        self._user = Splitter(user_ids)
        self._ids = dict(zip(tokens, range(len(tokens)), strict=True))
        for kind in (TokenType.CONTROL, TokenType.UNKNOWN, TokenType.BYTE):
            for i in ids_of_type(types, kind):
                del self._ids[tokens[i]]
        self._ids.update(user_ids)
        self._scores = scores
        self._unused = frozenset(ids_of_type(types, TokenType.UNUSED))
        self._bytes = _byte_ids(tokens, types)
        self._unknown = unknown_id
        self._space_prefix = space_prefix
        self._remove_extra_spaces = remove_extra_spaces
        self._normalize = normalize
        # No piece reaches over a space into the next word in nearly all models: words are then
        # independent of each other, and the ones seen before need no work.
        crossing = re.search(f"[^{SPACE}\0]{SPACE}", "\0".join(self._ids)) is not None
        self._word = None if crossing else re.compile(f"{SPACE}*[^{SPACE}]*")
        self._cache: dict[str, tuple[int, ...]] = {}

    def encode(self, text: str, parse_special: bool) -> list[int]:
        """Token ids of ``text``, without bos and eos."""
        if not parse_special:
            return self._encode_span(text)
        ids: list[int] = []
        for piece, token in self._control.split(text):
            if token is None:
                ids += self._encode_span(piece)
            else:
                ids.append(token)
        return ids

    def _encode_span(self, text: str) -> list[int]:
        if self._normalize is not None:
            text = self._normalize(text)
        if self._remove_extra_spaces:
            text = " ".join(word for word in text.split(" ") if word)
        if not text:
            return []
        text = text.replace(" ", SPACE)
        if self._space_prefix:
            text = SPACE + text
        ids: list[int] = []
        for piece, token in self._user.split(text):
            if token is not None:
                ids.append(token)
            elif self._word is None:
                ids += self._merge(piece)
            else:
                for word in self._word.findall(piece):
                    ids += self._encode_word(word)
        return self._fuse_unknown(ids)

    def _encode_word(self, word: str) -> Sequence[int]:
        ids = self._cache.get(word)
        if ids is None:
            ids = tuple(self._merge(word))
            if len(word) <= _CACHED_LENGTH:
                if len(self._cache) >= _CACHE_LIMIT:
                    self._cache.clear()
                self._cache[word] = ids
        return ids

    def _merge(self, word: str) -> list[int]:
        """The agenda algorithm: O(n log n) in the length of the word."""
        lookup, scores = self._ids.get, self._scores
        symbols: list[str] = list(word)
        count = len(symbols)
        before = list(range(-1, count - 1))
        after = list(range(1, count + 1))
        made_of: dict[str, tuple[str, str]] = {}
        agenda: list[tuple[float, int, int, int]] = []  # (-score, left, right, joined length)

        def pair(left: int, right: int) -> tuple[float, int, int, int] | None:
            joined = symbols[left] + symbols[right]
            token = lookup(joined)
            if token is None:
                return None
            if token in self._unused:
                made_of[joined] = (symbols[left], symbols[right])
            return (-scores[token], left, right, len(joined))

        for i in range(count - 1):
            if (entry := pair(i, i + 1)) is not None:
                agenda.append(entry)
        heapify(agenda)
        while agenda:
            _, left, right, size = heappop(agenda)
            if not symbols[left] or not symbols[right]:
                continue
            if len(symbols[left]) + len(symbols[right]) != size:
                continue  # one side has grown since
            symbols[left] += symbols[right]
            symbols[right] = ""
            following = after[left] = after[right]
            if following < count:
                before[following] = left
                if (entry := pair(left, following)) is not None:
                    heappush(agenda, entry)
            if before[left] >= 0 and (entry := pair(before[left], left)) is not None:
                heappush(agenda, entry)

        ids: list[int] = []
        for symbol in symbols:
            if symbol:
                self._emit(symbol, made_of, ids)
        return ids

    def _emit(self, symbol: str, made_of: Mapping[str, tuple[str, str]], ids: list[int]) -> None:
        token = self._ids.get(symbol)
        if token is not None and token in self._unused and symbol in made_of:
            # Unused pieces are stepping stones of the merges, but never a result.
            for part in made_of[symbol]:
                self._emit(part, made_of, ids)
        elif token is not None and token not in self._unused:
            ids.append(token)
        elif self._bytes is not None:
            ids += [self._bytes[byte] for byte in symbol.encode("utf-8")]
        elif self._unknown is not None:
            ids.append(self._unknown)

    def _fuse_unknown(self, ids: list[int]) -> list[int]:
        """A run of unknown characters is one unknown token."""
        if self._bytes is not None or self._unknown not in ids:
            return ids
        unknown = self._unknown
        return [t for i, t in enumerate(ids) if t != unknown or i == 0 or ids[i - 1] != unknown]


def _byte_ids(tokens: Sequence[str], types: TokenTypes) -> list[int] | None:
    """Ids of the 256 byte-fallback tokens by byte; None unless all are there."""
    found = {byte_value(tokens[i]): i for i in ids_of_type(types, TokenType.BYTE)}
    return [found[b] for b in range(256)] if all(b in found for b in range(256)) else None


def ids_of_type(types: TokenTypes, kind: TokenType) -> list[int]:
    """The ids of all tokens of one type."""
    found: list[int] = np.flatnonzero(types == int(kind)).tolist()
    return found


def byte_value(token: str) -> int | None:
    """The byte that a fallback token such as ``<0x0A>`` stands for."""
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        try:
            return int(token[3:5], 16)
        except ValueError:
            return None
    return None
