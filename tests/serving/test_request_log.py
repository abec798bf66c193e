"""A line for each request, and the header by which a client finds its own."""

from __future__ import annotations

import asyncio
import json
import logging
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from server_process import ServerProcess, kill_hard, wait_until
from starlette.responses import Response
from test_crash import Stream, say

from sartor.errors import SartorError, UsageError
from sartor.plan import ExecutionPlan
from sartor.serving.app import create_app
from sartor.serving.errors import overloaded
from sartor.serving.frontend import open_served_model
from sartor.serving.gateway import Gateway
from sartor.serving.intake import Intake
from sartor.serving.limits import ServerLimits
from sartor.serving.request_log import _WAITING_LINES, RequestLog, _Writer, json_line, text_line
from sartor.serving.request_record import RequestRecord, record_of
from sartor.serving.telemetry import Observer, Telemetry

SECRET = "sk-do-not-tell"


class LoggedServer(ServerProcess):
    def __init__(self, model: Path, file: Path, **more: Any) -> None:
        telemetry = {"log": "json", "log_file": str(file), **more}
        super().__init__([model], device="null-20ms", telemetry=telemetry)
        self._file = file
        self.http.headers["Authorization"] = f"Bearer {SECRET}"

    def line(self, request_id: str) -> dict[str, Any]:
        """The line of one request, as soon as it is written."""
        wait_until(lambda: request_id in self.text)
        (line,) = [line for line in self.text.splitlines() if f'"{request_id}"' in line]
        return dict(json.loads(line))

    @property
    def text(self) -> str:
        return self._file.read_text(encoding="utf-8")

    def ask(self, name: str, **body: Any) -> httpx.Response:
        return self.http.post(
            "/v1/completions",
            json={"model": self.name, "prompt": "a private matter", "ignore_eos": True, **body},
            headers={"x-request-id": name},
        )


@pytest.fixture(scope="module")
def server(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LoggedServer]:
    with LoggedServer(tiny_model, tmp_path_factory.mktemp("logs") / "requests.log") as server:
        yield server


def test_an_answer(server: LoggedServer) -> None:
    answer = server.ask("first", max_tokens=6, n=2)
    assert answer.headers["x-request-id"] == "first"
    line = server.line("first")
    assert line.pop("time").endswith("+00:00")
    times = {name: line.pop(name) for name in list(line) if name.endswith("_seconds")}
    assert line == {
        "id": "first",
        "method": "POST",
        "route": "/v1/completions",
        "status": 200,
        "outcome": "length",
        "code": None,
        "model": server.name,
        "adapter": None,
        "key": None,
        "stream": False,
        "finish_reasons": ["length", "length"],
        "prompt_tokens": 16,
        "cached_tokens": 0,
        "completion_tokens": 12,
        "worker_restarts": 0,
    }
    assert 0 <= times["queue_seconds"] < times["first_token_seconds"] < times["total_seconds"]
    assert 0.015 < times["inter_token_seconds"] <= times["longest_inter_token_seconds"]
    assert times["first_token_seconds"] + 5 * times["inter_token_seconds"] == pytest.approx(
        times["total_seconds"], abs=0.2
    )


def test_refusals_and_other_routes(server: LoggedServer) -> None:
    server.ask("refused", temperature=-1)
    line = server.line("refused")
    assert (line["status"], line["outcome"], line["code"]) == (400, "rejected", "invalid_value")
    assert line["model"] == server.name or line["model"] is None
    server.ask("lost", model="nobody")
    line = server.line("lost")
    assert (line["status"], line["code"], line["model"]) == (404, "model_not_found", None)
    server.http.get("/v1/models", headers={"x-request-id": "listing"})
    line = server.line("listing")
    assert (line["route"], line["status"], line["outcome"]) == ("/v1/models", 200, "ok")
    server.http.get(f"/{SECRET}", headers={"x-request-id": "elsewhere"})
    line = server.line("elsewhere")
    assert (line["route"], line["status"], line["code"]) == ("unmatched", 404, "404")
    assert "near" not in line
    server.http.get("/v1/v1/models", headers={"x-request-id": "twice"})
    line = server.line("twice")
    assert (line["route"], line["near"]) == ("unmatched", "/v1/models")
    server.http.get("/openapi.json", headers={"x-request-id": "described"})
    assert server.line("described")["route"] == "/openapi.json"


