"""Spans of requests for OpenTelemetry, made from a request's record when it has ended.

Attributes follow the conventions for generative AI and HTTP of
https://github.com/open-telemetry/semantic-conventions (docs/gen-ai, docs/http), which name no
span of a server that is a model: this one is of kind SERVER, with the attributes of an inference.
Needs the extra ``otel``.
"""

from __future__ import annotations

import os
import threading
from typing import TYPE_CHECKING, Any

from sartor import __version__
from sartor.errors import UnsupportedError, UsageError
from sartor.printable import field
from sartor.serving.request_record import RequestRecord

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider

_SECOND = 1_000_000_000
_CLOSE_SECONDS = 3.0
_ENDPOINTS = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
_PROTOCOLS = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
_PROTOCOL = "http/protobuf"


def wanted_by_environment() -> bool:
    """Whether the standard variables name an endpoint for traces, and do not turn them off."""
    off = os.environ.get("OTEL_SDK_DISABLED", "").lower() == "true"
    none = os.environ.get("OTEL_TRACES_EXPORTER", "").lower() == "none"
    return not (off or none) and any(os.environ.get(name) for name in _ENDPOINTS)


def otlp_provider() -> TracerProvider:
    """Sends spans by OTLP over HTTP, in the background, as the OTEL_* variables say; without
    them to the collector of this machine.

    UnsupportedError where the extra is missing, UsageError where the variables ask for another
    protocol.
    """
    protocol = next((os.environ[name] for name in _PROTOCOLS if os.environ.get(name)), _PROTOCOL)
    if protocol != _PROTOCOL:
        raise UsageError(
            f"traces: the environment asks for the protocol {protocol}; only {_PROTOCOL} is "
            f"spoken here, so set {_PROTOCOLS[0]} to it"
        )
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import (
            SERVICE_NAME,
            SERVICE_VERSION,
            OTELResourceDetector,
            Resource,
        )
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as error:
        raise UnsupportedError(
            f"traces need OpenTelemetry, which is not installed ({error.name}); install "
            "sartor[otel], or turn them off with --no-otel"
        ) from None
    resource = Resource.create({SERVICE_NAME: "sartor", SERVICE_VERSION: __version__})
    # The environment's attributes win: they are what the operator chose.
    named = resource.merge(OTELResourceDetector().detect())
    provider = TracerProvider(resource=named, shutdown_on_exit=False)
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    return provider


class Tracing:
    """A span for each request to a model, and one for each of its phases."""

    def __init__(self, provider: TracerProvider) -> None:
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self._provider = provider
        self._tracer = provider.get_tracer("sartor", __version__)
        self._propagator = TraceContextTextMapPropagator()

    def __call__(self, record: RequestRecord) -> None:
        if not record.operation:
            return
        from opentelemetry.trace import SpanKind, Status, StatusCode, set_span_in_context

        span = self._tracer.start_span(
            f"{record.operation} {field(record.asked)}".rstrip(),
            context=self._propagator.extract(record.trace),
            kind=SpanKind.SERVER,
            attributes=attributes(record),
            start_time=record.began,
        )
        if record.error is not None and record.status >= 500:
            span.set_status(Status(StatusCode.ERROR, field(record.error.message)))
        context = set_span_in_context(span)
        for name, begin, end in phases(record):
            child = self._tracer.start_span(name, context=context, start_time=begin)
            child.end(end)
        span.end(_unix(record, record.ended))

    def close(self) -> None:
        """Sends what is left; a collector that does not answer holds up the end for a moment."""
        closing = threading.Thread(target=self._provider.shutdown, daemon=True)
        closing.start()
        closing.join(_CLOSE_SECONDS)


def attributes(record: RequestRecord) -> dict[str, Any]:
    """Attributes of a request's span; none says what was asked or answered."""
    params = record.params
    found: dict[str, Any] = {
        "gen_ai.operation.name": record.operation,
        "gen_ai.provider.name": "sartor",
        "gen_ai.request.model": field(record.asked) or None,
        "gen_ai.response.model": field(record.adapter or record.model) or None,
        "gen_ai.response.finish_reasons": record.finish_reasons or None,
        "gen_ai.usage.input_tokens": record.prompt_tokens or None,
        "http.request.method": field(record.method),
        "http.route": field(record.route),
        "http.response.status_code": record.status or None,
        "error.type": field(record.code) or None,
        "sartor.request.id": record.id,
        "sartor.key": field(record.key) or None,
        "sartor.worker_restarts": record.restarts or None,
    }
    if record.requests:
        found["gen_ai.usage.cache_read.input_tokens"] = record.cached_tokens
    if params is not None and record.operation != "embeddings":
        found |= {
            "gen_ai.usage.output_tokens": record.completion_tokens,
            "gen_ai.response.time_to_first_chunk": record.first_token_seconds,
            "gen_ai.request.stream": record.stream,
            "gen_ai.request.choice.count": params.n if params.n > 1 else None,
            "gen_ai.request.seed": params.seed,
            "gen_ai.request.max_tokens": params.max_tokens,
            "gen_ai.request.temperature": params.temperature,
            "gen_ai.request.top_p": params.top_p,
            "gen_ai.request.top_k": params.top_k or None,
            "gen_ai.request.frequency_penalty": params.frequency_penalty or None,
            "gen_ai.request.presence_penalty": params.presence_penalty or None,
        }
    return {name: value for name, value in found.items() if value is not None}


def phases(record: RequestRecord) -> list[tuple[str, int, int]]:
    """Name, begin and end of what a request went through, in Unix nanoseconds."""
    if not record.submitted:
        return []
    if not record.first:
        return [("queue", _unix(record, record.submitted), _unix(record, record.ended))]
    prefill = _unix(record, record.submitted + (record.queue_seconds or 0.0))
    first = _unix(record, record.first)
    return [
        ("queue", _unix(record, record.submitted), prefill),
        ("prefill", prefill, first),
        ("decode", first, _unix(record, record.last)),
    ]


def _unix(record: RequestRecord, moment: float) -> int:
    return record.began + round((moment - record.arrived) * _SECOND)
