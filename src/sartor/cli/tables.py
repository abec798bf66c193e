"""A table of Markdown, drawn for a terminal."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterable, Iterator

_CELL = re.compile(r"(?<!\\)\|")
_BREAK = re.compile(r"<br\s*/?>")

Pieces = Callable[[str], Iterator[tuple[str, str]]]


def draw(lines: list[str], width: int, pieces: Pieces, styled: bool, unicode: bool) -> list[str]:
    """The lines of the drawn table, at most ``width`` cells wide.

    ``lines`` are the table's in Markdown: head, delimiters, rows. ``pieces`` gives the text of a
    cell with styles.
    """
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    def text(cell: str) -> Text:
        made = Text()
        for index, part in enumerate(_BREAK.split(cell)):
            if index:
                made.append("\n")
            for piece, style in pieces(part):
                made.append(piece, style=_rich_style(style))
        return made

    head, delimiters, *rows = (_cells(line) for line in lines)
    count = max(map(len, (head, *rows)))
    table = Table(box=box.SIMPLE_HEAD if unicode else box.ASCII2, show_edge=False, padding=(0, 1))
    for index in range(count):
        mark = delimiters[index] if index < len(delimiters) else ""
        right = mark.endswith(":")
        justify = "center" if right and mark.startswith(":") else "right" if right else "left"
        title = text(head[index]) if index < len(head) else ""
        table.add_column(title, justify=justify, overflow="fold")  # type: ignore[arg-type]
    for row in rows:
        table.add_row(*(text(cell) for cell in _padded(row, count)))
    out = io.StringIO()
    console = Console(
        file=out,
        width=width,
        force_terminal=styled,
        no_color=not styled,
        color_system="standard" if styled else None,
        legacy_windows=False,
        highlight=False,
    )
    console.print(table)
    return [line.rstrip() for line in out.getvalue().rstrip("\n").split("\n")]


def _cells(line: str) -> list[str]:
    inner = line.strip().removeprefix("|")
    if inner.endswith("|") and not inner.endswith("\\|"):
        inner = inner[:-1]
    return [cell.strip().replace("\\|", "|") for cell in _CELL.split(inner)]


def _padded(row: Iterable[str], count: int) -> list[str]:
    cells = list(row)
    return cells + [""] * (count - len(cells))


def _rich_style(sgr: str) -> str:
    names = {"1": "bold", "3": "italic", "9": "strike", "36": "cyan", "2": "dim"}
    return " ".join(names[code] for code in sgr.split(";") if code in names)
