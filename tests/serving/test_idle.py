"""Idle tuning: it begins late, looks for requests between slices, and never fails."""

from __future__ import annotations

from collections import deque
from typing import Any

import pytest

from sartor.backends.null.backend import NullExecutable, null_program
from sartor.hardware import MemoryLedger
from sartor.plan import ExecutionPlan
from sartor.serving import worker
from sartor.serving.hosting import Host, Running
from sartor.serving.idle import PATIENCE_SECONDS, SLICE_SECONDS, IdleTuning
from sartor.serving.meter import Reporter


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


class Executable(NullExecutable):
    """Takes the whole of each slice, ``slices`` times."""

    def __init__(self, clock: Clock, slices: int, plan: ExecutionPlan | None = None) -> None:
        super().__init__(null_program(), plan or ExecutionPlan())
        self.clock, self.slices, self.tuned = clock, slices, 0

    def tuned_from(self, folder: object, *, again: bool = False) -> None:
        raise AssertionError("a worker's models have been loaded")

    def timings(self) -> list[Any]:
        return []

    def use_tuned(self, on: bool) -> None:
        raise AssertionError("an idle worker compares nothing")

    def tune(self, seconds: float) -> bool:
        self.clock.now += seconds
        self.tuned += 1
        return self.tuned == self.slices


def test_it_begins_after_a_while_and_ends() -> None:
    clock = Clock()
    first, second = Executable(clock, 3), Executable(clock, 1)
    plain = NullExecutable(null_program(), ExecutionPlan())
    tuning = IdleTuning([first, plain, second], clock)
    assert not tuning.due()
    clock.now = PATIENCE_SECONDS - 0.1
    tuning.busy()
    clock.now = PATIENCE_SECONDS + 0.1
    assert not tuning.due()
    clock.now = 2 * PATIENCE_SECONDS
    for _ in range(4):
        assert tuning.due()
        tuning.slice()
    assert not tuning.due()
    assert (first.tuned, second.tuned) == (3, 1)


def test_a_plan_may_say_no() -> None:
    clock = Clock()
    tuning = IdleTuning([Executable(clock, 3, ExecutionPlan(tune=False))], clock)
    clock.now = 100
    assert not tuning.due()


def test_what_cannot_be_tuned_is_left_alone(caplog: pytest.LogCaptureFixture) -> None:
    class Broken(Executable):
        def tune(self, seconds: float) -> bool:
            raise MemoryError

    clock = Clock()
    tuning = IdleTuning([Broken(clock, 1), Executable(clock, 1)], clock)
    clock.now = 100
    tuning.slice()
    assert "tuned" in caplog.text
    tuning.slice()
    assert not tuning.due()


def test_a_request_waits_for_one_slice_at_most() -> None:
    """The worker's own loop, over an engine that has work from the arrival on for one step."""
    clock = Clock()
    executable = Executable(clock, 1000)
    arrival = PATIENCE_SECONDS + 10.5 * SLICE_SECONDS
    taken: list[float] = []
    pulse = worker.Pulse()

    class Engine:
        has_work = False

        def __init__(self) -> None:
            self.executable = executable

        def add(self, request: object) -> None:
            taken.append(clock.now)
            self.has_work = True

        def step(self) -> list[Any]:
            self.has_work = False
            return []

    class Inbox:
        def __init__(self) -> None:
            self.arrivals = deque([arrival])
            self.turns = 0

        def receive(self, wait_seconds: float) -> list[object]:
            self.turns += 1
            if self.turns > 200:
                pulse.stopping.set()
            if self.arrivals and clock.now + wait_seconds >= self.arrivals[0]:
                clock.now = max(clock.now, self.arrivals.popleft())
                return [worker.Submit("m", None)]  # type: ignore[arg-type]
            clock.now += wait_seconds
            return []

    models = {"m": Running(None, Engine())}  # type: ignore[arg-type]
    hosting = Host(MemoryLedger(), models, [])
    inbox: Any = Inbox()
    nothing_is_sent: Any = None
    reporter = Reporter({}, nothing_is_sent)
    worker._turn(hosting, inbox, pulse, IdleTuning([executable], clock), reporter)
    assert len(taken) == 1
    assert 0 <= taken[0] - arrival <= SLICE_SECONDS
    after = PATIENCE_SECONDS / worker._IDLE_SECONDS  # turns that wait again
    assert 10 < executable.tuned <= 200 - after
