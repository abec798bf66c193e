"""Where a text spells control tokens, or parts of them that other text could complete."""

from __future__ import annotations

import re
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Collection, Mapping, Sequence
from enum import IntEnum
from typing import Protocol, runtime_checkable

from sartor.text.sentencepiece import AddedPiece, Splitter, Surroundings

Part = str | int
"""Of a text with control tokens: text in which nothing is a control token, or a token's id."""
BREAK = -1
"""Stands between two texts that must not be joined, and for no token."""


@runtime_checkable
class SpellingEncoder(Protocol):
    """An encoder that finds tokens in the text by their spelling."""

    def added(self) -> Mapping[str, AddedPiece]:
        """The tokens that it finds, by their spelling."""
        ...

    def normalizer(self) -> Callable[[str], str] | None:
        """What it does to a text before it looks for tokens that are ``normalized``."""
        ...

    def encode_parts(self, parts: Sequence[Part]) -> list[int]:
        """Token ids of a text with its control tokens already found; see ``Tokenizer``."""
        ...


class Danger(IntEnum):
    """What a text holds: nothing; a character that begins a control token; a control token, or
    what is a control token once other text stands before or behind it."""

    NONE = 0
    START = 1
    SPELLED = 2


class ControlSpelling:
    """The spellings of one tokenizer's control tokens.

    ``added``: every token that is found by its spelling; those in ``special_ids`` are control
    tokens. Capitals and small letters count as equal where texts are searched, since a template or
    a normaliser may change them. Tokens of nothing but white space are not looked for.
    """

    def __init__(
        self,
        added: Mapping[str, AddedPiece],
        special_ids: Collection[int],
        normalize: Callable[[str], str] | None = None,
    ) -> None:
        special = {text: piece for text, piece in added.items() if piece.id in special_ids}
        control = sorted({text.lower() for text in special if text.strip()})
        self._special_ids = frozenset(piece.id for piece in special.values())
        self._texts = {piece.id: text for text, piece in special.items()}
        words = {text: p.surroundings.single_word for text, p in added.items()}
        self._tokens = Splitter(
            {text: piece.id for text, piece in added.items()},
            {text: Surroundings(single_word=single) for text, single in words.items()},
        )
        self._spelled = re.compile(f"(?={_tree(control)})", re.IGNORECASE) if control else None
        self._longest = max(map(len, control), default=0)
        self._forward, self._backward = control, sorted(text[::-1] for text in control)
        starts = {_start(text) for text in control}
        self._start = _any_of(starts)
        # Also those that begin inside another one.
        self._starts = re.compile(f"(?={_tree(starts)})", re.IGNORECASE) if control else None
        self._end = _any_of({text[-1] for text in control if not text[-1].isalnum()})
        self._normalize = None
        if normalize is not None and any(piece.normalized for piece in special.values()):
            self._normalize = normalize

    def danger(self, text: str) -> Danger:
        """What the text holds; a search for one character where it holds nothing."""
        found = Danger.NONE
        if self._start is not None and self._start.search(text):
            found = Danger.START
        if (found and self._spellings(text)) or self._head(text) is not None:
            found = Danger.SPELLED
        return found

    def normalizes_to_control(self, text: str) -> bool:
        """Whether the tokenizer's own normaliser makes control tokens of what is none before."""
        if self._normalize is None:
            return False
        changed = self._normalize(text)
        return changed != text and self.danger(changed) is Danger.SPELLED

    def starts(self, text: str) -> list[int]:
        """Places in the text, in order, of which every control token that begins in it, or whose
        beginning stands before it, has one inside."""
        return self._with_head(text, {at + 1 for at in self._beginnings(text)})

    def spelled(self, text: str) -> list[int]:
        """Those of ``starts`` that belong to the spelling of a token, or to one that the text's
        beginning or end is a part of."""
        return self._with_head(text, {at + 1 for at in self._spellings(text)})

    def parts(self, text: str, places: Sequence[int] = ()) -> tuple[list[Part], int]:
        """The text in parts, where none of its control tokens has one of ``places`` (in order)
        inside; with the number of those that have, which are left as text."""
        parts: list[Part] = []
        refused = start = at = 0
        while (found := self._tokens.first(text, at)) is not None:
            begin, end, token = found
            at = end
            if token not in self._special_ids:
                continue
            place = bisect_right(places, begin)
            # A token of one character has nothing inside: there, the place behind it counts.
            if place < len(places) and places[place] < max(end, begin + 2):
                refused += 1
                at = begin + 1
                continue
            if start < begin:
                parts.append(text[start:begin])
            parts.append(token)
            start = end
        if start < len(text):
            parts.append(text[start:])
        return parts, refused

    def broken(self, parts: Sequence[Part], ids: Collection[int]) -> list[Part]:
        """The parts, with a break inside each spelling of the control tokens ``ids``: some
        vocabularies have them as pieces of text too."""
        texts = [self._texts[i] for i in ids if i in self._texts]
        pattern = _any_of(texts)
        if pattern is None:
            return list(parts)
        cut: list[Part] = []
        for part in parts:
            if isinstance(part, int):
                cut.append(part)
                continue
            start = 0
            for found in pattern.finditer(part):
                cut += [part[start : found.start() + 1], BREAK]
                start = found.start() + 1
            cut.append(part[start:])
        return [part for part in cut if part != ""]

    def _with_head(self, text: str, places: set[int]) -> list[int]:
        head = self._head(text)
        return sorted(places if head is None else places | {head})

    def _beginnings(self, text: str, at: int = 0) -> list[int]:
        return [] if self._starts is None else [m.start() for m in self._starts.finditer(text, at)]

    def _spellings(self, text: str) -> list[int]:
        """Where tokens are spelled, and where one begins that goes on behind the text."""
        if self._spelled is None:
            return []
        found = [match.start() for match in self._spelled.finditer(text)]
        bare = text.rstrip()  # templates trim
        found += [
            at
            for at in self._beginnings(bare, max(0, len(bare) - self._longest))
            if _begins_one(self._forward, bare[at:].lower())
        ]
        return found

    def _head(self, text: str) -> int | None:
        """Where the text begins with the end of a token: text before it would make it whole.

        One character is not enough: no template writes a token but for its last character.
        """
        if self._end is None:
            return None
        bare = text.lstrip()
        head = bare[: self._longest].lower()
        for found in self._end.finditer(head):
            if found.end() > 1 and _begins_one(self._backward, head[: found.end()][::-1]):
                return len(text) - len(bare)
        return None


