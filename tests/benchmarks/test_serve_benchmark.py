"""Servers beside each other: what is made of the rounds, and a whole run without peers."""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import llama_server
import load
import pytest
import serve
from load_report import Outcome, Round
from serve_results import Burst, Findings, FirstToken, Row
from servers import SERVERS, Launch, RunningServer, Setting, answers, cpu_seconds
from tiny_model import write_tiny_model
from traffic import Prompts

from sartor.errors import SartorError, UsageError

DRIVERS = Path(serve.__file__).parent / "drivers"


def rounds(*rates: float) -> list[Round]:
    """Rounds of one answer of 10 tokens, at these tokens a second."""
    found = []
    for rate in rates:
        seconds = 10 / rate
        pieces = [seconds * (i + 1) / 10 for i in range(10)]
        found.append(
            Round(seconds, 0.01, [Outcome(0.0, 10, pieces, seconds, finish_reason="length")])
        )
    return found


def findings() -> Findings:
    row = Row("16 streams", 16, dict.fromkeys(("sartor", "peer"), serve.traffic(16, 16)))
    for name, rates in (("peer", (10.0, 20.0, 20.0)), ("sartor", (30.0, 40.0, 50.0))):
        for found in rounds(*rates):
            row.add(name, found, {"front": 0.002, "workers": 0.1})
    whole = Findings(
        "m",
        2,
        128,
        64,
        {"sartor": ("Sartor", "usual"), "peer": ("Peer", "-x")},
        {"other": "not there"},
    )
    whole.rows.append(row)
    whole.first = FirstToken(32, [0.012, 0.010, 0.02], [0.009, 0.008, 0.01])
    whole.bursts.append(Burst(200, rounds(5.0)[0], 0.005, 10**8, 2 * 10**8, 3 * 10**8))
    return whole


def test_ratios_are_of_rounds() -> None:
    row = findings().rows[0]
    ratio = row.ratio("peer")
    assert (ratio.median, ratio.low, ratio.high) == pytest.approx((2.5, 2.0, 3.0))
    assert row.gateway_seconds_per_token() == pytest.approx(0.006 / 30)
    row.drop("peer")
    assert "peer" not in row.to_json_dict()["servers"]


def test_what_http_adds_is_between_the_medians() -> None:
    first = findings().first
    assert first is not None
    assert first.added == pytest.approx(0.003)
    assert first.to_json_dict()["median_of_differences"] == pytest.approx(0.003)


def test_the_section_says_it_all() -> None:
    text = findings().to_markdown()
    assert text.startswith("## m over HTTP\n")
    sartor, peer = (line for line in text.split("\n") if line.startswith(("| Sartor", "| Peer")))
    assert text.index(sartor) < text.index(peer)
    assert "| 40 (30-50) |" in sartor
    assert "**x2.50** (2.00-3.00)" in peer
    assert "gateway, 16 streams: 200 us" in text
    assert "12.0 ms over HTTP, 9.0 ms in the engine's process; 3.0 ms are added" in text
    assert "| 200 | 1 | 0 | 5 | 200, 200 | 500 us a token | 200 MB | 100 -> 300 MB |" in text
    assert "- not measured, other: not there" in text
    assert (
        json.loads(json.dumps(findings().to_json_dict(), allow_nan=False))["bursts"][0]["size"]
        == 200
    )


def test_errors_of_our_own_are_counted() -> None:
    found = findings()
    assert found.own_errors() == {}
    found.bursts[0].round.outcomes[0].error = "status 500"
    assert found.own_errors() == {"status 500": 1}


def test_options(tmp_path: Path) -> None:
    model = tmp_path / "m.gguf"
    model.touch()
    given = [
        str(model),
        "--parts",
        "first,bursts",
        "--peers",
        "none",
        "--bursts",
        "7",
        "--own=--kv fp16",
    ]
    options = serve.parse(given)
    assert (options.parts, options.peers, options.bursts) == (("first", "bursts"), (), (7,))
    assert options.own == ("--kv", "fp16")
    more = ["--option", "llama_server=-fa on", "--option", "llama_server=-fa off"]
    named = serve.parse([str(model), *more]).named(["llama_server", "vllm_cpu"])
    assert named == ["sartor", "llama_server -fa on", "llama_server -fa off", "vllm_cpu"]
    for wrong in (
        ["--parts", "x"],
        ["--peers", "x"],
        ["--bursts", "a"],
        ["--rounds", "0"],
        ["--option", "x=1"],
        ["--option", "sartor=-x"],
    ):
        with pytest.raises(UsageError):
            serve.parse([str(model), *wrong])
    with pytest.raises(UsageError, match="no file"):
        serve.parse([str(tmp_path / "other.gguf")])


def test_every_server_says_what_it_needs(tmp_path: Path) -> None:
    setting = Setting(tmp_path / "m.gguf", 2, 16, 512, tmp_path)
    for name in ("llama_server", "vllm_cpu", "transformers"):
        with pytest.raises(SartorError, match="run python benchmarks"):
            SERVERS[name](setting, 1)


