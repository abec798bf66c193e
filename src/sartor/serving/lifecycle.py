"""When a worker is started, killed, restarted and given up: decisions only, no processes.

Times are seconds of one monotonic clock, handed in by the caller.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from sartor.serving.ending import Blame

Phase = Literal["waiting", "starting", "ready", "ending", "failed"]

Death = Literal["start", "hang", "signal", "memory", "error"]
"""How a worker ended: before it was ready, unresponsive, killed from outside, killed for want of
memory, or by itself (a crash is that, too)."""

KILLS_FORGIVEN = 8
"""Kills from outside in a row, without any progress, that are nobody's fault.

Neither a request nor a worker that is still loading can do anything about them. But watchers of
memory that are no part of the kernel kill from outside as well, and what makes them do so must
not go on for ever: from the next kill on each counts like a crash.
"""


_DEATHS: dict[Blame, Death] = {"outside": "signal", "memory": "memory", "itself": "error"}


@dataclass(frozen=True)
class Timing:
    """How patient the gateway is with a worker; seconds, but for ``starts``.

    start    from spawn to ready: reading weights may take long, so this only ends the endless
    hang     without a heartbeat, or in one engine step, before the worker counts as dead
    beat     between two heartbeats
    starts   attempts before a worker that never gets ready is given up
    delay    before the second attempt; doubles with each further one, up to ``longest_delay``
    retry    after giving up, until a request may cause one more attempt
    stall    that a client may leave a piece of its answer unread
    quarantine  that a request which was given up is refused without another try
    """

    start: float = 1800.0
    hang: float = 120.0
    beat: float = 1.0
    starts: int = 3
    delay: float = 0.5
    longest_delay: float = 10.0
    retry: float = 60.0
    stall: float = 60.0
    quarantine: float = 600.0


@dataclass(frozen=True)
class Start:
    """Spawn a worker now."""


@dataclass(frozen=True)
class Kill:
    """End the worker that runs now."""

    cause: str


class Lifecycle:
    """waiting -> starting -> ready -> ending -> waiting ..., or failed after too many starts.

    ``cause`` says why the last worker ended.
    """

    def __init__(self, timing: Timing, now: float) -> None:
        self.phase: Phase = "waiting"
        self.cause = ""
        self._timing = timing
        self._due = now
        self._since = now
        self._beat = now
        self._stuck = 0.0
        self._failed_starts = 0
        self._kills = 0
        self._idle_deaths = 0
        self._was_ready = False
        self._ever_ready = False
        self._worked = False

    @property
    def ever_ready(self) -> bool:
        """Whether any worker has been."""
        return self._ever_ready

    def ensure(self, now: float) -> None:
        """Somebody wants the worker: one that was given up long enough ago gets a try."""
        if self.phase == "failed" and now - self._since >= self._timing.retry:
            self._failed_starts = self._timing.starts - 1
            self.phase, self._due = "waiting", now

    def retry_seconds(self, now: float) -> float | None:
        """Until ``ensure`` gives a worker that was given up a try; None where none was."""
        if self.phase != "failed":
            return None
        return max(0.0, self._since + self._timing.retry - now)

    def tick(self, now: float) -> Start | Kill | None:
        """What to do at this moment, if anything."""
        if self.phase == "waiting" and now >= self._due:
            self.phase, self._since = "starting", now
            self._was_ready = self._worked = False
            return Start()
        if self.phase == "starting" and now - self._since > self._timing.start:
            return self._kill(f"the worker was not ready after {self._timing.start:g} s")
        if self.phase == "ready":
            if self._stuck > self._timing.hang:
                return self._kill(f"the worker was stuck in one step for {self._stuck:.0f} s")
            if now - self._beat > self._timing.hang:
                return self._kill(f"the worker gave no sign of life for {now - self._beat:.0f} s")
        return None

    def ready(self, now: float) -> None:
        self.phase, self._since, self._beat, self._stuck = "ready", now, now, 0.0
        self._failed_starts = self._kills = 0
        self._was_ready = self._ever_ready = True
        self.cause = ""

    def beat(self, now: float, stuck_seconds: float) -> None:
        self._beat, self._stuck = now, stuck_seconds

    def excuse(self, seconds: float) -> None:
        """The caller itself did not run for so long (a stopped process, a machine asleep): what
        the worker said meanwhile has not been heard yet."""
        self._beat += seconds
        self._since += seconds

    def worked(self) -> None:
        """The worker gave a result, so its next start needs no delay."""
        self._worked = True

    def silence(self, now: float) -> float | None:
        """Seconds since the last sign of life; None while none is expected."""
        return now - self._beat if self.phase == "ready" else None

    def exited(
        self, now: float, cause: str, blame: Blame = "itself", *, final: bool = False
    ) -> Death:
        """The process is gone. The cause of a kill is kept, since it says more.

        ``final``: the next one would end the same way. Where none was ever ready, that is the end;
        what one worker could load, another may load again once the disturbance is over.
        """
        death: Death = _DEATHS[blame]
        if not self._was_ready:
            death = "start"
        elif self.phase == "ending":
            death = "hang"
        if self.phase != "ending":
            self.cause = cause
        if self._was_ready:
            # One that was useful, and one that died for the first time, come back at once.
            self._idle_deaths = 0 if self._worked else self._idle_deaths + 1
            repeats = self._idle_deaths - 1
        elif blame == "outside" and self.phase != "ending" and self._kills < KILLS_FORGIVEN:
            self._kills += 1
            repeats = self._kills
        else:
            self._failed_starts += 1
            repeats = self._failed_starts
            hopeless = final and not self._ever_ready
            if hopeless or self._failed_starts >= self._timing.starts:
                self.phase, self._since = "failed", now
                return death
        delay = self._timing.delay * 2.0 ** min(repeats - 1, 16) if repeats > 0 else 0.0
        self.phase, self._due = "waiting", now + min(delay, self._timing.longest_delay)
        return death

    def _kill(self, cause: str) -> Kill:
        self.phase, self.cause = "ending", cause
        return Kill(cause)
