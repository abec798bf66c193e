"""What a worker tells of its engines: sums over their step records, and what they hold now."""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Callable

from sartor.engine.encoder import Encoder
from sartor.engine.engine import Engine
from sartor.engine.step import StepRecord
from sartor.serving.messages import EngineStats, StateUse, StepTotals

STEP_BOUNDS = (
    *(0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05),
    *(0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0),
)
"""Upper bounds of the counts of step times, seconds; one more count is for all beyond."""

REPORT_SECONDS = 1.0


class Meter:
    """The books of one engine since it began."""

    def __init__(self, model: str, engine: Engine | Encoder) -> None:
        self._model = model
        self._engine = engine
        executable = engine.executable
        self._groups = tuple(
            (f"{group.index}-{group.kind}", executable.block_bytes(group.index))
            for group in executable.program.groups()
        )
        self._next = 0
        self._prompt_tokens = self._decode_tokens = self._output_tokens = self._preemptions = 0
        self._schedule = self._build = self._execute = self._post = 0.0
        self._step_times = [0] * (len(STEP_BOUNDS) + 1)

    def drain(self) -> None:
        """Books the steps since the last call. To be called after every step: the engine keeps
        only its latest records."""
        records = self._engine.records
        if not records:
            return
        new = records[-1].index + 1 - self._next
        self._next += new
        for back in range(-min(new, len(records)), 0):
            self._add(records[back])

    def _add(self, record: StepRecord) -> None:
        self._prompt_tokens += record.prompt_tokens
        self._decode_tokens += record.decode_tokens
        self._output_tokens += record.output_tokens
        self._preemptions += record.preempted
        schedule, build = record.schedule_seconds, record.build_seconds
        execute, post = record.execute_seconds, record.post_seconds
        self._schedule += schedule
        self._build += build
        self._execute += execute
        self._post += post
        self._step_times[bisect_left(STEP_BOUNDS, schedule + build + execute + post)] += 1

    def stats(self) -> EngineStats:
        engine = self._engine
        states: tuple[StateUse, ...] = ()
        if isinstance(engine, Engine):
            rows = zip(
                self._groups,
                engine.blocks_held(),
                engine.blocks_cached(),
                engine.blocks_total,
                strict=True,
            )
            states = tuple(
                StateUse(group, held, cached, total, block_bytes)
                for (group, block_bytes), held, cached, total in rows
            )
        memory = engine.executable.memory()
        return EngineStats(
            model=self._model,
            totals=StepTotals(
                prompt_tokens=self._prompt_tokens,
                decode_tokens=self._decode_tokens,
                output_tokens=self._output_tokens,
                preemptions=self._preemptions,
                schedule_seconds=self._schedule,
                build_seconds=self._build,
                execute_seconds=self._execute,
                post_seconds=self._post,
                step_times=tuple(self._step_times),
            ),
            running=engine.running,
            waiting=engine.waiting,
            states=states,
            memory={
                "weights": memory.weights,
                "state": memory.state,
                "scratch": memory.scratch,
            },
        )


class Reporter:
    """Sends what the meters show: about once a second, and when the engines come to rest."""

    def __init__(
        self,
        engines: dict[str, Engine | Encoder],
        send: Callable[[EngineStats], object],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._meters = [Meter(model, engine) for model, engine in engines.items()]
        self._sent: dict[str, EngineStats] = {}
        self._send = send
        self._clock = clock
        self._due = clock()

    def turn(self, idle: bool) -> None:
        """To be called after every turn of the worker's loop; ``idle``: it had nothing to do."""
        for meter in self._meters:
            meter.drain()
        now = self._clock()
        if not idle and now < self._due:
            return
        self._due = now + REPORT_SECONDS
        for meter in self._meters:
            stats = meter.stats()
            if stats != self._sent.get(stats.model):
                self._sent[stats.model] = stats
                self._send(stats)
