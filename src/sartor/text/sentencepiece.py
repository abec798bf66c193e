"""SentencePiece BPE straight from pieces and scores.

The algorithm of SentencePiece (``bpe_model.cc``): of all neighbouring pairs whose concatenation is
a piece, join the one with the best score, leftmost first, until none is left. It needs no merge
table. Deriving one from 262,144 Gemma pieces takes seconds, and its ranks only approximate the
tie rule; the dictionary built here takes a tenth of a second.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from heapq import heapify, heappop, heappush
from typing import Literal

import numpy as np
from numpy.typing import NDArray

SPACE = "\u2581"  # how SentencePiece spells a space inside a piece

TokenTypes = NDArray[np.integer]  # one TokenType for each token, by id

Prefix = Literal["all", "spaceless", "first"]

_WORD = re.compile(r"\w")
_WHITE_SPACE_TEXT = "\t\n\x0b\x0c\r \x85\xa0\u1680\u2028\u2029\u202f\u205f\u3000" + "".join(
    map(chr, range(0x2000, 0x200B))
)  # Unicode's White_Space, as the tokenizers library has it; Python's isspace() knows others too
_WHITE_SPACE = frozenset(_WHITE_SPACE_TEXT)

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


@dataclass(frozen=True)
class Surroundings:
    """What a token takes of the text around it (``AddedToken`` of the ``tokenizers`` library).

    ``lstrip``, ``rstrip``: white space before and behind it belongs to it. ``single_word``: it
    counts only where no word goes on before or behind it.
    """

    lstrip: bool = False
    rstrip: bool = False
    single_word: bool = False


@dataclass(frozen=True)
class AddedPiece:
    """A token that is matched in the text before anything is split or merged.

    ``special``: a control token, which counts only where special tokens are read. ``normalized``:
    where a tokenizer.json has a normaliser, it is matched behind that.
    """

    id: int
    special: bool
    surroundings: Surroundings = Surroundings()
    normalized: bool = False


class Splitter:
    """Cuts text at the given strings: the leftmost match, and there the longest."""

    def __init__(
        self, tokens: Mapping[str, int], surroundings: Mapping[str, Surroundings] | None = None
    ) -> None:
        self._tokens = dict(tokens)
        nothing = Surroundings()
        self._surroundings = {t: s for t, s in (surroundings or {}).items() if s != nothing}
        lengths: dict[str, set[int]] = {}
        for token in filter(None, self._tokens):  # nothing would be found everywhere
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
            begin, end = at, at + len(match)
            takes = self._surroundings.get(match)
            if takes is not None:
                if takes.single_word and _in_word(text, begin, end):
                    at = end
                    continue
                while takes.lstrip and begin > start and text[begin - 1] in _WHITE_SPACE:
                    begin -= 1
                while takes.rstrip and end < len(text) and text[end] in _WHITE_SPACE:
                    end += 1
            if start < begin:
                yield text[start:begin], None
            yield match, self._tokens[match]
            start = at = end
        if start < len(text):
            yield text[start:], None

    def first(self, text: str, at: int = 0) -> tuple[int, int, int] | None:
        """Begin, end and id of the first match from ``at`` on, without the white space that it
        takes."""
        while self._start is not None and (found := self._start.search(text, at)):
            at = found.start()
            match = self._longest(text, at)
            if match is None:
                at += 1
                continue
            end = at + len(match)
            takes = self._surroundings.get(match)
            if takes is None or not takes.single_word or not _in_word(text, at, end):
                return at, end, self._tokens[match]
            at = end
        return None

    def _longest(self, text: str, at: int) -> str | None:
        for key in (text[at : at + 2], text[at]):
            for size in self._lengths.get(key, ()):
                candidate = text[at : at + size]
                if candidate in self._tokens:
                    return candidate
        return None


def _in_word(text: str, begin: int, end: int) -> bool:
    """Whether a word goes on before ``begin`` or behind ``end``."""
    return bool(_WORD.match(text[begin - 1 : begin]) or _WORD.match(text[end : end + 1]))


class SentencePieceBPE:
    """Encodes text; ids equal those of the ``sentencepiece`` library.

    Two things the library cannot do are added: control tokens are recognised in the text when
    asked for, and the text after one starts afresh (with the space prefix, if the model has one),
    as every chat format of these models expects.

    ``added``: tokens that are matched in the raw text, by their spelling. ``prefix``: which texts
    get the space prefix. "all": also those that begin with a space, as in SentencePiece itself.
    "spaceless": those that do not. "first": of those, only the one at the very start.
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
        added: Mapping[str, AddedPiece] | None = None,
        prefix: Prefix = "all",
    ) -> None:
        added = dict(added or {})
        control = [*ids_of_type(types, TokenType.CONTROL), *ids_of_type(types, TokenType.UNKNOWN)]
        user = ids_of_type(types, TokenType.USER_DEFINED)
        user_ids = {tokens[i].replace(" ", SPACE): i for i in user if tokens[i] not in added}
        added = {**{tokens[i]: AddedPiece(i, special=True) for i in control}, **added}
        takes = {text: piece.surroundings for text, piece in added.items()}
        self._added = added
        self._takes = {piece.id: piece.surroundings for piece in added.values()}
        plain = {text: piece.id for text, piece in added.items() if not piece.special}
        self._raw = Splitter(plain, takes)
        self._raw_special = Splitter({text: piece.id for text, piece in added.items()}, takes)
        self._user = Splitter(user_ids)
        self._ids = dict(zip(tokens, range(len(tokens)), strict=True))
        for kind in (TokenType.CONTROL, TokenType.UNKNOWN, TokenType.BYTE):
            for i in ids_of_type(types, kind):
                self._ids.pop(tokens[i], None)  # a damaged file may have it twice
        self._ids.update(user_ids)
        self._scores = scores
        self._unused = frozenset(ids_of_type(types, TokenType.UNUSED))
        self._bytes = _byte_ids(tokens, types)
        self._unknown = unknown_id
        self._prefix: Prefix | None = prefix if space_prefix else None
        self._remove_extra_spaces = remove_extra_spaces
        self._normalize = normalize
        # No piece reaches over a space into the next word in nearly all models: words are then
        # independent of each other, and the ones seen before need no work.
        crossing = re.search(f"[^{SPACE}\0]{SPACE}", "\0".join(self._ids)) is not None
        self._word = None if crossing else re.compile(f"{SPACE}*[^{SPACE}]*")
        self._cache: dict[str, tuple[int, ...]] = {}

    def encode(self, text: str, parse_special: bool) -> list[int]:
        """Token ids of ``text``, without bos and eos."""
        ids: list[int] = []
        at_start = True
        for piece, token in (self._raw_special if parse_special else self._raw).split(text):
            if token is None:
                ids += self._encode_span(piece, at_start)
            else:
                ids.append(token)
            at_start = False
        return ids

    def added(self) -> Mapping[str, AddedPiece]:
        """The tokens that are matched in the raw text, by their spelling."""
        return self._added

    def normalizer(self) -> None:
        """No token is looked for behind the normaliser but those that stand for text."""

    def encode_parts(self, parts: Sequence[str | int]) -> list[int]:
        """Token ids of a text in parts: ids, of which negative ones stand for nothing, and plain
        text."""
        ids: list[int] = []
        at_start = True
        for index, part in enumerate(parts):
            if isinstance(part, int):
                ids += [part] if part >= 0 else []
                at_start = False
                continue
            if index and self._around(parts[index - 1]).rstrip:
                part = part.lstrip(_WHITE_SPACE_TEXT)
            if index + 1 < len(parts) and self._around(parts[index + 1]).lstrip:
                part = part.rstrip(_WHITE_SPACE_TEXT)
            for piece, token in self._raw.split(part):
                if token is None:
                    ids += self._encode_span(piece, at_start)
                else:
                    ids.append(token)
                at_start = False
        return ids

    def _around(self, part: str | int) -> Surroundings:
        nothing = Surroundings()
        return nothing if isinstance(part, str) else self._takes.get(part, nothing)

    def _encode_span(self, text: str, at_start: bool) -> list[int]:
        if self._normalize is not None:
            text = self._normalize(text)
        if self._remove_extra_spaces:
            text = " ".join(word for word in text.split(" ") if word)
        if not text:
            return []
        text = text.replace(" ", SPACE)
        if self._prefix == "all" or (
            self._prefix is not None
            and (at_start or self._prefix == "spaceless")
            and not text.startswith(SPACE)
        ):
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
        left = [symbol]  # no recursion: a piece may be made of as many others as it is long
        while left:
            symbol = left.pop()
            token = self._ids.get(symbol)
            if token is not None and token in self._unused and symbol in made_of:
                # Unused pieces are stepping stones of the merges, but never a result.
                left += reversed(made_of[symbol])
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
