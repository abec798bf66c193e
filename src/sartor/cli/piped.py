"""Text that comes through standard input."""

from __future__ import annotations

import io
import os
import stat
import sys
import threading
from typing import Any

from sartor.cli.screen import say
from sartor.errors import SartorError, UsageError

MOST_BYTES = 64 << 20
PATIENCE = 1.0
"""Seconds without an end of the input, after which a line says what is waited for."""


def is_piped() -> bool:
    """Whether somebody gives text through standard input: it is a pipe or a file. A terminal, a
    socket or a device (/dev/null) gives none unless asked."""
    try:
        mode = os.fstat(sys.stdin.fileno()).st_mode
    except (AttributeError, OSError, ValueError):
        return False
    return stat.S_ISFIFO(mode) or stat.S_ISREG(mode)


def read_piped() -> str:
    """All of standard input, without its last line break. UsageError where it is no UTF-8 text."""
    timer = threading.Timer(
        PATIENCE, say, ["reading standard input to its end (< /dev/null gives it none)"]
    )
    timer.daemon = True
    timer.start()
    try:
        data = _read(sys.stdin)
    except OSError as error:
        cause = error.strerror or "it is not open for reading"
        raise SartorError(f"standard input cannot be read: {cause}") from None
    finally:
        timer.cancel()
    if isinstance(data, bytes):
        if len(data) > MOST_BYTES:
            raise UsageError(f"standard input is longer than {MOST_BYTES >> 20} MiB; give less")
        try:
            data = data.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise UsageError(
                f"standard input is not UTF-8 text: byte 0x{data[error.start]:02x} at position "
                f"{error.start}; convert it first"
            ) from None
        data = data.replace("\r\n", "\n").replace("\r", "\n")
    return data.removesuffix("\n")


def _read(stream: Any) -> bytes | str:
    buffer = getattr(stream, "buffer", None)
    if isinstance(buffer, io.BufferedIOBase):
        return buffer.read(MOST_BYTES + 1)
    text: str = stream.read()
    return text
