"""Progress on one line of standard error that is rewritten, and gone in the end.

The standard library alone: a start that is quick enough to show nothing pays a thread that sleeps.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal, TextIO, cast

from sartor.printable import plain

if TYPE_CHECKING:
    from sartor.progress.phase import Phase

DELAY = 0.3  # seconds; what ends before is not shown
PERIOD = 0.25  # seconds between two looks: seldom, for the sake of what is being measured

Screen = Literal["line", "plain", "none"]


def screen(stream: TextIO | None) -> Screen:
    """How progress can be shown: on a terminal, on one that cannot move its cursor, or not."""
    try:
        if stream is None or not stream.isatty():
            return "none"
    except ValueError:  # closed
        return "none"
    return "plain" if os.environ.get("TERM") == "dumb" else "line"


class ProgressLine:
    """A :class:`~sartor.progress.Progress` for people.

    Notices go to standard error in any case. Phases are shown in a terminal only: after 0.3 s, in
    its width at that moment, and not longer than they last. What others write to standard error
    meanwhile goes above the line. A terminal that cannot rewrite a line (TERM=dumb) gets a plain
    line for each phase.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.RLock()
        self._phases: list[Phase] = []
        self._unseen = 0  # phases that are open where nothing is shown
        self._stop = threading.Event()
        self._stream: TextIO | None = None
        self._above: _Above | None = None
        self._screen: Screen = "none"
        self._drawn = 0  # columns of the terminal when the line was drawn; 0: there is none
        self._seen = float("-inf")  # when a line was there last
        self._said: Phase | None = None

    def notice(self, text: str) -> None:
        if sys.stderr is not None:
            print(plain(text), file=sys.stderr, flush=True)

    def begin(
        self,
        phase: str,
        total: int | None = None,
        unit: str = "bytes",
        seconds: float | None = None,
    ) -> None:
        with self._lock:
            first = not self._phases and not self._unseen
            if first:
                self._stream = sys.stderr
                self._screen = screen(self._stream)
            if self._screen == "none":
                self._unseen += 1
                return
            from sartor.progress.phase import Phase

            now = self._clock()
            self._phases.append(Phase(plain(phase), total, unit, seconds, now))
            if not first:
                return
            # One phase after the other is one wait: no gap between their lines.
            again = now - self._seen < DELAY
            if again:
                self._draw()
            self._stop = threading.Event()
            threading.Thread(
                target=self._watch,
                args=(self._stop, PERIOD if again else DELAY),
                name="sartor-progress",
                daemon=True,
            ).start()

    def part(self, name: str) -> None:
        if self._phases:
            self._phases[-1].part = plain(name)

    def advance(self, n: int) -> None:
        if self._phases:
            phase = self._phases[-1]
            phase.done += n
            phase.advanced = self._clock()

    def end(self) -> None:
        with self._lock:
            if self._unseen:
                self._unseen -= 1
                return
            self._phases.pop()
            if self._phases:
                return
            self._stop.set()
            self._erase()

    def _watch(self, stop: threading.Event, delay: float) -> None:
        while not stop.wait(delay):
            with self._lock:
                if stop.is_set():
                    return
                self._draw()
            delay = PERIOD

    # The line; the caller holds the lock. ------------------------------------------------

    def _draw(self) -> None:
        phase, now = self._phases[-1], self._clock()
        phase.look(now)
        if self._screen == "plain":
            if self._said is not phase:
                self._said = phase
                self._write(f"{phase.name} ...\n")
            return
        if self._above is None:
            self._above = _Above(self, cast(TextIO, self._stream))
            sys.stderr = cast(TextIO, self._above)
        elif self._above.in_a_line:
            return
        width = self._width()
        plain = not (getattr(self._stream, "encoding", "") or "").lower().startswith("utf")
        text = phase.text(width - 1, now, ascii_only=plain)
        # The cursor rests at the beginning: where a narrower terminal breaks the line in two,
        # the next one is written over both.
        self._write(f"\r{text}{self._clear(width)}\r")
        self._drawn = width
        self._seen = now

    def _erase(self) -> None:
        if self._drawn:
            self._write(f"\r{self._clear(self._width())}")
            self._drawn = 0
            self._seen = self._clock()
        if self._above is not None and not self._phases:
            if sys.stderr is cast(TextIO, self._above):
                sys.stderr = self._stream
            self._above = None

    def make_room(self) -> None:
        """Takes the line away, for text that goes above it."""
        if self._drawn:
            self._write(f"\r{self._clear(self._width())}")
            self._drawn = 0

    def _clear(self, width: int) -> str:
        """Erases the rest of the line, and what a narrower terminal has made of it."""
        return "\x1b[K" if self._drawn in (0, width) else "\x1b[J"

    def _width(self) -> int:
        try:
            columns = os.get_terminal_size(cast(TextIO, self._stream).fileno()).columns
        except (OSError, ValueError):
            columns = 0
        return columns or 80

    def _write(self, text: str) -> None:
        stream = cast(TextIO, self._stream)
        try:
            stream.write(text)
            stream.flush()
        except (OSError, ValueError):  # the terminal has gone; the work goes on
            self._stop.set()

    @property
    def lock(self) -> threading.RLock:
        """Held by whoever writes to the terminal."""
        return self._lock


class _Above:
    """Stands in for standard error while a line is there: a warning must not end in its middle."""

    def __init__(self, line: ProgressLine, stream: TextIO) -> None:
        self._line = line
        self._stream = stream
        self.in_a_line = False

    def write(self, text: str) -> int:
        with self._line.lock:
            self._line.make_room()
            count = self._stream.write(text)
            self._stream.flush()
            if text:
                self.in_a_line = not text.endswith("\n")
        return count

    def writelines(self, lines: list[str]) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
