"""Text from elsewhere (models, files, clients) on its way to a terminal or a log.

A terminal obeys control characters instead of showing them, and a line break makes two lines of a
log out of one. Whatever was not written by this program goes through here.
"""

from __future__ import annotations

_CONTROL = {code: None for code in (*range(32), 127, *range(128, 160)) if chr(code) not in "\n\t"}
_ONE_LINE = {
    **_CONTROL,
    **dict.fromkeys(map(ord, "\n\t\u2028\u2029"), " "),
    # These turn the order of what follows around: the line would not be read as it is.
    **dict.fromkeys([*range(0x202A, 0x202F), *range(0x2066, 0x206A)]),
}


def printable(text: str) -> str:
    """The text without control characters; line breaks and tabs stay."""
    return text.translate(_CONTROL)


def plain(text: str) -> str:
    """The text as one line, without control characters."""
    return text.translate(_ONE_LINE)
