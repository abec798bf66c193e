"""Where an answer is shown: in lines that fit a terminal, or as it is."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Protocol

from sartor.cli.screen import write_text
from sartor.cli.terminal import columns, has_style, is_terminal
from sartor.printable import printable

_SIGNS = "•│─"


class Display(Protocol):
    """One answer's place on the screen."""

    def feed(self, text: str) -> None:
        """Shows the next piece, at once as far as its place is certain."""

    def end(self) -> None:
        """Shows what was held back; afterwards the cursor is at the beginning of a line."""


def open_display(markdown: bool) -> Display:
    """The display for standard output: Markdown and whole words on a terminal, else the text."""
    if not is_terminal(sys.stdout):
        return PlainDisplay()
    if markdown:
        from sartor.cli.markdown import MarkdownScreen

        screen = MarkdownScreen(
            sys.stdout.write, columns, styled=has_style(), unicode=_shows(_SIGNS)
        )
        return TerminalDisplay(screen.feed, screen.end)
    from sartor.cli.wrapping import WrappedText

    text = WrappedText(sys.stdout.write, columns)
    return TerminalDisplay(text.feed, text.end)


class PlainDisplay:
    """The text as it is, and a line break at its end where it has none."""

    def __init__(self) -> None:
        self._open = False

    def feed(self, text: str) -> None:
        if text:
            self._open = not text.endswith("\n")
        write_text(text)

    def end(self) -> None:
        if self._open:
            write_text("\n")
        self._open = False


class TerminalDisplay:
    """What the model wrote, less what a terminal would obey."""

    def __init__(self, feed: Callable[[str], None], end: Callable[[], None]) -> None:
        self._feed, self._end = feed, end

    def feed(self, text: str) -> None:
        self._feed(printable(text))
        sys.stdout.flush()

    def end(self) -> None:
        self._end()
        sys.stdout.flush()


def _shows(text: str) -> bool:
    try:
        text.encode(sys.stdout.encoding or "ascii")
    except (UnicodeEncodeError, LookupError):
        return False
    return True
