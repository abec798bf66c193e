"""What the commands show: JSON, tables and sizes. Progress is in ``sartor.progress``."""

from __future__ import annotations

import json
import math
import shutil
import sys
import textwrap
from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING

from sartor.printable import plain, printable

if TYPE_CHECKING:
    from sartor.hardware import Peak


def print_json(value: object) -> None:
    """One JSON object on standard output."""
    print(json.dumps(_finite(value), indent=2))


def _finite(value: object) -> object:
    """JSON has no infinity and no NaN: null."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def say(text: str, end: str = "\n") -> None:
    """One line for the person at the screen; never part of the result.

    Where standard error cannot be written (a full disk), the work goes on without it.
    """
    if sys.stderr is not None:
        with suppress(OSError):
            print(text, end=end, file=sys.stderr, flush=True)


def write_text(text: str) -> None:
    """Text of a model, at once."""
    sys.stdout.write(printable(text) if sys.stdout.isatty() else text)
    sys.stdout.flush()


def _columns() -> int | None:
    """The width of the terminal that standard output is; None for a file or a pipe."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None


def print_table(rows: Sequence[Sequence[str]], *, cut: bool = False) -> None:
    """Aligned columns; the first row is the header. ``cut`` ends lines where the terminal does."""
    rows = [[plain(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    width = _columns() if cut else None
    for row in rows:
        line = "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip()
        if width is not None and len(line) > width:
            line = line[: width - 1] + "\u2026"
        print(line)


def print_facts(facts: Sequence[tuple[str, str]]) -> None:
    """Names and values, one pair a line; long values go on below themselves in a terminal."""
    width = max(len(name) for name, _ in facts)
    columns = _columns()
    for name, value in facts:
        lines = [plain(value)]
        if columns is not None and len(lines[0]) > columns - width - 2:
            room = max(columns - width - 2, 16)
            lines = textwrap.wrap(lines[0], room, break_long_words=False, break_on_hyphens=False)
        for line in lines or [""]:
            print(f"{name.ljust(width)}  {line}".rstrip())
            name = ""


def arithmetic(activation: str, kv: str, head_bits: int) -> str:
    """What a plan computes in: these change answers."""
    head = f", head in {head_bits} bits" if head_bits else ""
    return f"{activation} x {kv} state{head}"


def size(count: int) -> str:
    """Bytes as people write them: decimal units, three digits."""
    value = float(count)
    for unit in ("B", "kB", "MB"):
        if value < 999.5:
            return f"{value:.0f} {unit}" if unit == "B" or value >= 99.95 else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.2f} GB" if value < 99.5 else f"{value:.0f} GB"


def tera(peak: Peak, unit: str) -> str:
    """A peak in tera-operations a second, ``unit`` as TOPS or TFLOPS, and how good that is."""
    text = f"{peak.ops_per_s / 1e12:.2f} {unit}"
    share = peak.share_of_width
    if share is None:
        return text
    return f"{text}, {share:.0%} of the issue width at {peak.clock_hz / 1e9:.2f} GHz"
