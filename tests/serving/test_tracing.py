"""Spans of requests, in memory and as a collector gets them."""

from __future__ import annotations

import socket
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
from server_process import ServerProcess
from test_request_log import finished_record

from sartor.errors import UnsupportedError, UsageError
from sartor.graph import SamplingParams
from sartor.serving.errors import internal, overloaded
from sartor.serving.request_record import RequestRecord
from sartor.serving.telemetry import Telemetry
from sartor.serving.tracing import Tracing, attributes, otlp_provider, wanted_by_environment

sdk = pytest.importorskip("opentelemetry.sdk.trace")
export = pytest.importorskip("opentelemetry.sdk.trace.export")
memory = pytest.importorskip("opentelemetry.sdk.trace.export.in_memory_span_exporter")

TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
TRACEPARENT = f"00-{TRACE}-{PARENT}-01"
BEGAN = 1_700_000_000 * 10**9


def spans_of(record: RequestRecord) -> dict[str, Any]:
    exporter = memory.InMemorySpanExporter()
    provider = sdk.TracerProvider()
    provider.add_span_processor(export.SimpleSpanProcessor(exporter))
    tracing = Tracing(provider)
    tracing(record)
    tracing.close()
    return {span.name: span for span in exporter.get_finished_spans()}


def asked_record() -> RequestRecord:
    record = finished_record()
    record.asked, record.params = (
        "polite",
        SamplingParams(max_tokens=5, temperature=0.5, top_p=1.0, seed=7),
    )
    return record


def milliseconds(span: Any) -> tuple[float, float]:
    return (span.start_time - BEGAN) / 1e6, (span.end_time - BEGAN) / 1e6


def test_a_request_is_a_span_with_its_phases() -> None:
    record = asked_record()
    record.trace = {"traceparent": TRACEPARENT, "tracestate": "vendor=1"}
    spans = spans_of(record)
    assert spans.keys() == {"chat polite", "queue", "prefill", "decode"}
    server = spans["chat polite"]
    assert server.kind.name == "SERVER"
    assert f"{server.context.trace_id:032x}" == TRACE
    assert f"{server.parent.span_id:016x}" == PARENT
    assert server.context.trace_state["vendor"] == "1"
    for name in ("queue", "prefill", "decode"):
        assert spans[name].parent.span_id == server.context.span_id
    assert milliseconds(server) == pytest.approx((0, 520))
    assert milliseconds(spans["queue"]) == pytest.approx((10, 40))
    assert milliseconds(spans["prefill"]) == pytest.approx((40, 100))
    assert milliseconds(spans["decode"]) == pytest.approx((100, 500))
    assert dict(server.attributes) == {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "sartor",
        "gen_ai.request.model": "polite",
        "gen_ai.request.max_tokens": 5,
        "gen_ai.request.temperature": 0.5,
        "gen_ai.request.top_p": 1.0,
        "gen_ai.request.seed": 7,
        "gen_ai.request.stream": False,
        "gen_ai.response.model": "polite",
        "gen_ai.response.finish_reasons": ("stop",),
        "gen_ai.response.time_to_first_chunk": pytest.approx(0.1),
        "gen_ai.usage.input_tokens": 100,
        "gen_ai.usage.output_tokens": 5,
        "gen_ai.usage.cache_read.input_tokens": 32,
        "http.request.method": "POST",
        "http.route": "/v1/chat/completions",
        "http.response.status_code": 200,
        "sartor.request.id": "abc",
        "sartor.key": "team",
        "sartor.worker_restarts": 1,
    }
    assert server.status.is_unset


def test_all_names_are_those_of_the_conventions() -> None:
    conventions = pytest.importorskip(
        "opentelemetry.semconv._incubating.attributes.gen_ai_attributes"
    )
    known = {value for name, value in vars(conventions).items() if name.startswith("GEN_AI_")}
    record = asked_record()
    record.params = SamplingParams(
        n=2, seed=1, max_tokens=2, top_k=3, frequency_penalty=1, presence_penalty=1
    ).resolved()
    used = {name for name in attributes(record) if name.startswith("gen_ai.")}
    assert len(used) == 18
    assert used <= known


