"""What is known of one HTTP request: metrics, log and traces all read it."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal
from uuid import uuid4

from sartor.engine.request import FinishReason
from sartor.graph import SamplingParams
from sartor.serving.errors import ApiError

Outcome = Literal["stop", "length", "abort", "error", "rejected", "ok"]
"""How a request ended. abort: the client left; rejected: refused before anything was computed for
it; ok: one that asks for no answer of a model."""

# Names of OpenTelemetry's conventions (gen_ai.operation.name).
OPERATIONS = {
    "/v1/chat/completions": "chat",
    "/v1/completions": "text_completion",
    "/v1/embeddings": "embeddings",
}
_SANE_ID = re.compile(r"[A-Za-z0-9._:/+=-]{1,128}")
_SHOWN = 200


@dataclass(slots=True, eq=False)
class RequestRecord:
    """One HTTP request, filled as it goes. Times are of ``time.monotonic``, 0.0 until known.

    id          the client's x-request-id where it is sane, else one of ours
    began       Unix time in nanoseconds at ``arrived``
    near        the path that one without a route was probably meant to be
    operation   what a model is asked for (:data:`OPERATIONS`), "" for other routes
    asked       the model as the client named it; ``model`` as it is known here, "" if it is not
    key         name of the tenant, never the secret
    requests    ids of its prompts in the engine; ``ends``: of every choice of every prompt
    submitted   when its prompts went to the engine's queue
    first       when its first token came; ``last``: its latest token
    prefill_seconds   of its first token, as the engine measured it
    gaps        how many tokens came after others, and ``gap_seconds`` how long after in all
    restarts    workers that ended while it was unfinished
    """

    id: str
    method: str
    arrived: float
    began: int
    client: str = ""
    trace: dict[str, str] = field(default_factory=dict)
    route: str = ""
    near: str = ""
    operation: str = ""
    asked: str = ""
    model: str = ""
    adapter: str = ""
    key: str = ""
    stream: bool = False
    params: SamplingParams | None = None
    status: int = 0
    error: ApiError | None = None
    requests: list[str] = field(default_factory=list)
    ends: list[FinishReason | None] = field(default_factory=list)
    submitted: float = 0.0
    first: float = 0.0
    last: float = 0.0
    ended: float = 0.0
    prefill_seconds: float = 0.0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    gaps: int = 0
    gap_seconds: float = 0.0
    longest_gap: float = 0.0
    restarts: int = 0

    @classmethod
    def of(cls, scope: Any) -> RequestRecord:
        """A new one, for an ASGI connection scope of type "http"."""
        headers = {name.decode("latin-1"): value for name, value in scope["headers"]}
        given = headers.get("x-request-id", b"").decode("latin-1")
        client = scope.get("client")
        route = scope["path"] if scope["path"] in OPERATIONS else ""
        return cls(
            id=given if _SANE_ID.fullmatch(given) else uuid4().hex,
            method=scope["method"],
            arrived=time.monotonic(),
            began=time.time_ns(),
            client=client[0] if client else "",
            trace={
                name: headers[name].decode("latin-1")
                for name in ("traceparent", "tracestate")
                if name in headers
            },
            route=route,
            operation=OPERATIONS.get(route, "") if scope["method"] == "POST" else "",
        )

    def asks(self, body: Any) -> None:
        """Notes what a body says, before anything is known of its model."""
        self.asked = str(getattr(body, "model", ""))[:_SHOWN]
        self.stream = bool(getattr(body, "stream", False))

    @property
    def finish_reasons(self) -> list[str]:
        """Of every choice that has ended, in order."""
        return [end for end in self.ends if end is not None]

    @property
    def outcome(self) -> Outcome:
        if self.error is not None:
            refused = self.error.status < 500 or self.error.status == 503
            return "rejected" if refused and not self.first else "error"
        if not self.operation:
            return "ok"
        if not self.ends or any(end in (None, "abort", "error") for end in self.ends):
            return "abort"
        return "length" if "length" in self.ends else "stop"

    @property
    def code(self) -> str:
        """Of the error, as the client got it; "" where there was none."""
        return "" if self.error is None else self.error.code or str(self.error.status)

    @property
    def first_token_seconds(self) -> float | None:
        """From arrival, so that reading and encoding the prompt count too."""
        return self.first - self.arrived if self.first else None

    @property
    def queue_seconds(self) -> float | None:
        """From submission to the start of the prefill that gave the first token: with the time
        for a worker to come back, and the messages' way."""
        if not self.first:
            return None
        return max(self.first - self.prefill_seconds - self.submitted, 0.0)

    @property
    def mean_gap(self) -> float | None:
        return self.gap_seconds / self.gaps if self.gaps else None

    @property
    def total_seconds(self) -> float:
        return self.ended - self.arrived


def record_of(connection: Mapping[str, Any]) -> RequestRecord:
    """The record that :class:`sartor.serving.telemetry.Observer` opened for a request, or for the
    ASGI scope of one."""
    record: RequestRecord = connection["state"]["record"]
    return record
