"""Statistics of a load test, and whole ones against our server with a backend that computes nothing."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path

import load
import numpy as np
import pytest
from load_report import Objective, Outcome, Report, Round, Spread
from server_process import ServerProcess
from tiny_model import write_tiny_model
from traffic import Call

from sartor.errors import SartorError, UsageError


def outcome(**fields: object) -> Outcome:
    """Due at 10 s, first of three tokens at 10.5 s, the others 0.1 and 0.3 s later."""
    usual = {
        "due": 10.0,
        "asked": 3,
        "pieces": [10.5, 10.6, 10.9],
        "end": 11.0,
        "finish_reason": "length",
    }
    return Outcome(**{**usual, **fields})  # type: ignore[arg-type]


def test_times_of_one_answer() -> None:
    one = outcome()
    assert one.first == pytest.approx(0.5)
    assert one.gaps == pytest.approx([0.1, 0.3])
    assert one.per_token == pytest.approx(0.2)
    # The server's count goes before the pieces: two tokens came as one piece.
    assert outcome(completion_tokens=4).per_token == pytest.approx(0.4 / 3)
    assert outcome(pieces=[]).first is None
    assert outcome(pieces=[10.5]).per_token is None


def test_spread() -> None:
    values = [float(v) for v in np.random.default_rng(0).permutation(101)]
    assert Spread.of(values) == Spread(101, 50.0, 50.0, 90.0, 99.0, 100.0)
    assert math.isnan(Spread.of([]).median)


def test_an_answer_is_good_when_both_times_are_met() -> None:
    assert Objective(0.5, 0.2001).met(outcome())
    assert not Objective(0.49, 1).met(outcome())
    assert not Objective(1, 0.19).met(outcome())
    assert not Objective().met(outcome(error="timeout"))
    assert not Objective().met(outcome(left=True))
    assert Objective(1, 0.01).met(outcome(pieces=[10.5]))


def test_a_report_counts_everyone() -> None:
    answers = [outcome(), outcome(left=True), outcome(error="timeout", pieces=[])]
    short = outcome(asked=9, due=0.0, pieces=[1.0], end=2.0)
    report = Report([Round(2.0, 0.1, answers), Round(1.0, 0.1, [short])], Objective(first=0.7))
    counts = report.counts()
    assert counts["requests"] == 4
    assert (counts["finished"], counts["left"], counts["failed"]) == (2, 1, 1)
    assert (counts["short"], counts["good"]) == (1, 1)
    assert counts["output_tokens"] == 7
    assert report.rates() == {
        "output_tokens_per_s": [3.0, 1.0],
        "requests_per_s": [0.5, 1.0],
        "good_requests_per_s": [0.5, 0.0],
    }
    assert report.errors() == {"timeout": 1}
    assert report.client_seconds_per_token == pytest.approx(0.2 / 7)
    assert report.times()["first_token"].max == 1.0
    found = json.loads(json.dumps(report.to_json_dict(), allow_nan=False))
    assert found["output_tokens_per_s"]["median"] == 2.0
    nothing = Report([Round(1.0, 0.1, [outcome(error="x", pieces=[])])], Objective())
    assert (
        json.loads(json.dumps(nothing.to_json_dict(), allow_nan=False))["seconds"]["first_token"][
            "max"
        ]
        is None
    )
    assert any("4: 2 finished, 1 left, 1 failed, 1 short" in line for line in report.lines())


def record(status: int, *events: str, leave_after: int | None = None) -> Outcome:
    """The outcome of an answer of these events."""
    found = Outcome(0.0, 3)
    recorder = load.Recorder(found, leave_after)
    client = load.Target("http://127.0.0.1:1", "m").client()
    recorder.exchange = client.exchange("POST", "/", b"", recorder.on_body)
    recorder.exchange.response.status = status
    for data in events:
        recorder.on_body(status, f"data: {data}\n\n".encode())
    recorder.check()
    return found


CHAT = '{"choices":[{"index":0,"delta":{"content":"%s"},"finish_reason":null}],"usage":null}'
END = '{"choices":[{"index":0,"delta":{},"finish_reason":"length"}]}'
USAGE = (
    '{"choices":[],"usage":{"prompt_tokens":7,"completion_tokens":3,"total_tokens":10,'
    '"prompt_tokens_details":{"cached_tokens":4}}}'
)


def test_an_answer_is_read() -> None:
    found = record(200, CHAT % "", CHAT % "a", CHAT % "bc", END, USAGE, "[DONE]")
    assert found.error is None
    assert len(found.pieces) == 2, "the greeting is no text"
    assert (found.prompt_tokens, found.cached_tokens, found.tokens) == (7, 4, 3)
    assert found.finish_reason == "length"
    plain = record(
        200,
        '{"choices":[{"text":"a"}]}',
        '{"choices":[{"text":"","finish_reason":"stop"}]}',
        "[DONE]",
    )
    assert (plain.tokens, plain.error) == (1, None)
    assert plain.piece_tokens == [1]


def test_a_character_of_several_tokens_is_one_piece() -> None:
    found = record(
        200,
        '{"choices":[{"text":"a","logprobs":{"tokens":["a"]}}]}',
        '{"choices":[{"text":"","logprobs":{"tokens":["\\u00f0"]}}]}',
        '{"choices":[{"text":"\\u20ac!","logprobs":{"tokens":["\\u20ac","!"]}}]}',
        END,
        "[DONE]",
    )
    assert (len(found.pieces), found.piece_tokens) == (2, [1, 3])


def test_what_is_wrong_with_an_answer() -> None:
    assert record(200, CHAT % "a").error == "answer without an end"
    assert record(200, CHAT % "a", END).error == "answer without an end"
    assert record(503).error == "status 503"
    broken = record(200, CHAT % "a", '{"error":{"message":"x"}}', "[DONE]")
    assert broken.error == "error in the stream"


def test_a_client_leaves_in_time() -> None:
    found = record(200, CHAT % "a", CHAT % "b", CHAT % "c", leave_after=2)
    assert found.left
    assert found.error is None


def test_bodies_ask_for_exact_lengths() -> None:
    call = Call(None, "hello", 1, 5, None)
    chat = json.loads(load.Target("http://h", "m").body(call))
    assert chat["messages"] == [{"role": "user", "content": "hello"}]
    assert (chat["max_tokens"], chat["ignore_eos"], chat["stream"]) == (5, True, True)
    plain = load.Target("http://h", "m", "completions", ignore_eos=False, more={"n": 1})
    body = json.loads(plain.body(Call(None, (1, 2), 2, 5, None)))
    assert body["prompt"] == [1, 2]
    assert "ignore_eos" not in body
    assert body["n"] == 1


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    model = write_tiny_model(tmp_path_factory.mktemp("load") / "tiny.gguf")
    with ServerProcess([model], device="null-1ms", max_requests=64) as server:
        yield server


def run(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, *arguments: str
) -> tuple[int, dict[str, object]]:
    """Exit code and JSON of the command."""
    target = tmp_path / "found.json"
    monkeypatch.setattr(sys, "argv", ["load.py", *arguments, "--json", str(target)])
    return load.main(), json.loads(target.read_text())


def test_streams(
    server: ServerProcess,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    code, found = run(
        monkeypatch, tmp_path, "--url", server.url, "--streams", "4", "--requests", "12",
        "--input", "5-20", "--output", "16", "--rounds", "2", "--slo-first", "60",
    )  # fmt: skip
    assert code == 0
    assert (found["requests"], found["finished"], found["good"], found["short"]) == (24, 24, 24, 0)
    assert found["output_tokens"] == 24 * 16
    assert found["errors"] == {}
    assert len(found["output_tokens_per_s"]["rounds"]) == 2  # type: ignore[index]
    assert "24 finished" in capsys.readouterr().out
    assert server.health().json()["status"] == "ok"


def test_poisson_arrivals_with_clients_that_leave(
    server: ServerProcess, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    code, found = run(
        monkeypatch, tmp_path, "--url", server.url, "--rate", "60", "--requests", "30",
        "--endpoint", "completions", "--output", "32", "--leave", "0.5", "--leave-after", "3",
        "--share", "0.5", "--prefix", "30", "--warm-up", "0",
    )  # fmt: skip
    assert code == 0
    assert found["finished"] + found["left"] == 30  # type: ignore[operator]
    assert 0 < found["left"] < 30  # type: ignore[operator]
    assert found["cached_tokens"] > 0  # type: ignore[operator]


def test_a_burst_that_is_turned_away_is_reported(
    server: ServerProcess, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    code, found = run(
        monkeypatch, tmp_path, "--url", server.url, "--burst", "80", "--output", "200",
        "--model", server.name,
    )  # fmt: skip
    assert code == 1
    assert found["errors"].keys() == {"status 429"}  # type: ignore[attr-defined]
    assert found["finished"] >= 64  # type: ignore[operator]
    assert found["finished"] + found["failed"] == 80  # type: ignore[operator]


def test_a_server_that_is_not_there_is_an_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["load.py", "--url", "http://127.0.0.1:1", "--streams", "1"])
    assert load.main() == SartorError.exit_code
    assert "--model" in capsys.readouterr().err


def test_options_that_contradict_each_other() -> None:
    for arguments in (
        ["--ids", "--streams", "1"],
        ["--streams", "1", "--rate", "2"],
        ["--rounds", "0"],
    ):
        with pytest.raises(UsageError):
            load.parse(["--url", "http://h", "--model", "m", *arguments])
