"""What was typed in chats before, in a file that only its owner can read."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

ENTRIES = 1000
"""Entries that are kept; the file may hold as many again until it is cut."""
LONGEST = 64 << 10
"""Characters of an entry; longer ones (pasted files) are not kept."""


def history_path() -> Path:
    """``history`` in ``SARTOR_HOME``, or in the platform's folder for what a program remembers."""
    chosen = os.environ.get("SARTOR_HOME")
    if chosen:
        return Path(os.path.expanduser(chosen)).absolute() / "history"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Application Support" / "sartor" / "history"
    variable = "LOCALAPPDATA" if sys.platform == "win32" else "XDG_STATE_HOME"
    base = os.environ.get(variable)
    return (Path(base) if base else Path.home() / ".local" / "state") / "sartor" / "history"


class HistoryFile:
    """One JSON string a line, oldest first. OSError where it cannot be read or written."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> list[str]:
        """The newest entries, oldest first. A file of more than twice as many is cut."""
        try:
            lines = self.path.read_text(encoding="utf-8", errors="replace").split("\n")
        except FileNotFoundError:
            return []
        entries = list(_entries(lines))
        kept = entries[-ENTRIES:]
        if len(lines) > 2 * ENTRIES:
            self._write(kept)
        return kept

    def append(self, entry: str) -> None:
        """Adds an entry at the end."""
        if len(entry) > LONGEST:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT
        with os.fdopen(os.open(self.path, flags, 0o600), "ab") as file:
            if hasattr(os, "fchmod"):
                os.fchmod(file.fileno(), 0o600)
            file.write(json.dumps(entry).encode() + b"\n")  # one write: other chats append too

    def _write(self, entries: Iterable[str]) -> None:
        """The whole file anew."""
        with tempfile.NamedTemporaryFile(dir=self.path.parent, delete=False) as part:  # mode 0600
            part.writelines(json.dumps(entry).encode() + b"\n" for entry in entries)
        os.replace(part.name, self.path)


def _entries(lines: Iterable[str]) -> Iterable[str]:
    for line in lines:
        try:
            entry = json.loads(line)
        except ValueError:  # cut by a full disk, or not ours
            continue
        if isinstance(entry, str):
            yield entry
