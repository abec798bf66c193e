"""What reaches the log and the terminal: no line of a stranger's, no colour, no flood."""

from __future__ import annotations

import io
import json
import logging
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from raw_client import RawClient
from server_process import ServerProcess, wait_until

from sartor.errors import UsageError
from sartor.printable import FIELD_CHARS, LINE_CHARS, field, plain, printable
from sartor.serving.errors import ApiError, unauthorized
from sartor.serving.keys import ApiKey, add_key
from sartor.serving.log_lines import LineFormatter, log_to_stderr, say
from sartor.serving.refusals import MAX_PEERS, WINDOW_SECONDS, Refusals
from sartor.serving.request_log import RequestLog, json_line, text_line
from sartor.serving.request_record import RequestRecord
from sartor.serving.startup import check_adapters
from sartor.serving.tracing import attributes

Start = Callable[..., ServerProcess]
FORGED = (
    "a\r\n2026-01-01 00:00:00 200 POST /v1/forged\x1b[31m\x07\x9b2J\x00\x7f\u202e\u2066\u200f"
    "\u2028\u2029\u0085\x0b\x0c\x1c\tb\ud800"
)
BAD = [
    *map(chr, (*range(32), 127, *range(128, 160), *range(0x202A, 0x202F), *range(0x2066, 0x206A)))
]
BAD += ["\u2028", "\u2029", "\u200e", "\u200f", "\u061c", "\ud800", "\udfff"]


def clean(text: str) -> bool:
    text.encode("utf-8")
    return not any(bad in text for bad in BAD)


def test_the_filter() -> None:
    assert clean(plain("".join(BAD) + FORGED))
    assert plain("one\ntwo\tthree") == "one two three"
    assert plain("\ud800") == "\ufffd"
    assert printable("one\ntwo\tthree\x1b[31m") == "one\ntwo\tthree[31m"
    assert field("x" * FIELD_CHARS) == "x" * FIELD_CHARS
    assert field("x" * 10_000) == "x" * (FIELD_CHARS - 3) + "..."
    assert plain("größer 漢字 🙂") == "größer 漢字 🙂"


def forged_record(text: str) -> RequestRecord:
    record = RequestRecord("abc", text, 10.0, 1_700_000_000 * 10**9, text)
    record.route = record.near = record.model = record.adapter = record.key = record.asked = text
    record.error = ApiError(400, text, code=text)
    record.operation, record.ended = "chat", 11.0
    record.ends = ["length"] * 5000
    return record


@pytest.mark.parametrize("form", [text_line, json_line])
@pytest.mark.parametrize("text", [FORGED, FORGED * 1000, "x" * 60_000])
def test_a_line_of_the_log_is_one_line(form: Callable[..., str], text: str) -> None:
    line = form(forged_record(text), client=True)
    assert clean(line)
    assert len(line) <= LINE_CHARS
    if form is json_line:
        fields = json.loads(line)
        assert all(len(v) <= FIELD_CHARS for v in fields.values() if isinstance(v, str))


def test_attributes_of_spans_are_clean_and_short() -> None:
    found = attributes(forged_record(FORGED * 100))
    for name, value in found.items():
        if isinstance(value, str):
            assert clean(value), name
            assert len(value) <= FIELD_CHARS


def formatted(log: Callable[[logging.Logger], None]) -> str:
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(LineFormatter())
    logger = logging.Logger("sartor.test")
    logger.addHandler(handler)
    log(logger)
    return stream.getvalue()


def test_a_message_is_one_line() -> None:
    said = formatted(lambda log: log.warning("the adapter %s: %s", FORGED, "x" * 10_000))
    assert said.count("\n") == 1
    assert clean(said.removesuffix("\n"))
    assert len(said) <= LINE_CHARS + 1
    assert formatted(lambda log: log.warning("%d", "x")) == "%d ('x',)\n"


def test_lines_of_a_traceback_cannot_be_taken_for_others() -> None:
    def fail(log: logging.Logger) -> None:
        try:
            raise RuntimeError(FORGED + "\n2026 forged\n" * 500)
        except RuntimeError:
            log.exception("it failed")

    message, *more = formatted(fail).removesuffix("\n").split("\n")
    assert message == "it failed"
    assert 100 < len(more) < 210
    assert all(line.startswith("| ") and clean(line) for line in more)
    assert any("lines are left out" in line for line in more)


