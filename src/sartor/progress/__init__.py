"""What long work tells its caller while it runs: phases, how far they are, and notices.

Work takes a :class:`Progress` as its last argument and never prints; :data:`SILENT` is the default
everywhere. ``line.py`` shows one in a terminal.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol


class Progress(Protocol):
    """Receives notices, and what happens between the ``begin`` and the ``end`` of a phase.

    A phase may hold others: then the innermost one is what is waited for. All calls come from one
    thread.
    """

    def notice(self, text: str) -> None:
        """One line for people, which stays."""

    def begin(
        self,
        phase: str,
        total: int | None = None,
        unit: str = "bytes",
        seconds: float | None = None,
    ) -> None:
        """A phase by name, as "packing smollm2:135m".

        ``total``: how much there is to do, in ``unit`` (bytes, weights, tokens, ...); None where
        nobody knows. ``seconds``: what the phase takes at most, where that was chosen beforehand.
        """

    def part(self, name: str) -> None:
        """What the phase does now: a measurement, an operator."""

    def advance(self, n: int) -> None:
        """So much more is done; negative where something must start over."""

    def end(self) -> None:
        """The innermost phase is over, however it went."""


class Silent:
    """A Progress that shows nothing."""

    def notice(self, text: str) -> None:
        del text

    def begin(
        self,
        phase: str,
        total: int | None = None,
        unit: str = "bytes",
        seconds: float | None = None,
    ) -> None:
        del phase, total, unit, seconds

    def part(self, name: str) -> None:
        del name

    def advance(self, n: int) -> None:
        del n

    def end(self) -> None:
        pass


SILENT: Progress = Silent()


@contextmanager
def showing(
    progress: Progress,
    phase: str,
    total: int | None = None,
    unit: str = "bytes",
    seconds: float | None = None,
) -> Iterator[None]:
    """A phase; ``end`` is called whatever happens."""
    progress.begin(phase, total, unit, seconds)
    try:
        yield
    finally:
        progress.end()
