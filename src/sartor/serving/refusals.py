"""Requests without a valid key, summed up: whoever sends many of them gets few lines of the log."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

WINDOW_SECONDS = 10.0
MAX_PEERS = 1024


@dataclass(slots=True)
class _Window:
    end: float
    more: int = 0


class Refusals:
    """Of each address, the first refusal in 10 s gets a line, and the others are counted.

    Beyond :data:`MAX_PEERS` addresses at once, all others share one count. Safe to use from several
    threads.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._windows: dict[str | None, _Window] = {}

    @property
    def waiting(self) -> bool:
        """Whether something may be due soon."""
        return bool(self._windows)

    def is_first(self, peer: str) -> bool:
        """Whether this refusal gets a line; otherwise it is counted."""
        with self._lock:
            known: str | None = peer
            if peer not in self._windows and len(self._windows) >= MAX_PEERS:
                known = None
            window = self._windows.get(known)
            if window is None:
                self._windows[known] = _Window(self._clock() + WINDOW_SECONDS)
                return True
            # One that is over is taken away by `due`, which is never far behind.
            window.more += 1
            return False

    def due(self, everything: bool = False) -> list[tuple[str | None, int]]:
        """Addresses and counts of the windows that are over, or of all; None stands for addresses
        that share a count. They begin anew afterwards."""
        with self._lock:
            now = self._clock()
            over = [peer for peer, w in self._windows.items() if everything or w.end <= now]
            ended = [(peer, self._windows.pop(peer).more) for peer in over]
        return [(peer, more) for peer, more in ended if more]
