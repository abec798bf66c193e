"""Where the time of a phase goes, by operator."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Protocol, runtime_checkable

from sartor.backends.base import Executable
from sartor.errors import UnsupportedError


@runtime_checkable
class Profiled(Protocol):
    """An executable that can time its nodes."""

    def profile(self, on: bool) -> None:
        """Starts timing from zero, or stops it and forgets the sums."""

    def seconds(self) -> list[tuple[str, float]]:
        """Seconds by node since profiling began, in program order."""


def profiled(executable: Executable) -> Profiled:
    """The same executable; UnsupportedError where its backend cannot time nodes."""
    if isinstance(executable, Profiled):
        return executable
    raise UnsupportedError(
        f"backend {executable.plan.backend} cannot time its operators; measure without a profile"
    )


def by_operator(seconds: Iterable[tuple[str, float]]) -> dict[str, float]:
    """Adds up the layers: ``model.layers.7.mlp.up_proj`` counts as ``model.layers.*.mlp.up_proj``.

    The slowest come first.
    """
    sums: dict[str, float] = {}
    for name, value in seconds:
        key = re.sub(r"\.\d+\.", ".*.", name)
        sums[key] = sums.get(key, 0.0) + value
    return dict(sorted(sums.items(), key=lambda item: -item[1]))
