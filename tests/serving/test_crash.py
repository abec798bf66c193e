"""Workers that die, hang or never start: nothing is lost, everyone gets an answer."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from server_process import ServerProcess, wait_until
from tiny_model import write_tiny_model

Start = Callable[..., ServerProcess]
TOKENS = 40


class Stream(threading.Thread):
    """Reads one stream to its end."""

    def __init__(self, server: ServerProcess, **parameters: Any) -> None:
        super().__init__(daemon=True)
        self.pieces: list[tuple[int, str]] = []
        self.ends: dict[int, str] = {}
        self.logprobs: list[tuple[str, float]] = []
        self.usage: Any = None
        self.error: Exception | None = None
        self._server = server
        self._parameters = {"max_tokens": TOKENS, "ignore_eos": True, **parameters}
        self.start()

    def run(self) -> None:
        extra = {k: self._parameters.pop(k) for k in ("ignore_eos",)}
        try:
            for event in self._server.client.chat.completions.create(
                model=self._server.name,
                stream=True,
                stream_options={"include_usage": True},
                extra_body=extra,
                **self._parameters,
            ):
                self.usage = event.usage
                for choice in event.choices:
                    self.pieces.append((choice.index, choice.delta.content or ""))
                    if choice.logprobs:
                        self.logprobs += [(t.token, t.logprob) for t in choice.logprobs.content]
                    if choice.finish_reason:
                        self.ends[choice.index] = choice.finish_reason
        except Exception as error:
            self.error = error

    def finish(self) -> tuple[dict[int, str], dict[int, str], list[tuple[str, float]], int]:
        self.join(20)
        assert not self.is_alive(), "the stream did not end"
        if self.error is not None:
            raise self.error
        texts: dict[int, str] = {}
        for index, piece in self.pieces:
            texts[index] = texts.get(index, "") + piece
        return texts, self.ends, self.logprobs, self.usage.completion_tokens


def say(text: str) -> list[Any]:
    return [{"role": "user", "content": text}]


FOUR = [
    {"messages": say("one"), "temperature": 0},
    {"messages": say("two"), "seed": 5, "logprobs": True, "top_logprobs": 2},
    {"messages": say("three"), "seed": 6, "n": 3, "presence_penalty": 1, "stop": ["e", "?"]},
    {"messages": say("four"), "seed": 7, "ignore_eos": False, "max_tokens": 30},
]


@pytest.fixture(scope="module")
def server(tiny_model: Path) -> Iterator[ServerProcess]:
    """20 ms a step, and 2 s of silence are a hang."""
    with ServerProcess(
        [tiny_model], device="null-20ms", timing={"hang": 2.0, "beat": 0.2}
    ) as server:
        yield server


@pytest.fixture(scope="module")
def narrow_server(tiny_model: Path) -> Iterator[ServerProcess]:
    """One sequence at a time, and two requests at most."""
    with ServerProcess(
        [tiny_model], device="null-20ms", plan={"max_sequences": 1}, max_requests=2
    ) as server:
        yield server


def kill_amid(server: ServerProcess, streams: list[Stream], number: int) -> None:
    """Kills the worker as soon as it has brought every stream something new."""
    seen = [len(stream.pieces) for stream in streams]
    wait_until(
        lambda: all(
            len(s.pieces) > before or not s.is_alive()
            for s, before in zip(streams, seen, strict=True)
        )
    )
    server.kill_worker(number)


def test_streams_outlive_killed_workers(server: ServerProcess) -> None:
    server.wait_healthy()
    streams = [Stream(server, **parameters) for parameters in FOUR]
    undisturbed = [stream.finish() for stream in streams]
    assert undisturbed[0][3] == TOKENS
    first = server.worker()
    streams = [Stream(server, **parameters) for parameters in FOUR]
    # First all of them go on together; after the second time they are suspects and run one at
    # a time. The answers are the same.
    for _ in range(2):
        kill_amid(server, streams, signal.SIGSEGV)
    assert [stream.finish() for stream in streams] == undisturbed
    assert server.worker().pid != first.pid


def test_a_request_that_kills_alone_twice_is_given_up(server: ServerProcess) -> None:
    server.wait_healthy()
    stream = Stream(server, messages=say("poison"), max_tokens=500)
    for _ in range(2):
        kill_amid(server, [stream], signal.SIGSEGV)  # SIGKILL would be nobody's fault
    with pytest.raises(openai.APIError, match="died twice"):
        stream.finish()
    # The next request waits for the next worker.
    assert Stream(server, messages=say("fine")).finish()[3] == TOKENS


def test_a_worker_that_hangs_is_replaced(server: ServerProcess) -> None:
    server.wait_healthy()
    expected = Stream(server, messages=say("x"), seed=1).finish()
    stream = Stream(server, messages=say("x"), seed=1)
    wait_until(lambda: len(stream.pieces) > 5)
    frozen = server.worker()
    frozen.send_signal(signal.SIGSTOP)
    assert stream.finish() == expected
    assert not frozen.is_running()


def test_a_worker_that_cannot_start_again_is_given_up(start_server: Start, tmp_path: Path) -> None:
    model = write_tiny_model(tmp_path / "tiny.gguf")
    server = start_server([model], timing={"starts": 2})
    model.write_bytes(b"GGUF, and no more of it")
    server.worker().kill()
    wait_until(lambda: "worker could not be started" in server.health().text, 30)
    begin = time.monotonic()
    answer = server.post("/v1/completions", {"model": server.name, "prompt": "x"})
    assert time.monotonic() - begin < 1
    assert answer.status_code == 503
    assert 0 < int(answer.headers["Retry-After"]) <= 60
    error = answer.json()["error"]
    assert model.name in error["message"]
    assert str(tmp_path) not in error["message"]  # the log has the whole path
    assert error["code"] == "service_unavailable"
    health = server.health()
    assert health.status_code == 503
    assert model.name in health.text
    assert str(tmp_path) not in health.text
    assert server.workers() == []


def test_a_client_that_leaves_frees_the_engine(narrow_server: ServerProcess) -> None:
    server = narrow_server
    body = {"model": server.name, "prompt": "x", "max_tokens": 1500, "ignore_eos": True}
    with server.http.stream("POST", "/v1/completions", json={**body, "stream": True}) as r:
        next(r.iter_lines())
    with pytest.raises(httpx.ReadTimeout):
        server.http.post("/v1/completions", json=body, timeout=0.5)
    begin = time.monotonic()
    answer = server.post("/v1/completions", {**body, "max_tokens": 5})
    assert answer.json()["usage"]["completion_tokens"] == 5
    assert time.monotonic() - begin < 3


def test_a_full_queue_turns_requests_away(narrow_server: ServerProcess) -> None:
    server = narrow_server
    streams = [Stream(server, messages=say("x"), max_tokens=50) for _ in range(2)]
    wait_until(lambda: any(stream.pieces for stream in streams))
    time.sleep(0.2)  # the other one waits in the engine
    answer = server.post("/v1/completions", {"model": server.name, "prompt": "x"})
    assert answer.status_code == 429
    assert int(answer.headers["Retry-After"]) >= 1
    assert answer.json()["error"]["code"] == "queue_full"
    for stream in streams:
        assert stream.finish()[3] == 50
    answer = server.post("/v1/completions", {"model": server.name, "prompt": "x"})
    assert answer.status_code == 200
