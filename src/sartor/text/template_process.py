"""Templates in a process of their own, which can be stopped.

A chat template is a program from a stranger. No list of forbidden things is complete, so what it
may take is limited from outside: processor time, memory and output of a process that holds nothing
of value (``template_worker.py`` runs there). It starts beside the loading of a model, which takes
longer, and a prompt costs one message each way.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import struct
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from sartor.errors import FormatError, SartorError, UsageError
from sartor.text.content_shape import TemplateStopped

CPU_SECONDS = 2.0
"""Processor time of one rendering, the first with compiling. Above it the process is ended."""
MEMORY_BYTES = 256 << 20
"""Address space of the process, Python and Jinja2 included (about 25 MB)."""
OUTPUT_CHARS = 16_000_000
"""Longest prompt that a template may write."""
IDLE_SECONDS = 60.0
"""After so long without work the process ends; the next call starts another."""

_AT_ONCE = 0.02  # seconds of processor time within which nearly all templates are done
_PATIENCE = 30.0  # seconds in all: on a busy machine 2 s of processor time take longer
_KEPT_VARIABLES = ("TZ", "LD_LIBRARY_PATH", "SYSTEMROOT")
_HEAD = struct.Struct("<I")

_ERRORS: Mapping[str, type[SartorError]] = {
    "format": FormatError,
    "stopped": TemplateStopped,
    "usage": UsageError,
}
"""By the kind of an answer."""

_START = """
import json, sys
sys.path[:] = json.loads(sys.argv[1])
from sartor.text.template_worker import main
main()
"""


class TemplateProcess:
    """Renders the templates of one checkpoint. Calls from several threads take turns.

    Nothing runs before :meth:`start` or the first call.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._greeted = False  # whether the process has said that it is ready
        self._finalizer: Callable[[], object] = lambda: None

    def start(self) -> None:
        """Starts the process, if it does not run, without waiting for it."""
        with self._lock:
            self._ready()

    def close(self) -> None:
        """Ends the process; the next :meth:`render` starts another."""
        with self._lock:
            self._end()

    def check(self, source: str) -> None:
        """Compiles a template; FormatError if it has a syntax error, TemplateStopped if that takes
        too much time or memory."""
        self._ask(source, None)

    def render(self, source: str, variables: dict[str, Any]) -> str:
        """What a template writes; ``variables`` are JSON data. It is compiled once.

        FormatError if the template has a syntax error; UsageError if it refuses the messages or
        fails, TemplateStopped if it takes too much time or memory.
        """
        return self._ask(source, variables)

    def _ask(self, source: str, variables: dict[str, Any] | None) -> str:
        message = json.dumps([source, variables]).encode()
        with self._lock:
            try:
                answer = self._answer(message)
            except _EndedError as ended:
                if not ended.idle:
                    raise TemplateStopped(f"the chat template was stopped: {ended}") from None
                answer = self._answer(message)  # it had just ended for want of work
        kind, text = json.loads(answer)
        if kind == "text":
            return str(text)
        raise _ERRORS[kind](text)

    def _answer(self, message: bytes) -> bytes:
        process = self._ready()
        try:
            if not self._greeted:
                _greet(process)
                self._greeted = True
            answer, slow = _exchange(process, message)
        except BaseException:  # after an interrupt the answer would be taken for the next one's
            self._end()
            raise
        if slow:  # its priority cannot be raised again
            self._end()
        return answer

    def _ready(self) -> subprocess.Popen[bytes]:
        if self._process is not None and self._process.poll() is None:
            return self._process
        self._end()
        command = [sys.executable, "-I", "-S", "-X", "utf8", "-c", _START, json.dumps(_paths())]
        try:
            process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                # No secrets of ours, and no Ctrl-C of the terminal's.
                env={name: os.environ[name] for name in _KEPT_VARIABLES if name in os.environ},
                start_new_session=True,
                bufsize=0,
            )
        except OSError as error:
            raise SartorError(
                f"the process for chat templates cannot be started: {error}; free some memory or "
                "processes"
            ) from None
        with contextlib.suppress(OSError):  # it has died: the first call says so
            limits = [CPU_SECONDS, MEMORY_BYTES, OUTPUT_CHARS, IDLE_SECONDS]
            _send(process, json.dumps(limits).encode())
        self._process, self._greeted = process, False
        self._finalizer = weakref.finalize(self, _kill, process)
        return process

    def _end(self) -> None:
        self._process = None
        self._finalizer()


