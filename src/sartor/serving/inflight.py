"""Requests of one worker: who waits, who runs, who comes again after a crash, who does not.

Decisions only. Requests present at two crashes are suspects and run one at a time, alone; a
suspect that was alone at two crashes has shown that it is the cause and is given up. That
explains the crashes: the others go on together.

A kill from outside is no crash: an operator, a service manager or a test does that, and no
request is at fault. Only where a request gets nowhere over more than ``KILLS_FORGIVEN`` of them
does each further one count like a crash. A kill for want of memory, a fault (SIGSEGV, SIGABRT),
an error and a hang are crashes at once.
"""

from __future__ import annotations

from array import array
from collections import Counter
from dataclasses import dataclass, field, replace

from sartor.engine.request import Chunk, Request
from sartor.serving.lifecycle import KILLS_FORGIVEN

SUSPECT_CRASHES = 2


@dataclass
class InFlight:
    """One request with what is known of its answer; ``crashes`` that it was present at.

    ``kills`` are those from outside since its latest token.
    """

    model: str
    request: Request
    emitted: list[array[int]] = field(init=False)
    finished: list[bool] = field(init=False)
    crashes: int = 0
    lone_crashes: int = 0
    kills: int = 0
    _tokens_at_kill: int = 0

    def __post_init__(self) -> None:
        choices = self.request.params.n
        self.emitted = [array("i") for _ in range(choices)]  # a list takes nine times as much
        self.finished = [False] * choices

    @property
    def suspect(self) -> bool:
        return self.crashes >= SUSPECT_CRASHES

    @property
    def done(self) -> bool:
        return all(self.finished)

    def record(self, chunk: Chunk) -> bool:
        """Notes what a chunk brings; False when its choice had finished before."""
        if self.finished[chunk.choice]:
            return False
        self.emitted[chunk.choice].extend(chunk.tokens)
        self.finished[chunk.choice] = chunk.finish_reason is not None
        return True

    @property
    def tokens(self) -> int:
        """How many were emitted."""
        return sum(map(len, self.emitted))

    def crash(self, *, alone: bool, outside: bool) -> None:
        """The worker that ran it died; ``outside``: killed by somebody else."""
        if outside:
            tokens = self.tokens
            self.kills = 1 if tokens > self._tokens_at_kill else self.kills + 1
            self._tokens_at_kill = tokens
            if self.kills <= KILLS_FORGIVEN:
                return
        self.crashes += 1
        self.lone_crashes += alone

    def replay(self) -> Request:
        """The request as a worker must see it to go on after the tokens already emitted."""
        if not any(self.emitted):
            return self.request
        return replace(self.request, emitted=tuple(tuple(tokens) for tokens in self.emitted))


class Ledger:
    """All requests of one worker, in order of arrival."""

    def __init__(self) -> None:
        self._waiting: dict[str, InFlight] = {}
        self._running: dict[str, InFlight] = {}

    def __len__(self) -> int:
        return len(self._waiting) + len(self._running)

    def tenants(self) -> Counter[str]:
        """How many each tenant has."""
        entries = (*self._running.values(), *self._waiting.values())
        return Counter(entry.request.tenant for entry in entries)

    def get(self, request_id: str) -> InFlight | None:
        return self._running.get(request_id) or self._waiting.get(request_id)

    def uses(self, adapter: str) -> bool:
        """Whether an unfinished request runs with an adapter."""
        entries = (*self._running.values(), *self._waiting.values())
        return any(entry.request.adapter == adapter for entry in entries)

    def add(self, entry: InFlight) -> None:
        self._waiting[entry.request.id] = entry

    def remove(self, request_id: str) -> bool:
        """Forgets a request; True when a worker has it."""
        self._waiting.pop(request_id, None)
        return self._running.pop(request_id, None) is not None

    def take(self) -> list[InFlight]:
        """Requests that go to the worker now: all that wait, or one suspect by itself.

        Suspects go first: what runs beside them or comes after them would be at risk. Of them
        the one with the fewest tokens does, since most trouble comes early: once the cause is
        found, all others may run together again.
        """
        if not self._waiting or any(entry.suspect for entry in self._running.values()):
            return []
        chosen = list(self._waiting.values())
        suspects = [entry for entry in chosen if entry.suspect]
        if suspects:
            chosen = [] if self._running else [min(suspects, key=lambda entry: entry.tokens)]
        for entry in chosen:
            del self._waiting[entry.request.id]
            self._running[entry.request.id] = entry
        return chosen

    def crash(self, *, outside: bool = False) -> list[InFlight]:
        """The worker died: all that ran waits again, in front. Returns those given up.

        ``outside``: somebody else killed it.
        """
        present = list(self._running.values())
        self._running = {}
        for entry in present:
            entry.crash(alone=len(present) == 1, outside=outside)
        guilty = [entry for entry in present if entry.lone_crashes >= SUSPECT_CRASHES]
        again = {entry.request.id: entry for entry in present if entry not in guilty}
        self._waiting = again | self._waiting
        if guilty:
            self.absolve()
        return guilty

    def absolve(self) -> None:
        """A cause was found: it explains what all others were present at, though not what they
        did alone."""
        for entry in (*self._running.values(), *self._waiting.values()):
            entry.crashes = entry.lone_crashes

    def drop_model(self, model: str) -> list[InFlight]:
        """Forgets the requests of one model."""
        gone = [e for e in (*self._running.values(), *self._waiting.values()) if e.model == model]
        for entry in gone:
            self.remove(entry.request.id)
        return gone

    def clear(self) -> list[InFlight]:
        """Forgets all requests and returns them, the running ones first."""
        gone = [*self._running.values(), *self._waiting.values()]
        self._running, self._waiting = {}, {}
        return gone
