"""How long a request that comes now would wait for its first token: an estimate, no clock."""

from __future__ import annotations

from collections import Counter

_HALF_LIFE = 20.0  # seconds after which what was seen counts half
_EVIDENCE = 3.0  # starts that must have been seen; below, nothing is said


class Waits:
    """Learns how often requests start while others wait, and takes the queue at that rate.

    Tenants take turns, so of each one no more come before a request than its own tenant has
    waiting, and one. Times are seconds of one monotonic clock, handed in by the caller.
    """

    def __init__(self) -> None:
        self._waiting: dict[str, str] = {}
        self._of: Counter[str] = Counter()
        self._starts = 0.0
        self._seconds = 0.0
        self._last = 0.0

    def arrived(self, request_id: str, now: float, tenant: str = "") -> None:
        self._pass(now)
        self._waiting[request_id] = tenant
        self._of[tenant] += 1

    def began(self, request_id: str, now: float) -> None:
        """Something came of a request; nothing happens where that is not the first time."""
        if request_id in self._waiting:
            self._pass(now)
            self._leave(request_id)
            self._starts += 1

    def ended(self, request_id: str, now: float) -> None:
        """A request is over, perhaps without ever having begun."""
        if request_id in self._waiting:
            self._pass(now)
            self._leave(request_id)

    def seconds(self, now: float, tenant: str = "") -> float:
        """The wait of a request that comes now; 0 where nobody waits or too little is known."""
        self._pass(now)
        if not self._waiting or self._starts < _EVIDENCE:
            return 0.0
        own = self._of[tenant]
        before = own + sum(min(n, own + 1) for who, n in self._of.items() if who != tenant)
        return before * self._seconds / self._starts

    def _leave(self, request_id: str) -> None:
        tenant = self._waiting.pop(request_id)
        self._of[tenant] -= 1
        if not self._of[tenant]:
            del self._of[tenant]

    def _pass(self, now: float) -> None:
        """Time counts while somebody waits: an idle server is not a slow one."""
        passed = now - self._last
        self._last = now
        if self._waiting:
            fade = 0.5 ** (passed / _HALF_LIFE)
            self._starts *= fade
            self._seconds = self._seconds * fade + passed
