"""What all keys share: bytes, prompts and places for work, none of which one key may fill.

Decisions only, no clock and no network; everything is called on the event loop's thread.
"""

from __future__ import annotations

import asyncio
import math
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Literal

ALONE_SECONDS = 10.0
_MOST_KEYS = 1024  # whose pace is remembered; what is past is forgotten then


def everything() -> float:
    """The part of a room that a key may hold where it shares with nobody."""
    return 1.0


class Room:
    """An amount that the server has once, and that requests hold for a while.

    ``limit``: all of it. ``part``: how much of it one key may hold, from 0 to 1; asked anew each
    time, since keys come and go.
    """

    def __init__(self, limit: int, part: Callable[[], float] = everything) -> None:
        self.limit = limit
        self._part = part
        self._held: Counter[str] = Counter()
        self._total = 0

    @property
    def held(self) -> int:
        return self._total

    @property
    def most(self) -> int:
        """What one key may hold; never less than 1."""
        return max(1, int(self.limit * self._part()))

    def of(self, key: str) -> int:
        """What a key holds."""
        return self._held[key]

    def keys(self) -> dict[str, int]:
        """What each key holds that holds anything."""
        return dict(self._held)

    def full(self, key: str, amount: int) -> Literal["", "key", "all"]:
        """Why a key cannot have so much more: its part is taken, or all is; "" where it can."""
        if self._total + amount > self.limit:
            return "all"
        return "key" if self._held[key] + amount > self.most else ""

    def take(self, key: str, amount: int) -> None:
        """Takes, whatever :meth:`full` says; less than 0 gives back."""
        self._total += amount
        self._held[key] += amount
        if not self._held[key]:
            del self._held[key]

    def give(self, key: str, amount: int) -> None:
        """Gives back what was taken."""
        self.take(key, -amount)


class Pace:
    """How fast each key goes on: ``rate`` a second, beyond which it waits. A key that has been
    alone for :data:`ALONE_SECONDS` takes nobody's time, and does not wait.
    """

    def __init__(self, rate: float) -> None:
        self._rate = rate
        self._free: dict[str, float] = {}
        """When what each key has taken would be through at that rate."""
        self._latest = ""
        self._shared_until = -math.inf

    def delay(self, key: str, amount: float, now: float) -> float:
        """Seconds to wait after so much more of a key, or before anything more where it is 0."""
        if self._latest != key:
            if self._latest:
                self._shared_until = now + ALONE_SECONDS
            self._latest = key
        if now >= self._shared_until:
            self._free.clear()
            return 0.0
        if len(self._free) > _MOST_KEYS:
            self._free = {k: at for k, at in self._free.items() if at > now}
        at = max(self._free.get(key, now), now) + amount / self._rate
        self._free[key] = at
        return at - now


class FairTurns:
    """Places for work that takes long, given to whoever of those waiting has used least.

    ``places``: how many work at once, and ``part`` of them may be one key's, but never less than
    one. Use is counted in seconds of work, divided by the key's share; who comes back after a
    pause starts level with the one that has used least of those present, as in the engine
    (:class:`sartor.engine.waiting.WaitingQueue`).
    """

    def __init__(self, places: int, part: Callable[[], float] = everything) -> None:
        self._places = places
        self._part = part
        self._working: Counter[str] = Counter()
        self._waiting: dict[str, deque[asyncio.Future[None]]] = {}
        self._used: dict[str, float] = {}

    @asynccontextmanager
    async def turn(self, key: str, share: float) -> AsyncIterator[None]:
        """Waits for a place and holds it. What it took is booked at the end."""
        await self._enter(key)
        loop = asyncio.get_running_loop()
        begun = loop.time()
        try:
            yield
        finally:
            self._used[key] += (loop.time() - begun) / share
            self._working[key] -= 1
            self._leave(key)

    async def _enter(self, key: str) -> None:
        if not self._present(key):
            least = min((self._used[k] for k in self._used if self._present(k)), default=0.0)
            self._used[key] = max(self._used.get(key, least), least)
        if key not in self._waiting and self._may_work(key):
            self._working[key] += 1
            return
        place = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(key, deque()).append(place)
        try:
            await place
        except asyncio.CancelledError:
            if place.done() and not place.cancelled():  # it had just been given
                self._working[key] -= 1
            elif place in (line := self._waiting.get(key, deque())):
                line.remove(place)
                if not line:
                    del self._waiting[key]
            self._leave(key)
            raise

    def _leave(self, key: str) -> None:
        """Gives free places away, and forgets what nobody has to remember."""
        while ready := [k for k in self._waiting if self._may_work(k)]:
            # Of equals, who has fewer places: what they are at has not been booked yet.
            chosen = min(ready, key=lambda k: (self._used[k], self._working[k]))
            line = self._waiting[chosen]
            place = line.popleft()
            if not line:
                del self._waiting[chosen]
            if not place.done():
                self._working[chosen] += 1
                place.set_result(None)
        if not self._working[key]:
            del self._working[key]
        if not self._working and not self._waiting:
            self._used.clear()

    def _present(self, key: str) -> bool:
        return key in self._working or key in self._waiting

    def _may_work(self, key: str) -> bool:
        most = max(1, int(self._places * self._part()))
        return self._working.total() < self._places and self._working[key] < most
