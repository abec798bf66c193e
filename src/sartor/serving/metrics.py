"""``GET /metrics``: the gateway's books in the words of Prometheus.

Names and units follow https://prometheus.io/docs/practices/naming/. ``python -m
sartor.serving.metrics`` prints the table of docs/serving.md.
"""

from __future__ import annotations

import platform
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from fastapi import APIRouter, Request
from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.exposition import choose_encoder
from prometheus_client.metrics_core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector
from starlette.responses import Response

from sartor import __version__
from sartor.serving.access import Visit
from sartor.serving.books import LATENCY_BOUNDS
from sartor.serving.gateway import Gateway
from sartor.serving.intake import Intake
from sartor.serving.lifecycle import Death
from sartor.serving.meter import STEP_BOUNDS


@dataclass(frozen=True)
class Described:
    """One metric: what it is called, what its labels are, and what it says."""

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    labels: tuple[str, ...]
    help: str


_M = ("model",)
METRICS = (
    Described(
        "sartor_time_to_first_token_seconds",
        "histogram",
        _M,
        "From a request's arrival to its first token in the gateway.",
    ),
    Described(
        "sartor_inter_token_seconds",
        "histogram",
        _M,
        "Between two tokens of one choice, as they reach the gateway.",
    ),
    Described(
        "sartor_request_queue_seconds",
        "histogram",
        _M,
        "From a request's submission to the start of its prefill.",
    ),
    Described(
        "sartor_request_duration_seconds",
        "histogram",
        _M,
        "From a request's arrival to the last byte of its complete answer.",
    ),
    Described(
        "sartor_requests_total",
        "counter",
        ("model", "outcome", "code", "key"),
        "Requests that have ended: stop, length, abort (the client left), error, or rejected; "
        "the code is the error's.",
    ),
    Described(
        "sartor_prompt_tokens_total",
        "counter",
        ("model", "key"),
        "Tokens of prompts, once something came of them; cached ones included.",
    ),
    Described(
        "sartor_cached_prompt_tokens_total",
        "counter",
        ("model", "key"),
        "Tokens of prompts whose state was found in the cache.",
    ),
    Described(
        "sartor_completion_tokens_total",
        "counter",
        ("model", "key"),
        "Tokens generated, counted as they come.",
    ),
    Described(
        "sartor_intake_seconds_total",
        "counter",
        ("key",),
        "Time spent on reading requests, those that were refused included.",
    ),
    Described(
        "sartor_held_bytes",
        "gauge",
        ("key", "what"),
        "Memory of the gateway: bodies that are being read, answers that wait to be taken.",
    ),
    Described(
        "sartor_unfinished_prompts", "gauge", ("key",), "Prompts whose answers are not complete."
    ),
    Described("sartor_requests_in_flight", "gauge", _M, "Requests that have not ended."),
    Described("sartor_requests_waiting", "gauge", _M, "Those of them without a first token yet."),
    Described(
        "sartor_engine_sequences",
        "gauge",
        ("model", "state"),
        "Sequences in the engine: running ones hold state, waiting ones do not.",
    ),
    Described(
        "sartor_engine_step_seconds",
        "histogram",
        _M,
        "What a step of the engine took; the count is that of steps.",
    ),
    Described(
        "sartor_engine_phase_seconds_total",
        "counter",
        ("model", "phase"),
        "Seconds of all steps by phase: execute is the backend, the others are host work.",
    ),
    Described(
        "sartor_engine_prompt_tokens_total",
        "counter",
        _M,
        "Tokens computed in chunks of more than one: prompts, and what is computed again.",
    ),
    Described("sartor_engine_decode_tokens_total", "counter", _M, "Tokens computed one at a time."),
    Described("sartor_engine_output_tokens_total", "counter", _M, "Tokens sampled."),
    Described(
        "sartor_engine_preemptions_total",
        "counter",
        _M,
        "Sequences that lost their state to others and had it computed again.",
    ),
    Described(
        "sartor_state_blocks",
        "gauge",
        ("model", "group", "state"),
        "Blocks of sequence state by state group: held, cached for prompts to come, or free.",
    ),
    Described(
        "sartor_state_bytes", "gauge", ("model", "group", "state"), "The same blocks in bytes."
    ),
    Described(
        "sartor_memory_bytes",
        "gauge",
        ("model", "owner"),
        "Memory of the worker by what it holds; with --memory, also the process's own share.",
    ),
    Described(
        "sartor_memory_limit_bytes", "gauge", (), "What --memory allows the worker; 0: no limit."
    ),
    Described(
        "sartor_model_up", "gauge", _M, "1 where the model can answer, 0 where it could not load."
    ),
    Described("sartor_worker_up", "gauge", (), "1 while the worker is ready, 0 otherwise."),
    Described(
        "sartor_worker_deaths_total",
        "counter",
        ("cause",),
        "Workers that ended and were replaced: start (before they were ready), hang (killed for "
        "it), signal (killed from outside), memory (killed for want of it), error (by themselves).",
    ),
    Described(
        "sartor_worker_heartbeat_age_seconds",
        "gauge",
        (),
        "Since the ready worker's last sign of life.",
    ),
    Described(
        "sartor_build_info", "gauge", ("version", "python"), "1, with the versions that run."
    ),
)
_FAMILIES = {
    "counter": CounterMetricFamily,
    "gauge": GaugeMetricFamily,
    "histogram": HistogramMetricFamily,
}