def test_it_is_set_up_unless_something_else_is(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    root = logging.RootLogger(logging.WARNING)
    monkeypatch.setattr(logging, "getLogger", lambda *_: root)
    log_to_stderr()
    log_to_stderr()
    assert len(root.handlers) == 1
    root.warning("told %s", FORGED)
    root.info("not told")
    root.error("first\nstill first")
    err = capsys.readouterr().err
    assert len(err.splitlines()) == 2
    assert err.endswith("first still first\n")
    root.handlers = [logging.NullHandler()]
    log_to_stderr()
    assert len(root.handlers) == 1


def test_handlers_and_warnings_of_libraries_write_lines() -> None:
    code = f"""
import logging, sys, warnings
from sartor.serving.log_lines import format_all_lines, log_to_stderr
log_to_stderr()
own = logging.getLogger("a.library")
own.addHandler(logging.StreamHandler())
own.propagate = False
format_all_lines()
own.warning({FORGED!r})
warnings.warn({FORGED!r})
"""
    err = subprocess.run([sys.executable, "-c", code], capture_output=True).stderr.decode()
    assert len(err.splitlines()) == 2
    assert all(map(clean, err.splitlines()))


def test_notes_are_lines(capsys: pytest.CaptureFixture[str]) -> None:
    say(f"note: {FORGED}")
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert clean(err.removesuffix("\n"))


def test_adapters_have_names_that_can_be_shown(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot be shown"):
        check_adapters({"a\nb": tmp_path}, None)


# Requests without a valid key -----------------------------------------------------------------


def test_refusals_are_counted_by_address() -> None:
    now = [0.0]
    refusals = Refusals(lambda: now[0])
    assert [refusals.is_first("a") for _ in range(8)] == [True] + [False] * 7
    assert refusals.is_first("b")
    assert refusals.due() == []
    now[0] = WINDOW_SECONDS
    assert refusals.due() == [("a", 7)]
    assert not refusals.waiting
    assert refusals.is_first("a")
    assert not refusals.is_first("a")
    assert refusals.due(everything=True) == [("a", 1)]


def test_the_memory_for_addresses_is_bounded() -> None:
    refusals = Refusals(lambda: 0.0)
    firsts = sum(refusals.is_first(str(i)) for i in range(50 * MAX_PEERS))
    assert firsts == MAX_PEERS + 1
    ((peer, more),) = refusals.due(everything=True)
    assert (peer, more) == (None, 49 * MAX_PEERS - 1)


def refused(client: str) -> RequestRecord:
    record = RequestRecord("abc", "GET", 10.0, 1_700_000_000 * 10**9, client)
    record.status, record.error, record.ended = 401, unauthorized("no", "missing"), 10.0
    return record


@pytest.mark.parametrize("form", ["text", "json"])
@pytest.mark.parametrize("client", [False, True])
def test_the_log_sums_refusals_up(tmp_path: Path, form: Any, client: bool) -> None:
    file = tmp_path / "log"
    log = RequestLog(form, file, client=client)
    for _ in range(8):
        log(refused("10.0.0.1"))
    log.close()
    first, last = file.read_text(encoding="utf-8").splitlines()
    assert "missing_api_key" in first
    whom = "10.0.0.1" if client else "one address"
    note = f"7 more requests without a valid key from {whom} in 10 s"
    assert last == (json.dumps({"note": note}, separators=(",", ":")) if form == "json" else note)
    assert ("10.0.0.1" in first + last) is client


def test_the_count_comes_by_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sartor.serving.refusals.WINDOW_SECONDS", 0.2)
    monkeypatch.setattr("sartor.serving.request_log._TICK_SECONDS", 0.05)
    log = RequestLog("text", tmp_path / "log")
    for _ in range(3):
        log(refused("10.0.0.1"))
    wait_until(lambda: "2 more requests" in (tmp_path / "log").read_text(encoding="utf-8"))
    log.close()


def test_strangers_cannot_fill_the_log(start_server: Start, tmp_path: Path) -> None:
    keys, file = tmp_path / "keys.toml", tmp_path / "log"
    add_key(keys, lambda sha: ApiKey(name="a", sha256=sha))
    server = start_server(keys=str(keys), telemetry={"log": "text", "log_file": str(file)})
    for _ in range(20):
        with RawClient(server) as client:
            head = b"M" * 15_000 + b" /" + b"p" * 500 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n"
            assert client.send(head).answer()[0] == 401
    assert server.http.get("/v1/models").status_code == 401
    server.stop()
    text = file.read_text(encoding="utf-8")
    assert len(text) < 1000
    assert len(text.splitlines()) == 2
    assert "20 more requests without a valid key" in text


def test_messages_of_the_server_are_clean(start_server: Start, tmp_path: Path) -> None:
    """The name of a folder comes with an error of the worker's, and a colour with the folder."""
    folder = tmp_path / "adapters"
    (folder / "a\x1b[31m\nforged").mkdir(parents=True)
    server = start_server(adapter_folder=str(folder), wait=False)
    server.read_ready_line()
    body = {"lora_name": "poet", "lora_path": "a\x1b[31m\nforged"}
    assert server.post("/v1/load_lora_adapter", body).status_code == 400
    server.process.terminate()
    assert server.process.stderr is not None
    said = server.process.stderr.read()
    server.process.wait(20)
    assert "a client's adapter was not loaded" in said
    assert "forged" in said
    assert "\x1b" not in said
    assert not any(line.startswith("forged") for line in said.splitlines())
