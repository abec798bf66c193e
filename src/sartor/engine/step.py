"""One step: what is known of it while the backend runs it, and the record that it leaves."""

from __future__ import annotations

from dataclasses import dataclass

from sartor.engine.sequence import Sequence


@dataclass(frozen=True, slots=True)
class StepRecord:
    """What one step did, and where its time went (seconds).

    ``blocks_held``, ``blocks_cached`` and ``blocks_total`` are per state group, after the step.
    ``decode_tokens`` counts sequences that computed a single token, ``prompt_tokens`` the tokens
    of larger chunks. ``waiting`` and ``running`` count sequences after it. ``execute_seconds`` is
    time spent in calls of the backend (where it is asynchronous, less than the step took);
    everything else is host work. ``seconds`` is the step as a whole; where steps overlap, the time
    since the one before it ended.
    """

    index: int
    started: float
    prompt_tokens: int
    decode_tokens: int
    output_tokens: int
    sequences: int
    preempted: int
    running: int
    waiting: int
    blocks_held: tuple[int, ...]
    blocks_cached: tuple[int, ...]
    blocks_total: tuple[int, ...]
    schedule_seconds: float
    build_seconds: float
    execute_seconds: float
    post_seconds: float
    seconds: float

    @property
    def host_seconds(self) -> float:
        return self.schedule_seconds + self.build_seconds + self.post_seconds


@dataclass(frozen=True, slots=True)
class Flight:
    """A step that was submitted and not yet collected.

    ``items``: each sequence with its number of tokens; ``ends``: the length of its state after
    the step. ``outputs``: the sequence of each output row; ``positions``: where its token goes.
    ``times``: when scheduling started, when it ended, when the batch was built and submitted.
    """

    handle: int
    items: list[tuple[Sequence, int]]
    ends: list[int]
    outputs: list[Sequence]
    positions: list[int]
    preempted: int
    times: tuple[float, float, float, float]
