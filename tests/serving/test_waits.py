from __future__ import annotations

import threading
from collections.abc import Callable

import httpx
import pytest
from server_process import ServerProcess, wait_until

from sartor.serving.waits import Waits


def started(count: int, every: float, queue: int, begin: float = 100.0) -> tuple[Waits, float]:
    """``count`` requests have begun, one each ``every`` seconds; ``queue`` others still wait."""
    waits = Waits()
    for i in range(count + queue):
        waits.arrived(str(i), begin)
    now = begin
    for i in range(count):
        now += every
        waits.began(str(i), now)
    return waits, now


def test_the_queue_at_the_rate_at_which_requests_start() -> None:
    waits, now = started(10, 0.5, 20)
    assert waits.seconds(now) == pytest.approx(10, rel=0.05)
    waits.ended("25", now)
    assert waits.seconds(now) == pytest.approx(9.5, rel=0.05)


def test_nothing_is_said_where_nothing_is_known() -> None:
    waits = Waits()
    assert waits.seconds(5.0) == 0.0
    waits, now = started(2, 10.0, 50)
    assert waits.seconds(now) == 0.0


def test_nobody_waits_where_the_queue_is_empty() -> None:
    waits, now = started(10, 0.5, 0)
    assert waits.seconds(now) == 0.0


def test_an_idle_hour_does_not_count() -> None:
    waits, now = started(10, 0.5, 0)
    now += 3600
    for i in range(8):
        waits.arrived(f"new{i}", now)
    assert waits.seconds(now) == pytest.approx(4, rel=0.05)


def test_the_newest_counts_most() -> None:
    waits, now = started(100, 0.1, 30)
    for i in range(100, 110):
        now += 10
        waits.began(str(i), now)
    assert 90 < waits.seconds(now) < 20 * 10


def test_a_choice_that_goes_on_is_no_second_start() -> None:
    waits, now = started(4, 1.0, 4)
    before = waits.seconds(now)
    waits.began("0", now)
    waits.ended("0", now)
    assert waits.seconds(now) == before


def test_a_server_turns_away_who_would_wait_too_long(
    start_server: Callable[..., ServerProcess],
) -> None:
    server = start_server(device="null-100ms", plan={"max_sequences": 1}, max_wait=2.0)
    body = {
        "model": server.name,
        "prompt": [5],
        "max_tokens": 8,
        "ignore_eos": True,
        "stream": True,
    }
    with httpx.Client(base_url=server.url, timeout=60) as client:
        streams = [client.stream("POST", "/v1/completions", json=body) for _ in range(12)]

        def read(stream: object) -> None:
            with stream as answer:  # type: ignore[attr-defined]
                statuses.append(answer.status_code)
                answer.read()

        statuses: list[int] = []
        threads = [threading.Thread(target=read, args=(stream,)) for stream in streams]
        for thread in threads:
            thread.start()
        wait_until(lambda: len(statuses) >= 4, 30)
        refused = client.post("/v1/completions", json=body)
        for thread in threads:
            thread.join()
    assert statuses == [200] * 12
    assert refused.status_code == 429
    assert refused.json()["error"]["code"] == "queue_too_long"
    assert 1 <= int(refused.headers["retry-after"]) <= 20


def test_tenants_take_turns_so_one_with_many_holds_up_no_other() -> None:
    waits = Waits()
    for i in range(100):
        waits.arrived(f"bad {i}", 0.0, "bad")
    for i in range(10):
        waits.began(f"bad {i}", float(i))
    assert waits.seconds(9.0, "bad") > 50
    assert waits.seconds(9.0, "good") < 2
    waits.arrived("good", 9.0, "good")
    assert 1.5 < waits.seconds(9.0, "good") < 4
    for i in range(100):
        waits.ended(f"bad {i}", 10.0)
    waits.ended("good", 10.0)
    assert waits.seconds(10.0, "good") == 0
