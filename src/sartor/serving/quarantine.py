"""Requests that were given up, remembered for a while so that they do no harm again.

Clients try again by themselves, and every try of a request that kills workers costs all others
four restarts before it is found out once more. So the very same request (model, adapter, prompt
and parameters; whoever asks) is refused at once for some time. Not for ever: the cause may be gone.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable

import msgspec

from sartor.engine.request import Request

_MOST = 256


class Quarantine:
    """The latest requests that were given up, each for ``seconds``."""

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._seconds = seconds
        self._clock = clock
        self._until: dict[bytes, float] = {}

    def add(self, model: str, request: Request) -> None:
        key = _digest(model, request)
        self._until.pop(key, None)
        self._until[key] = self._clock() + self._seconds
        if len(self._until) > _MOST:
            del self._until[next(iter(self._until))]

    def left(self, model: str, request: Request) -> float:
        """Seconds that a request is still refused for; 0 where it is welcome."""
        if not self._until:  # nearly always: then a request costs nothing
            return 0.0
        key = _digest(model, request)
        left = self._until.get(key, 0.0) - self._clock()
        if left <= 0:
            self._until.pop(key, None)
            return 0.0
        return left


def _digest(model: str, request: Request) -> bytes:
    """Without the seed that was drawn, so a second try is the same request as the first."""
    told = (model, request.adapter, request.prompt, request.params, request.segments)
    return hashlib.blake2b(msgspec.msgpack.encode(told), digest_size=16).digest()
