"""One line a request: what it was, how it ended and where its time went. Never what it said."""

from __future__ import annotations

import logging
import queue
import sys
import threading
from collections.abc import Callable
from datetime import UTC, datetime
from logging.handlers import WatchedFileHandler
from pathlib import Path
from typing import Any, Literal

import msgspec

from sartor.errors import SartorError
from sartor.printable import LINE_CHARS, field, plain
from sartor.serving.refusals import WINDOW_SECONDS, Refusals
from sartor.serving.request_record import RequestRecord

LogFormat = Literal["text", "json", "none"]
_WAITING_LINES = 10_000
_CLOSE_SECONDS = 2.0
# Whoever asks these every few seconds is no news.
_QUIET = {"/health", "/metrics"}
_TICK_SECONDS = 1.0
_METHOD_CHARS = 32
_REASONS = 128


class RequestLog:
    """Writes the line of each finished request; of requests without a valid key, few."""

    def __init__(self, form: LogFormat, file: Path | None = None, *, client: bool = False) -> None:
        """``file`` is appended to, standard error where it is None; ``client`` adds addresses.

        SartorError where the file cannot be opened.
        """
        self._line = json_line if form == "json" else text_line
        self._client = client
        try:
            # Notices when somebody has moved the file away, and opens it anew.
            handler = WatchedFileHandler(file, encoding="utf-8") if file else None
        except OSError as error:
            raise SartorError(
                f"the log file {file} cannot be opened: {error.strerror}; choose another with "
                "--log-file"
            ) from None
        self._refusals = Refusals()
        self._writer = _Writer(
            handler or logging.StreamHandler(sys.stderr), self._missed, self._refused
        )

    def __call__(self, record: RequestRecord) -> None:
        if record.route in _QUIET:
            return
        if record.status == 401 and not self._refusals.is_first(record.client):
            return
        self._writer.put(self._line(record, self._client))

    def close(self) -> None:
        self._writer.close()

    def _missed(self, lines: int) -> str:
        return self._note(
            f"{lines} lines of the log are missing: they could not be written in time"
        )

    def _refused(self, at_the_end: bool) -> list[str] | None:
        """The lines for refusals that got none; None where nothing can come later either."""
        if not self._refusals.waiting:
            return None
        return [
            self._note(
                f"{more} more requests without a valid key from {self._whom(peer)} in "
                f"{WINDOW_SECONDS:g} s"
            )
            for peer, more in self._refusals.due(everything=at_the_end)
        ]

    def _whom(self, peer: str | None) -> str:
        if peer is None:
            return "other addresses"
        return field(peer) if self._client else "one address"

    def _note(self, text: str) -> str:
        return msgspec.json.encode({"note": text}).decode() if self._line is json_line else text


class _Writer:
    """Writes lines from a thread of its own: a terminal or a disk that stalls must not stall
    answers. Where too many wait, new ones are dropped, and that is written too.

    ``later`` gives lines for what is only written after a while, with True at the end; None says
    that there is nothing to wait for.
    """

    def __init__(
        self,
        handler: logging.Handler,
        missed: Callable[[int], str],
        later: Callable[[bool], list[str] | None] = lambda _: None,
    ) -> None:
        self._handler = handler
        self._missed = missed
        self._later = later
        self._dropped = 0
        self._queue: queue.Queue[str | None] = queue.Queue(_WAITING_LINES)
        self._thread = threading.Thread(target=self._write, name="request-log", daemon=True)
        self._thread.start()

    def put(self, line: str) -> None:
        try:
            self._queue.put_nowait(line)
        except queue.Full:
            self._dropped += 1

    def close(self) -> None:
        try:
            self._queue.put(None, timeout=_CLOSE_SECONDS)
        except queue.Full:
            return
        self._thread.join(_CLOSE_SECONDS)

    def _write(self) -> None:
        while True:
            due = self._later(False)
            for late in due or ():
                self._emit(late)
            try:
                # What makes something due later puts a line, which ends a wait without a limit.
                line = self._queue.get(timeout=None if due is None else _TICK_SECONDS)
            except queue.Empty:
                continue
            if line is None:
                break
            self._emit(line)
            if self._dropped:
                dropped, self._dropped = self._dropped, 0
                self._emit(self._missed(dropped))
        for late in self._later(True) or ():
            self._emit(late)
        self._handler.close()

    def _emit(self, line: str) -> None:
        self._handler.handle(logging.makeLogRecord({"msg": line}))


def json_line(record: RequestRecord, client: bool = False) -> str:
    """A JSON object; seconds and counts as numbers, what is unknown as null. Fields are cut."""
    fields: dict[str, Any] = {
        "time": _time(record).isoformat(timespec="milliseconds"),
        "id": record.id,
        "method": plain(record.method, _METHOD_CHARS),
        "route": field(record.route),
        "status": record.status,
        "outcome": record.outcome,
        "code": field(record.code) or None,
        "model": field(record.model) or None,
        "adapter": field(record.adapter) or None,
        "key": field(record.key) or None,
        "stream": record.stream,
        "finish_reasons": record.finish_reasons[:_REASONS],
        "prompt_tokens": record.prompt_tokens,
        "cached_tokens": record.cached_tokens,
        "completion_tokens": record.completion_tokens,
        "queue_seconds": _rounded(record.queue_seconds),
        "first_token_seconds": _rounded(record.first_token_seconds),
        "inter_token_seconds": _rounded(record.mean_gap),
        "longest_inter_token_seconds": _rounded(record.longest_gap if record.gaps else None),
        "total_seconds": _rounded(record.total_seconds),
        "worker_restarts": record.restarts,
    }
    if record.near:
        fields["near"] = field(record.near)
    if client:
        fields["client"] = field(record.client)
    return msgspec.json.encode(fields).decode()


def text_line(record: RequestRecord, client: bool = False) -> str:
    """The same in words, without what is zero or unknown."""
    route, method = field(record.route), plain(record.method, _METHOD_CHARS)
    route = f"{route} (near {field(record.near)})" if record.near else route or "?"
    parts = [f"{_time(record):%Y-%m-%d %H:%M:%S} {record.status} {method} {route}"]
    if client:
        parts.append(f"from {field(record.client)}")
    parts.append(f"id {record.id}")
    if record.model:
        adapter = f" + {field(record.adapter)}" if record.adapter else ""
        parts.append(f"{field(record.model)}{adapter}")
    if record.key:
        parts.append(f"key {field(record.key)}")
    if record.prompt_tokens:
        cached = f" ({record.cached_tokens} cached)" if record.cached_tokens else ""
        parts.append(f"{record.prompt_tokens}{cached} + {record.completion_tokens} tokens")
    if record.first_token_seconds is not None:
        parts.append(f"queue {_ms(record.queue_seconds)}")
        parts.append(f"first token {_ms(record.first_token_seconds)}")
    if record.gaps:
        parts.append(f"then {_ms(record.mean_gap)} (longest {_ms(record.longest_gap)})")
    parts.append(f"total {record.total_seconds:.3f} s")
    if record.restarts:
        parts.append(f"worker restarts {record.restarts}")
    if record.operation or record.code:
        reasons = "/".join(dict.fromkeys(record.finish_reasons))
        ended = reasons if record.outcome in ("stop", "length") else record.outcome
        parts.append(f"{ended} {field(record.code)}".rstrip())
    return plain(", ".join(parts), LINE_CHARS)


def _time(record: RequestRecord) -> datetime:
    return datetime.fromtimestamp(record.began / 1e9, UTC)


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 6)


def _ms(seconds: float | None) -> str:
    return f"{(seconds or 0.0) * 1000:.1f} ms"