def test_a_client_that_left_and_a_worker_that_died(server: LoggedServer) -> None:
    body = {"model": server.name, "prompt": "x", "max_tokens": 500, "stream": True}
    body["ignore_eos"] = True
    headers = {"x-request-id": "left"}
    with server.http.stream("POST", "/v1/completions", json=body, headers=headers) as r:
        assert r.headers["x-request-id"] == "left"
        next(r.iter_lines())
    line = server.line("left")
    assert (line["outcome"], line["stream"], line["status"]) == ("abort", True, 200)

    server.http.headers["x-request-id"] = "survivor"
    stream = Stream(server, messages=say("hello"))
    wait_until(lambda: len(stream.pieces) > 3)
    del server.http.headers["x-request-id"]
    kill_hard(server.worker())
    stream.finish()
    line = server.line("survivor")
    assert (line["worker_restarts"], line["outcome"]) == (1, "length")
    assert line["longest_inter_token_seconds"] > 2 * line["inter_token_seconds"]


def test_nothing_private_and_nothing_dull_is_written(server: LoggedServer) -> None:
    server.health()
    server.http.get("/metrics")
    server.ask("last", max_tokens=2)
    assert "client" not in server.line("last")
    text = server.text
    for word in (SECRET, "private", "/health", "/metrics", "python-httpx", "127.0.0.1"):
        assert word not in text


def test_the_address_of_the_client_where_it_is_wanted(tiny_model: Path, tmp_path: Path) -> None:
    with LoggedServer(tiny_model, tmp_path / "log", log_client=True) as server:
        server.ask("me", max_tokens=1)
        assert server.line("me")["client"] == "127.0.0.1"


@pytest.mark.parametrize(
    "given", ["", "with space", "a" * 129, 'quo"te', "new\tline", "\u00e9", "<script>"]
)
def test_ids_that_are_not_sane_are_replaced(given: str) -> None:
    headers = [(b"x-request-id", given.encode("latin-1"))]
    scope = {"headers": headers, "method": "POST", "path": "/", "client": None}
    ids = {RequestRecord.of(scope).id for _ in range(2)}
    assert given not in ids
    assert len(ids) == 2


def test_a_gate_before_the_routes_can_refuse(tiny_model: Path) -> None:
    """A middleware that answers by itself: the request counts, whatever its path says."""

    async def check() -> None:
        records: list[RequestRecord] = []
        gateway = Gateway([open_served_model("m", tiny_model, ExecutionPlan(backend="null"))])

        async def gate(scope: Any, receive: Any, send: Any) -> None:
            record_of(scope).error, record_of(scope).key = overloaded(1), "team"
            await Response(status_code=429)(scope, receive, send)

        app = Observer(gate, gateway, [records.append])
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://s") as client:
            await client.post("/v1/completions", json={})
            await client.post("/v1/secret", json={})
        await gateway.close()
        assert [record.route for record in records] == ["/v1/completions", ""]
        assert gateway.books.requests == {("", "rejected", "queue_full", "team"): 1}

    asyncio.run(check())


