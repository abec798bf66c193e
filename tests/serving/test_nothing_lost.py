"""Workers that are killed from outside, at the worst moments: every answer is still whole."""

from __future__ import annotations

import contextlib
import random
import signal
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from reading import Choice, Reading
from server_process import ServerProcess, kill_hard, wait_until

Start = Callable[..., ServerProcess]

KINDS: list[dict[str, Any]] = [
    {"prompt": "greedy", "temperature": 0},
    {"prompt": "sampled", "logprobs": 3},
    {"prompt": "many", "n": 3, "presence_penalty": 1, "stop": ["e", "?", "ab"]},
    {"messages": [{"role": "user", "content": "a chat"}], "logprobs": True, "top_logprobs": 2},
]
SIXTEEN = [{**KINDS[i % 4], "seed": i, "max_tokens": 40 + i} for i in range(16)]


@pytest.fixture(scope="module", params=["null", "reference", "cpu"])
def server(request: pytest.FixtureRequest, tiny_model: Path) -> Iterator[ServerProcess]:
    if request.param == "cpu":
        pytest.importorskip("sartor.backends.cpu._native")
    device = "null-20ms" if request.param == "null" else request.param
    with ServerProcess([tiny_model], backend=request.param, device=device) as server:
        yield server


@pytest.fixture(scope="module")
def slow_server(tiny_model: Path) -> Iterator[ServerProcess]:
    """32 tokens in 20 ms: a prompt of 1,900 takes over a second."""
    plan = {"max_batch_tokens": 32, "max_sequences": 32}
    with ServerProcess([tiny_model], device="null-20ms", plan=plan) as server:
        yield server


def test_sixteen_streams_do_not_notice(server: ServerProcess) -> None:
    def answers(readings: list[Reading]) -> list[tuple[dict[int, Choice], int]]:
        found = [reading.whole() for reading in readings]
        if server.backend == "reference":
            # Its sums depend on what else is in the batch, in the last digit of a logprob.
            for choice in (choice for choices, _ in found for choice in choices.values()):
                choice.logprobs = [None] * len(choice.logprobs)
        return found

    undisturbed = answers([Reading(server, **body) for body in SIXTEEN])
    assert any(c.logprobs for choices, _ in undisturbed for c in choices.values())
    assert {c.finish_reason for choices, _ in undisturbed for c in choices.values()} == {
        "stop",
        "length",
    }
    readings = [Reading(server, **body) for body in SIXTEEN]
    wait_until(lambda: all(r.pieces > 3 or not r.is_alive() for r in readings))
    server.kill_worker()
    assert answers(readings) == undisturbed


def test_kill_after_kill_at_any_moment(server: ServerProcess) -> None:
    # On a fast processor short answers of so small a model are over before anybody is killed.
    tokens = 1500 if server.backend == "cpu" else 300
    bodies = [{"prompt": f"a story {i}", "seed": i, "max_tokens": tokens} for i in range(16)]
    undisturbed = [reading.whole() for reading in [Reading(server, **body) for body in bodies]]
    rng = random.Random(0)
    readings = [Reading(server, **body) for body in bodies]
    kills = 0
    for _ in range(4):
        # Amid the prompts, the first tokens, or any later ones.
        wait_for_pieces(readings, rng.choice((0, 1, 16, 200)))
        kills += alive(readings)
        server.kill_worker()
    assert [reading.whole() for reading in readings] == undisturbed
    assert kills > 1, "the answers were over before they could be disturbed"


def wait_for_pieces(readings: list[Reading], more: int) -> None:
    enough = sum(reading.pieces for reading in readings) + more
    wait_until(lambda: sum(r.pieces for r in readings) >= enough or not alive(readings), 30)


def alive(readings: list[Reading]) -> bool:
    return any(reading.is_alive() for reading in readings)


def test_kills_amid_a_long_prefill_give_nobody_up(slow_server: ServerProcess) -> None:
    server = slow_server
    long = {"prompt": "long " * 380, "seed": 1, "max_tokens": 10}
    short = [{"prompt": f"short {i}", "seed": i, "max_tokens": 10} for i in range(5)]
    expected = Reading(server, **long).whole()
    others_expected = [Reading(server, **body).whole() for body in short]
    # Of another salt, so that what is cached does not make the prompt short.
    reading = Reading(server, **long, cache_salt="other")
    wait_until(lambda: in_flight(server) == 1)
    others = []
    for body in short:  # the kills after the first hit replays that have not come to a token
        assert reading.pieces == 0
        server.kill_worker()
        others.append(Reading(server, **body))
    assert reading.whole() == expected
    assert [other.whole() for other in others] == others_expected


def in_flight(server: ServerProcess) -> int:
    lines = server.http.get("/metrics").text.splitlines()
    return sum(
        int(float(line.split()[-1]))
        for line in lines
        if line.startswith("sartor_requests_in_flight{")
    )


def test_kills_while_the_first_workers_load(start_server: Start) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    server = start_server(wait=False, port=port, timing={"delay": 0.01, "starts": 2})
    server.url = f"http://127.0.0.1:{port}"
    wait_until(lambda: listens(port), 30)
    readings = [Reading(server, prompt=f"early {i}", seed=i) for i in range(4)]
    dead: set[int] = set()

    def next_worker() -> psutil.Process | None:
        found = [w for w in server.workers() if w.pid not in dead]
        return found[0] if found else None

    for _ in range(4):  # twice as many as failed starts are forgiven
        wait_until(lambda: next_worker() is not None)
        worker = next_worker()
        assert worker is not None
        dead.add(worker.pid)
        kill_hard(worker)
    early = [reading.whole() for reading in readings]
    assert early == [Reading(server, prompt=f"early {i}", seed=i).whole() for i in range(4)]


def listens(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
        return True
    return False


def test_a_worker_that_cannot_start_says_why_and_is_tried_again(
    start_server: Start, tiny_model: Path, tmp_path: Path
) -> None:
    model = tmp_path / "model.gguf"
    model.write_bytes(tiny_model.read_bytes())
    server = start_server([model], device="null-20ms", timing={"starts": 2, "retry": 1.0})
    expected = Reading(server, prompt="x", seed=1).whole()
    reading = Reading(server, prompt="x", seed=1)
    wait_until(lambda: reading.pieces > 3)
    model.rename(tmp_path / "away")
    server.worker().send_signal(signal.SIGSEGV)
    reading.join(30)
    assert reading.problem["code"] == "service_unavailable"
    assert "model.gguf" in reading.problem["message"]
    health = server.health()
    assert (health.status_code, health.json()["status"]) == (503, "failed")
    assert "model.gguf" in health.text
    (tmp_path / "away").rename(model)
    refused = 0

    def answered() -> bool:
        nonlocal refused
        status = server.post("/v1/completions", {"model": server.name, "prompt": "x"}).status_code
        refused += status == 503
        return status == 200

    wait_until(answered, 30)
    assert Reading(server, prompt="x", seed=1).whole() == expected
