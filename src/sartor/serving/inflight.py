"""Requests of one worker: who waits, who runs, who comes again after a crash, who does not.

Decisions only. Requests present at two crashes are suspects and run one at a time, alone; a
suspect that was alone at two crashes has shown that it is the cause and is given up.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from sartor.engine.request import Chunk, Request

SUSPECT_CRASHES = 2


@dataclass
class InFlight:
    """One request with what is known of its answer; ``crashes`` that it was present at."""

    model: str
    request: Request
    emitted: list[list[int]] = field(init=False)
    finished: list[bool] = field(init=False)
    crashes: int = 0
    lone_crashes: int = 0

    def __post_init__(self) -> None:
        choices = self.request.params.n
        self.emitted = [[] for _ in range(choices)]
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

        Suspects go first: what runs beside them or comes after them would be at risk.
        """
        if any(entry.suspect for entry in self._running.values()):
            return []
        chosen = list(self._waiting.values())
        suspects = [entry for entry in chosen if entry.suspect]
        if suspects:
            chosen = [] if self._running else suspects[:1]
        for entry in chosen:
            del self._waiting[entry.request.id]
            self._running[entry.request.id] = entry
        return chosen

    def crash(self) -> list[InFlight]:
        """The worker died: all that ran waits again, in front. Returns those given up."""
        present = list(self._running.values())
        self._running = {}
        for entry in present:
            entry.crashes += 1
            entry.lone_crashes += len(present) == 1
        guilty = [entry for entry in present if entry.lone_crashes >= SUSPECT_CRASHES]
        again = {entry.request.id: entry for entry in present if entry not in guilty}
        self._waiting = again | self._waiting
        return guilty

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
