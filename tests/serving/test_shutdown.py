from __future__ import annotations

import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import psutil
import pytest
from poison_backend import installed
from server_process import ServerProcess
from test_crash import Stream, say, wait_until
from tiny_model import write_tiny_model

from sartor.errors import FormatError, SartorError, UsageError
from sartor.serving.server import serve

Start = Callable[..., ServerProcess]


def test_one_signal_drains(start_server: Start, tmp_path: Path) -> None:
    server = start_server(device="null-20ms", environment={"TMPDIR": str(tmp_path)})
    family = psutil.Process(server.process.pid).children(recursive=True)
    number = signal.SIGINT
    stream = Stream(server, messages=say("x"), max_tokens=100)
    wait_until(lambda: len(stream.pieces) > 3)
    server.process.send_signal(number)
    server.worker().send_signal(number)  # as a terminal does: to the whole group
    wait_until(lambda: server.health().json()["status"] == "draining")
    answer = server.post("/v1/completions", {"model": server.name, "prompt": "x"})
    assert stream.is_alive(), "all this happens before the last answer ends"
    assert answer.status_code == 503
    assert int(answer.headers["Retry-After"]) >= 1
    assert "shutting down" in answer.json()["error"]["message"]
    assert stream.finish()[3] == 100
    assert server.process.wait(5) == 0
    with pytest.raises(httpx.TransportError):
        server.health()
    nothing_is_left(family, tmp_path)


def test_nothing_to_drain_ends_at_once(start_server: Start) -> None:
    server = start_server()
    server.process.send_signal(signal.SIGTERM)
    assert server.process.wait(5) == 0


def nothing_is_left(family: list[psutil.Process], temporary: Path) -> None:
    _, left = psutil.wait_procs(family, 10)
    assert not left
    assert not list(temporary.iterdir())


def test_a_second_signal_stops_at_once(start_server: Start, tmp_path: Path) -> None:
    server = start_server(device="null-100ms", environment={"TMPDIR": str(tmp_path)})
    family = psutil.Process(server.process.pid).children(recursive=True)
    stream = Stream(server, messages=say("x"), max_tokens=500)
    wait_until(lambda: len(stream.pieces) > 3)
    server.process.send_signal(signal.SIGTERM)
    wait_until(lambda: server.health().json()["status"] == "draining")
    assert server.process.poll() is None
    begin = time.monotonic()
    server.process.send_signal(signal.SIGTERM)
    assert server.process.wait(5) == 1
    assert time.monotonic() - begin < 4
    nothing_is_left(family, tmp_path)


@pytest.mark.parametrize("when", ["loading", "idle", "answering"])
def test_a_killed_gateway_leaves_nothing_behind(
    start_server: Start, tmp_path: Path, when: str
) -> None:
    server = start_server(
        device="null-20ms", environment={"TMPDIR": str(tmp_path)}, wait=when != "loading"
    )
    if when == "loading":
        wait_until(lambda: bool(server.workers()))
    if when == "answering":
        stream = Stream(server, messages=say("x"), max_tokens=500)
        wait_until(lambda: len(stream.pieces) > 3)
    family = psutil.Process(server.process.pid).children(recursive=True)
    server.process.kill()
    server.process.wait(5)
    nothing_is_left(family, tmp_path)


def test_a_worker_that_no_longer_runs_threads_ends_with_its_gateway(
    start_server: Start, tmp_path: Path
) -> None:
    server = start_server(device="null", backend="poison", environment=installed(tmp_path))
    family = psutil.Process(server.process.pid).children(recursive=True)
    Stream(server, messages=say("FROZEN!"), max_tokens=5)
    time.sleep(1)  # until it has begun; nothing tells
    server.process.kill()
    server.process.wait(5)
    assert not psutil.wait_procs(family, 5)[1]


def test_several_models_in_one_worker_which_ends_with_its_gateway(
    start_server: Start, tiny_model: Path, tmp_path: Path
) -> None:
    small = write_tiny_model(tmp_path / "small.gguf", context=64, template=None)
    server = start_server([tiny_model, small])
    assert {m.id for m in server.client.models.list()} == set(server.names)
    for name in server.names:
        body = {"model": name, "prompt": "x", "max_tokens": 3, "ignore_eos": True}
        answer = server.post("/v1/completions", body).json()
        assert (answer["model"], answer["usage"]["completion_tokens"]) == (name, 3)
    body = {"model": str(small), "messages": say("x")}
    answer = server.post("/v1/chat/completions", body)
    assert answer.status_code == 400
    assert "no chat template" in answer.text
    answer = server.post("/v1/completions", {"model": str(small), "prompt": "x" * 64})
    assert answer.json()["error"]["code"] == "context_length_exceeded"

    worker = server.worker()
    server.process.kill()
    server.process.wait(5)
    worker.wait(5)


def test_what_cannot_be_served_is_an_error_at_once(tmp_path: Path, tiny_model: Path) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"GGUF")
    with pytest.raises(FormatError, match="broken"):
        serve([str(broken)])
    with pytest.raises(UsageError, match="twice"):
        serve([str(tiny_model)] * 2)
    with pytest.raises(UsageError, match="at least one"):
        serve([])
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(SartorError, match="port"):
        serve([str(tiny_model)], port=taken.getsockname()[1])
