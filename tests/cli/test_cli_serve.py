"""``sartor serve``: what it refuses at once, and what it shows when it is ready."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from test_cli_commands import Capture, fails
from test_cli_process import COMMAND

from sartor.cli import serve_screen
from sartor.cli.serve_screen import facts, show
from sartor.plan import ExecutionPlan
from sartor.serving.frontend import open_served_model
from sartor.serving.messages import AdapterSpec, HostedModel
from sartor.serving.startup import Started


@pytest.mark.parametrize(
    ("options", "code", "says"),
    [
        (("--port", 70000), 2, "70000 is not in the range 0<=x<=65535"),
        (("--port", 65536), 2, "65536 is not in the range"),
        (("--port", -1), 2, "-1 is not in the range"),
        (("--host", "nowhere.invalid"), 1, "cannot listen on host 'nowhere.invalid'"),
        (("--host", ""), 1, "cannot listen on host ''"),
        (("--host", "192.0.2.1"), 1, "cannot listen on 192.0.2.1 port 8000"),
        (("--keys", "none.toml"), 1, "none.toml cannot be read"),
        (("--log-file", "none/x.log"), 1, "none/x.log cannot be opened"),
        (("--log", "none", "--log-file", "x.log"), 2, "--log-file needs a log"),
        (("--log", "none", "--log-client"), 2, "--log-client needs a log"),
        (("--adapter", "a=none"), 2, "none is no folder"),
        (("--adapter-folder", "none"), 2, "none does not exist"),
        (("--cors-origin", "example.org"), 2, "'example.org' is no origin"),
        (("--allowed-host", "http://box"), 2, "'http://box' is no name of a host"),
        (("--max-wait", "nan"), 2, "max_wait is nan"),
        (("--max-wait", -1), 2, "-1"),
        (("--max-seconds", "inf"), 2, "--max-seconds is inf"),
        (("--max-requests", 0), 2, "0 is not in the range"),
        (("--max-sequences", 0), 2, "0 is not in the range"),
        (("--max-connections", 0), 2, "0 is not in the range"),
        (("--max-body-bytes", 0), 2, "0 is not in the range"),
        (("--max-tokens", -1), 2, "-1 is not in the range"),
        (("--memory", "much"), 2, "'much' is no size"),
        (("--alias", "name"), 2, "write it as NAME=MODEL"),
        (("--alias", "=m"), 2, "write it as NAME=MODEL"),
        (("--alias", "a=m", "--alias", "a=n"), 2, "given twice"),
    ],
)
def test_wrong_options_end_it_before_a_model_is_looked_for(
    capsys: Capture, options: tuple[object, ...], code: int, says: str
) -> None:
    assert says in fails(capsys, code, "serve", "no-such-model:1b", *options)


def test_a_taken_port(capsys: Capture) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        said = fails(capsys, 1, "serve", "no-such-model:1b", "--port", port)
    assert f"cannot listen on 127.0.0.1 port {port}: Address already in use" in said


def test_aliases_that_lead_nowhere(capsys: Capture, tiny: Path) -> None:
    said = fails(capsys, 2, "serve", tiny, "--port", 0, "--alias", "a=other")
    assert f"a is for other, which is not served; name one of {tiny.name}" in said


def test_a_limit_of_bodies_above_that_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    from sartor.cli.main import guarded
    from sartor.serving import server

    seen: list[Any] = []
    monkeypatch.setattr(server, "serve", lambda _, **given: seen.append(given["limits"]) or 0)
    assert guarded(["serve", "m", "--max-body-bytes", str(2**30)]) == 0
    assert seen[0].bodies_bytes >= seen[0].body_bytes == 2**30


@contextmanager
def serving(*arguments: object, **more: Any) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [*COMMAND, "serve", *map(str, arguments), "--port", "0", "--backend", "null"],
        stderr=subprocess.DEVNULL,
        **{"stdout": subprocess.PIPE, "text": True, **more},
    )
    try:
        yield process
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(20)


def read_block(process: subprocess.Popen[str]) -> list[str]:
    assert process.stdout is not None
    lines = [process.stdout.readline().rstrip("\n")]
    while not lines[-1].startswith("curl"):
        lines.append(process.stdout.readline().rstrip("\n"))
        assert len(lines) < 30, lines
    return lines


@pytest.mark.skipif(sys.platform == "win32", reason="needs a shell")
def test_what_a_pipe_gets(tiny: Path) -> None:
    with serving(tiny, "--alias", f"mine={tiny}", "--device", "null") as process:
        ready, empty, *lines, space, call = read_block(process)
        found = re.fullmatch(rf"Ready: {re.escape(tiny.name)} at (http://\S+)/v1 \(.*\)", ready)
        assert found is not None
        assert (empty, space) == ("", "")
        table = {line[:8].strip(): line[10:] for line in lines}
        assert list(table) == [
            "address",
            "model",
            "sampling",
            "runs on",
            "memory",
            "tuning",
            "keys",
        ]
        assert table["address"] == f"{found[1]}/v1"
        assert table["model"] == f"{tiny.name}: chat, 2048 tokens of context, also mine"
        assert table["keys"] == "none needed"
        assert "\x1b" not in "".join(lines)
        done = subprocess.run(["sh", "-c", call], capture_output=True, text=True, timeout=60)
        answer = json.loads(done.stdout)
        assert answer["model"] == "mine"
        assert answer["choices"]


@pytest.mark.skipif(sys.platform == "win32", reason="needs a terminal")
@pytest.mark.parametrize("columns", [60, 200])
def test_what_a_terminal_gets(tiny: Path, columns: int) -> None:
    """Facts are broken at the width; the call stays one line, which a terminal breaks itself."""
    import fcntl
    import struct
    import termios

    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
    aliases = [option for i in range(8) for option in ("--alias", f"alias-{i}={tiny}")]
    environment = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "LINES")}
    with serving(tiny, *aliases, stdout=theirs, text=False, env=environment):
        os.close(theirs)
        text, end = b"", time.monotonic() + 30
        while b"curl" not in text or not text.endswith(b"\n"):
            assert time.monotonic() < end, text
            if select.select([ours], [], [], 0.1)[0]:
                text += os.read(ours, 65536)
    os.close(ours)
    lines = text.decode().replace("\r", "").split("\n")
    shown = lines[2 : next(i for i, line in enumerate(lines) if line.startswith("curl"))]
    assert any("alias-7" in line for line in shown)
    words = tiny.name  # cannot be broken
    assert all(len(line) <= columns for line in shown if words not in line)
    if columns == 60:
        assert any(line.startswith(" " * 9) for line in shown)


def started(model: Path, **more: Any) -> Started:
    served = open_served_model("m", model, ExecutionPlan())
    plan = ExecutionPlan(backend="cpu", device="cpu", isa="avx2", threads=1, kv="int8", tune=False)
    hosted = {"m": HostedModel("m", plan=plan, memory={"weights": 10**8, "state": 2 * 10**9})}
    return Started(("http://127.0.0.1:80",), (served,), hosted, **more)


def test_facts(tiny: Path, bare: Path) -> None:
    found = dict(facts(started(tiny, keys=3, memory_bytes=3 * 10**9)))
    assert found["runs on"] == "cpu avx2, 1 thread, int8 x int8 state"
    assert found["memory"] == "100 MB of weights, 2.00 GB of state, limit 3.00 GB"
    assert found["tuning"] == "off"
    assert found["keys"] == "needed, 3 in the file"
    assert "nobody gets in" in dict(facts(started(tiny, keys=0)))["keys"]
    assert "completions, no chat template" in dict(facts(started(bare)))["model"]
    one = started(tiny)
    one.models[0].adapters["poet"] = AdapterSpec("poet", "p")
    assert dict(facts(one))["model"].endswith(", adapter poet")
    several = Started(("http://127.0.0.1:80", "http://192.0.2.1:80"), one.models * 2, one.hosted)
    assert [name for name, _ in facts(several)][:4] == ["address", "", "model", ""]


def test_output_is_written_in_one_piece(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever reads a line and closes the pipe must not break the server."""
    written: list[str] = []
    monkeypatch.setattr(
        serve_screen, "print", lambda text, **_: written.append(text), raising=False
    )
    show(started(tiny))
    assert len(written) == 1
    assert written[0].startswith("Ready: m at ")
