"""What one key cannot do to others: take all the room, all the turns, all the connections."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median

import psutil
import pytest
from keyed_server import KeyedServer
from raw_client import RawClient
from server_process import ServerProcess, wait_until
from tiny_model import write_tiny_model

from sartor.serving.intake import KEY_SECONDS_PER_SECOND

TWO = {"bad": {"admin": True}, "good": {}}


@pytest.fixture(scope="module")
def narrow(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[KeyedServer]:
    """Little room for bodies and prompts, and slow steps."""
    with KeyedServer(
        [tiny_model],
        tmp_path_factory.mktemp("narrow"),
        TWO,
        device="null-20ms",
        max_requests=4,
        limits={"bodies_bytes": 4000},
    ) as server:
        yield server


def test_one_key_does_not_fill_the_room_for_bodies(narrow: KeyedServer) -> None:
    with RawClient(narrow.process) as slow:
        slow.send(narrow.head("bad", "/v1/completions", 1900) + b" " * 1800)

        def refused() -> bool:
            answer = narrow.complete("bad", prompt="x" * 400)
            return answer.status_code == 429 and answer.json()["error"]["code"] == "key_share"

        wait_until(refused)
        assert narrow.complete("good", prompt="x" * 400).status_code == 200
        assert 'sartor_held_bytes{key="bad",what="bodies"} 1800.0' in narrow.metrics("bad")
    wait_until(lambda: narrow.complete("bad", prompt="x" * 400).status_code == 200)


def test_one_key_does_not_take_all_prompts(narrow: KeyedServer) -> None:
    answer = narrow.complete("bad", prompt=["x"] * 3)
    assert answer.status_code == 400
    assert "takes 2 unfinished ones of one key" in answer.json()["error"]["message"]
    body = json.dumps({"model": narrow.name, "prompt": ["a", "b"], "max_tokens": 200}).encode()
    with RawClient(narrow.process) as client:
        client.send(narrow.head("bad", "/v1/completions", len(body)) + body)
        wait_until(lambda: 'sartor_unfinished_prompts{key="bad"} 2.0' in narrow.metrics("bad"))
        refused = narrow.complete("bad")
        assert (refused.status_code, refused.headers["retry-after"]) == (429, "1")
        assert "2 of 4 unfinished prompts" in refused.json()["error"]["message"]
        assert narrow.complete("good").status_code == 200
    wait_until(lambda: narrow.complete("bad").status_code == 200)


def test_a_key_by_itself_has_all(tiny_model: Path, tmp_path: Path) -> None:
    with KeyedServer([tiny_model], tmp_path, {"only": {}}, max_requests=4) as server:
        assert server.complete("only", prompt=["x"] * 4).status_code == 200


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Iterator[KeyedServer]:
    """A long context, for prompts that take long to read."""
    folder = tmp_path_factory.mktemp("wide")
    model = write_tiny_model(folder / "wide.gguf", context=2**17)
    with KeyedServer([model], folder, TWO) as server:
        yield server


def long_and_wrong(name: str) -> bytes:
    """A body of 8 MB all of which is tokenised before its last prompt is refused."""
    prompts: list[object] = ["some words and more of them " * 1100] * 250
    return json.dumps({"model": name, "prompt": [*prompts, [10**9]]}).encode()


def test_long_work_of_one_key_holds_nobody_up(wide: KeyedServer) -> None:
    body = long_and_wrong(wide.name)
    assert 7_000_000 < len(body) < 8 * 2**20

    def seconds(chars: int) -> float:
        begin = time.monotonic()
        assert wide.complete("good", prompt="words " * (chars // 6)).status_code == 200
        return time.monotonic() - begin

    alone = {chars: max(seconds(chars) for _ in range(5)) for chars in (100, 10_000, 100_000)}
    clients = [RawClient(wide.process, 120) for _ in range(8)]
    with contextlib.ExitStack() as stack:
        for client in clients:
            stack.enter_context(client)
            # Not all at once: a key has room for so many bodies alone.
            client.send(wide.head("bad", "/v1/completions", len(body)) + body)
        for chars, usual in alone.items():
            # The processor is shared, but nobody waits for a body of the other key.
            assert median(seconds(chars) for _ in range(5)) < 3 * usual + 0.3
        statuses = [client.answer()[0] for client in clients]
    assert set(statuses) <= {400, 429}
    assert 400 in statuses
    spent = [line for line in wide.metrics("bad").splitlines() if "intake_seconds_total{" in line]
    used = {line.split('"')[1]: float(line.split()[-1]) for line in spent}
    assert min(used["bad"], used["good"]) > 0.05


def test_bodies_of_one_key_come_at_a_pace(wide: KeyedServer) -> None:
    body = b'{"model": "none", "prompt": "' + b"x" * 8_000_000 + b'"}'

    def seconds(key: str) -> float:
        begin = time.monotonic()
        with RawClient(wide.process) as client:
            client.send(wide.head(key, "/v1/completions", len(body)) + body)
            assert client.answer()[0] == 404
        return time.monotonic() - begin

    assert wide.complete("good").status_code == 200  # a key that is alone keeps no pace
    assert sum(seconds("bad") for _ in range(4)) > 3 * len(body) / 2**25


def test_reading_for_one_key_has_a_pace(wide: KeyedServer) -> None:
    def spent() -> float:
        lines = [
            line for line in wide.metrics("bad").splitlines() if "intake_seconds_total{" in line
        ]
        return {line.split('"')[1]: float(line.split()[-1]) for line in lines}.get("bad", 0.0)

    before, begin = spent(), time.monotonic()
    with ThreadPoolExecutor(8) as pool:
        assert wide.complete("good").status_code == 200
        for answer in pool.map(
            lambda _: wide.complete("bad", prompt="some words " * 1000, max_tokens=1), range(200)
        ):
            assert answer.status_code == 200
    taken = spent() - before
    # Up to eight may have begun before the first of them was booked.
    assert time.monotonic() - begin > 0.9 * taken * 192 / 200 / KEY_SECONDS_PER_SECOND - 0.5


def test_a_prompt_that_is_far_too_long_is_not_read_to_its_end(wide: KeyedServer) -> None:
    begin = time.monotonic()
    answer = wide.complete("good", prompt="a b " * 1_000_000)
    assert answer.status_code == 400
    message = answer.json()["error"]["message"]
    assert "has at least" in message
    assert "maximum context length is 131072" in message
    assert time.monotonic() - begin < 10
    # Near the limit the count is exact.
    exact = wide.complete("good", prompt="a" * 140_000).json()["error"]["message"]
    assert "has 140000 tokens" in exact


def test_refused_work_counts_against_limits(tiny_model: Path, tmp_path: Path) -> None:
    keys = {
        "thrifty": {"tokens_per_minute": 1000},
        "slow": {"intake_seconds_per_minute": 0.001},
        "free": {},
    }
    with KeyedServer([tiny_model], tmp_path, keys) as server:
        too_long = server.complete("thrifty", prompt="x" * 3000)
        assert too_long.json()["error"]["code"] == "context_length_exceeded"
        after = server.complete("thrifty")
        assert (after.status_code, after.json()["error"]["code"]) == (429, "tokens_per_minute")
        assert int(after.headers["retry-after"]) > 60  # 2000 tokens in debt

        assert server.complete("slow", prompt=["y" * 1500] * 40 + [[10**9]]).status_code == 400
        after = server.complete("slow")
        code = after.json()["error"]["code"]
        assert (after.status_code, code) == (429, "intake_seconds_per_minute")
        assert server.complete("free").status_code == 200


def connect(server: ServerProcess, source: str) -> socket.socket:
    host, port = server.url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), 10, source_address=(source, 0))


def test_one_address_does_not_take_all_connections(tiny_model: Path) -> None:
    with ServerProcess([tiny_model], limits={"connections": 200}) as server:
        with contextlib.ExitStack() as stack:
            for _ in range(100):
                stack.enter_context(connect(server, "127.0.0.2"))
            refused = stack.enter_context(connect(server, "127.0.0.2"))
            data = b"".join(iter(lambda: refused.recv(65536), b""))
            assert data.startswith(b"HTTP/1.1 429 ")
            assert b"100 connections" in data
            with connect(server, "127.0.0.3") as other:
                other.sendall(b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\n\r\n")
                assert other.recv(65536).startswith(b"HTTP/1.1 200 ")

        def free_again() -> bool:
            with connect(server, "127.0.0.2") as again:
                again.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
                return again.recv(65536).startswith(b"HTTP/1.1 200 ")

        wait_until(free_again)


def test_health_is_answered_where_all_connections_are_taken(tiny_model: Path) -> None:
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(ServerProcess([tiny_model], limits={"connections": 4}))
        for _ in range(4):
            stack.enter_context(connect(server, "127.0.0.1"))
        for path, status in (("/health", b"200"), ("/v1/models", b"503")):
            with connect(server, "127.0.0.1") as client:
                client.sendall(f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
                assert client.recv(65536).startswith(b"HTTP/1.1 " + status)
        # Who says nothing does not keep such a place.
        with connect(server, "127.0.0.1") as silent:
            begin = time.monotonic()
            assert silent.recv(65536).startswith(b"HTTP/1.1 503 ")
            assert time.monotonic() - begin < 5


def test_log_probabilities_of_a_whole_answer_are_bounded(narrow: KeyedServer) -> None:
    body = {"n": 64, "logprobs": 20, "max_tokens": 2000}
    refused = narrow.complete("good", **body)
    error = refused.json()["error"]
    assert (refused.status_code, error["code"], error["param"]) == (
        400,
        "limit_exceeded",
        "logprobs",
    )
    assert "2000 tokens x 64 choices x 21" in error["message"]
    assert narrow.complete("good", n=64, logprobs=20, max_tokens=4).status_code == 200


def test_the_largest_answer_goes_where_answers_fill_the_memory(
    tiny_model: Path, tmp_path: Path
) -> None:
    limits = {"answers_bytes": 2_000_000}
    with KeyedServer([tiny_model], tmp_path, TWO, device="null-4ms", limits=limits) as server:
        found: list[int] = []
        large = {"n": 32, "logprobs": 20, "max_tokens": 200, "ignore_eos": True, "seed": 1}

        def ask() -> None:
            answer = server.complete("bad", **large)
            found.append(answer.status_code)
            assert answer.json()["error"]["code"] == "answers_full"

        thread = threading.Thread(target=ask)
        thread.start()
        small = [
            server.complete("good", max_tokens=50, logprobs=5, ignore_eos=True).status_code
            for _ in range(5)
        ]
        thread.join(60)
        assert found == [503]
        assert small == [200] * 5
        wait_until(lambda: 'held_bytes{key="bad",what="answers"} 0.0' in server.metrics("bad"))


def test_memory_of_the_gateway_is_bounded(tiny_model: Path, tmp_path: Path) -> None:
    """Legal requests that make it keep as much as they can: answers with log probabilities."""
    room = 32 * 2**20
    limits = {"answers_bytes": room}
    with KeyedServer([tiny_model], tmp_path, TWO, limits=limits) as server:
        process = psutil.Process(server.process.process.pid)
        server.complete("bad", n=8, logprobs=20, max_tokens=20)
        before = process.memory_info().rss
        peak = [before]
        over = threading.Event()

        def watch() -> None:
            while not over.wait(0.02):
                peak[0] = max(peak[0], process.memory_info().rss)

        watcher = threading.Thread(target=watch)
        watcher.start()
        body = {"n": 16, "logprobs": 20, "max_tokens": 500, "ignore_eos": True}
        with KeyedClients(server, body, 4) as statuses:
            pass
        over.set()
        watcher.join()
        assert set(statuses) <= {200, 503}
        # What waits, the same once more while it is put together and sent, and what the
        # allocator keeps.
        assert peak[0] - before < 4 * room


class KeyedClients:
    """Asks the same of a server several times at once, with the key "bad"."""

    def __init__(self, server: KeyedServer, body: dict[str, object], count: int) -> None:
        self._statuses: list[int] = []

        def ask() -> None:
            self._statuses.append(server.complete("bad", **body).status_code)

        self._threads = [threading.Thread(target=ask) for _ in range(count)]

    def __enter__(self) -> list[int]:
        for thread in self._threads:
            thread.start()
        return self._statuses

    def __exit__(self, *_: object) -> None:
        for thread in self._threads:
            thread.join(120)
