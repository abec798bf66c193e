"""A Progress that remembers what it was told."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class Told:
    name: str
    total: int | None
    unit: str
    seconds: float | None
    done: int = 0
    parts: list[str] = field(default_factory=list)
    ended: bool = False


class Recorded:
    """``phases`` in the order in which they began."""

    def __init__(self) -> None:
        self.notices: list[str] = []
        self.phases: list[Told] = []
        self._open: list[Told] = []

    def notice(self, text: str) -> None:
        self.notices.append(text)

    def begin(
        self,
        phase: str,
        total: int | None = None,
        unit: str = "bytes",
        seconds: float | None = None,
    ) -> None:
        self.phases.append(Told(phase, total, unit, seconds))
        self._open.append(self.phases[-1])

    def part(self, name: str) -> None:
        self._open[-1].parts.append(name)

    def advance(self, n: int) -> None:
        self._open[-1].done += n

    def end(self) -> None:
        self._open.pop().ended = True

    def phase(self, name: str) -> Told:
        """The one of that name, which has to have ended."""
        (found,) = [told for told in self.phases if told.name == name]
        assert found.ended
        return found