@pytest.mark.parametrize("error", [overloaded(3), internal("the worker died twice")])
def test_errors(error: Any) -> None:
    record = asked_record()
    record.error, record.status = error, error.status
    record.first = 0.0
    spans = spans_of(record)
    assert spans.keys() == {"chat polite", "queue"}
    span = spans["chat polite"]
    assert span.parent is None
    assert span.attributes["error.type"] == error.code
    # That a client asks too much is no error of the server's.
    assert span.status.is_ok is (error.status < 500)
    assert milliseconds(spans["queue"]) == pytest.approx((10, 520))


def test_other_routes_have_no_span() -> None:
    record = asked_record()
    record.operation = ""
    assert spans_of(record) == {}


def test_the_environment_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("ENDPOINT", "TRACES_ENDPOINT", "PROTOCOL", "TRACES_PROTOCOL"):
        monkeypatch.delenv(f"OTEL_EXPORTER_OTLP_{name}", raising=False)
    assert not wanted_by_environment()
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://localhost:1")
    assert wanted_by_environment()
    for name, value in (("OTEL_SDK_DISABLED", "true"), ("OTEL_TRACES_EXPORTER", "none")):
        with monkeypatch.context() as inner:
            inner.setenv(name, value)
            assert not wanted_by_environment()
    assert otlp_provider().resource.attributes["service.name"] == "sartor"
    monkeypatch.setenv("OTEL_SERVICE_NAME", "mine")
    assert otlp_provider().resource.attributes["service.name"] == "mine"
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc")
    with pytest.raises(UsageError, match="http/protobuf"):
        otlp_provider()


def test_without_the_extra(monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.resources", None)
    with pytest.raises(UnsupportedError, match=r"sartor\[otel\]"), Telemetry(otel=True).open():
        pass
    # Where only the environment asks, which may mean others, the server starts all the same.
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://localhost:1")
    with Telemetry(otel=None).open() as sinks:
        assert sinks == []
    assert "sartor[otel]" in caplog.text
    caplog.clear()
    with Telemetry(otel=False).open() as sinks:
        assert sinks == []
    assert not caplog.text


class Collector:
    """Takes spans by OTLP over HTTP on a free port."""

    def __init__(self) -> None:
        bodies = self.bodies = []  # type: list[bytes]

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                assert self.path == "/v1/traces"
                bodies.append(self.rfile.read(int(self.headers["content-length"])))
                self.send_response(200)
                self.end_headers()

            def log_message(self, *_: object) -> None:
                pass

        self._server = HTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()

    def spans(self) -> list[Any]:
        from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
            ExportTraceServiceRequest,
        )

        return [
            span
            for body in self.bodies
            for resource in ExportTraceServiceRequest.FromString(body).resource_spans
            for scope in resource.scope_spans
            for span in scope.spans
        ]

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def collector() -> Iterator[Collector]:
    collector = Collector()
    yield collector
    collector.close()


def test_a_collector_gets_the_spans_of_a_server(
    tiny_model: Path, collector: Collector, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.url)
    with ServerProcess([tiny_model], device="null-20ms", telemetry={"otel": None}) as server:
        body = {"model": server.name, "prompt": "a private matter", "ignore_eos": True}
        body["max_tokens"] = 30  # half a second: a busy machine may be late to see the first one
        server.http.post("/v1/completions", json=body, headers={"traceparent": TRACEPARENT})
        server.http.get("/v1/models")
    # The end of the server has sent what was left.
    spans = {span.name: span for span in collector.spans()}
    name = f"text_completion {server.name}"
    assert spans.keys() == {name, "queue", "prefill", "decode"}
    assert spans[name].trace_id.hex() == TRACE
    assert spans[name].parent_span_id.hex() == PARENT
    moments = [spans[n].start_time_unix_nano for n in (name, "queue", "prefill", "decode")]
    moments += [spans["decode"].end_time_unix_nano, spans[name].end_time_unix_nano]
    assert moments == sorted(moments)
    assert moments[-2] - moments[-3] > 2 * 0.015e9  # at least some of the tokens
    assert all(b"private" not in body for body in collector.bodies)


def test_a_collector_that_is_silent_holds_nobody_up(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", url)
        server = ServerProcess([tiny_model], telemetry={"otel": True})
        body = {"model": server.name, "prompt": "x", "max_tokens": 4}
        for _ in range(3):
            assert server.post("/v1/completions", body).status_code == 200
        begin = time.monotonic()
        assert server.stop() == 0
        assert time.monotonic() - begin < 8
