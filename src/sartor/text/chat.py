"""From the messages of a chat to token ids, in which only the template places control tokens.

What a template writes is one text, and a control token that is spelled in a message would open a
turn like the template's own. So texts that might do that are rendered once more, with marks inside
what they spell. A mark shows where a spelling came to stand, however the template moved, cut or
joined it: control tokens with a mark inside are text, all others are the template's.

A name that a template itself puts between the brackets of a token, as in ``<|{{ role }}|>``, is a
token of the template.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

from sartor.errors import UsageError
from sartor.text.control_spelling import ControlSpelling, Danger, Part
from sartor.text.template import ChatTemplate
from sartor.text.tokenizer import Tokenizer

# What may take something out of a text and join the rest: what it leaves may spell a token that
# no text spells.
_JOINS = re.compile(r"\b(replace|striptags|join|reverse|format|unique|translate)\b")
_MOST_MARKS = 250_000
_LETTERS = "abcdefghijkmnopqrstuvwxyz0123456789"


class Chat:
    """One conversation as a model reads it.

    ``special_in_text``: control tokens that messages spell become those tokens, as in
    transformers; else they stay text. ``variables``: further arguments of
    :meth:`ChatTemplate.render` (``tools``, ...). Raises what that raises.
    """

    def __init__(
        self,
        template: ChatTemplate,
        tokenizer: Tokenizer,
        messages: Sequence[Mapping[str, Any]],
        /,
        *,
        special_in_text: bool = False,
        **variables: Any,
    ) -> None:
        self._template = template
        self._tokenizer = tokenizer
        self._special_in_text = special_in_text
        self._data = template.read(messages, **variables)
        self.text = template.write(self._data)
        """What the template writes."""

    def encode(self) -> list[int]:
        """The token ids. UsageError where the text is not valid Unicode, or the template fails on
        messages with marks in them."""
        if not self._special_in_text:
            parts = self._parts(self._tokenizer.spelling)
            if parts is not None:
                return self._tokenizer.encode_parts(parts)
        # The template writes the special tokens itself, so none are added.
        return self._tokenizer.encode(self.text, add_special=False)

    def _parts(self, spelling: ControlSpelling) -> list[Part] | None:
        """The text in parts; None where all its control tokens are the template's."""
        strings = list(_strings(self._data.given()))
        dangers = [spelling.danger(text) for text in strings]
        changes = any(map(spelling.normalizes_to_control, strings))
        danger = max(dangers, default=Danger.NONE)
        if not changes:
            if danger is Danger.NONE:
                return None
            if danger is Danger.START and not _JOINS.search(self._data.source):
                begun = (t for t, d in zip(strings, dangers, strict=True) if d)
                if self._has_whole(begun):
                    return None
        parts, refused = self._own_tokens(spelling, danger)
        return parts if refused or changes else None

    def _has_whole(self, texts: Iterable[str]) -> bool:
        """Whether the template has written these texts as they are, one behind the other."""
        at = 0
        for text in texts:
            bare = text.strip()
            at = self.text.find(bare, at)
            if at < 0:
                return False
            at += len(bare)
        return True

    def _own_tokens(self, spelling: ControlSpelling, danger: Danger) -> tuple[list[Part], bool]:
        """The parts, and whether they differ from those of the text as it is."""
        # With a mark behind whatever begins a token, no text can make one in any way.
        marked, places = self._marked(spelling.starts)
        parts, refused = spelling.parts(marked, places)
        if marked == self.text:
            return parts, refused > 0
        # The marks have changed what the template does, which may look for "<think>" in a text.
        # Where no token is spelled, it is enough that the text has the same ones without marks.
        plain, _ = spelling.parts(self.text)
        if danger is not Danger.SPELLED and _ids(plain) == _ids(parts):
            return plain, False
        fewer, at = self._marked(spelling.spelled)
        if fewer == self.text:
            own, refused = spelling.parts(self.text, at)
            if _ids(own) == _ids(parts):
                return own, refused > 0
        return parts, True

    def _marked(self, places_in: Callable[[str], list[int]]) -> tuple[str, list[int]]:
        """The chat rendered with marks at these places of every text, but without the marks; and
        where they stood."""
        # Letters and digits, which JSON and HTML leave as they are; nobody can guess them.
        mark = "".join(secrets.choice(_LETTERS) for _ in range(10))
        count = 0

        def change(text: str) -> str:
            nonlocal count
            places = places_in(text)
            if not places:
                return text
            count += len(places)
            if count > _MOST_MARKS:
                raise UsageError(
                    "the messages spell a control token of the model, and have more than "
                    f"{_MOST_MARKS:,} characters that begin one; send a shorter chat"
                )
            cuts = [0, *places, len(text)]
            return mark.join(text[a:b] for a, b in pairwise(cuts))

        written = self._template.write(self._data.changed(change))
        pieces = re.split(mark, written, flags=re.IGNORECASE)
        at, places = 0, []
        for piece in pieces[:-1]:
            at += len(piece)
            places.append(at)
        return "".join(pieces), places


def _ids(parts: Sequence[Part]) -> list[int]:
    return [part for part in parts if isinstance(part, int)]


def _strings(value: object) -> Iterator[str]:
    """Every string in plain data, names in objects too."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _strings(key)
            yield from _strings(item)
    elif isinstance(value, list):
        for item in value:
            yield from _strings(item)
