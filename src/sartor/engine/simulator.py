"""Replays a trace of requests through the real engine in virtual time: no model, no waiting.

Everything that decides is the engine's own (scheduler, pace, prefix cache, preemption); only the
step is a formula. So a question about scheduling has an exact answer in milliseconds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from sartor.backends.base import MemoryUse
from sartor.engine.engine import Engine
from sartor.engine.request import Chunk, Request
from sartor.errors import UsageError
from sartor.graph import Batch, Builder, Capabilities, LowRank, Program, Ragged, SamplingParams
from sartor.graph.batch import StepOutput
from sartor.plan import ExecutionPlan
from sartor.text.tokenizer import Tokenizer

_VOCAB = 50_000


@dataclass(frozen=True)
class StepCost:
    """Seconds of a step: a part of its own, one for every token, and one for every token of
    state that a sequence reads (once for all of its tokens in the step)."""

    step: float
    token: float
    state: float = 0.0

    def seconds(self, batch: Batch) -> float:
        ends = batch.contexts + np.diff(batch.starts)
        return self.step + self.token * len(batch.tokens) + self.state * float(ends.sum())


@dataclass(frozen=True)
class Arrival:
    """One request of a trace. Those of one ``prefix_group`` begin with the same
    ``prefix_tokens`` tokens. ``leaves_after``: tokens after which the client goes away."""

    seconds: float
    prompt_tokens: int
    output_tokens: int
    tenant: str = ""
    share: float = 1.0
    priority: int = 0
    prefix_group: int = 0
    prefix_tokens: int = 0
    leaves_after: int | None = None


@dataclass
class Served:
    """What became of one arrival; ``times`` are those of its tokens, in seconds."""

    arrival: Arrival
    times: list[float] = field(default_factory=list)
    cached_tokens: int = 0
    finish_reason: str | None = None

    @property
    def first_token_seconds(self) -> float:
        return self.times[0] - self.arrival.seconds

    def intervals(self, start: float = 0.0, stop: float = float("inf")) -> list[float]:
        """Seconds between tokens, of those that came between two moments."""
        pairs = zip(self.times, self.times[1:], strict=False)
        return [after - before for before, after in pairs if start <= after < stop]


def replay(
    trace: Sequence[Arrival],
    cost: StepCost | Callable[[Batch], float],
    plan: ExecutionPlan,
    blocks: int,
    look: Callable[[Engine], None] = lambda engine: None,
) -> list[Served]:
    """Runs a trace to its end, on ``blocks`` blocks of state; ``look`` sees the engine after
    every step. The arrivals may come in any order."""
    clock = _Clock()
    executable = _Formula(plan, cost if callable(cost) else cost.seconds, clock)
    engine = Engine(
        executable,
        _TOKENIZER,
        capabilities=_CAPABILITIES,
        context_length=blocks * plan.block_size,
        model_key="simulated",
        state_blocks=[blocks],
        clock=clock,
    )
    served = [Served(arrival) for arrival in trace]
    coming = sorted(range(len(trace)), key=lambda i: trace[i].seconds, reverse=True)
    while coming or engine.has_work:
        if not engine.has_work:
            clock.now = max(clock.now, trace[coming[-1]].seconds)
        while coming and trace[coming[-1]].seconds <= clock.now:
            index = coming.pop()
            engine.add(_request(index, trace[index]))
        for chunk in engine.step():
            entry = served[int(chunk.request_id)]
            _take(entry, chunk, clock.now)
            if chunk.finish_reason is None and len(entry.times) == entry.arrival.leaves_after:
                engine.abort(chunk.request_id)
        look(engine)
    return served


def _take(entry: Served, chunk: Chunk, now: float) -> None:
    entry.times += [now] * len(chunk.tokens)
    entry.cached_tokens = chunk.cached_tokens
    entry.finish_reason = chunk.finish_reason


def _request(index: int, arrival: Arrival) -> Request:
    own = np.random.default_rng(index).integers(0, _VOCAB, arrival.prompt_tokens)
    group = np.random.default_rng([arrival.prefix_group])
    own[: arrival.prefix_tokens] = group.integers(0, _VOCAB, arrival.prefix_tokens)
    return Request(
        str(index),
        tuple(own.tolist()),
        SamplingParams(temperature=0.0, max_tokens=arrival.output_tokens, ignore_eos=True),
        seed=0,
        tenant=arrival.tenant,
        share=arrival.share,
        priority=arrival.priority,
        want_text=False,
    )


class _Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


class _Formula:
    """An executable that draws token 0 and takes as long as a formula says."""

    def __init__(
        self, plan: ExecutionPlan, seconds: Callable[[Batch], float], clock: _Clock
    ) -> None:
        self.plan = plan
        self.program = _program()
        self._seconds = seconds
        self._clock = clock
        self._rows = 0

    def block_bytes(self, group: int) -> int:
        return self.plan.block_size

    def allocate_state(self, blocks: Sequence[int]) -> None:
        """There is none."""

    def load_adapter(self, index: int, layers: Mapping[str, LowRank]) -> None:
        raise UsageError("a simulated model takes no adapters")

    def drop_adapter(self, index: int) -> None:
        raise UsageError("a simulated model takes no adapters")

    def submit(self, batch: Batch) -> int:
        self._clock.now += self._seconds(batch)
        self._rows = len(batch.output_rows)
        return 0

    def collect(self, handle: int) -> StepOutput:
        tokens, starts = np.zeros(self._rows, np.int32), np.zeros(self._rows + 1, np.int32)
        return StepOutput(
            tokens,
            np.zeros(self._rows, np.float32),
            Ragged(np.zeros(0, np.int32), starts),
            Ragged(np.zeros(0, np.float32), starts),
        )

    def memory(self) -> MemoryUse:
        return MemoryUse(0, 0, 0)

    def kernel_path(self, node: str) -> str:
        return "simulated"

    def close(self) -> None:
        """Nothing is held."""


def _program() -> Program:
    builder = Builder()
    x = builder.embedding(builder.token_ids, "embedding", _VOCAB, 2)
    q, k, v = (builder.linear(x, name, 2) for name in "qkv")
    x = builder.attention(q, k, v, heads=1, kv_heads=1, head_dim=2, scale=1.0)
    return builder.finish(
        builder.linear(builder.gather_rows(x, builder.output_rows), "head", _VOCAB)
    )


class _NoText:
    def encode(self, text: str, parse_special: bool) -> list[int]:
        raise UsageError("a simulated model has no text")


_CAPABILITIES = Capabilities(operators=frozenset(), copies=True)
_TOKENIZER = Tokenizer(
    encoder=_NoText(),
    bytes_of=lambda token: b"",
    vocab_size=_VOCAB,
    special_ids=frozenset(),
    bos_id=None,
    eos_ids=frozenset(),
    prefix=[],
    suffix=[],
    strips_leading_space=False,
)
