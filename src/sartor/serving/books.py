"""The gateway's books: what came of requests, token by token, and what the engines report.

Written on the event loop's thread, on the way of every token, so a token costs a few sums;
:mod:`sartor.serving.metrics` reads them when somebody asks.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from sartor.engine.request import Chunk, Request
from sartor.serving.lifecycle import Death
from sartor.serving.messages import EngineStats, StepTotals
from sartor.serving.request_record import RequestRecord

LATENCY_BOUNDS = (
    *(0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075),
    *(0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 5.0, 7.5, 10.0, 15.0, 20.0, 30.0, 60.0),
)
"""Upper bounds in seconds; neighbours are close enough for a median of use."""

MAX_KEYS = 256
OTHER_KEYS = "(other)"
"""Stands for all keys beyond the first :data:`MAX_KEYS`: every one makes some twenty lines."""


class Histogram:
    """Counts of values by upper bound; the last count is for all beyond."""

    __slots__ = ("_bounds", "counts", "sum")

    def __init__(self, bounds: Sequence[float] = LATENCY_BOUNDS) -> None:
        self._bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def observe(self, value: float, times: int = 1) -> None:
        self.counts[bisect_left(self._bounds, value)] += times
        self.sum += value * times


@dataclass(slots=True)
class Usage:
    """Tokens of one model and key. A prompt counts once something came of it."""

    prompt: int = 0
    cached: int = 0
    completion: int = 0


@dataclass(slots=True)
class ModelBooks:
    """What the gateway saw of one model, and what its engine says.

    ``ended`` sums over workers that are gone: what a worker counts begins at 0, and a counter
    must not fall.
    """

    first_token: Histogram = field(default_factory=Histogram)
    inter_token: Histogram = field(default_factory=Histogram)
    queue: Histogram = field(default_factory=Histogram)
    duration: Histogram = field(default_factory=Histogram)
    engine: EngineStats | None = None
    ended: StepTotals = field(default_factory=StepTotals)

    @property
    def totals(self) -> StepTotals:
        return self.ended if self.engine is None else self.ended + self.engine.totals

    def worker_died(self) -> None:
        self.ended, self.engine = self.totals, None


@dataclass(slots=True, eq=False)
class _Stream:
    """One prompt of a request, and when the latest token of each of its choices came."""

    record: RequestRecord
    books: ModelBooks
    usage: Usage
    prompt_tokens: int
    offset: int
    latest: list[float]
    begun: bool = False


class Books:
    """All counts of one gateway."""

    def __init__(self, models: Iterable[str], clock: Callable[[], float] = time.monotonic) -> None:
        self.models = {name: ModelBooks() for name in models}
        self.usage: dict[tuple[str, str], Usage] = {}
        self.requests: Counter[tuple[str, str, str, str]] = Counter()
        """By model, outcome, code and key."""
        self.deaths: Counter[Death] = Counter()
        self.unfinished: set[RequestRecord] = set()
        self.process_bytes = 0
        """What the worker holds beside its models, where its memory is limited."""
        self._streams: dict[str, _Stream] = {}
        self._keys: set[str] = set()
        self._clock = clock

    def begin(self, record: RequestRecord, model: str, requests: Sequence[Request]) -> None:
        """A request's prompts are about to be submitted."""
        first = requests[0]
        record.model, record.adapter, record.params = model, first.adapter, first.params
        record.key = first.tenant or record.key
        record.prompt_tokens = sum(len(request.prompt) for request in requests)
        record.submitted = self._clock()
        books, usage = self.models[model], self._usage(model, record.key)
        for request in requests:
            choices = request.params.n
            self._streams[request.id] = _Stream(
                record, books, usage, len(request.prompt), len(record.ends), [0.0] * choices
            )
            record.requests.append(request.id)
            record.ends += [None] * choices
        self.unfinished.add(record)

    def chunks(self, chunks: Iterable[Chunk]) -> None:
        """What one step of an engine gave."""
        now = self._clock()
        for chunk in chunks:
            stream = self._streams.get(chunk.request_id)
            if stream is None:
                continue
            record, choice, count = stream.record, chunk.choice, len(chunk.tokens)
            if chunk.finish_reason is not None:
                record.ends[stream.offset + choice] = chunk.finish_reason
            if count:
                latest, stream.latest[choice] = stream.latest[choice], now
                record.last = now
                record.completion_tokens += count
                stream.usage.completion += count
                if latest:
                    gap = (now - latest) / count
                    stream.books.inter_token.observe(gap, count)
                    record.gaps += count
                    record.gap_seconds += now - latest
                    if gap > record.longest_gap:
                        record.longest_gap = gap
                    continue
            if not stream.begun and chunk.finish_reason not in ("error", "abort"):
                self._begun(stream, chunk, now)

    def _begun(self, stream: _Stream, chunk: Chunk, now: float) -> None:
        """The first that comes of a prompt."""
        stream.begun = True
        stream.usage.prompt += stream.prompt_tokens
        stream.usage.cached += chunk.cached_tokens
        record = stream.record
        record.cached_tokens += chunk.cached_tokens
        if chunk.tokens and not record.first:
            record.first, record.prefill_seconds = now, chunk.prefill_seconds
            stream.books.first_token.observe(record.first_token_seconds or 0.0)
            stream.books.queue.observe(record.queue_seconds or 0.0)

    def finish(self, record: RequestRecord) -> None:
        """The response has gone out, or will not."""
        record.ended = self._clock()
        self.unfinished.discard(record)
        for request_id in record.requests:
            del self._streams[request_id]
        if not record.operation:
            return
        outcome = record.outcome
        self.requests[record.model, outcome, record.code, self.label(record.key)] += 1
        if outcome in ("stop", "length"):
            self.models[record.model].duration.observe(record.total_seconds)

    def engine_stats(self, stats: EngineStats) -> None:
        self.models[stats.model].engine = stats

    def worker_died(self, death: Death) -> None:
        self.deaths[death] += 1
        for books in self.models.values():
            books.worker_died()
        for record in self.unfinished:
            record.restarts += None in record.ends

    def _usage(self, model: str, key: str) -> Usage:
        return self.usage.setdefault((model, self.label(key)), Usage())

    def label(self, name: str) -> str:
        """What stands for a key in the lines of :mod:`sartor.serving.metrics`."""
        if name not in self._keys:
            if len(self._keys) >= MAX_KEYS:
                return OTHER_KEYS
            self._keys.add(name)
        return name
