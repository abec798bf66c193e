"""What a server and its processes say on standard error, beside the lines of requests.

Messages quote models, adapters and errors of libraries. None of that may look like a line of its
own, or move the cursor of a terminal.
"""

from __future__ import annotations

import logging
import sys
from typing import TextIO

from sartor.printable import LINE_CHARS, plain

_MOST_LINES = 200
_MARK = "| "


class LineFormatter(logging.Formatter):
    """The message as one line, then the lines of a traceback, each with a mark in front."""

    def format(self, record: logging.LogRecord) -> str:
        """Never raises for the sake of the message: a wrong call of a logger is shown as it is."""
        try:
            message = record.getMessage()
        except Exception:
            message = f"{record.msg} {record.args}"
        lines = [plain(message, LINE_CHARS)]
        if record.exc_info:
            more = self.formatException(record.exc_info).splitlines()
            if (left_out := len(more) - _MOST_LINES) > 0:
                half = _MOST_LINES // 2
                more = [*more[:half], f"({left_out} lines are left out)", *more[-half:]]
            lines += [_MARK + plain(line, LINE_CHARS - len(_MARK)) for line in more]
        return "\n".join(lines)


class _StderrHandler(logging.StreamHandler[TextIO]):
    """Writes to whatever standard error is at that time, as Python's handler of last resort."""

    def __init__(self) -> None:
        logging.Handler.__init__(self, logging.WARNING)
        self.setFormatter(LineFormatter())

    @property
    def stream(self) -> TextIO:
        return sys.stderr

    @stream.setter
    def stream(self, _: TextIO) -> None:
        raise AttributeError("the stream is standard error")


def log_to_stderr() -> None:
    """Has warnings and errors of all libraries written by a :class:`LineFormatter`, unless logging
    is set up already; those of Python's ``warnings`` too."""
    root = logging.getLogger()
    if not root.handlers:
        root.addHandler(_StderrHandler())
        logging.captureWarnings(True)


def format_all_lines() -> None:
    """Gives handlers that libraries have set up for themselves (transformers does when it is
    imported) the same form of lines."""
    for logger in list(logging.Logger.manager.loggerDict.values()):
        for handler in getattr(logger, "handlers", ()):
            if isinstance(handler, logging.StreamHandler):
                handler.setFormatter(LineFormatter())


def say(text: str) -> None:
    """One line on standard error."""
    print(plain(text, LINE_CHARS), file=sys.stderr, flush=True)
