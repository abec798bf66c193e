"""What a person types in a chat: one message, or one command, at a time."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Protocol

from sartor.cli.screen import say
from sartor.cli.terminal import is_terminal

QUOTES = '"""'


@dataclass(frozen=True)
class Typed:
    """``literal``: all of it is the message, whatever it begins with."""

    text: str
    literal: bool = False


class Reader(Protocol):
    """Where messages come from."""

    def read(self) -> Typed:
        """The next one. EOFError at the end of the input; KeyboardInterrupt where Ctrl-C was
        pressed and nothing had been typed."""

    def keep_history(self, on: bool) -> None:
        """Whether messages are kept for later chats."""


def is_open(text: str) -> bool:
    """Whether a block has begun and not ended."""
    start = text.lstrip()
    return start.startswith(QUOTES) and not (
        len(start.rstrip()) >= 2 * len(QUOTES) and start.rstrip().endswith(QUOTES)
    )


def block(text: str) -> Typed | None:
    """The message of a whole block; None where the text is none."""
    start = text.strip()
    if not start.startswith(QUOTES) or is_open(text) or len(start) < 2 * len(QUOTES):
        return None
    inside = start[len(QUOTES) : -len(QUOTES)]
    return Typed(inside.removeprefix("\n").removesuffix("\n"), literal=True)


class LineReader:
    """Lines as the system gives them: where one of both ends is no terminal, or a dumb one."""

    def keep_history(self, on: bool) -> None:
        """There is none."""
        del on

    def read(self) -> Typed:
        text = self._line("> ")
        try:
            while is_open(text):
                text += "\n" + self._line("")
            while text.endswith("\\") and not is_open(text) and block(text) is None:
                text = text[:-1] + "\n" + self._line("")
        except EOFError:
            return Typed(text.strip().removeprefix(QUOTES), literal=True)
        except KeyboardInterrupt:
            return Typed("")  # what was typed is dropped
        return block(text) or Typed(text)

    def _line(self, prompt: str) -> str:
        try:
            if is_terminal(sys.stdout):
                return input(prompt)
            # input() would write its prompt between the answers.
            say(prompt, end="")
            return input()
        except (EOFError, KeyboardInterrupt):
            say("")  # the terminal is in the middle of a line
            raise
