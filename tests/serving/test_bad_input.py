"""Whatever comes in, the answer is a 4xx that says why, soon, and nobody else notices."""

from __future__ import annotations

import asyncio
import itertools
import json
import random
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from raw_client import RawClient
from server_process import ServerProcess, wait_until
from tiny_model import write_tiny_model

from sartor.plan import ExecutionPlan
from sartor.serving.errors import ApiError
from sartor.serving.frontend import open_served_model
from sartor.serving.intake_process import IntakeProcess
from sartor.serving.limits import ServerLimits
from sartor.serving.openai_types import CompletionRequest
from sartor.serving.prepare import View, prepare

MEGA = 2**20
BIG = 8 * MEGA - 1024


def repeated(piece: str, size: int = BIG) -> str:
    return ",".join([piece] * (size // (len(piece) + 1)))


COMPLETION = '{"model": "%s", "prompt": "a", %s}'
CHAT = '{"model": "%s", "messages": [%s]}'
MESSAGE = '{"role": "user", "content": "x"}'

BODIES: dict[str, tuple[str, str]] = {
    "stop strings of a megabyte": (COMPLETION, '"stop": [' + repeated('"ab"', MEGA) + "]"),
    "one stop string of a megabyte": (COMPLETION, '"stop": "' + "a" * MEGA + '"'),
    "NaN": (COMPLETION, '"temperature": NaN'),
    "Infinity": (COMPLETION, '"temperature": Infinity'),
    "-Infinity": (COMPLETION, '"top_p": -Infinity'),
    "a number without end": (COMPLETION, '"temperature": 1e400'),
    "an integer of 5000 digits": (COMPLETION, '"seed": ' + "9" * 5000),
    "an integer of a million digits": (COMPLETION, '"max_tokens": ' + "9" * MEGA),
    "a huge n": (COMPLETION, '"n": 9223372036854775807'),
    "a float n": (COMPLETION, '"n": 1.5'),
    "a true n": (COMPLETION, '"n": true'),
    "depth": (COMPLETION, '"metadata": ' + "[" * 100_000 + "]" * 100_000),
    "depth of objects": (COMPLETION, '"metadata": ' + '{"a":' * 100_000 + "1" + "}" * 100_000),
    "depth without end": (COMPLETION, "[" * MEGA),
    "a lone surrogate": (COMPLETION, '"stop": "\\ud800"'),
    "a lone surrogate in a key": (COMPLETION, '"\\udfff": 1'),
    "many unknown parameters": (COMPLETION, ",".join(f'"x{i}": 1' for i in range(300_000))),
    "many biases": (
        COMPLETION,
        '"logit_bias": {' + ",".join(f'"{i}":1' for i in range(10**5)) + "}",
    ),
    "a long name": (COMPLETION, '"' + "n" * MEGA + '": 1'),
    "many wrong messages": (CHAT, repeated('{"a":1}')),
    "many messages": (CHAT, repeated(MESSAGE)),
    "no message": (CHAT, ""),
    "a message that is none": (CHAT, "null"),
    "a long role": (CHAT, '{"role": "' + "r" * MEGA + '"}'),
    "a message of many unknown fields": (
        CHAT,
        '{"role": "user", ' + ",".join(f'"x{i}": 1' for i in range(300_000)) + "}",
    ),
    "a text of megabytes": (CHAT, '{"role": "user", "content": "' + "word " * (BIG // 5) + '"}'),
    "a letter of megabytes": (CHAT, '{"role": "user", "content": "' + "a" * BIG + '"}'),
    "parts of megabytes": (CHAT, '{"role": "user", "content": [' + repeated("{}") + "]}"),
    "numbers for prompts": ('{"model": "%s", "prompt": [%s]}', repeated("1.5")),
    "ids without end": ('{"model": "%s", "prompt": [%s]}', repeated("1")),
    "prompts without end": ('{"model": "%s", "prompt": [%s]}', repeated('"a"')),
    "mixed prompts": ('{"model": "%s", "prompt": [%s]}', '1, "a", [1]'),
}


@pytest.mark.parametrize("name", BODIES)
def test_bad_bodies(api_server: ServerProcess, name: str) -> None:
    form, content = BODIES[name]
    body = (form % (api_server.name, content)).encode("utf-8")[: 8 * MEGA]
    path = "/v1/chat/completions" if form is CHAT else "/v1/completions"
    response = api_server.http.post(path, content=body)
    assert 400 <= response.status_code < 500, response.text
    error = response.json()["error"]
    assert error["message"]
    assert len(response.content) < 2000, "an error repeats no megabytes"


@pytest.mark.parametrize(
    "raw",
    [
        b'{"model": "\xff\xfe"}',
        b'{"model": "\xed\xa0\x80"}',  # a surrogate in UTF-8
        b"\xef\xbb\xbf{}",  # a byte order mark
        b"\x00",
        b"{}{}",
        b'{"model": "a\x00b"}',
        "{}".encode("utf-16"),
        b"null",
        b'"a"',
        b"1e400",
        b"-",
        b'{"model": "m", "prompt": "a",}',
        b"{'model': 'm'}",
        b"",
        b" " * MEGA,
        b'"' * MEGA,
        b'"\\' * MEGA,
        b",:" * MEGA,
        b"{}" + b"}" * MEGA,
    ],
    ids=lambda raw: repr(raw[:12]),
)
def test_bad_bytes(api_server: ServerProcess, raw: bytes) -> None:
    for path in ("/v1/completions", "/v1/chat/completions", "/v1/embeddings"):
        response = api_server.http.post(path, content=raw)
        assert response.status_code == 400, response.text
        assert response.json()["error"]["message"]


def test_text_that_is_only_odd_is_an_answer(api_server: ServerProcess) -> None:
    for text in ("\0", "a\0b", "\ufeff", "\u202e", "é" * 100, "\U0001f9f5", " ", "\r\n"):
        body = {"model": api_server.name, "prompt": text, "max_tokens": 1}
        assert api_server.post("/v1/completions", body).status_code == 200, repr(text)
        messages = [{"role": "user", "content": text}]
        body = {"model": api_server.name, "messages": messages, "max_tokens": 1}
        assert api_server.post("/v1/chat/completions", body).status_code == 200, repr(text)
    for content in ("", None, []):
        messages = [{"role": "user", "content": content}]
        body = {"model": api_server.name, "messages": messages, "max_tokens": 1}
        assert api_server.post("/v1/chat/completions", body).status_code == 200


def test_of_two_equal_keys_the_last_one_counts(api_server: ServerProcess) -> None:
    """As in Python, JavaScript and the OpenAI API; RFC 8259 leaves it open."""
    raw = '{"model": "x", "prompt": "a", "max_tokens": 3, "max_tokens": 1, "model": "%s"}'
    response = api_server.http.post("/v1/completions", content=raw % api_server.name)
    assert response.status_code == 200
    assert response.json()["usage"]["completion_tokens"] == 1


@pytest.mark.parametrize(
    ("content_type", "status"),
    [
        ("application/json", 200),
        ("APPLICATION/JSON", 200),
        ("application/json; charset=utf-8", 200),
        ("application/json;charset=latin-1", 200),  # RFC 8259: JSON is UTF-8, whatever is said
        ("application/vnd.api+json", 200),
        ("application/x-www-form-urlencoded", 415),
        ("text/plain", 415),
        ("multipart/form-data; boundary=x", 415),
        ("application/jsonp", 415),
        ("", 415),
        ("x" * 5000, 415),
    ],
)
def test_content_types(api_server: ServerProcess, content_type: str, status: int) -> None:
    body = {"model": api_server.name, "prompt": "x", "max_tokens": 1}
    response = api_server.http.post(
        "/v1/completions", content=json.dumps(body), headers={"content-type": content_type}
    )
    assert response.status_code == status, response.text
    assert len(response.content) < 2000


@pytest.mark.parametrize("method", ["OPTIONS", "PUT", "DELETE", "PATCH", "TRACE", "BREW"])
def test_other_methods(api_server: ServerProcess, method: str) -> None:
    for path in ("/v1/completions", "/v1/models", "/health"):
        response = api_server.http.request(method, path)
        assert response.status_code == 405
        allowed = "POST" if path == "/v1/completions" else "GET, HEAD"
        assert response.headers["allow"] == allowed
        assert response.json()["error"]["message"].endswith(f"at {path}; use {allowed}")


@pytest.mark.parametrize(
    ("head", "status"),
    [
        (b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + b"a" * 300_000, 431),
        (b"GET /" + b"a" * 300_000, 431),
        (b"GET /" + b"a" * 10_000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n", 404),
        (b"GET / HTTP/1.1\r\n" + b"X: a\r\n" * 60_000, 431),
        (b"GET / HTTP/1.1\r\n\r\n", 400),  # no host
        (b"GET / HTTP/1.1\r\nHost: localhost\r\nHost: y\r\n\r\n", 400),
        (b"GET / HTTP/9.9\r\nHost: localhost\r\n\r\n", 404),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", 400),  # TLS
        (b"\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: localhost\r\nBad Name: a\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: localhost\r\nX: a\0b\r\n\r\n", 400),
        (b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: -1\r\n\r\n", 400),
        (b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1, 2\r\n\r\n", 400),
        (
            b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 3\r\n"
            b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
            400,
        ),
        (
            b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: gzip\r\n\r\n",
            501,
        ),
        (
            b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
            400,
        ),
        (b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\nAuthorization: \xff\xfe\r\n\r\n", 200),
        (b"GET /v1/models/%ff%00%2f HTTP/1.1\r\nHost: localhost\r\n\r\n", 404),
        (b"GET http://other/health HTTP/1.1\r\nHost: localhost\r\n\r\n", 200),
        (
            b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n",
            200,
        ),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 404),
    ],
)
def test_odd_heads(api_server: ServerProcess, head: bytes, status: int) -> None:
    with RawClient(api_server) as client:
        found, body = client.send(head).answer()
    assert found == status, body
    assert len(json.dumps(body)) < 2000
    if status >= 400:
        assert body["error"]["message"]


def test_pipelined_requests_are_answered_in_order(api_server: ServerProcess) -> None:
    def request(tokens: int) -> bytes:
        body = json.dumps({"model": api_server.name, "prompt": "x", "max_tokens": tokens}).encode()
        return (
            b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n"
            % len(body)
            + body
        )

    with RawClient(api_server) as client:
        client.send(
            b"".join(request(n) for n in (3, 1, 2))
            + b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
        )
        counts = [client.answer()[1]["usage"]["completion_tokens"] for _ in range(3)]
        assert counts == [3, 1, 2]
        assert client.answer()[1]["status"] == "ok"


def test_a_client_that_waits_to_be_told_to_go_on(api_server: ServerProcess) -> None:
    with RawClient(api_server) as client:
        client.send(
            b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 2\r\n"
            b"Expect: 100-continue\r\n\r\n"
        )
        assert client.socket.recv(100).startswith(b"HTTP/1.1 100 ")
        assert client.send(b"{}").answer()[0] == 400


def test_random_bytes_are_answered_or_cut_off(api_server: ServerProcess) -> None:
    rng = random.Random(1)
    for _ in range(50):
        with RawClient(api_server) as client:
            client.send(rng.randbytes(rng.randrange(1, 400)) + b"\r\n\r\n\r\n")
            received = client.read_to_end()
        assert received.startswith((b"HTTP/1.1 400 ", b"HTTP/1.1 431 ")), received
    assert api_server.health().status_code == 200


def test_errors_are_as_the_client_expects_after_megabytes(api_server: ServerProcess) -> None:
    """Whoever sends too much can still read why: the connection is not torn down meanwhile."""
    response = httpx.post(
        f"{api_server.url}/v1/completions", content=b" " * (12 * MEGA), timeout=20, verify=False
    )
    assert response.status_code == 413


@pytest.fixture(scope="module")
def paced(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    path = write_tiny_model(tmp_path_factory.mktemp("paced") / "tiny.gguf")
    with ServerProcess([path], device="null-20ms") as server:
        yield server


@pytest.mark.parametrize(
    "name", ["a text of megabytes", "numbers for prompts", "many wrong messages", "ids without end"]
)
def test_streams_keep_their_pace(paced: ServerProcess, name: str) -> None:
    """`benchmarks/pace_under_attack.py` prints the numbers; here they are only bounded."""
    form, content = BODIES[name]
    path = "/v1/chat/completions" if form is CHAT else "/v1/completions"
    body = (form % (paced.name, content)).encode()
    stop, codes = threading.Event(), set()

    def attack() -> None:
        with httpx.Client(base_url=paced.url, verify=False, timeout=60) as http:
            while not stop.is_set():
                codes.add(http.post(path, content=body).status_code)

    request = {"model": paced.name, "prompt": "x", "stream": True, "ignore_eos": True}
    thread = threading.Thread(target=attack)
    arrivals = []
    with paced.http.stream(
        "POST", "/v1/completions", json={**request, "max_tokens": 150}
    ) as stream:
        for index, _ in enumerate(stream.iter_raw()):
            arrivals.append(time.monotonic())
            if index == 10:
                thread.start()
    stop.set()
    thread.join()
    assert codes == {400}
    gaps = sorted(b - a for a, b in itertools.pairwise(arrivals))
    # A step takes 20 ms. Parsed on the loop, one of these bodies would hold it for seconds.
    assert gaps[len(gaps) // 2] < 0.06
    assert gaps[-1] < 0.5


def intake(path: Path, **more: float) -> tuple[IntakeProcess, dict[str, Any]]:
    model = open_served_model("m", path, ExecutionPlan())
    return IntakeProcess({"m": model}, **more), {"m": model}


BODY = json.dumps(
    {"model": "m", "prompt": ["hello", "x"], "echo": True, "n": 2, "seed": 4}
).encode()
VIEW = View(ServerLimits())


def test_far_and_near_give_the_same(tiny_model: Path) -> None:
    process, models = intake(tiny_model)

    async def run() -> None:
        far = await process.prepare(CompletionRequest, BODY, VIEW)
        assert far == prepare(CompletionRequest, BODY, models, VIEW)
        near: ApiError | None = None
        for wrong in (b"[", b'{"model": "other", "prompt": "x"}', b'{"model": "m", "prompt": ""}'):
            try:
                prepare(CompletionRequest, wrong, models, VIEW)
            except ApiError as error:
                near = error
            with pytest.raises(ApiError) as found:
                await process.prepare(CompletionRequest, wrong, VIEW)
            assert near is not None
            assert vars(found.value) == vars(near)
        await process.close()

    asyncio.run(run())


def test_what_changes_of_a_model_reaches_the_process(tiny_model: Path) -> None:
    process, models = intake(tiny_model)

    async def run() -> None:
        await process.prepare(CompletionRequest, BODY, VIEW)
        models["m"].aliases = frozenset({"alias"})
        models["m"].context_length = 8
        body = b'{"model": "alias", "prompt": "%s"}'
        assert (await process.prepare(CompletionRequest, body % b"x", VIEW)).model == "m"
        with pytest.raises(ApiError, match="8 tokens"):
            await process.prepare(CompletionRequest, body % b"xxxxxxxxxx", VIEW)
        await process.close()

    asyncio.run(run())


def test_the_process_ends_when_idle_and_comes_back(tiny_model: Path) -> None:
    process, _ = intake(tiny_model, idle_seconds=0.05)

    async def run() -> None:
        await process.prepare(CompletionRequest, BODY, VIEW)
        first = process.pid
        assert first is not None
        while process.pid is not None or psutil.pid_exists(first):
            await asyncio.sleep(0.02)
        await process.prepare(CompletionRequest, BODY, VIEW)
        assert process.pid not in (None, first)
        await process.close()

    asyncio.run(asyncio.wait_for(run(), 30))


def test_one_request_that_takes_too_long_is_the_only_one(tiny_model: Path) -> None:
    process, _ = intake(tiny_model, work_seconds=0.0)

    async def run() -> None:
        with pytest.raises(ApiError, match="could not be read in 0 s"):
            await process.prepare(CompletionRequest, BODY, VIEW)
        assert process.pid is None
        process._work_seconds = 30.0
        assert (await process.prepare(CompletionRequest, BODY, VIEW)).model == "m"
        await process.close()

    asyncio.run(run())


def test_a_dead_process_is_replaced(tiny_model: Path) -> None:
    process, _ = intake(tiny_model)

    async def run() -> None:
        await process.prepare(CompletionRequest, BODY, VIEW)
        assert process.pid is not None
        psutil.Process(process.pid).kill()
        with pytest.raises(ApiError) as error:
            await process.prepare(CompletionRequest, BODY, VIEW)
        assert (error.value.status, error.value.retry_after) == (503, 1)
        assert (await process.prepare(CompletionRequest, BODY, VIEW)).model == "m"
        await process.close()

    asyncio.run(run())


def test_long_requests_are_answered_like_short_ones(api_server: ServerProcess) -> None:
    """Through the process, with a body that is long for what does not count."""
    short = {"model": api_server.name, "prompt": "hello", "max_tokens": 5, "seed": 3}
    long = {**short, "metadata": {"a": "b" * 200_000}}
    texts = [api_server.post("/v1/completions", body).json()["choices"] for body in (short, long)]
    assert texts[0] == texts[1]
    children = psutil.Process(api_server.process.pid).children()
    assert any("sartor.serving.intake_process" in child.cmdline() for child in children)
    wait_until(lambda: api_server.health().status_code == 200)