class _Page:
    """The families of one scrape, empty at first."""

    def __init__(self) -> None:
        self.families: dict[str, Metric] = {
            m.name: _FAMILIES[m.kind](m.name, m.help, labels=m.labels) for m in METRICS
        }

    def add(self, name: str, value: float, *labels: str) -> None:
        family = self.families[name]
        assert isinstance(family, CounterMetricFamily | GaugeMetricFamily)
        family.add_metric(labels, value)

    def histogram(
        self, name: str, bounds: Sequence[float], counts: Sequence[int], total: float, label: str
    ) -> None:
        family = self.families[name]
        assert isinstance(family, HistogramMetricFamily)
        buckets, below = [], 0
        for bound, count in zip((*map(str, bounds), "+Inf"), counts, strict=True):
            below += count
            buckets.append((bound, below))
        family.add_metric([label], buckets, total)


class GatewayCollector(Collector):
    """Reads books, queues and the supervisor of one gateway whenever it is asked."""

    def __init__(self, gateway: Gateway, intake: Intake | None = None) -> None:
        self._gateway = gateway
        self._intake = intake

    def describe(self) -> Iterable[Metric]:
        return _Page().families.values()

    def collect(self) -> Iterable[Metric]:
        page = _Page()
        self._requests(page)
        self._budgets(page)
        for name in self._gateway.books.models:
            self._model(page, name)
        self._worker(page)
        page.add("sartor_build_info", 1, __version__, platform.python_version())
        return page.families.values()

    def _requests(self, page: _Page) -> None:
        books = self._gateway.books
        for labels, count in books.requests.items():
            page.add("sartor_requests_total", count, *labels)
        for (model, key), usage in books.usage.items():
            page.add("sartor_prompt_tokens_total", usage.prompt, model, key)
            page.add("sartor_cached_prompt_tokens_total", usage.cached, model, key)
            page.add("sartor_completion_tokens_total", usage.completion, model, key)

    def _budgets(self, page: _Page) -> None:
        """What keys take of what they share."""
        gateway, intake = self._gateway, self._intake
        if intake is None:
            return
        # Zeros too, for every key that ever asked.
        seconds = intake.seconds
        for metric, values, *labels in (
            ("sartor_intake_seconds_total", seconds),
            ("sartor_unfinished_prompts", gateway.unfinished_by_key()),
            ("sartor_held_bytes", intake.bodies.keys(), "bodies"),
            ("sartor_held_bytes", gateway.answers.keys(), "answers"),
        ):
            for key, value in self._by_label({**dict.fromkeys(seconds, 0), **values}).items():
                page.add(metric, value, key, *labels)

    def _by_label(self, values: Mapping[str, float]) -> dict[str, float]:
        sums: dict[str, float] = {}
        for key, value in values.items():
            label = self._gateway.books.label(key)
            sums[label] = sums.get(label, 0) + value
        return sums

    def _model(self, page: _Page, name: str) -> None:
        books = self._gateway.books
        model = books.models[name]
        for metric, histogram in (
            ("sartor_time_to_first_token_seconds", model.first_token),
            ("sartor_inter_token_seconds", model.inter_token),
            ("sartor_request_queue_seconds", model.queue),
            ("sartor_request_duration_seconds", model.duration),
        ):
            page.histogram(metric, LATENCY_BOUNDS, histogram.counts, histogram.sum, name)
        open_ones = [record for record in books.unfinished if record.model == name]
        page.add("sartor_requests_in_flight", len(open_ones), name)
        waiting = sum(not record.first for record in open_ones)
        page.add("sartor_requests_waiting", waiting, name)
        page.add("sartor_model_up", self._gateway.problem(name) is None, name)

        totals = model.totals
        seconds = {
            "schedule": totals.schedule_seconds,
            "build": totals.build_seconds,
            "execute": totals.execute_seconds,
            "post": totals.post_seconds,
        }
        for phase, value in seconds.items():
            page.add("sartor_engine_phase_seconds_total", value, name, phase)
        times = totals.step_times or (0,) * (len(STEP_BOUNDS) + 1)
        spent = sum(seconds.values())
        page.histogram("sartor_engine_step_seconds", STEP_BOUNDS, times, spent, name)
        page.add("sartor_engine_prompt_tokens_total", totals.prompt_tokens, name)
        page.add("sartor_engine_decode_tokens_total", totals.decode_tokens, name)
        page.add("sartor_engine_output_tokens_total", totals.output_tokens, name)
        page.add("sartor_engine_preemptions_total", totals.preemptions, name)

        engine = model.engine
        if engine is None:
            return  # nobody holds anything
        page.add("sartor_engine_sequences", engine.running, name, "running")
        page.add("sartor_engine_sequences", engine.waiting, name, "waiting")
        for use in engine.states:
            free = use.total - use.held - use.cached
            for state, blocks in (("held", use.held), ("cached", use.cached), ("free", free)):
                page.add("sartor_state_blocks", blocks, name, use.group, state)
                page.add("sartor_state_bytes", blocks * use.block_bytes, name, use.group, state)
        for owner, size in engine.memory.items():
            page.add("sartor_memory_bytes", size, name, owner)

    def _worker(self, page: _Page) -> None:
        gateway = self._gateway
        page.add("sartor_worker_up", gateway.phase == "ready")
        # Zeros too: a rate needs the value before the first one.
        for death in get_args(Death):
            page.add("sartor_worker_deaths_total", gateway.books.deaths[death], death)
        page.add("sartor_memory_limit_bytes", gateway.memory_bytes or 0)
        if gateway.memory_bytes is not None:
            page.add("sartor_memory_bytes", gateway.books.process_bytes, "", "process")
        if (silence := gateway.worker_silence) is not None:
            page.add("sartor_worker_heartbeat_age_seconds", silence)