def test_llama_server_is_started_with_its_settings(tmp_path: Path) -> None:
    program = tmp_path / "llama_server" / "bin" / "llama-server"
    program.parent.mkdir(parents=True)
    program.touch()
    setting = Setting(tmp_path / "m.gguf", 2, 16, 512, tmp_path, ["-fa", "on"])
    launch = SERVERS["llama_server"](setting, 81)
    assert launch.settings == "-np 16 -c 8192 -t 2 -tb 2 -fa on"
    assert launch.command[0] == str(program)
    assert "81" in launch.command
    assert llama_server.build(tmp_path, 1) == program, "it is built already"


def test_a_build_that_fails_says_where(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "llama_server/source/llama_cpp_python-1/vendor/llama.cpp").mkdir(parents=True)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SartorError, match="cmake is not installed"):
        llama_server.build(tmp_path, 1)


def test_a_server_that_ends_is_an_error(tmp_path: Path) -> None:
    setting = Setting(tmp_path / "no.gguf", 1, 1, 64, tmp_path)
    with pytest.raises(SartorError, match=r"ended with code \d.*no\.gguf"):
        RunningServer("sartor", setting, tmp_path / "log")


def test_a_server_that_gives_up_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def launch(setting: Setting, port: int) -> Launch:
        script = "import time; print('No hope', flush=True); time.sleep(60)"
        return Launch("Other", "", [sys.executable, "-c", script], "m", hopeless="No hope")

    monkeypatch.setitem(SERVERS, "other", launch)
    begun = time.monotonic()
    with pytest.raises(SartorError, match="Other has given up: No hope"):
        RunningServer("other", Setting(tmp_path, 1, 1, 64, tmp_path), tmp_path / "log")
    assert time.monotonic() - begun < 30


def test_a_server_sleeps_while_another_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def launch(setting: Setting, port: int) -> Launch:
        command = [sys.executable, "-m", "http.server", str(port), "--bind", "127.0.0.1"]
        return Launch("Other", "", [*command, "--directory", str(tmp_path)], "m", ready="/")

    monkeypatch.setitem(SERVERS, "other", launch)
    with RunningServer("other", Setting(tmp_path, 1, 1, 64, tmp_path), tmp_path / "log") as server:
        with server.asleep():
            assert [process.status() for process in server.processes()] == ["stopped"]
        assert answers(server.url, "/")


class FakeModel:
    def encode(self, prompt: str | list[int]) -> list[int]:
        return list(range(len(prompt.split()))) if isinstance(prompt, str) else prompt

    def answer(self, prompt: list[int], tokens: int) -> Iterator[str]:
        for number in range(tokens):
            yield f" {number}"


def test_the_server_over_transformers_speaks_the_protocol(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    monkeypatch.syspath_prepend(str(DRIVERS))
    import serve_transformers

    serve_transformers.Handler.model = FakeModel()  # type: ignore[assignment]
    serve_transformers.Handler.name = "m"
    with serve_transformers.Server(("127.0.0.1", 0), serve_transformers.Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        url = f"http://127.0.0.1:{server.server_address[1]}"
        try:
            assert answers(url, "/health")
            assert load.first_model(url, None) == "m"
            target = load.Target(url, "m", "completions")
            report = load.run(
                target, serve.traffic(3, 6), Prompts.common(), rounds=1, warm_up=0, seed=0
            )
        finally:
            server.shutdown()
            thread.join()
    assert report.errors() == {}
    assert report.counts()["output_tokens"] == 6 * 64
    assert report.counts()["prompt_tokens"] == 6 * 128


def test_a_run_without_peers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("sartor.backends.cpu._native")
    model = write_tiny_model(tmp_path / "tiny.gguf")
    monkeypatch.setattr(Prompts, "of_model", staticmethod(lambda path, endpoint: Prompts.common()))
    target = tmp_path / "found.json"
    arguments = [str(model), "--peers", "none", "--rounds", "1", "--requests", "1", "--first", "2"]
    arguments += [
        "--bursts",
        "20",
        "--parts",
        "streams,first,bursts",
        "--environments",
        str(tmp_path),
        "--json",
        str(target),
    ]
    arguments += ["--write", str(tmp_path / "page.md"), "--threads", "1"]
    monkeypatch.setattr(sys, "argv", ["serve.py", *arguments])
    monkeypatch.setenv("SARTOR_HOME", str(tmp_path / "home"))
    assert serve.main() == 0
    found: dict[str, Any] = json.loads(target.read_text())
    assert found["rows"]["16 streams"]["servers"]["sartor"]["output_tokens"] == 16 * 64
    assert found["rows"]["16 streams"]["gateway_seconds_per_token"] > 0
    assert len(found["first_token"]["over_http"]) == len(found["first_token"]["in_process"]) == 2
    assert found["bursts"][0]["finished"] == 20
    assert found["bursts"][0]["gateway_peak_bytes"] > 10**7
    assert "## tiny over HTTP" in (tmp_path / "page.md").read_text()
    assert "## tiny over HTTP" in capsys.readouterr().out


def test_processor_time_grows_with_work() -> None:
    import psutil

    own = psutil.Process()
    before = cpu_seconds(own)
    while cpu_seconds(own) == before:
        sum(range(1000))
