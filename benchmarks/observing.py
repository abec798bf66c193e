"""What metrics, logs and traces cost the server, in microseconds of one core.

    python benchmarks/observing.py [--rounds N]

Times are of the thread's own clock, the least of the rounds: what else the machine does is not
in them. A step costs the worker, everything else the gateway. "A span" is one request's spans
given to an exporter that drops them.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib.util
import time
from collections import deque
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any, cast

import msgspec

from sartor.engine.request import Chunk, Request
from sartor.engine.step import StepRecord
from sartor.graph import SamplingParams
from sartor.serving.books import Books
from sartor.serving.gateway import Gateway
from sartor.serving.meter import Reporter
from sartor.serving.metrics import make_registry
from sartor.serving.request_log import json_line, text_line
from sartor.serving.request_record import RequestRecord
from sartor.serving.telemetry import Observer

MODEL = "m"
STREAMS = 16
TOKENS = 64


def least(rounds: int, work: Callable[[], int]) -> float:
    """Microseconds of one unit; ``work`` says how many it did."""
    best = float("inf")
    for _ in range(rounds):
        begin = time.thread_time()
        count = work()
        best = min(best, (time.thread_time() - begin) / count * 1e6)
    return best


def record_of_step(index: int) -> StepRecord:
    blocks = ((40, 30), (20, 10), (400, 300))
    return StepRecord(index, 0.0, 0, 16, 16, 16, 0, 16, 3, *blocks, 1e-4, 2e-4, 5e-3, 1e-4, 5.4e-3)


def steps(rounds: int) -> float:
    """Of the reporter, called after every step as the worker does, a report a second included."""
    program = SimpleNamespace(groups=lambda: ())
    memory = SimpleNamespace(weights=1, state=2, scratch=3)
    engine: Any = SimpleNamespace(
        records=deque(maxlen=1024),
        executable=SimpleNamespace(program=program, memory=lambda: memory),
        running=STREAMS,
        waiting=0,
    )
    reporter = Reporter({MODEL: engine}, msgspec.msgpack.encode)
    # Made beforehand: the engine makes them with or without a meter.
    records = iter([record_of_step(index) for index in range(rounds * 1000)])

    def work() -> int:
        for _ in range(1000):
            engine.records.append(next(records))
            reporter.turn(idle=False)
        return 1000

    return least(rounds, work)


def new_record() -> RequestRecord:
    record = RequestRecord("0" * 32, "POST", time.monotonic(), time.time_ns(), "127.0.0.1")
    record.route, record.operation, record.status = "/v1/chat/completions", "chat", 200
    return record


def request(name: str) -> Request:
    return Request(name, tuple(range(100)), SamplingParams(max_tokens=TOKENS), 1, tenant="team")


def chunk(name: str, done: bool = False) -> Chunk:
    return Chunk(name, 0, " word", (7,), (), "length" if done else None, None, 100, 1, 32)


def tokens(rounds: int) -> float:
    """Of the books, in messages of :data:`STREAMS` chunks."""
    names = [f"r{i}" for i in range(STREAMS)]

    def work() -> int:
        for _ in range(TOKENS):
            books.chunks(message)
        return TOKENS * STREAMS

    books = Books([MODEL])
    for name in names:
        books.begin(new_record(), MODEL, [request(name)])
    message = [chunk(name) for name in names]
    return least(rounds, work)


def requests(rounds: int, sinks: Sequence[Callable[[RequestRecord], object]]) -> float:
    """From the record's opening to its end, and what ``sinks`` make of it."""
    books = Books([MODEL])
    asked, chunks = request("r"), [chunk("r"), chunk("r", True)]

    def work() -> int:
        for _ in range(200):
            record = new_record()
            books.begin(record, MODEL, [asked])
            for one in chunks:
                books.chunks([one])
            books.finish(record)
            for sink in sinks:
                sink(record)
        return 200

    return least(rounds, work)


def pieces(rounds: int, observed: bool) -> float:
    """Of a stream, on their way from the application to the server."""
    sent = 5000
    scope: Any = {"type": "http", "method": "GET", "path": "/", "headers": [], "client": None}
    message = {"type": "http.response.body", "body": b"data", "more_body": True}

    async def app(scope: Any, receive: Any, send: Any) -> None:
        for _ in range(sent):
            await send(message)

    async def send(_: Any) -> None:
        pass

    gateway: Any = SimpleNamespace(books=Books([MODEL]), models={})
    run: Any = Observer(app, gateway) if observed else app
    loop = asyncio.new_event_loop()
    try:
        return least(rounds, lambda: loop.run_until_complete(run(dict(scope), None, send)) or sent)
    finally:
        loop.close()


def scrape(rounds: int) -> float:
    """Of a gateway with one model and ten keys."""
    from prometheus_client import generate_latest

    async def measure() -> float:
        gateway = Gateway([cast(Any, SimpleNamespace(name=MODEL, hosted=lambda: None))])
        try:
            for key in range(10):
                record = new_record()
                asked = Request(f"r{key}", (1,), SamplingParams(), 1, tenant=f"team-{key}")
                gateway.books.begin(record, MODEL, [asked])
                gateway.books.chunks([chunk(asked.id), chunk(asked.id, True)])
                gateway.books.finish(record)
            registry = make_registry(gateway)
            return least(rounds, lambda: len([generate_latest(registry) for _ in range(5)]))
        finally:
            await gateway.close()

    return asyncio.run(measure())


def span_sink() -> Callable[[RequestRecord], object]:
    from opentelemetry.sdk.trace import TracerProvider

    from sartor.serving.tracing import Tracing

    return Tracing(TracerProvider())


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="What metrics, logs and traces cost.")
    parser.add_argument("--rounds", type=int, default=20)
    rounds = parser.parse_args(arguments).rounds
    bare = requests(rounds, [])
    rows = {
        "a step": steps(rounds),
        "a token": tokens(rounds),
        "a piece of a stream": pieces(rounds, True) - pieces(rounds, False),
        "a request": bare,
        "its line in JSON": requests(rounds, [json_line]) - bare,
        "its line in text": requests(rounds, [text_line]) - bare,
        "a scrape": scrape(rounds),
    }
    if importlib.util.find_spec("opentelemetry.sdk"):
        rows["a span"] = requests(rounds, [span_sink()]) - bare
    print("microseconds")
    for name, value in rows.items():
        print(f"{name:20}{value:10.2f}")


if __name__ == "__main__":
    main()
