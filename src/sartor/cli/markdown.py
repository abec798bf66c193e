"""Markdown on a terminal, shown while it comes.

Nothing that was written is ever taken back or moved: no flicker, and a terminal may change its
size in the middle. What cannot be told yet is held instead: the mark at the beginning of a line
until it is known what it begins, emphasis until it ends, a table until its last row. Line breaks
are kept, since models write poems and addresses without Markdown's own marks for them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from functools import cache
from typing import TYPE_CHECKING

from sartor.cli.wrapping import Wrapper

if TYPE_CHECKING:
    from markdown_it import MarkdownIt

BOLD, ITALIC, STRUCK, CODE, HEADING, DIM = "1", "3", "9", "36", "1;35", "2"

_RULE = re.compile(r" {0,3}(?:(?:-[ \t]*){3,}|(?:\*[ \t]*){3,}|(?:_[ \t]*){3,})$")
_FENCE = re.compile(r"([ \t]*)(`{3,}|~{3,})([^`]*)$")
_HEADING = re.compile(r" {0,3}#{1,6}[ \t]+")
_ITEM = re.compile(r"([ \t]*)([-*+]|\d{1,9}[.)])[ \t]+(\[[ xX]\][ \t]+)?")
_QUOTE = re.compile(r"(?: {0,3}>[ \t]?)+")
_DELIMITERS = re.compile(r"[ \t]*\|?(?:[ \t]*:?-+:?[ \t]*\|)+(?:[ \t]*:?-+:?[ \t]*)?\|?[ \t]*$")
_UNDECIDED = re.compile(
    r"[ \t]*(?:[-*_+#> \t]*|[-*+][ \t]+\[[ xX]?\]?[ \t]*|\d{1,9}[.)]?[ \t]*|`{1,2}|~{1,2})$"
)
_LINES = ("```", "~~~", "|")
"""What begins a line that is looked at as a whole."""
_MATH = re.compile(r"\\(?=[()\[\]])")
"""Formulas are written between ``\\(`` and ``\\)``: the signs stay, as what is inside does."""

HOLD = 400
"""The most characters that are held to see where emphasis ends; then its marks are text."""


class MarkdownScreen:
    """Shows a text in Markdown that comes in pieces.

    ``write`` takes what is to be shown, ``columns`` tells the width of the terminal. Without
    ``styled`` there are no escape sequences, and the marks of emphasis stay as the model wrote
    them; ``unicode`` says whether bullets and lines can be shown.
    """

    def __init__(
        self,
        write: Callable[[str], object],
        columns: Callable[[], int],
        *,
        styled: bool = True,
        unicode: bool = True,
    ) -> None:
        self._wrapper = Wrapper(write, columns)
        self._write = write
        self._styled = styled
        self._bullet, self._bar, self._line = "•│─" if unicode else "*|-"
        self._unicode = unicode
        self._source = ""  # of the line that has not ended
        self._shown = 0  # how much of it is
        self._style = ""  # of that line: a heading's
        self._begun = False  # its kind is known
        self._open = False  # something stands on the terminal's last line
        self._blank = False  # an empty line comes before what is next
        self._in_list = False
        self._fence = ""  # the marks that the code block began with
        self._fence_indent = ""
        self._code: CodeLines | None = None
        self._table: list[str] = []

    def feed(self, text: str) -> None:
        """Shows what can be shown now."""
        *lines, rest = text.split("\n")
        for line in lines:
            self._source += line
            self._end_line()
        self._source += rest
        if rest and not self._fence and not self._table:
            self._stream(final=False)

    def end(self) -> None:
        """Shows whatever was held; the cursor is at the beginning of a line after that."""
        if self._source:
            self._end_line()
        self._end_table()
        if self._open:
            self._wrapper.newline()
        self._open = self._blank = self._in_list = False
        self._fence = ""

    # Lines ----------------------------------------------------------------------------

    def _end_line(self) -> None:
        line = self._source
        if self._fence:
            self._code_line(line)
        elif self._table or (not self._begun and line.lstrip().startswith("|")):
            self._table_line(line)
        elif not self._begun and (fence := _FENCE.match(line)):
            self._begin_code(fence)
        elif not line.strip():
            self._blank = True
        else:
            self._stream(final=True)
        self._source, self._shown, self._style, self._begun = "", 0, "", False

    def _stream(self, final: bool) -> None:
        """Shows as much of the line as is certain, or all of it."""
        if not self._begun:
            if not final and self._is_undecided():
                return
            self._begin()
        while text := self._source[self._shown :]:
            certain = len(text) if final else _certain(text)
            if not certain:
                break
            self._inline(text[:certain], self._style)
            self._shown += certain

    def _is_undecided(self) -> bool:
        if self._source.lstrip(" \t").startswith(_LINES):
            return True
        return len(self._source) < HOLD and bool(_UNDECIDED.match(self._source))

    def _begin(self) -> None:
        """The first sight of a line: what kind it is."""
        source = self._source
        self._before()
        self._begun = True
        wrapper = self._wrapper
        if _RULE.match(source):
            wrapper.put(self._line * min(wrapper.limit, 40), self._sgr(DIM))
            self._shown = len(source)
        elif quote := _QUOTE.match(source):
            bars = f"{self._bar} " * quote[0].count(">")
            wrapper.put(bars)
            wrapper.indent(bars)
            self._shown = quote.end()
        elif self._styled and (heading := _HEADING.match(source)):
            self._style = HEADING
            self._shown = heading.end()
        elif item := _ITEM.match(source):
            indent, mark, task = item.groups()
            bullet = self._bullet if mark in "-*+" else mark
            box = f"{task.rstrip()} " if task else ""
            first = f"{indent.expandtabs(4)}{bullet} {box}"
            wrapper.put(first)
            wrapper.indent(" " * len(first))
            self._shown = item.end()
            self._in_list = True
        else:
            spaces = len(source) - len(source.lstrip())
            self._in_list = self._in_list and spaces > 0
            if spaces < 4 and not self._in_list:
                spaces = 0
            indent = " " * len(source[:spaces].expandtabs(4))
            wrapper.put(indent)
            wrapper.indent(indent)
            self._shown = len(source) - len(source.lstrip())

    def _before(self) -> None:
        """Ends what is on the last line, and leaves an empty one where the text has it."""
        if self._open:
            self._wrapper.newline()
            if self._blank:
                self._wrapper.newline()
        self._open, self._blank = True, False

    # Inline ---------------------------------------------------------------------------

    def _inline(self, text: str, style: str) -> None:
        for piece, sgr in self._pieces(text):
            self._wrapper.put(piece, ";".join(filter(None, (style, sgr))))

    def _pieces(self, text: str) -> Iterator[tuple[str, str]]:
        if not self._styled:
            yield text, ""
            return
        yield from styled_pieces(text)

    def _sgr(self, style: str) -> str:
        return style if self._styled else ""

    # Code -----------------------------------------------------------------------------

    def _begin_code(self, fence: re.Match[str]) -> None:
        self._fence_indent, self._fence, language = fence.groups()
        self._code = CodeLines(language.strip()) if self._styled else None
        if self._open:
            self._blank = True
        if not self._styled:
            self._before()
            self._wrapper.verbatim(fence[0])

    def _code_line(self, line: str) -> None:
        """Code goes out as it is, without a frame or an indent, so that it can be copied."""
        mark = line.strip()
        if len(mark) >= len(self._fence) and set(mark) == {self._fence[0]}:
            if not self._styled:
                self._before()
                self._wrapper.verbatim(line)
            self._fence, self._blank = "", True
            return
        for char in self._fence_indent:
            line = line.removeprefix(char)
        self._before()
        self._wrapper.verbatim(self._code.line(line) if self._code else line)

    # Tables ---------------------------------------------------------------------------

    def _table_line(self, line: str) -> None:
        if "|" in line and (len(self._table) != 1 or _DELIMITERS.match(line)):
            self._table.append(line)
            return
        self._end_table()
        self._end_line()  # it belongs to no table

    def _end_table(self) -> None:
        lines, self._table = self._table, []
        if len(lines) > 1:
            from sartor.cli.tables import draw

            self._before()
            drawn = draw(lines, self._wrapper.limit, self._pieces, self._styled, self._unicode)
            for index, line in enumerate(drawn):
                if index:
                    self._wrapper.newline()
                self._wrapper.verbatim(line)
        elif lines:
            source, self._source = self._source, lines[0]
            self._stream(final=True)
            self._source, self._shown, self._style, self._begun = source, 0, "", False


class CodeLines:
    """Colours a program line by line, each with what stands before it in view."""

    MOST = 300
    """Lines that are coloured: each one looks at all before it."""

    def __init__(self, language: str) -> None:
        from pygments.formatters import TerminalFormatter
        from pygments.formatters.terminal import TERMINAL_COLORS
        from pygments.lexers import get_lexer_by_name
        from pygments.token import Comment, Error, Whitespace
        from pygments.util import ClassNotFound

        self._lines: list[str] = []
        # What is not finished looks wrong to it, and is not. Grey is white on many terminals.
        own = {Error: ("", ""), Whitespace: ("", ""), Comment: ("brightblack", "brightblack")}
        self._formatter = TerminalFormatter(colorscheme={**TERMINAL_COLORS, **own})
        name = re.split(r"[\s{,:]", language)[0].lower()
        try:
            self._lexer = get_lexer_by_name(name, stripnl=False, ensurenl=True) if name else None
        except ClassNotFound:
            self._lexer = None

    def line(self, line: str) -> str:
        """The line with its colours."""
        if self._lexer is None or len(self._lines) >= self.MOST:
            return line
        from pygments import highlight

        self._lines.append(line)
        shown = highlight("\n".join(self._lines), self._lexer, self._formatter).split("\n")
        return shown[len(self._lines) - 1] if line else line


def styled_pieces(text: str) -> Iterator[tuple[str, str]]:
    """The text of one line without its marks, in pieces of one style."""
    styles: list[str] = []
    link = ""
    said = ""
    for token in _parser().parseInline(_MATH.sub(r"\\\\", text))[0].children or ():
        style = ";".join(styles)
        match token.type:
            case "strong_open":
                styles.append(BOLD)
            case "em_open":
                styles.append(ITALIC)
            case "s_open":
                styles.append(STRUCK)
            case "strong_close" | "em_close" | "s_close":
                styles.pop()
            case "link_open":
                link, said = str(token.attrs.get("href", "")), ""
            case "link_close":
                if link and link != said and link != f"mailto:{said}":
                    yield f" ({link})", DIM
                link = ""
            case "code_inline":
                said += token.content
                yield token.content, ";".join([*styles, CODE])
            case "image":
                yield token.content or "image", style
                yield f" ({token.attrs.get('src', '')})", DIM
            case "softbreak" | "hardbreak":
                yield " ", style
            case _:
                said += token.content
                yield token.content, style


@cache
def _parser() -> MarkdownIt:
    from markdown_it import MarkdownIt

    parser = MarkdownIt("commonmark", {"html": False}).enable("strikethrough")
    # Addresses stay as the model wrote them.
    parser.normalizeLink = parser.normalizeLinkText = str  # type: ignore[assignment,method-assign]
    return parser


def _certain(text: str) -> int:
    """How many characters from the beginning mean the same whatever follows: up to the last blank
    before the first mark whose other half has not come."""
    position = certain = 0
    while position < len(text):
        after = _after(text, position)
        if after is None:
            # Marks without an end are text in the end.
            if len(text) - position <= HOLD:
                return certain
            return position + len(text[position:]) - len(text[position:].lstrip(text[position]))
        if text[position] in " \t":
            certain = after  # whole words: emphasis may begin or end in the middle of one
        position = after
    # A very long word is shown as it comes.
    return certain if position - certain <= HOLD else position


def _after(text: str, at: int) -> int | None:
    """The position behind the character or the span that begins here; None where that is not
    known yet."""
    char = text[at]
    if char == "\\":
        if text[at + 1 : at + 2] in ("(", "["):
            end = text.find("\\" + {"(": ")", "[": "]"}[text[at + 1]], at + 2)
            return None if end < 0 else end + 2
        return at + 2 if at + 1 < len(text) else None
    if char == "!":
        return at + 1 if at + 1 < len(text) else None
    if char == "<":
        end = text.find(">", at)
        blank = text.find(" ", at)
        if end < 0:
            return None if blank < 0 else at + 1
        return end + 1 if blank < 0 or blank > end else at + 1
    if char == "[":
        return _after_link(text, at)
    if char not in "`*_~":
        return at + 1
    run = len(text[at:]) - len(text[at:].lstrip(char))
    behind = at + run
    if behind == len(text):
        return None
    mark = char * run
    if char == "`":
        end = _find_run(text, mark, behind)
        return None if end < 0 else end + run
    opens = not text[behind].isspace()
    inside_word = at > 0 and text[at - 1].isalnum()
    if not opens or (char == "_" and inside_word) or (char == "~" and run != 2):
        return behind
    end = _find_run(text, mark, behind)
    while end >= 0 and text[end - 1].isspace():
        end = _find_run(text, mark, end + run)
    return None if end < 0 or end + run == len(text) else end + run


def _after_link(text: str, at: int) -> int | None:
    depth = 0
    for position in range(at, len(text)):
        depth += {"[": 1, "]": -1}.get(text[position], 0)
        if depth == 0:
            if position + 1 == len(text):
                return None
            if text[position + 1] != "(":
                return at + 1  # brackets and no link: what is inside is looked at by itself
            end = text.find(")", position)
            return None if end < 0 else end + 1
    return None


def _find_run(text: str, mark: str, start: int) -> int:
    """Where exactly this run of one character begins, and no longer one; -1 for nowhere."""
    char = mark[0]
    at = text.find(mark, start)
    while at >= 0:
        end = at
        while end < len(text) and text[end] == char:
            end += 1
        if end - at == len(mark):
            return at
        at = text.find(mark, end)
    return -1
