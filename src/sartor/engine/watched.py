"""How far packing is, seen from which weights the backend asks for."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from pathlib import Path
from types import TracebackType

from sartor.backends.base import WeightSource
from sartor.graph import Program
from sartor.ops.weights import Weight
from sartor.progress import Progress


class WatchedSource:
    """The weights of ``source``; tells ``progress`` of every one that a backend is done with.

    So no backend has to tell. A weight counts as done when the next one is asked for. Packed files
    ask for none: then there is no phase at all.
    """

    def __init__(
        self, source: WeightSource, program: Program, progress: Progress, phase: str
    ) -> None:
        self._source = source
        self._progress = progress
        self._phase = phase
        self._sizes: Mapping[str, int] = {w.name: prod(w.shape) for w in program.weights}
        self._total = program.size
        self._asked: set[str] = set()
        self._pending = 0
        self._open = False

    def weight(self, name: str) -> Weight:
        if not self._open:
            self._open = True
            self._progress.begin(self._phase, self._total, "weights")
        self._progress.advance(self._pending)
        self._pending = 0 if name in self._asked else self._sizes.get(name, 0)
        self._asked.add(name)
        return self._source.weight(name)

    def identity(self) -> str:
        return self._source.identity()

    @property
    def path(self) -> Path:
        """Where the source lies (:class:`~sartor.backends.base.Located`). AttributeError where it
        does not say."""
        found: Path = self._source.path  # type: ignore[attr-defined]
        return found

    def __enter__(self) -> WatchedSource:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._open:
            self._progress.end()
