"""What a pull tells its caller while it runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol


class Progress(Protocol):
    """Receives notices (one line of text) and, between ``begin`` and ``end``, bytes of one file.

    ``advance`` counts bytes, and gets a negative number where a transfer must start over. All
    calls come from the thread that called the store.
    """

    def notice(self, text: str) -> None: ...

    def begin(self, file: str, total: int | None) -> None: ...

    def advance(self, n: int) -> None: ...

    def end(self) -> None: ...


class Silent:
    """A Progress that shows nothing."""

    def notice(self, text: str) -> None:
        del text

    def begin(self, file: str, total: int | None) -> None:
        del file, total

    def advance(self, n: int) -> None:
        del n

    def end(self) -> None:
        pass


@contextmanager
def showing(progress: Progress, file: str, total: int | None) -> Iterator[None]:
    """Show one file's progress; ``end`` is called whatever happens."""
    progress.begin(file, total)
    try:
        yield
    finally:
        progress.end()