def _begins_one(tokens: Sequence[str], text: str) -> bool:
    """Whether one of the sorted tokens begins with the text."""
    at = bisect_left(tokens, text)
    return bool(text) and at < len(tokens) and tokens[at].startswith(text)


def _start(token: str) -> str:
    """The shortest beginning of a token that words do not have; else all of it."""
    for i, character in enumerate(token):
        if not character.isalnum() and not character.isspace():
            return token[: i + 1]
    return token


def _tree(texts: Collection[str], depth: int = 32) -> str:
    """An expression that matches what begins with one of the texts, in one way through it: a list
    of thousands would be tried one by one. Below ``depth`` branches it is a list."""
    if "" in texts:
        return ""
    if not depth:
        return f"(?:{'|'.join(map(re.escape, sorted(texts)))})"
    heads: dict[str, list[str]] = {}
    for text in texts:
        heads.setdefault(text[0], []).append(text)
    branches = []
    for _, found in sorted(heads.items()):
        shared = _shared(found)
        rest = _tree([text[len(shared) :] for text in found], depth - 1)
        branches.append(re.escape(shared) + rest)
    return branches[0] if len(branches) == 1 else f"(?:{'|'.join(branches)})"


def _shared(texts: Collection[str]) -> str:
    """What all texts begin with."""
    first, last = min(texts), max(texts)
    for i, (a, b) in enumerate(zip(first, last, strict=False)):
        if a != b:
            return first[:i]
    return first


def _any_of(texts: Collection[str]) -> re.Pattern[str] | None:
    if not texts:
        return None
    ordered = sorted(texts, key=lambda text: (-len(text), text))
    return re.compile("|".join(map(re.escape, ordered)), re.IGNORECASE)