def make_registry(gateway: Gateway, intake: Intake | None = None) -> CollectorRegistry:
    """Everything that a scrape of one gateway shows; nothing of it is global."""
    registry = CollectorRegistry()
    registry.register(GatewayCollector(gateway, intake))
    # Of Linux alone: elsewhere these two find nothing to read, and say nothing.
    ProcessCollector(registry=registry)
    ProcessCollector(
        namespace="sartor_worker", pid=lambda: gateway.worker_pid or "none", registry=registry
    )
    return registry


class _OfOneKey(Collector):
    """The lines of a registry that carry the label of one key. A family without any is left out."""

    def __init__(self, registry: CollectorRegistry, key: str) -> None:
        self._registry = registry
        self._key = key

    def collect(self) -> Iterable[Metric]:
        for family in self._registry.collect():
            family.samples = [s for s in family.samples if s.labels.get("key") == self._key]
            if family.samples:
                yield family


def add_metrics_route(router: APIRouter, gateway: Gateway, intake: Intake) -> None:
    """GET /metrics: all of it, or for a key without the right to that what is the key's own."""
    registry = make_registry(gateway, intake)

    @router.get("/metrics", include_in_schema=False)  # Prometheus describes it
    async def metrics(request: Request) -> Response:
        # On the event loop, which alone writes the books.
        encode, content_type = choose_encoder(request.headers.get("accept", ""))
        visit: Visit = request.state.visit
        shown: Collector = registry if visit.key.sees_all else _OfOneKey(registry, visit.key.name)
        return Response(encode(shown), headers={"Content-Type": content_type})


def table(metrics: Iterable[Described] = METRICS) -> Iterator[str]:
    """The lines of a Markdown table."""
    yield "| metric | type | labels | what it says |"
    yield "| --- | --- | --- | --- |"
    for metric in metrics:
        labels = ", ".join(metric.labels)
        yield f"| `{metric.name}` | {metric.kind} | {labels} | {metric.help} |"


if __name__ == "__main__":
    print("\n".join(table()))
