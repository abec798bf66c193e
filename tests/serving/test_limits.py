"""Every limit has an answer that names it, and an end."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from raw_client import RawClient
from server_process import ServerProcess, wait_until

from sartor.errors import UsageError
from sartor.serving.limits import ServerLimits

LIMITS = {
    "body_bytes": 200_000,
    "body_seconds": 1.0,
    "head_seconds": 1.0,
    "idle_seconds": 1.0,
    "connections": 8,
    "json_depth": 10,
    "json_values": 5000,
    "prompt_tokens": 300,
    "chars_per_token": 4,
    "max_tokens": 50,
    "messages": 4,
    "prompts": 3,
    "choices": 5,
    "sequences": 8,
    "stop_strings": 2,
    "stop_chars": 10,
    "logit_biases": 3,
    "request_seconds": 1.0,
}


@pytest.fixture(scope="module")
def strict(tiny_model: Path) -> Iterator[ServerProcess]:
    with ServerProcess([tiny_model], device="null-20ms", limits=LIMITS) as server:
        yield server


@pytest.fixture(scope="module")
def small(tiny_model: Path) -> Iterator[ServerProcess]:
    """Takes 2000 bytes of bodies at once, and 100 ms a step."""
    with ServerProcess(
        [tiny_model], device="null-100ms", limits={"bodies_bytes": 2000, "body_seconds": 2.0}
    ) as server:
        yield server


MESSAGE = {"role": "user", "content": "x"}


@pytest.mark.parametrize(
    ("body", "param", "number"),
    [
        ({"prompt": "x", "n": 6}, "n", 5),
        ({"prompt": "x", "max_tokens": 51}, "max_tokens", 50),
        ({"messages": [MESSAGE], "max_completion_tokens": 51}, "max_completion_tokens", 50),
        ({"messages": [MESSAGE] * 5}, "messages", 4),
        ({"prompt": ["x"] * 4}, "prompt", 3),
        ({"prompt": ["x"] * 3, "n": 3}, "prompt", 8),
        ({"prompt": "x" * 301}, "prompt", 300),
        ({"prompt": [120] * 301}, "prompt", 300),
        ({"prompt": "x" * 1201}, "prompt", 300),
        ({"messages": [{"role": "user", "content": "x" * 301}]}, "messages", 300),
        ({"prompt": "x", "stop": ["a", "b", "c"]}, "stop", 2),
        ({"prompt": "x", "stop": "y" * 11}, "stop", 10),
        ({"prompt": "x", "stop": ["a", "y" * 11]}, "stop[1]", 10),
        ({"prompt": "x", "logit_bias": {str(i): 0 for i in range(4)}}, "logit_bias", 3),
        ({"prompt": [1] * 5001}, None, 5000),
        ({"prompt": "x", "metadata": {"a": [[[[[[[[[[1]]]]]]]]]]}}, None, 10),
    ],
)
def test_limits_are_named(
    strict: ServerProcess, body: dict[str, Any], param: str | None, number: int
) -> None:
    path = "/v1/chat/completions" if "messages" in body else "/v1/completions"
    response = strict.post(path, {"model": strict.name, **body})
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["param"] == param
    assert error["code"] in ("limit_exceeded", "context_length_exceeded")
    assert str(number) in error["message"]


@pytest.mark.parametrize(
    "body",
    [
        {"prompt": "x", "n": 5, "max_tokens": 1},
        {"prompt": ["x"] * 2, "n": 4, "max_tokens": 1},
        {"prompt": "x" * 300, "max_tokens": 1},
        {"prompt": "x", "max_tokens": 1, "stop": ["y" * 10, "b"]},
        {"prompt": "x", "max_tokens": 1, "logit_bias": {str(i): 0 for i in range(3)}},
        {"prompt": "[{" * 100 + '\\"', "max_tokens": 1},
        {"prompt": "x", "max_tokens": 1, "metadata": {"a": [[[[[[[[1]]]]]]]]}},
        {"messages": [MESSAGE] * 4, "max_tokens": 1},
    ],
)
def test_what_is_just_within_goes_through(strict: ServerProcess, body: dict[str, Any]) -> None:
    path = "/v1/chat/completions" if "messages" in body else "/v1/completions"
    response = strict.post(path, {"model": strict.name, **body})
    assert response.status_code == 200, response.text


def test_an_answer_without_a_length_gets_the_limit(strict: ServerProcess) -> None:
    body = {"model": strict.name, "messages": [MESSAGE], "ignore_eos": True}
    response = strict.post("/v1/chat/completions", body)
    # 50 steps of 20 ms are the limit of time, too: whichever comes first is an answer.
    if response.status_code == 200:
        assert response.json()["usage"]["completion_tokens"] == 50
    else:
        assert response.status_code == 504


def test_a_body_that_is_too_long(strict: ServerProcess) -> None:
    response = strict.http.post("/v1/completions", content=b" " * 200_001)
    assert response.status_code == 413
    assert response.json()["error"]["code"] == "body_too_large"
    assert "200000" in response.json()["error"]["message"]
    with RawClient(strict) as client:
        status, error = client.send(
            b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: "
            + b"9" * 18
            + b"\r\n\r\n"
        ).answer()
        assert (status, error["error"]["code"]) == (413, "body_too_large")


def test_requests_about_the_server_are_short(strict: ServerProcess) -> None:
    body = b'{"lora_name": "' + b"a" * 70_000 + b'"}'
    assert strict.http.post("/v1/unload_lora_adapter", content=body).status_code == 413


def ends_in_time(seconds: float) -> None:
    """A limit of one second, half a second between two looks, and a slow machine."""
    assert 0.9 <= seconds < 6


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/unload_lora_adapter"])
def test_a_body_that_comes_slowly(strict: ServerProcess, path: str) -> None:
    with RawClient(strict) as client:
        client.send(
            f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 999\r\n\r\n".encode()
        )
        ends_in_time(client.drip(b" ", 0.1, 20))
        status, error = client.answer()
        assert (status, error["error"]["code"]) == (408, "body_timeout")


def test_a_chunked_body_without_end(strict: ServerProcess) -> None:
    with RawClient(strict) as client:
        client.send(
            b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
        )
        ends_in_time(client.drip(b"1\r\n \r\n", 0.05, 20))
        assert client.received.startswith(b"HTTP/1.1 408 ")


def test_a_head_that_comes_slowly(strict: ServerProcess) -> None:
    with RawClient(strict) as client:
        client.send(b"GET /health HTTP/1.1\r\n")
        ends_in_time(client.drip(b"X-A: b\r\n", 0.1, 20))
        status, error = client.answer()
        assert (status, error["error"]["code"]) == (408, "head_timeout")


def test_a_second_head_that_comes_slowly(strict: ServerProcess) -> None:
    with RawClient(strict) as client:
        assert client.send(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n").answer()[0] == 200
        client.send(b"GET /health HTTP/1.1\r\n")
        ends_in_time(client.drip(b"X-A: b\r\n", 0.1, 20))


def test_the_rest_of_a_body_that_nobody_reads(strict: ServerProcess) -> None:
    with RawClient(strict) as client:
        client.send(
            b"POST /nowhere HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
        )
        assert client.answer()[0] == 404
        ends_in_time(client.drip(b"1\r\n \r\n", 0.05, 20))


@pytest.mark.parametrize("first", [b"", b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"])
def test_an_idle_connection_ends(strict: ServerProcess, first: bytes) -> None:
    with RawClient(strict) as client:
        begin = time.monotonic()
        client.send(first).read_to_end()
        ends_in_time(time.monotonic() - begin)


def test_connections_have_a_number(strict: ServerProcess) -> None:
    clients = [RawClient(strict) for _ in range(LIMITS["connections"] + 4)]  # type: ignore[operator]
    try:
        refused = clients[-1].read_to_end()
        assert refused.startswith(b"HTTP/1.1 503 ")
        assert b"retry-after: 1" in refused.lower()
        assert b"connections" in refused
    finally:
        for client in clients:
            client.socket.close()
    wait_until(lambda: RawClient(strict).post(b"{}").answer()[0] == 400)


def test_all_bodies_together_have_room(small: ServerProcess) -> None:
    body = json.dumps({"model": small.name, "prompt": "x" * 1200, "max_tokens": 1}).encode()
    with RawClient(small) as slow, RawClient(small) as second:
        slow.send(
            b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1500\r\n\r\n"
        )
        slow.send(b" " * 1200)

        def refused() -> bool:
            status, answer = second.post(body).answer()
            return status == 503 and "receiving" in answer["error"]["message"]

        wait_until(refused)
        assert slow.answer()[0] == 408
        assert second.post(body).answer()[0] == 200, "what was held is given back"


def test_a_whole_answer_that_takes_too_long(strict: ServerProcess) -> None:
    body = {"model": strict.name, "prompt": ["a", "b"], "max_tokens": 50, "ignore_eos": True}
    begin = time.monotonic()
    response = strict.post("/v1/completions", {**body, "n": 4})
    if response.status_code == 200:  # 50 steps of 20 ms may just have been quick enough
        assert time.monotonic() - begin < 1.5
        return
    assert response.status_code == 504
    assert response.json()["error"]["code"] == "request_timeout"


def test_a_stream_that_takes_too_long(tiny_model: Path, start_server: Any) -> None:
    server = start_server(device="null-100ms", limits={"request_seconds": 1.0})
    body = {"model": server.name, "prompt": "x", "max_tokens": 500, "ignore_eos": True}
    begin = time.monotonic()
    whole = server.post("/v1/completions", body)
    ends_in_time(time.monotonic() - begin)
    assert whole.status_code == 504
    assert whole.json()["error"]["code"] == "request_timeout"
    stream = server.post("/v1/completions", {**body, "stream": True})
    assert stream.status_code == 200
    *events, error, done, end = stream.text.split("\n\n")
    assert (done, end) == ("data: [DONE]", "")
    assert len(events) >= 2, "what there was has been sent"
    assert json.loads(error.removeprefix("data: "))["error"]["code"] == "request_timeout"
    assert server.post("/v1/completions", {**body, "max_tokens": 2}).status_code == 200


def test_limits_must_make_sense() -> None:
    for wrong in ({"body_bytes": 0}, {"max_tokens": -1}, {"body_seconds": float("nan")}):
        with pytest.raises(UsageError, match=next(iter(wrong))):
            ServerLimits(**wrong)  # type: ignore[arg-type]


def test_no_answer_waits_for_an_acknowledgement(strict: ServerProcess) -> None:
    """40 ms, where a socket holds back small writes until the client has confirmed the last."""
    times = []
    with RawClient(strict) as client:
        for _ in range(60):
            begin = time.monotonic()
            client.send(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n").answer()
            times.append(time.monotonic() - begin)
    assert sorted(times)[30] < 0.035
