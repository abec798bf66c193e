"""What the commands show: JSON, tables, sizes and the progress of a pull."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress
    from rich.progress import TaskID

    from sartor.hardware import Peak

# A model may write escape sequences; in a terminal they would do more than show.
_CONTROL = {code: None for code in (*range(32), 127, *range(128, 160)) if chr(code) not in "\n\t"}


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


def printable(text: str) -> str:
    """Text of a model without what a terminal would obey instead of showing it."""
    return text.translate(_CONTROL)


def write_text(text: str) -> None:
    """Text of a model, at once."""
    sys.stdout.write(printable(text) if sys.stdout.isatty() else text)
    sys.stdout.flush()


def print_table(rows: Sequence[Sequence[str]]) -> None:
    """Aligned columns; the first row is the header."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip())


def print_facts(facts: Sequence[tuple[str, str]]) -> None:
    """Names and values, one pair a line."""
    width = max(len(name) for name, _ in facts)
    for name, value in facts:
        print(f"{name.ljust(width)}  {value}".rstrip())


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


class Waiting:
    """A word on what is being waited for; it vanishes. Nothing where standard error is a file."""

    def __init__(self, text: str) -> None:
        self._shows = sys.stderr is not None and sys.stderr.isatty()
        if self._shows:
            sys.stderr.write(text)
            sys.stderr.flush()

    def over(self) -> None:
        if self._shows:
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()
        self._shows = False


class PullProgress:
    """The store's Progress on standard error: a bar in a terminal, else one line a file."""

    def __init__(self) -> None:
        self._bar: RichProgress | None = None
        self._task: TaskID | None = None

    def notice(self, text: str) -> None:
        say(text)

    def begin(self, file: str, total: int | None) -> None:
        if sys.stderr is None or not sys.stderr.isatty():
            say(f"{file}{f' ({size(total)})' if total else ''}")
            return
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            DownloadColumn,
            Progress,
            TextColumn,
            TimeRemainingColumn,
            TransferSpeedColumn,
        )

        self._bar = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=30),
            DownloadColumn(),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
            console=Console(stderr=True),
        )
        self._task = self._bar.add_task(file, total=total)
        self._bar.start()

    def advance(self, n: int) -> None:
        if self._bar is not None and self._task is not None:
            self._bar.advance(self._task, n)

    def end(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
