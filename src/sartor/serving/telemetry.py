"""Who hears of requests: opens a record for each and hands it on when it has ended."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sartor.errors import UnsupportedError, UsageError
from sartor.serving.errors import internal, respond
from sartor.serving.gateway import Gateway
from sartor.serving.names import lookup
from sartor.serving.request_log import LogFormat, RequestLog
from sartor.serving.request_record import RequestRecord
from sartor.serving.targets import route_of, take_target
from sartor.serving.tracing import Tracing, otlp_provider, wanted_by_environment

logger = logging.getLogger(__name__)
Sink = Callable[[RequestRecord], None]


@dataclass(frozen=True)
class Telemetry:
    """What a server tells of its requests, beside its metrics.

    log         form of the line that each request gets, or "none"
    log_file    where the lines go; None is standard error
    log_client  with the client's address
    otel        send spans; None leaves it to the environment (OTEL_EXPORTER_OTLP_ENDPOINT)
    """

    log: LogFormat = "none"
    log_file: Path | None = None
    log_client: bool = False
    otel: bool | None = False

    def __post_init__(self) -> None:
        if self.log not in ("text", "json", "none"):
            raise UsageError(f"log: {self.log!r} is unknown; choose text, json or none")
        if self.log == "none" and (self.log_file is not None or self.log_client):
            name = "--log-client" if self.log_file is None else "--log-file"
            raise UsageError(f"log: {name} needs a log; choose --log text or json")

    @contextmanager
    def open(self) -> Iterator[list[Sink]]:
        """The sinks for records; at the end they have written and sent what they had.

        SartorError where a file cannot be opened or OpenTelemetry is missing.
        """
        with ExitStack() as stack:
            sinks: list[Sink] = []
            if self.log != "none":
                log = RequestLog(self.log, self.log_file, client=self.log_client)
                stack.callback(log.close)
                sinks.append(log)
            if (tracing := self._tracing()) is not None:
                stack.callback(tracing.close)
                sinks.append(tracing)
            yield sinks

    def _tracing(self) -> Tracing | None:
        if self.otel is False or (self.otel is None and not wanted_by_environment()):
            return None
        try:
            return Tracing(otlp_provider())
        except UnsupportedError as error:
            if self.otel:
                raise
            # The variables may be meant for others on this machine.
            logger.warning("%s", error)
            return None


class Observer:
    """ASGI middleware, the outermost: gives every request a record, as ``request.state.record``,
    and every answer the header ``x-request-id``; brings targets into the form of one of ``paths``.
    """

    def __init__(
        self,
        app: ASGIApp,
        gateway: Gateway,
        sinks: Sequence[Sink] = (),
        paths: Collection[str] = (),
    ) -> None:
        self._app = app
        self._gateway = gateway
        self._paths = frozenset(paths)
        self._sinks: tuple[Sink, ...] = (gateway.books.finish, *sinks)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        wrong = take_target(scope, self._paths)
        record = RequestRecord.of(scope)
        scope.setdefault("state", {})["record"] = record

        async def observed(message: Message) -> None:
            if message["type"] == "http.response.start":
                record.status = message["status"]
                header = (b"x-request-id", record.id.encode())
                message = {**message, "headers": [*message.get("headers", ()), header]}
            await send(message)

        try:
            if wrong is not None:
                record.error = wrong
                await respond(wrong)(scope, receive, observed)
                return
            await self._app(scope, receive, observed)
        except Exception as error:
            record.error = record.error or internal(f"the server made a mistake: {error}")
            record.status = record.status or 500
            raise
        finally:
            self._finish(record, scope)

    def _finish(self, record: RequestRecord, scope: Scope) -> None:
        record.route = route_of(scope) or record.route
        if not record.model and (found := lookup(self._gateway.models, record.asked)):
            record.model = found.model.name
        for sink in self._sinks:
            try:
                sink(record)
            except Exception:  # the request itself went well
                logger.exception("a finished request could not be told of")
