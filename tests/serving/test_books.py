"""What the gateway counts, on a clock of its own."""

from __future__ import annotations

import time
from typing import Any

import pytest

from sartor.engine.request import Chunk, FinishReason, Request
from sartor.graph import SamplingParams
from sartor.serving.books import LATENCY_BOUNDS, MAX_KEYS, OTHER_KEYS, Books, Histogram
from sartor.serving.errors import ApiError, internal, invalid, overloaded, unavailable
from sartor.serving.messages import EngineStats, StepTotals
from sartor.serving.request_record import RequestRecord


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def record_at(moment: float) -> RequestRecord:
    record = RequestRecord("id", "POST", moment, time.time_ns())
    record.operation = "chat"
    return record


def chunk(
    name: str,
    tokens: int = 1,
    choice: int = 0,
    end: FinishReason | None = None,
    cached: int = 0,
    prefill: float = 0.0,
) -> Chunk:
    return Chunk(
        name, choice, "", (1,) * tokens, (), end, None, 10, 1, cached, prefill_seconds=prefill
    )


class Desk:
    """Books, and one request in them: prompts a (two choices) and b."""

    def __init__(self) -> None:
        self.clock = Clock()
        self.books = Books(["m"], self.clock)
        self.model = self.books.models["m"]
        self.record = self.begin("a", "b", n=2)

    def begin(self, *names: str, n: int = 1, tenant: str = "team") -> RequestRecord:
        record = record_at(self.clock.now)
        self.clock.now += 0.5  # reading and encoding
        params = SamplingParams(n=n)
        requests = [Request(name, (1,) * 10, params, 1, tenant=tenant) for name in names]
        self.books.begin(record, "m", requests)
        return record

    def after(self, seconds: float, *chunks: Chunk) -> None:
        self.clock.now += seconds
        self.books.chunks(chunks)

    @property
    def counted(self) -> dict[Any, int]:
        return dict(self.books.requests)


def counts(histogram: Histogram) -> dict[float, int]:
    """Counts that are not 0, by upper bound."""
    bounds = (*LATENCY_BOUNDS, float("inf"))
    return {b: n for b, n in zip(bounds, histogram.counts, strict=True) if n}


def test_the_times_of_a_request() -> None:
    desk = Desk()
    desk.after(2.0, chunk("a", cached=4, prefill=0.25), chunk("unknown"))
    desk.after(0.12, chunk("a"), chunk("a", choice=1, prefill=9.0))
    desk.after(0.44, chunk("b", cached=8), chunk("a", tokens=2))
    desk.clock.now += 1.0
    record = desk.record
    desk.books.finish(record)
    assert record.first_token_seconds == pytest.approx(2.5)
    assert record.prefill_seconds == 0.25
    assert record.queue_seconds == pytest.approx(1.75)
    # a's first choice: one token after 0.12 s, two after 0.44; b and a's other one had one each.
    assert record.gaps == 3
    assert record.mean_gap == pytest.approx(0.56 / 3)
    assert record.longest_gap == pytest.approx(0.22)
    assert record.total_seconds == pytest.approx(4.06)
    assert (record.prompt_tokens, record.cached_tokens, record.completion_tokens) == (20, 12, 6)
    usage = desk.books.usage["m", "team"]
    assert (usage.prompt, usage.cached, usage.completion) == (20, 12, 6)
    assert counts(desk.model.first_token) == {3.0: 1}
    assert counts(desk.model.queue) == {2.0: 1}
    assert counts(desk.model.inter_token) == {0.15: 1, 0.3: 2}
    assert desk.model.inter_token.sum == pytest.approx(0.56)
    # What comes later belongs to nobody.
    desk.after(1.0, chunk("a"))
    assert usage.completion == 6
    assert not desk.books.unfinished


ENDS: list[tuple[list[FinishReason | None], str]] = [
    (["stop", "stop", "stop", "stop"], "stop"),
    (["stop", "length", "stop", "stop"], "length"),
    (["stop", "stop", None, "length"], "abort"),
    (["stop", "abort", "stop", "stop"], "abort"),
]


@pytest.mark.parametrize(("ends", "outcome"), ENDS)
def test_outcomes(ends: list[FinishReason | None], outcome: str) -> None:
    desk = Desk()
    for index, end in enumerate(ends):
        desk.after(0.1, chunk("ab"[index // 2], 1, index % 2, end))
    assert desk.record.finish_reasons == [end for end in ends if end]
    desk.books.finish(desk.record)
    assert desk.counted == {("m", outcome, "", "team"): 1}
    complete = outcome in ("stop", "length")
    assert sum(desk.model.duration.counts) == complete


@pytest.mark.parametrize(
    ("error", "begun", "outcome", "code"),
    [
        (invalid("no"), False, "rejected", "400"),
        (overloaded(3), False, "rejected", "queue_full"),
        (unavailable("no"), False, "rejected", "service_unavailable"),
        (unavailable("no"), True, "error", "service_unavailable"),
        (internal("no"), False, "error", "internal_error"),
        (ApiError(504, "no", code="request_timeout"), False, "error", "request_timeout"),
    ],
)
def test_errors(error: Any, begun: bool, outcome: str, code: str) -> None:
    desk = Desk()
    if begun:
        desk.after(0.1, chunk("a"))
    desk.record.error = error
    desk.books.finish(desk.record)
    assert desk.counted == {("m", outcome, code, "team"): 1}
    assert sum(desk.model.duration.counts) == 0


def test_a_prompt_that_failed_at_once_costs_nobody_anything() -> None:
    desk = Desk()
    desk.after(0.1, chunk("a", 0, 0, "error"), chunk("b", 0, 0, "abort"))
    usage = desk.books.usage["m", "team"]
    assert (usage.prompt, usage.completion) == (0, 0)
    assert not desk.record.first


def test_other_routes_are_no_requests_to_a_model() -> None:
    desk = Desk()
    record = record_at(0.0)
    record.operation = ""
    desk.books.finish(record)
    assert record.outcome == "ok"
    assert desk.counted == {}


def test_counters_outlive_workers() -> None:
    desk = Desk()
    done = desk.begin("c")
    desk.after(0.1, chunk("c", 1, 0, "stop"))

    def report(steps: int) -> None:
        totals = StepTotals(output_tokens=steps, step_times=(steps, 0))
        desk.books.engine_stats(EngineStats("m", totals, 1, 2, (), {}))

    seen = []
    for life, deaths in (([3, 5], "hang"), ([2], "signal"), ([], "start"), ([4], "error")):
        for steps in life:
            report(steps)
            seen.append(desk.model.totals)
        desk.books.worker_died(deaths)  # type: ignore[arg-type]
        seen.append(desk.model.totals)
        assert desk.model.engine is None
    assert [totals.output_tokens for totals in seen] == [3, 5, 5, 7, 7, 7, 11, 11]
    assert seen[-1].step_times == (11, 0)
    assert desk.books.deaths == {"hang": 1, "signal": 1, "start": 1, "error": 1}
    assert desk.record.restarts == 4
    assert done.restarts == 0  # it only had to be sent


def test_there_are_only_so_many_keys() -> None:
    desk = Desk()
    for i in range(MAX_KEYS + 5):
        desk.books.finish(desk.begin(f"r{i}", tenant=f"t{i}"))
    keys = {key for _, key in desk.books.usage}
    assert len(keys) == MAX_KEYS + 1
    assert OTHER_KEYS in keys
    assert desk.counted["m", "abort", "", OTHER_KEYS] == 6  # "team" was the first
    assert {key for *_, key in desk.books.requests} == keys - {"team"}
