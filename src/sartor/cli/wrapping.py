"""Text that comes in pieces, in lines of whole words. What is written is never taken back, so a
terminal may change its size at any time."""

from __future__ import annotations

from collections.abc import Callable

from rich.cells import cell_len

_JOINER = "\u200d"
_NO_START = frozenset("、。，．：；！？）」』】》〉”’…ー々,.:;!?)]}%")
"""Characters that stay with what is before them."""
_NO_END = frozenset("（「『【《〈“‘([{")
LEAST_COLUMNS = 10


class Wrapper:
    """Writes words, and a line break before one that would not fit.

    ``write`` takes what is to be shown, ``columns`` tells the width of the terminal now.
    A style is the parameters of an SGR escape sequence ("1" is bold), empty for none. Text with
    wide characters (Chinese, Japanese, Korean) may break between any two of them.
    """

    def __init__(self, write: Callable[[str], object], columns: Callable[[], int]) -> None:
        self._write = write
        self._columns = columns
        self._width = columns()
        self._indent = ""
        self._column = 0
        self._spaces = 0
        self._word: list[tuple[str, str]] = []  # characters with their styles
        self._torn = False  # the word's beginning is written already: it was too long to hold

    @property
    def at_line_start(self) -> bool:
        return self._column == 0 and not self._word

    @property
    def limit(self) -> int:
        """Cells that a line may have; the last column stays free: terminals differ there."""
        return max(self._columns(), LEAST_COLUMNS) - 1

    def indent(self, text: str) -> None:
        """What later lines begin with, until the next :meth:`newline`."""
        self._indent = text if cell_len(text) <= self.limit // 2 else ""

    def put(self, text: str, style: str = "") -> None:
        """Text without line breaks; the last word is held until it has ended."""
        for char in text:
            if char in " \t":
                self.flush()
                self._spaces += 1
                continue
            if self._word and _may_break(self._word[-1][0], char):
                self.flush()
            self._word.append((char, style))
            if len(self._word) > self.limit:  # a long address: shown as it comes, in one piece
                self.flush()
                self._torn = True

    def verbatim(self, text: str) -> None:
        """Something that takes whole lines and is not wrapped; escape sequences included."""
        self.flush()
        self._write(text)
        self._column = 1  # somewhere in the line

    def newline(self) -> None:
        """Ends the line; blanks at its end are dropped."""
        self.flush()
        self._write("\n")
        self._column = self._spaces = 0
        self._indent = ""

    def flush(self) -> None:
        """Writes the word that is held."""
        torn, self._torn = self._torn, False
        if not self._word:
            return
        word, self._word = self._word, []
        width = cell_len("".join(char for char, _ in word))
        self._resize()
        if torn:
            self._spaces = 0
        elif self._column and self._column + self._spaces + width > self.limit:
            if self._column > cell_len(self._indent):
                self._write("\n" + self._indent)
                self._column = cell_len(self._indent)
            self._spaces = 0
        self._write(" " * self._spaces + _styled(word))
        self._column += self._spaces + width
        self._spaces = 0
        if self._column > self._width:  # the terminal has wrapped
            self._column %= self._width

    def _resize(self) -> None:
        width = max(self._columns(), LEAST_COLUMNS)
        if width < self._width and self._column >= width:
            self._column %= width  # the terminal has put the line into several
        self._width = width


def _may_break(before: str, after: str) -> bool:
    if _JOINER in (before, after) or before in _NO_END or after in _NO_START:
        return False
    code = ord(after)
    if 0x1F3FB <= code <= 0x1F3FF or 0x1F1E6 <= code <= 0x1F1FF:  # skin tones, halves of flags
        return False
    wide = cell_len(after)
    return wide > 0 and (wide == 2 or cell_len(before) == 2)


def _styled(word: list[tuple[str, str]]) -> str:
    """Runs of one style, each in its own pair of escape sequences."""
    parts: list[str] = []
    start = 0
    for end in range(1, len(word) + 1):
        if end < len(word) and word[end][1] == word[start][1]:
            continue
        text = "".join(char for char, _ in word[start:end])
        style = word[start][1]
        parts.append(f"\x1b[{style}m{text}\x1b[0m" if style else text)
        start = end
    return "".join(parts)


class WrappedText:
    """Plain text in lines of whole words; its own line breaks and indents stay."""

    def __init__(self, write: Callable[[str], object], columns: Callable[[], int]) -> None:
        self._wrapper = Wrapper(write, columns)
        self._open = False

    def feed(self, text: str) -> None:
        """Shows all but a last word that may go on."""
        for index, line in enumerate(text.split("\n")):
            if index:
                self._wrapper.newline()
                self._open = False
            self._open = self._open or bool(line)
            self._wrapper.put(line)

    def end(self) -> None:
        """Shows that word too; the cursor is at the beginning of a line after that."""
        if self._open:
            self._wrapper.newline()
        self._open = False
