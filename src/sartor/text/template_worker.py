"""The process that renders chat templates: its limits, and its loop over messages."""

from __future__ import annotations

import contextlib
import json
import struct
import sys
from typing import BinaryIO

from sartor.errors import FormatError, SartorError
from sartor.text.content_shape import TemplateStopped
from sartor.text.template_sandbox import compiled

_HEAD = struct.Struct("<I")
_MESSAGE_CHARS = 2000  # of an error, which may hold whatever the template wants


def main() -> None:
    """Reads the limits, then messages ``[source, variables]`` until standard input ends. Each is
    answered with ``[kind, text]``: "text", or an error by its kind. Without variables the template
    is compiled, and no more. After ``idle_seconds`` without a message it ends, too."""
    inbox, outbox = sys.stdin.buffer, sys.stdout.buffer
    first = _read(inbox)
    if first is None:
        return
    cpu_seconds, memory_bytes, output_chars, idle_seconds = json.loads(first)
    limited = _limit(memory_bytes)
    _write(outbox, b"ready")
    while _comes(inbox, idle_seconds) and (message := _read(inbox)) is not None:
        if limited:
            _allow(cpu_seconds)
        answer = _answer(message, output_chars)
        if limited:
            _allow(0.0)
        _write(outbox, answer)


def _answer(message: bytes, output_chars: int) -> bytes:
    try:
        source, variables = json.loads(message)
        program = compiled(source)
        text = "" if variables is None else program.render(variables)
        if len(text) > output_chars:
            raise TemplateStopped(
                f"the chat template was stopped: it writes {len(text):,} characters"
            )
        return json.dumps(["text", text]).encode()
    except TemplateStopped as error:
        found = ("stopped", str(error))
    except FormatError as error:
        found = ("format", str(error))
    except SartorError as error:
        found = ("usage", str(error))
    except (MemoryError, RecursionError):
        found = ("stopped", "the chat template was stopped: it needs too much memory")
    except Exception as error:
        found = ("usage", f"the chat template fails: {type(error).__name__}: {error}")
    return json.dumps([found[0], found[1][:_MESSAGE_CHARS]]).encode()


def _limit(memory_bytes: int) -> bool:
    """Takes from this process what a template does not need; False where the system cannot."""
    try:
        import resource
        import signal
    except ImportError:  # Windows: the parent's clock alone ends it
        return False
    # What is read at first use is read now: later no file can be opened.
    import select  # noqa: F401
    import time

    import jinja2.debug  # noqa: F401 - for a template that fails

    time.localtime()
    compiled(r"{{ 'a\n' | tojson }}{{ strftime_now('%c') }}").render({})
    signal.signal(signal.SIGPROF, signal.SIG_DFL)  # ends the process in the midst of any call
    for kind, most in (
        ("RLIMIT_AS", memory_bytes),
        ("RLIMIT_CORE", 0),
        ("RLIMIT_FSIZE", 0),
        ("RLIMIT_NOFILE", 3),
        ("RLIMIT_NPROC", 0),
    ):
        with contextlib.suppress(AttributeError, ValueError, OSError):
            resource.setrlimit(getattr(resource, kind), (most, most))
    return True


def _allow(cpu_seconds: float) -> None:
    """Ends the process after so much more processor time; 0 takes that back."""
    import signal

    signal.setitimer(signal.ITIMER_PROF, cpu_seconds)


def _comes(stream: BinaryIO, seconds: float) -> bool:
    """Waits for a message, or the end. Between two messages nothing is left in the buffer."""
    if sys.platform == "win32":  # no pipe can be waited for there
        return True
    import select

    return bool(select.select([stream], [], [], seconds)[0])


def _write(stream: BinaryIO, message: bytes) -> None:
    stream.write(_HEAD.pack(len(message)) + message)
    stream.flush()


def _read(stream: BinaryIO) -> bytes | None:
    head = stream.read(_HEAD.size)
    if len(head) < _HEAD.size:
        return None
    (length,) = _HEAD.unpack(head)
    body = stream.read(length)
    return body if len(body) == length else None
