"""An engine as the bench sees it: a process that answers one JSON line for each."""

from __future__ import annotations

import json
import os
import queue
import subprocess
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

from sartor.errors import SartorError

DRIVERS = Path(__file__).parent / "drivers"
Answer = dict[str, Any]


class EngineError(SartorError):
    """An engine could not do what was asked; it may still do other things."""


class EngineLost(EngineError):
    """The process of an engine has ended or answers no more."""


class Engine(Protocol):
    """What can be asked of an engine; ``drivers/protocol.py`` names the commands."""

    def ask(self, command: str, **fields: object) -> Answer: ...

    def close(self) -> None: ...


class EngineProcess:
    """A driver in the environment of its engine. A context manager: it ends the process.

    ``log`` takes what the engine prints; an answer that takes longer than ``timeout`` seconds
    counts as none.
    """

    def __init__(
        self,
        command: Sequence[str],
        log: Path,
        timeout: float,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self._log, self._timeout = log, timeout
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("wb") as errors:
            self._process = subprocess.Popen(
                list(command),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                env={**os.environ, **(environment or {})},
                text=True,
                encoding="utf-8",
            )
        self._lines: queue.Queue[str] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def __enter__(self) -> EngineProcess:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def ask(self, command: str, **fields: object) -> Answer:
        """The answer to one request; EngineError with the engine's own reason where it has none."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps({"command": command, **fields}) + "\n")
            self._process.stdin.flush()
            line = self._lines.get(timeout=self._timeout)
        except OSError:
            line = ""
        except queue.Empty:
            self._process.kill()
            raise EngineLost(f"no answer to {command} within {self._timeout:.0f} s") from None
        if not line:
            raise EngineLost(f"its process ended with code {self._process.wait()}: {self._last()}")
        answer: Answer = json.loads(line)
        if "error" in answer:
            raise EngineError(str(answer["error"]))
        return answer

    def close(self) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.close()
            self._process.wait(timeout=10)
        except (OSError, subprocess.TimeoutExpired):
            self._process.kill()
            self._process.wait()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._lines.put(line)
        self._lines.put("")  # the end

    def _last(self) -> str:
        """The last line that the engine printed."""
        lines = self._log.read_text(encoding="utf-8", errors="replace").split("\n")
        return next((line.strip()[:300] for line in reversed(lines) if line.strip()), "no message")
