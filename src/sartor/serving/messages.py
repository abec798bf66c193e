"""What the gateway and its workers say to each other: one typed message each way.

Encoded with msgpack. A model is always named, since a worker may host several.
"""

from __future__ import annotations

from operator import add

import msgspec

from sartor.engine.request import Chunk, Request
from sartor.plan import ExecutionPlan
from sartor.serving.channel import Ticket


class AdapterSpec(msgspec.Struct, frozen=True):
    """An adapter of a model: the name that requests use, and its folder."""

    name: str
    path: str


class ModelSpec(msgspec.Struct, frozen=True):
    """A model that a worker shall host."""

    name: str
    path: str
    plan: ExecutionPlan
    cache: str | None = None
    adapters: tuple[AdapterSpec, ...] = ()


class WorkerConfig(msgspec.Struct, frozen=True):
    """What a worker is told at its start, as one line of JSON on its standard input.

    ``channel`` leads to its sockets (:func:`sartor.serving.channel.open_end`). ``memory_bytes`` is
    what weights, state, scratch and the process itself may take; None: no limit.
    """

    models: tuple[ModelSpec, ...]
    channel: tuple[Ticket, Ticket]
    beat_seconds: float
    memory_bytes: int | None = None


# Gateway to worker


class Submit(msgspec.Struct, frozen=True, tag=True):
    model: str
    request: Request


class Abort(msgspec.Struct, frozen=True, tag=True):
    model: str
    request_id: str


class LoadAdapter(msgspec.Struct, frozen=True, tag=True):
    model: str
    adapter: AdapterSpec


class DropAdapter(msgspec.Struct, frozen=True, tag=True):
    """Requests that run with it finish first."""

    model: str
    name: str


ToWorker = Submit | Abort | LoadAdapter | DropAdapter


# Worker to gateway


class HostedModel(msgspec.Struct, frozen=True):
    """A model after loading: its context length, or the error that kept it from loading.

    ``final``: another try would end the same way, as long as nobody changes anything.
    ``adapter_errors`` names the adapters that it came without, and why. ``plan`` has every "auto"
    replaced, and ``memory`` is in bytes, by owner.
    """

    name: str
    context_length: int = 0
    load_seconds: float = 0.0
    error: str | None = None
    final: bool = False
    adapter_errors: dict[str, str] = {}
    plan: ExecutionPlan | None = None
    memory: dict[str, int] = {}


class Ready(msgspec.Struct, frozen=True, tag=True):
    """The worker takes requests. ``process_bytes``: what it holds beside its models, where it
    counts that."""

    models: tuple[HostedModel, ...]
    process_bytes: int = 0


class Chunks(msgspec.Struct, frozen=True, tag=True):
    """Everything that one engine step gave."""

    model: str
    chunks: list[Chunk]


class Refused(msgspec.Struct, frozen=True, tag=True):
    """The engine did not take a request. ``invalid``: the request is wrong, not the engine."""

    model: str
    request_id: str
    message: str
    invalid: bool


class AdapterLoaded(msgspec.Struct, frozen=True, tag=True):
    """The end of a :class:`LoadAdapter`: usable from now on, or the error that kept it away."""

    model: str
    name: str
    error: str | None = None


class StepTotals(msgspec.Struct, frozen=True):
    """Sums over the steps of one engine (see :class:`~sartor.engine.step.StepRecord`).

    ``step_times`` counts steps by :data:`sartor.serving.meter.STEP_BOUNDS`; the sum of the
    seconds is what these took.
    """

    prompt_tokens: int = 0
    decode_tokens: int = 0
    output_tokens: int = 0
    preemptions: int = 0
    schedule_seconds: float = 0.0
    build_seconds: float = 0.0
    execute_seconds: float = 0.0
    post_seconds: float = 0.0
    step_times: tuple[int, ...] = ()

    def __add__(self, other: StepTotals) -> StepTotals:
        if not (self.step_times and other.step_times):
            return self if self.step_times else other
        return StepTotals(
            prompt_tokens=self.prompt_tokens + other.prompt_tokens,
            decode_tokens=self.decode_tokens + other.decode_tokens,
            output_tokens=self.output_tokens + other.output_tokens,
            preemptions=self.preemptions + other.preemptions,
            schedule_seconds=self.schedule_seconds + other.schedule_seconds,
            build_seconds=self.build_seconds + other.build_seconds,
            execute_seconds=self.execute_seconds + other.execute_seconds,
            post_seconds=self.post_seconds + other.post_seconds,
            step_times=tuple(map(add, self.step_times, other.step_times)),
        )


class StateUse(msgspec.Struct, frozen=True):
    """Blocks of one state group: held by sequences, cached for prompts to come, and all."""

    group: str
    held: int
    cached: int
    total: int
    block_bytes: int


class EngineStats(msgspec.Struct, frozen=True, tag=True):
    """What one engine has done since its worker began, and what it holds now.

    ``running`` and ``waiting`` count sequences; ``memory`` is in bytes, by owner: weights, state,
    scratch and whatever else is told apart.
    """

    model: str
    totals: StepTotals
    running: int
    waiting: int
    states: tuple[StateUse, ...]
    memory: dict[str, int]


class Beat(msgspec.Struct, frozen=True, tag=True):
    """A sign of life from a thread of its own; ``stuck_seconds`` since the loop last turned."""

    stuck_seconds: float


class Failed(msgspec.Struct, frozen=True, tag=True):
    """The worker's last words: why it ends. ``final``: another one would end the same way."""

    cause: str
    final: bool = False


FromWorker = Ready | Chunks | Refused | AdapterLoaded | EngineStats | Beat | Failed
