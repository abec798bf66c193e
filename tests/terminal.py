"""A command in a terminal of its own, and what the terminal shows while it runs."""

from __future__ import annotations

import fcntl
import os
import pty
import select
import signal
import struct
import termios
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import pyte

ROWS = 40


@dataclass
class Shown:
    """What was on the screen, row by row without empty ones: each time that it changed, and in the
    end; the raw bytes; and the exit code."""

    frames: list[list[str]] = field(default_factory=list)
    raw: bytes = b""
    code: int = 0

    @property
    def final(self) -> list[str]:
        return self.frames[-1] if self.frames else []

    @property
    def text(self) -> str:
        """All that was ever to be seen."""
        return "\n".join(row for frame in self.frames for row in frame)


def in_terminal(
    command: Sequence[str],
    columns: int = 80,
    environment: Mapping[str, str] | None = None,
    *,
    on_frame: Callable[[list[str], int, int], None] | None = None,
    timeout: float = 120,
) -> Shown:
    """Runs a command on a terminal, as input, output and errors.

    ``on_frame(rows, process id, descriptor of the terminal)`` may send signals and resize.
    """
    pid, fd = pty.fork()
    if pid == 0:
        try:
            for number in (signal.SIGINT, signal.SIGHUP):  # whoever started the tests may ignore it
                signal.signal(number, signal.SIG_DFL)
            # The size has to be there before the command looks for it.
            resize(0, columns)
            os.execvpe(
                command[0], list(command), {**os.environ, "TERM": "xterm", **(environment or {})}
            )
        finally:
            os._exit(127)
    screen = pyte.Screen(columns, ROWS)
    stream = pyte.ByteStream(screen)
    shown = Shown()
    end = time.monotonic() + timeout
    try:
        while time.monotonic() < end:
            if not select.select([fd], [], [], 0.5)[0]:
                continue
            try:
                data = os.read(fd, 65536)
            except OSError:  # Linux: the other end is closed
                break
            if not data:
                break
            shown.raw += data
            # Every rewriting of the line is a frame of its own, however many come at once.
            for piece in data.replace(b"\r", b"\0\r").split(b"\0"):
                stream.feed(piece)
                rows = [row.rstrip() for row in screen.display if row.strip()]
                if not shown.frames or rows != shown.frames[-1]:
                    shown.frames.append(rows)
                    if on_frame is not None:
                        on_frame(rows, pid, fd)
            size = columns_of(fd)
            if size != screen.columns:
                screen.resize(ROWS, size)
        else:
            os.kill(pid, signal.SIGKILL)
            raise AssertionError(f"{command} did not end within {timeout} s: {shown.final}")
    finally:
        _, status = os.waitpid(pid, 0)
        os.close(fd)
    shown.code = os.waitstatus_to_exitcode(status)
    return shown


def resize(fd: int, columns: int) -> None:
    fcntl.ioctl(fd, termios.TIOCSWINSZ, struct.pack("HHHH", ROWS, columns, 0, 0))


def columns_of(fd: int) -> int:
    return int(struct.unpack("HHHH", fcntl.ioctl(fd, termios.TIOCGWINSZ, bytes(8)))[1])
