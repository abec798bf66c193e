"""Who starts next: waiting sequences by priority, and fairly between those who ask."""

from __future__ import annotations

import heapq
from bisect import bisect_left, insort
from collections.abc import Iterator
from operator import attrgetter
from typing import Generic, Protocol, TypeVar

OUTPUT_COST = 4
"""Tokens of a prompt that cost as much as one token of an answer."""

_MOST_TENANTS = 10_000  # whose use is remembered while they have nothing to do
_order = attrgetter("order")


class Claim(Protocol):
    """What the queue reads of a sequence."""

    @property
    def order(self) -> int:
        """Number of arrival."""

    @property
    def priority(self) -> int: ...

    @property
    def tenant(self) -> str: ...

    @property
    def share(self) -> float: ...

    @property
    def length(self) -> int: ...


C = TypeVar("C", bound=Claim)


class WaitingQueue(Generic[C]):
    """Waiting sequences in the order in which they are to start.

    Higher priority first; within one, the tenant that has used least in proportion to its share;
    of one tenant, who came first. Use is counted in tokens as they are computed
    (:meth:`charge`). A tenant that comes back after a pause starts level with the one that has
    used least of those present: nobody saves up, and nobody gets rid of what was used.

    Source: virtual token counters, Sheng et al., "Fairness in Serving Large Language Models"
    (OSDI 2024).
    """

    def __init__(self) -> None:
        self._lines: dict[int, dict[str, list[C]]] = {}
        self._used: dict[str, float] = {}
        self._present: dict[str, int] = {}
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[C]:
        """In order, each charged with its length for the sake of those after it."""
        for priority in sorted(self._lines, reverse=True):
            lines = self._lines[priority]
            if len(lines) == 1:
                (line,) = lines.values()
                yield from line
                continue
            heap = [(self._used[tenant], line[0].order, 0, line) for tenant, line in lines.items()]
            heapq.heapify(heap)
            while heap:
                used, _, at, line = heap[0]
                yield line[at]
                used += line[at].length / line[at].share
                if at + 1 < len(line):
                    heapq.heapreplace(heap, (used, line[at + 1].order, at + 1, line))
                else:
                    heapq.heappop(heap)

    def add(self, claim: C) -> None:
        line = self._lines.setdefault(claim.priority, {}).setdefault(claim.tenant, [])
        insort(line, claim, key=_order)
        self._count += 1

    def remove(self, claim: C) -> None:
        lines = self._lines[claim.priority]
        line = lines[claim.tenant]
        at = bisect_left(line, claim.order, key=_order)
        assert line[at] is claim
        del line[at]
        self._count -= 1
        if not line:
            del lines[claim.tenant]
            if not lines:
                del self._lines[claim.priority]

    # Who has used how much

    def arrive(self, tenant: str) -> None:
        """One more sequence of a tenant, which waits or runs until it leaves."""
        if tenant not in self._present:
            least = min((self._used[name] for name in self._present), default=0.0)
            self._used[tenant] = max(self._used.get(tenant, least), least)
        self._present[tenant] = self._present.get(tenant, 0) + 1

    def leave(self, tenant: str) -> None:
        self._present[tenant] -= 1
        if self._present[tenant]:
            return
        del self._present[tenant]
        if not self._present:
            self._used.clear()
        elif len(self._used) - len(self._present) > _MOST_TENANTS:
            self._used = {name: self._used[name] for name in self._present}

    def charge(self, tenant: str, share: float, prompt_tokens: int, output_tokens: int) -> None:
        """A step computed tokens of a present tenant."""
        self._used[tenant] += (prompt_tokens + OUTPUT_COST * output_tokens) / share
