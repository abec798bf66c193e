"""A person at a terminal: keys go in, and what the screen shows is looked at."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from typing import Any

import pexpect
import pyte

COMMAND = [sys.executable, "-c", "from sartor.cli.main import main; main()"]
PATIENCE = 90.0
"""Seconds: a busy machine takes long to start Python."""


def usual_signals() -> None:
    """Whoever started the tests may ignore some, and what they start would too."""
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


class Terminal:
    """A program on a terminal of its own, until the end of a ``with`` block.

    ``raw`` is all that the program wrote.
    """

    def __init__(
        self,
        *arguments: object,
        columns: int = 80,
        rows: int = 200,
        env: dict[str, str] | None = None,
        command: list[str] = COMMAND,
    ) -> None:
        environment = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "COLUMNS")}
        environment.update({"TERM": "xterm-256color", **(env or {})})
        self.raw = ""
        self._screen = pyte.Screen(columns, rows)
        self._stream = pyte.Stream(self._screen)
        self._process: Any = pexpect.spawn(
            command[0],
            [*command[1:], *map(str, arguments)],
            dimensions=(rows, columns),
            env=environment,
            encoding="utf-8",
            codec_errors="replace",
            echo=True,
            preexec_fn=usual_signals,
        )
        self._process.delaybeforesend = None

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *exception: object) -> None:
        self._process.close(force=True)

    @property
    def pid(self) -> int:
        return int(self._process.pid)

    @property
    def descriptor(self) -> int:
        """The terminal, whose settings can be looked at."""
        return int(self._process.child_fd)

    @property
    def lines(self) -> list[str]:
        """What the screen shows, without the empty lines below it."""
        return self.text.split("\n")

    @property
    def text(self) -> str:
        return "\n".join(line.rstrip() for line in self._screen.display).rstrip()

    def type(self, keys: str) -> None:
        self._process.send(keys)

    def paste(self, text: str) -> None:
        """As a terminal does it that marks what is pasted."""
        self.type(f"\x1b[200~{text}\x1b[201~")

    def until(self, seen: str | Callable[[str], bool], count: int = 1) -> str:
        """Reads until the screen shows a text so many times; returns what it shows then."""
        wanted = seen if callable(seen) else lambda text: text.count(seen) >= count
        end = time.monotonic() + PATIENCE
        while not wanted(self.text):
            assert time.monotonic() < end, f"no {seen!r} on the screen:\n{self.text}"
            try:
                self._feed(self._process.read_nonblocking(1 << 16, 1))
            except pexpect.TIMEOUT:
                continue
            except pexpect.EOF:
                break
        assert wanted(self.text), (
            f"no {seen!r} on the screen, and the program has ended:\n{self.text}"
        )
        return self.text

    def prompt(self, count: int) -> str:
        """Reads until the prompt is there for the so manieth time, and waits for a key."""

        def shown(text: str) -> bool:
            lines = text.split("\n")
            prompts = sum(line.startswith(">") for line in lines)
            return prompts >= count and lines[-1] == ">"

        return self.until(shown)

    def resize(self, columns: int) -> None:
        """As a terminal does it that leaves its lines as they are."""
        self._process.setwinsize(self._screen.lines, columns)
        self._screen.resize(self._screen.lines, columns)

    def end(self) -> tuple[int | None, int | None]:
        """Reads to the end; exit code, and the signal where one ended it."""
        self.drain()
        self._process.close()
        return self._process.exitstatus, self._process.signalstatus

    def drain(self) -> None:
        """Reads until the program has ended."""
        end = time.monotonic() + PATIENCE
        while time.monotonic() < end:
            try:
                self._feed(self._process.read_nonblocking(1 << 16, 1))
            except pexpect.TIMEOUT:
                continue
            except pexpect.EOF:
                break

    def _feed(self, text: str) -> None:
        self.raw += text
        self._stream.feed(text)
