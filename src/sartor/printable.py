"""Text from elsewhere (models, files, clients) on its way to a terminal or a log.

A terminal obeys control characters instead of showing them, and a line break makes two lines of a
log out of one. Whatever was not written by this program goes through here.
"""

from __future__ import annotations

FIELD_CHARS = 256
LINE_CHARS = 4096
"""The longest field of a line, and the longest line of a log."""

_CONTROL = {code: None for code in (*range(32), 127, *range(128, 160)) if chr(code) not in "\n\t"}
_ONE_LINE = {
    **_CONTROL,
    **dict.fromkeys(map(ord, "\n\t\u2028\u2029"), " "),
    # These turn the order of what follows around: the line would not be read as it is.
    **dict.fromkeys([*range(0x202A, 0x202F), *range(0x2066, 0x206A), 0x200E, 0x200F, 0x061C]),
    # Halves of a character, which no file can have.
    **dict.fromkeys(range(0xD800, 0xE000), "\ufffd"),
}


def printable(text: str) -> str:
    """The text without control characters; line breaks and tabs stay."""
    return text.translate(_CONTROL)


def plain(text: str, most: int | None = None) -> str:
    """The text as one line, without control characters; one of more than ``most`` characters is
    cut, and ends in three dots."""
    if most is not None and len(text) > most:
        text = text[: most - 3] + "..."
    return text.translate(_ONE_LINE)


def field(text: str) -> str:
    """The text as one of several fields of a line."""
    return plain(text, FIELD_CHARS)
