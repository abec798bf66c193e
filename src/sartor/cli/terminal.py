"""What the terminal is like, and how to leave it as it was found."""

from __future__ import annotations

import os
import shutil
import signal
import sys
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

from sartor.cli.screen import say
from sartor.printable import printable

_PASTE_ON, _PASTE_OFF = "\x1b[?2004h", "\x1b[?2004l"
_DEADLY = ("SIGTERM", "SIGHUP", "SIGQUIT")


def is_terminal(stream: Any) -> bool:
    """Whether a person is at the other end of a standard stream; a closed one is none."""
    try:
        return stream is not None and bool(stream.isatty())
    except ValueError:  # closed by Python
        return False


def has_style() -> bool:
    """Whether escape sequences may be written: not with NO_COLOR (https://no-color.org), nor on a
    terminal that does not know any."""
    if os.environ.get("NO_COLOR"):
        return False
    return os.environ.get("TERM", "" if os.name == "posix" else "windows") not in ("", "dumb")


def columns(stream: Any = None) -> int:
    """The width of the terminal now; 80 where it does not say."""
    with suppress(AttributeError, OSError, ValueError):
        width = os.get_terminal_size((stream or sys.stdout).fileno()).columns
        if width > 0:
            return width
    return shutil.get_terminal_size().columns


def remark(text: str) -> None:
    """Like :func:`say`, but dim and with whole words on each line where it is a terminal."""
    text = printable(text)
    if is_terminal(sys.stderr):
        width = max(columns(sys.stderr) - 1, 20)
        text = textwrap.fill(text, width, break_long_words=False, break_on_hyphens=False)
        if has_style():
            text = "\n".join(f"\x1b[2m{line}\x1b[0m" for line in text.split("\n"))
    say(text)


def remark_facts(rows: Sequence[tuple[str, str]]) -> None:
    """Names and what is said of each, in two columns; the second has whole words on each line."""
    left = max(len(name) for name, _ in rows) + 4
    width = columns(sys.stderr) - 1 if is_terminal(sys.stderr) else sys.maxsize
    for name, text in rows:
        start = f"  {name}".ljust(left)
        if width < left + 20:  # too narrow for two columns
            say(start.rstrip())
            start = left * " " if width > 2 * left else "    "
        indent = " " * len(start)
        text = printable(text)
        say(textwrap.fill(text, max(width, 20), initial_indent=start, subsequent_indent=indent))


@contextmanager
def quiet_keys() -> Iterator[None]:
    """Keys show nothing while an answer is written; what is typed or pasted waits for the prompt.

    Ctrl-C still interrupts. Nothing happens where standard input is no POSIX terminal.
    """
    saved = _modes()
    if saved is None:
        yield
        return
    import termios

    silent = list(saved)
    silent[3] &= ~(termios.ECHO | termios.ICANON)
    descriptor = sys.stdin.fileno()
    try:
        termios.tcsetattr(descriptor, termios.TCSADRAIN, silent)
        if has_style():  # a paste keeps its marks, so that its lines stay together
            sys.stdout.write(_PASTE_ON)
            sys.stdout.flush()
        yield
    finally:
        _restore(saved)


@contextmanager
def left_as_found() -> Iterator[None]:
    """Signals that end the program put the terminal in order first."""
    saved = _modes()
    before: dict[int, Any] = {}

    def die(number: int, frame: FrameType | None) -> None:
        del frame
        if saved is not None:
            _restore(saved)
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)

    if saved is not None:
        for name in _DEADLY:
            number = getattr(signal, name)
            if signal.getsignal(number) is signal.SIG_DFL:  # not one that `nohup` ignores
                before[number] = signal.signal(number, die)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Interrupts:
    """Ctrl-C during an answer: the first one asks for its end, so that what was said is kept whole
    and the engine keeps its cache; the next one, or one before the first word, is an exception."""

    def __init__(self) -> None:
        self.asked = False
        self.speaking = False
        self._before: Any = None

    def __enter__(self) -> Interrupts:
        self._before = signal.signal(signal.SIGINT, self._interrupt)
        return self

    def __exit__(self, *exception: object) -> None:
        signal.signal(signal.SIGINT, self._before)

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        del number, frame
        if self.asked or not self.speaking:
            raise KeyboardInterrupt
        self.asked = True


def _modes() -> list[Any] | None:
    """The settings of the terminal at standard input."""
    try:
        import termios
    except ImportError:
        return None
    try:
        return termios.tcgetattr(sys.stdin.fileno()) if is_terminal(sys.stdin) else None
    except (OSError, ValueError, termios.error):
        return None


def _restore(saved: list[Any]) -> None:
    import termios

    with suppress(OSError, ValueError, termios.error):  # the terminal may be gone
        termios.tcsetattr(sys.stdin.fileno(), termios.TCSANOW, saved)
        if has_style() and is_terminal(sys.stdout):
            os.write(sys.stdout.fileno(), f"{_PASTE_OFF}\x1b[0m\x1b[?25h".encode())