def finished_record() -> RequestRecord:
    record = RequestRecord("abc", "POST", 10.0, 1_700_000_000 * 10**9, "10.0.0.1")
    record.route, record.operation, record.status = "/v1/chat/completions", "chat", 200
    record.model, record.adapter, record.key = "smollm2:135m", "polite", "team"
    record.requests, record.ends = ["r"], ["stop"]
    record.submitted, record.first, record.last, record.ended = 10.01, 10.1, 10.5, 10.52
    record.prefill_seconds = 0.06
    record.prompt_tokens, record.cached_tokens, record.completion_tokens = 100, 32, 5
    record.gaps, record.gap_seconds, record.longest_gap, record.restarts = 4, 0.4, 0.25, 1
    return record


def test_the_line_in_words() -> None:
    record = finished_record()
    assert text_line(record) == (
        "2023-11-14 22:13:20 200 POST /v1/chat/completions, id abc, smollm2:135m + polite, "
        "key team, 100 (32 cached) + 5 tokens, queue 30.0 ms, first token 100.0 ms, "
        "then 100.0 ms (longest 250.0 ms), total 0.520 s, worker restarts 1, stop"
    )
    assert ", from 10.0.0.1, id abc" in text_line(record, client=True)
    record.error, record.status = overloaded(3), 429
    record.first = record.gaps = record.completion_tokens = 0
    assert text_line(record).endswith("total 0.520 s, worker restarts 1, rejected queue_full")
    assert json.loads(json_line(record))["queue_seconds"] is None


def test_a_log_that_stalls_stalls_nobody() -> None:
    stalled, go_on = threading.Event(), threading.Event()
    lines: list[str] = []

    class Stuck(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            stalled.set()
            go_on.wait(20)
            lines.append(record.getMessage())

    writer = _Writer(Stuck(), lambda dropped: f"{dropped} missing")
    writer.put("0")
    assert stalled.wait(20)
    begin = time.monotonic()
    for i in range(_WAITING_LINES + 7):
        writer.put(str(i + 1))
    assert time.monotonic() - begin < 10
    go_on.set()
    writer.close()
    assert lines[:2] == ["0", "7 missing"]
    assert lines[2:] == [str(i + 1) for i in range(_WAITING_LINES)]


def test_a_file_that_is_moved_away_is_opened_anew(tmp_path: Path) -> None:
    file = tmp_path / "log"
    log = RequestLog("json", file)
    log(finished_record())
    wait_until(lambda: file.exists() and file.stat().st_size > 0)
    file.rename(tmp_path / "log.1")
    log(finished_record())
    log.close()
    assert len(file.read_text().splitlines()) == 1


def test_what_cannot_be_logged_is_an_error_at_once(tmp_path: Path) -> None:
    with pytest.raises(SartorError, match="--log-file"):
        RequestLog("text", tmp_path / "no" / "log")
    with pytest.raises(UsageError, match="choose text, json or none"):
        Telemetry(log="xml")  # type: ignore[arg-type]


def test_our_own_mistakes_have_an_id_too(tiny_model: Path, monkeypatch: Any) -> None:
    """And a sink that fails keeps nobody's answer."""
    records: list[RequestRecord] = []

    def fail(_: RequestRecord) -> None:
        raise RuntimeError("a sink is full")

    def boom(*_: object) -> None:
        raise RuntimeError("boom")

    async def check() -> None:
        model = open_served_model("m", tiny_model, ExecutionPlan(backend="null"))
        gateway = Gateway([model])
        intake = Intake(gateway.models, ServerLimits())
        app = create_app(gateway, intake, sinks=[fail, records.append])
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://s") as client:
            models = await client.get("/v1/models")
            monkeypatch.setattr(gateway, "submit", boom)
            answer = await client.post("/v1/completions", json={"model": "m", "prompt": "x"})
        monkeypatch.undo()
        await intake.close()
        await gateway.close()
        assert models.status_code == 200
        assert answer.status_code == 500
        assert answer.headers["x-request-id"] == records[-1].id
        assert "boom" not in answer.text
        assert gateway.books.requests == {("m", "error", "internal_error", ""): 1}

    asyncio.run(check())
    assert [record.outcome for record in records] == ["ok", "error"]
