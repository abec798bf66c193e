"""What a worker does when nobody asks: it measures kernels, a slice at a time."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable

from sartor.backends.base import Executable, Tunable

PATIENCE_SECONDS = 5.0  # without a request, before it begins
SLICE_SECONDS = 0.05  # between looks for new requests: what one may have to wait
_LOG = logging.getLogger(__name__)


class IdleTuning:
    """Tunes executables one after the other, while all engines are idle."""

    def __init__(
        self, executables: Iterable[Executable], clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Those that are :class:`Tunable` and whose plan wants it are tuned."""
        self._left: list[Tunable] = [
            e for e in executables if e.plan.tune and isinstance(e, Tunable)
        ]
        self._clock = clock
        self._idle_since = clock()

    def due(self) -> bool:
        """Whether there is something to measure, and the time for it."""
        return bool(self._left) and self._clock() - self._idle_since >= PATIENCE_SECONDS

    def busy(self) -> None:
        """Somebody asked: the wait begins again."""
        self._idle_since = self._clock()

    def slice(self) -> None:
        """Measures for at most about :data:`SLICE_SECONDS`. Never fails: what cannot be tuned
        stays as it is."""
        try:
            done = self._left[0].tune(SLICE_SECONDS)
        except Exception:
            _LOG.exception("kernels cannot be tuned")
            done = True
        if done:
            self._left.pop(0)