class _EndedError(Exception):
    """The process ended, or was ended, before it had answered; ``idle``: of its own accord."""

    def __init__(self, reason: str, *, idle: bool = False) -> None:
        super().__init__(reason)
        self.idle = idle


def _paths() -> list[str]:
    """Where the process finds Python's own library, this package, and what it imports."""
    found = [str(Path(__file__).parents[2])]
    for name in ("jinja2", "markupsafe"):
        spec = find_spec(name)
        if spec is None or spec.origin is None:
            raise SartorError(f"{name} is not installed, which chat templates need; install it")
        found.append(str(Path(spec.origin).parents[1]))
    base = {str(Path(os.__file__).parent), str(Path(os.__file__).parent / "lib-dynload")}
    standard = [path for path in sys.path if path in base or path.endswith(".zip")]
    return [*standard, *dict.fromkeys(found)]


def _greet(process: subprocess.Popen[bytes]) -> None:
    """Waits until a new process is ready: what it takes to start is not the template's."""
    watch = _Watch(process)
    watch.lowered = True  # nothing to lower
    try:
        _receive(process, watch)
    except EOFError:
        raise _ended(process) from None
    finally:
        watch.over()


def _exchange(process: subprocess.Popen[bytes], message: bytes) -> tuple[bytes, bool]:
    """The answer to a message, and whether the process has been lowered for taking long."""
    watch = _Watch(process)
    try:
        _send(process, message)
        return _receive(process, watch), watch.lowered
    except (BrokenPipeError, EOFError):
        raise _ended(process) from None
    finally:
        watch.over()


def _send(process: subprocess.Popen[bytes], message: bytes) -> None:
    assert process.stdin is not None
    left = memoryview(_HEAD.pack(len(message)) + message)
    while left:
        left = left[process.stdin.write(left) :]


def _receive(process: subprocess.Popen[bytes], watch: _Watch) -> bytes:
    (length,) = _HEAD.unpack(_read(process, _HEAD.size, watch))
    return _read(process, length, watch)


def _read(process: subprocess.Popen[bytes], length: int, watch: _Watch) -> bytes:
    assert process.stdout is not None
    parts: list[bytes] = []
    while length:
        watch.until_readable()
        part = process.stdout.read(min(length, 1 << 20))
        if not part:
            raise EOFError
        parts.append(part)
        length -= len(part)
    return b"".join(parts)


class _Watch:
    """Looks at what a process takes while an answer is waited for."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self.lowered = False
        self._process = process
        self._end = time.monotonic() + _PATIENCE
        self._cpu = _cpu_seconds(process.pid)
        self._timer: threading.Timer | None = None
        if sys.platform == "win32":  # no pipe can be waited for there
            self._timer = threading.Timer(_PATIENCE, process.kill)
            self._timer.start()

    def until_readable(self) -> None:
        """Returns when there is something to read, or the end."""
        if self._timer is not None:
            return
        poll = select.poll()
        poll.register(self._process.stdout, select.POLLIN)  # type: ignore[arg-type]
        while not poll.poll(20 if not self.lowered else 1000):
            if time.monotonic() > self._end:
                raise _EndedError(f"it takes more than {_PATIENCE:g} s")
            if not self.lowered and _cpu_seconds(self._process.pid) - self._cpu > _AT_ONCE:
                self.lowered = True
                with contextlib.suppress(OSError):
                    os.setpriority(os.PRIO_PROCESS, self._process.pid, 19)

    def over(self) -> None:
        if self._timer is not None:
            self._timer.cancel()


def _cpu_seconds(pid: int) -> float:
    """Processor time that a process has taken; where the system does not tell, time as such."""
    if sys.platform != "linux":
        return time.monotonic()
    try:
        return time.clock_gettime(~pid << 3 | 2)  # the clock of clock_getcpuclockid(3)
    except OSError:
        return 0.0  # it has ended, which reading will find


def _ended(process: subprocess.Popen[bytes]) -> _EndedError:
    """Why a process ended, for the one who wanted a prompt from it."""
    try:
        code = process.wait(1.0)
    except subprocess.TimeoutExpired:
        return _EndedError("its process closed its output")
    return _EndedError(_why(code), idle=code == 0)


def _why(code: int) -> str:
    if hasattr(signal, "SIGPROF") and code in (-signal.SIGPROF, -signal.SIGXCPU):
        return f"it takes more than {CPU_SECONDS:g} s of processor time"
    if code < 0:
        return (
            f"its process ended with signal {-code}; it may need more than the memory it is given"
        )
    return f"its process ended with code {code}"


def _kill(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with contextlib.suppress(OSError):
                pipe.close()
    process.wait()
